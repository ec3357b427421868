"""The files that ``tsqp analyze`` writes: checked before logs are read, written, and named on the standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from .analyze import Analysis
    from .perf_read import Log

WriteFiles = Callable[["Sequence[Log]", "Analysis"], None]


def report_files(plot: str | None, trace: str | None, forward: int | None, compare: bool) -> WriteFiles:
    """What writes the files of the options. Raises :class:`ConfigError` where they can't be had."""
    if compare and (plot or trace):
        raise ConfigError("--compare makes neither --plot nor --trace; leave it out, and give one log")
    if forward is not None and plot is None:
        raise ConfigError("--forward says what --plot draws; give --plot too, or leave it out")
    if plot is not None:
        from .report_plots import check_plot

        check_plot(plot)

    def write(logs: Sequence[Log], found: Analysis) -> None:
        for path in filter(None, (plot, trace)):
            if any(_same_file(path, log.path) for log in logs):
                raise ConfigError(f"{path} is a log that is read; give another path to write to")
        if plot is not None:
            from .report_plots import save_plot

            save_plot(logs, found, plot, forward)
            print(f"wrote {plot}", file=sys.stderr)
        if trace is not None:
            from .report_trace import MAX_CALLS, save_trace

            count, left_out = save_trace(logs, trace)
            more = f", without {left_out:,} (at most {MAX_CALLS:,} with a Start)" if left_out else ""
            print(f"wrote {trace}: {count:,} calls{more}; open it in ui.perfetto.dev", file=sys.stderr)

    return write


def _same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False  # it does not exist yet


def write_report(option: str, path: str, parts: Iterable[bytes]) -> None:
    """Writes ``parts`` to ``path``. Raises :class:`ConfigError` naming ``option`` where that can't be done."""
    try:
        with Path(path).open("wb") as file:
            file.writelines(parts)
    except OSError as error:
        raise ConfigError(f"{option} {path} can't be written: {error.strerror}; give a path that can be") from error
