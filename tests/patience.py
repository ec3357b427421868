"""Waiting for what another thread or process does, and not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Far more than anything takes that works.
PATIENCE_S = 30.0


def until(
    condition: Callable[[], bool], what: str = "the condition never came true", within: float = PATIENCE_S
) -> None:
    """Waits for ``condition``; fails with ``what`` after ``within`` seconds."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)
