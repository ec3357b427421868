"""What other processes take of the machine while something is measured, and a wait until they leave it alone."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from . import usage

#: Others that take less of a core than this do not count.
QUIET = 0.2
_LOOK_S = 0.1


def busy_s() -> float:
    """CPU time of everything on this machine since it started, time a hypervisor took from it included."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return float(sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


class Others:
    """What other processes take of the machine."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._begin = self._now()

    def _now(self) -> tuple[float, float]:
        return time.monotonic(), busy_s() - sum(usage.cpu_ns(pid) for pid in self._pids) / 1e9

    def share(self) -> float:
        """Of one core, since this object was made."""
        (then, before), (now, after) = self._begin, self._now()
        return (after - before) / (now - then)


def wait_for_quiet(patience_s: float) -> None:
    """Returns when other processes leave the machine alone, or after `patience_s`."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        others = Others((os.getpid(),))
        time.sleep(_LOOK_S)
        if others.share() < QUIET:
            return
