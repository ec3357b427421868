"""A thread that sleeps until it is told to look again."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Waiter:
    """A thread that sleeps until its condition holds, or until it is its turn to read."""

    __slots__ = ("_gate", "_woken", "ready")

    def __init__(self, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self._gate = threading.Lock()
        self._gate.acquire()
        self._woken = False

    def wake(self) -> None:
        """Callers hold the table's lock."""
        if not self._woken:
            self._woken = True
            self._gate.release()

    def sleep(self, seconds: float | None) -> bool:
        """False if nobody woke it."""
        limit = threading.TIMEOUT_MAX if seconds is None else min(max(seconds, 0.0), threading.TIMEOUT_MAX)
        if not self._gate.acquire(timeout=limit):
            return False
        self._woken = False
        return True
