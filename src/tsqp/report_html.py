"""A report as one HTML page: the picture as inline SVG, and the tables of ``tsqp analyze``.

The page loads nothing and runs nothing: no script, no reference to another file. All that comes from a log is escaped:
it is a file that somebody may have made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from .analyze import Analysis, Stats
from .analyze_rules import recommend
from .analyze_show import overall_figures
from .perf_read import Row

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; color: #222; background: #fff; max-width: 1280px; margin: 1.5em auto;
  padding: 0 1em }
svg { width: 100%; height: auto } h2 { margin: 1.6em 0 .4em; font-size: 1.15em }
.tables { display: flex; flex-wrap: wrap; gap: 0 2.5em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .15em .6em; text-align: right; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
th:first-child, td:first-child { text-align: left; padding-left: 0 } th { border-bottom: 2px solid #888 }
"""
_STATS = ("calls", "mean (ms)", "p50 (ms)", "p99 (ms)", "total (ms)", "share")
_CALLS = (
    "request",
    "method",
    "layer",
    "total (ms)",
    "recv (ms)",
    "compute (ms)",
    "sent (KB)",
    "received (KB)",
    "carrier",
)
_HEADER = ("transport", "model", "placement", "versions")
_BEFORE_SVG = re.compile(rb"^.*?(?=<svg\b)", re.DOTALL)
#: Layers in the table; a log may claim any number of them.
_MAX_ROWS = 500
#: Numbers from here on are written with an exponent.
_LONG = 1e15


def page(title: str, picture: bytes, found: Analysis) -> bytes:
    """The page, in UTF-8. ``picture`` is a whole SVG file made here, not one that came from elsewhere."""
    return "\n".join(_page(title, picture, found)).encode(errors="replace")


def _page(title: str, picture: bytes, found: Analysis) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    yield _BEFORE_SVG.sub(b"", picture, count=1).decode()
    yield '<div class="tables">'
    yield from _table("Overall", ("", ""), [*_of_logs(found), *_overall(found)])
    yield from _stats("Stages of a call", "stage", found.stages)
    yield from _stats("What Recv is made of", "part", found.recv_parts)
    yield from _stats("Calls by method", "method", found.methods)
    yield from _stats("Calls by layer", "layer", found.layers)
    yield from _table("Slowest calls", _CALLS, map(_call, found.slowest))
    yield from _table("Largest transfers", _CALLS, map(_call, found.largest))
    yield "</div><h2>What to try</h2><ul>"
    advice = [escape(str(one)) for one in recommend(found)] or ["no figure is over the limit of a rule"]
    yield from (f"<li>{one}</li>" for one in advice)
    yield "</ul></body></html>"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"<section><h2>{escape(title)}</h2><table>"
    if any(columns):
        yield "<tr>" + "".join(f"<th>{escape(column)}</th>" for column in columns) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    yield "</table></section>"


def _of_logs(found: Analysis) -> Iterator[tuple[str, str]]:
    for log in found.logs:
        yield "log", log.path
        yield from ((name, str(value)) for name, value in log.header.items() if name.lower() in _HEADER)
        if log.bad:
            yield "bad lines", f"{log.bad:,} left out, the first is line {log.bad_lines[0]}"
        if not log.complete:
            yield "incomplete", "no summary: the process was killed, is still running, or the disk was full"


def _overall(found: Analysis) -> Iterator[tuple[str, str]]:
    for name, value in overall_figures(found).items():
        yield name, value if isinstance(value, str) else _number(value)


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if value < _LONG else f"{value:.3g}"


def _stats(title: str, what: str, groups: Mapping[str, Stats]) -> Iterator[str]:
    rows = [
        (
            name,
            f"{stats.count:,}",
            *map(_number, (stats.mean_ms, stats.p50_ms, stats.p99_ms, stats.total_ms)),
            f"{100 * stats.share:.1f}%",
        )
        for name, stats in list(groups.items())[:_MAX_ROWS]
    ]
    if rows:
        yield from _table(title, (what, *_STATS), rows)


def _call(row: Row) -> tuple[str, ...]:
    numbers = (row.total_ms, row.recv_ms, row.compute_ms, row.sent_kb, row.recv_kb)
    cells = ["-" if number is None else _number(float(number)) for number in numbers]
    return str(row.id), row.method, "-" if row.layer is None else str(row.layer), *cells, row.carrier or "-"
