"""Tables of text: shown with rich to somebody at a terminal, or plainly where as little as possible is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable


class Table:
    """A title, columns and rows. ``str()`` of it is plain text; importing this module does not load rich."""

    def __init__(self, title: str, show_header: bool = True) -> None:
        self.title, self.show_header = title, show_header
        self._columns: list[tuple[str, bool]] = []
        self._rows: list[tuple[str, ...]] = []

    def add_column(self, name: str, right: bool = False) -> None:
        """``right``: its cells stand at the right edge, as numbers do."""
        self._columns.append((name, right))

    def add_row(self, *cells: str) -> None:
        """One cell a column; a table without columns takes any number."""
        self._rows.append(cells)

    def as_rich(self) -> RichTable:
        """The same for rich's console."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, show_header=self.show_header, title_justify="left")
        for name, right in self._columns:
            table.add_column(name, justify="right" if right else "left")
        for row in self._rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        lines = [*([tuple(name for name, _ in self._columns)] if self.show_header else []), *self._rows]
        if not lines:
            return self.title
        widths = [max(len(row[place]) for row in lines) for place in range(len(lines[0]))]
        rights = [right for _, right in self._columns] or [False] * len(widths)
        shown = (
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, rights, strict=True)
            )
            for row in lines
        )
        return "\n".join([self.title, *(f"  {line.rstrip()}" for line in shown)])
