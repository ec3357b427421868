"""An :class:`~tsqp.analyze.Analysis`, or two compared, as tables, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .analyze import Analysis, Change, Stats, analyze, compare
from .analyze_rules import recommend
from .perf_read import Log, Row

_STATS = ("count", "mean (ms)", "p50 (ms)", "p99 (ms)", "total (ms)", "share")
_SECTIONS = (
    ("time by stage", "stage", "stages"),
    ("what Recv is made of", "part of Recv", "recv_parts"),
    ("calls by method", "method", "methods"),
    ("calls by layer", "layer", "layers"),
)


def print_figures(found: Analysis, kind: str) -> None:
    """Prints the figures of logs as ``tables``, ``json`` or ``csv``."""
    if kind == "json":
        print(json.dumps(as_json(found)))
    elif kind == "csv":
        print(as_csv(found), end="")
    else:
        _wide().print(tables(found))


def print_comparison(before: Log, after: Log, kind: str) -> None:
    """Prints two logs beside each other, as above."""
    one, other = analyze([before]), analyze([after])
    changes = compare(one, other)
    if kind == "json":
        print(json.dumps(comparison_as_json(one, other, changes)))
    elif kind == "csv":
        print(comparison_as_csv(changes), end="")
    else:
        _wide().print(comparison_table(changes))


def _wide() -> Console:
    """The standard output; one that is no terminal is wide enough for every table."""
    return Console() if sys.stdout.isatty() else Console(width=160)


# --- tables -------------------------------------------------------------------------------------------------


def tables(found: Analysis) -> Group:
    """Everything, for rich to print."""
    parts: list[Any] = [_overall(found)]
    parts += [
        _stats_table(*section[:2], getattr(found, section[2])) for section in _SECTIONS if getattr(found, section[2])
    ]
    parts += [_calls("slowest calls", found.slowest), _calls("largest transfers", found.largest)]
    parts.append(Text("recommendations"))
    advice = recommend(found)
    parts += [Text(f"  - {one}") for one in advice] or [Text("  none: no figure is over the limit of a rule")]
    return Group(*parts)


def _overall(found: Analysis) -> Table:
    table = Table(title="overall", show_header=False, title_justify="left")
    for log in found.logs:
        table.add_row("log", Text(log.path))
        for name, value in log.header.items():
            if name.lower() in ("transport", "model", "placement", "versions"):
                table.add_row(f"  {name}", Text(str(value)))
        if log.bad:
            table.add_row("  bad lines", f"{log.bad} left out, the first is line {log.bad_lines[0]}")
        if not log.complete:
            table.add_row("  incomplete", "no summary: the process was killed, is still running, or the disk was full")
    for name, value in overall_figures(found).items():
        table.add_row(
            name, value if isinstance(value, str) else f"{value:g}" if value == int(value) else f"{value:.3f}"
        )
    return table


def overall_figures(found: Analysis) -> dict[str, Any]:
    """The figures of the whole, by names that hold their units."""
    total = found.total
    figures: dict[str, Any] = {
        "round trips": total.count,
        "errors": found.errors,
        "time in calls (ms)": total.total_ms,
        "mean per call (ms)": total.mean_ms,
        "p50 per call (ms)": total.p50_ms,
        "p99 per call (ms)": total.p99_ms,
        "sent (KB)": found.sent_kb,
        "received (KB)": found.recv_kb,
        "throughput (MB/s)": found.throughput_mb_s,
    }
    if found.elapsed_ms is not None:
        figures["elapsed (ms)"] = found.elapsed_ms
    for carrier, kb in sorted(found.carried_kb.items()):
        figures[f"carried by {carrier} (KB)"] = kb
    if found.tokens is not None:
        about = ", estimated" if found.tokens.estimated else ""
        figures["tokens (forwards)"] = found.tokens.count
        figures[f"round trips per token{about}"] = found.tokens.round_trips
        figures[f"time in calls per token{about} (ms)"] = found.tokens.ms
    return figures


def _right(title: str, *columns: str) -> Table:
    """A table whose first column is left-aligned."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _stats_table(title: str, what: str, groups: Mapping[str, Stats]) -> Table:
    table = _right(title, what, *_STATS)
    for name, stats in groups.items():
        times = (stats.mean_ms, stats.p50_ms, stats.p99_ms, stats.total_ms)
        table.add_row(Text(name), str(stats.count), *(f"{ms:.3f}" for ms in times), f"{100 * stats.share:.1f}%")
    return table


