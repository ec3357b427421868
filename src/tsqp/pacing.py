"""How often the listener's thread wakes up for strangers: each time costs the clients that are served 0.1 ms of a core.

Pacing puts together what strangers cause, connections that come and go and messages of no client, and holds up nothing
else: whoever posts something to be sent ends the wait, and a wake-up that had a client's message is never followed by
one. What strangers may do is rationed (see ``rations``): one who is alone meets no wait.
"""

from __future__ import annotations

import select
import time

from .rations import Rations

#: How often a second, and how often at once, the thread may wake up for strangers alone.
WAKES_PER_S, WAKES_AT_ONCE = 50.0, 500.0


class Pace:
    """One thread's. ``wake_fd`` is readable where somebody has something for the thread to do."""

    def __init__(self, wake_fd: int) -> None:
        # Not select(): it knows no descriptors from 1024 on.
        self._called = select.poll()
        self._called.register(wake_fd, select.POLLIN)
        self._rations = Rations(WAKES_AT_ONCE, WAKES_PER_S)
        #: Set by whoever meets one, until the next :meth:`hold`.
        self.stranger = self.client = False

    def hold(self) -> None:
        """Called before the thread looks for work again: waits a little where strangers woke it too often."""
        alone = self.stranger and not self.client
        self.stranger = self.client = False
        if not alone:
            return
        if not self._rations.afford(None, 1.0, time.monotonic()):
            self._called.poll(1000 / WAKES_PER_S)


__all__ = ["WAKES_AT_ONCE", "WAKES_PER_S", "Pace"]
