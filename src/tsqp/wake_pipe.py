"""A pipe that wakes a thread which polls descriptors; any thread may ring it."""

from __future__ import annotations

import contextlib
import os
import threading


class WakePipe:
    """``fd`` is readable from a :meth:`ring` on until :meth:`drain`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may ring where its thread does
        self.fd, self._writes = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._writes, False)

    def ring(self) -> None:
        """Wakes the thread; does nothing after :meth:`close`."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._writes >= 0:  # else the descriptor may be somebody else's
                os.write(self._writes, b"x")

    def drain(self) -> None:
        """Forgets all rings so far."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 4096):
                pass

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._writes >= 0:
                os.close(self.fd)
                os.close(self._writes)
                self.fd = self._writes = -1
