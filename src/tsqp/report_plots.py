"""A picture of performance logs in one file: ``tsqp analyze --plot report.png``, ``.svg`` or ``.html``.

Needs matplotlib (``pip install 'tsqp[plot]'``). Logs of a million calls are drawn in bounded time and size: bars,
medians and histogram are of all calls, points and timeline of some (:mod:`tsqp.report_data`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .analyze import Analysis
from .errors import ConfigError
from .perf_read import Log
from .report_data import report_of
from .report_figures import draw, need_matplotlib
from .report_files import write_report

KINDS = ("png", "svg", "html")


def check_plot(path: str) -> str:
    """``png``, ``svg`` or ``html``: what ``path`` ends in. Raises :class:`ConfigError` for another ending, and where
    matplotlib is not installed; called before logs are read.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise ConfigError(f"--plot {path} ends in none of .png, .svg and .html; give one of these endings")
    need_matplotlib()
    return kind


def save_plot(logs: Sequence[Log], analysis: Analysis, path: str, forward: int | None = None) -> None:
    """Writes the picture of ``logs``; a page has the figures of ``analysis`` below it.

    ``forward``: whose timeline is shown; None: the median decode step's. Raises :class:`ConfigError`.
    """
    kind = check_plot(path)
    report = report_of(logs, forward)
    if kind == "html":
        from .report_html import page

        content = page(report.title, draw(report, "svg"), analysis)
    else:
        content = draw(report, kind)
    write_report("--plot", path, [content])
