"""Durations, numbers as text, and tables over sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

NOTHING = "-"


@dataclass
class Samples:
    """Durations in nanoseconds; those of one turn after the other where turns were begun."""

    ns: list[int] = field(default_factory=list)
    _turns: list[int] = field(default_factory=list)

    def turn(self) -> list[int]:
        """Begins a turn; what is added to the list from now on is its own."""
        self._turns.append(len(self.ns))
        return self.ns

    def turns(self) -> list[Samples]:
        """The durations of each turn."""
        ends = [*self._turns[1:], len(self.ns)]
        return [Samples(self.ns[begin:end]) for begin, end in zip(self._turns, ends, strict=True) if end > begin]

    def quantile_us(self, share: float) -> float:
        """Nearest-rank quantile in microseconds."""
        ordered = sorted(self.ns)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] / 1000

    @property
    def median_us(self) -> float:
        return self.quantile_us(0.5)

    @property
    def p99_us(self) -> float:
        return self.quantile_us(0.99)

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "median_us": round(self.median_us, 3),
            "p99_us": round(self.p99_us, 3),
            "max_us": round(max(self.ns) / 1000, 3),
            "count": len(self.ns),
        }
        if self._turns:
            found["rounds"] = {"median_us": [round(turn.median_us, 3) for turn in self.turns()]}
        return found


def size_text(nbytes: int) -> str:
    """64 -> '64 B', 1024 -> '1 KB', 5 << 20 -> '5 MB'."""
    for unit, factor in (("MB", 1 << 20), ("KB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:g} {unit}"
    return f"{nbytes} B"


def number_of(count: int, unit: str) -> str:
    """'1 layer', '2 layers'."""
    return f"{count} {unit}{'' if count == 1 else 's'}"


def figure(value: float) -> str:
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def show(table: Table, console: Console) -> None:
    """The title on a line of its own: in the table it is broken to the table's width."""
    title, table.title = table.title, None
    console.print(f"\n[bold]{title}[/bold]", highlight=False)
    console.print(table)


def _table(result: dict[str, Any], title: str, text: Callable[[str, str], str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for nbytes in result["sizes_bytes"]:
        table.add_column(size_text(nbytes), justify="right")
    for key, title_of_peer in result["titles"].items():
        table.add_row(title_of_peer, *(text(key, str(nbytes)) for nbytes in result["sizes_bytes"]))
    return table


def cell_table(result: dict[str, Any], title: str, name: str) -> Table:
    """One figure of every cell: a row for each peer, a column for each size."""

    def text(key: str, nbytes: str) -> str:
        value = result["cells"][key].get(nbytes, {}).get(name)
        return NOTHING if value is None else figure(value)

    return _table(result, title, text)


def ratio_table(result: dict[str, Any], base: str) -> Table:
    """The medians as multiples of the peer `base`."""

    def text(key: str, nbytes: str) -> str:
        ratio = median_ratio(result, key, base, nbytes)
        return NOTHING if ratio is None else figure(ratio)

    return _table(result, f"Medians as multiples of: {result['titles'][base]}", text)


def median_us(result: dict[str, Any], key: str, nbytes: int | str) -> float | None:
    """The median echo of a peer at a size, None where it was not measured."""
    cell = result["cells"].get(key, {}).get(str(nbytes))
    return None if cell is None else cell["median_us"]


def median_ratio(result: dict[str, Any], key: str, base: str, nbytes: int | str) -> float | None:
    """One peer's median as a multiple of another's, None where one is missing."""
    mine, theirs = median_us(result, key, nbytes), median_us(result, base, nbytes)
    return None if mine is None or not theirs else mine / theirs