def _calls(title: str, rows: Sequence[Row]) -> Table:
    columns = ("ID", "method", "layer", "total", "recv", "compute", "sent KB", "recv KB", "carrier")
    table = _right(f"{title} (times in ms)", *columns)
    for row in rows:
        table.add_row(
            str(row.id),
            Text(row.method),
            _or_dash(row.layer),
            f"{row.total_ms:.3f}",
            f"{row.recv_ms:.3f}",
            _or_dash(row.compute_ms, 3),
            f"{row.sent_kb:.1f}",
            f"{row.recv_kb:.1f}",
            row.carrier or "-",
        )
    return table


def _or_dash(value: float | None, decimals: int = 0) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def comparison_table(changes: Sequence[Change]) -> Table:
    """Before, after and their ratio."""
    table = _right("before and after", "", "before", "after", "after / before")
    for change in changes:
        unit = f" ({change.unit})" if change.unit else ""
        cells = (_or_dash(change.before, 3), _or_dash(change.after, 3), _or_dash(change.ratio, 3))
        table.add_row(Text(change.name + unit), *cells)
    return table


# --- for programs -------------------------------------------------------------------------------------------


def as_json(found: Analysis) -> dict[str, Any]:
    """Everything as plain data: ms, KB, shares from 0 to 1."""
    return {
        "logs": [
            {
                "path": log.path,
                "format": log.format,
                "rows": len(log.rows),
                "bad_lines": log.bad,
                "complete": log.complete,
                "header": log.header,
            }
            for log in found.logs
        ],
        "overall": overall_figures(found),
        **{key: {name: asdict(stats) for name, stats in getattr(found, key).items()} for _, _, key in _SECTIONS},
        "slowest": [row._asdict() for row in found.slowest],
        "largest": [row._asdict() for row in found.largest],
        "recommendations": [asdict(one) for one in recommend(found)],
    }


def comparison_as_json(before: Analysis, after: Analysis, changes: Sequence[Change]) -> dict[str, Any]:
    """The comparison as plain data."""
    return {
        "before": [log.path for log in before.logs],
        "after": [log.path for log in after.logs],
        "changes": [{**asdict(change), "ratio": change.ratio} for change in changes],
    }


def as_csv(found: Analysis) -> str:
    """One line per figure or group: section, name, and the columns of :class:`~tsqp.analyze.Stats` or one value."""
    return _csv(("section", "name", "value", *Stats.__dataclass_fields__), _csv_rows(found))


def _csv_rows(found: Analysis) -> Iterator[Sequence[Any]]:
    for name, value in overall_figures(found).items():
        yield ("overall", name, value)
    yield ("overall", "bad lines", found.bad)
    for _, what, key in _SECTIONS:
        for name, stats in getattr(found, key).items():
            yield (what, name, "", *asdict(stats).values())
    for kind, rows in (("slowest", found.slowest), ("largest", found.largest)):
        for row in rows:
            yield (kind, f"{row.id} {row.method}", row.kb if kind == "largest" else row.total_ms)
    for one in recommend(found):
        yield ("recommendation", str(one), one.figure)


def comparison_as_csv(changes: Sequence[Change]) -> str:
    """One line per figure."""
    rows = ((change.name, change.unit, change.before, change.after, change.ratio) for change in changes)
    return _csv(("name", "unit", "before", "after", "ratio"), rows)


def _csv(titles: Sequence[str], rows: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(titles)
    for row in rows:
        writer.writerow([*row, *[""] * (len(titles) - len(row))])
    return text.getvalue()
