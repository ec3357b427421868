"""One client's share of the listener's ROUTER, which the listener's I/O thread owns; see :mod:`tsqp.links`."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from . import handshake as hs
from .errors import ClosedError, PeerDiedError, WaitTimeoutError
from .frames import multipart, slice_until, trackers
from .links import LargeMessage, check_process, cost


class ServerLink:
    """One client's share of the listener's ROUTER. Filled and emptied by the listener's I/O thread."""

    def __init__(
        self,
        identity: bytes,
        post: Callable[[ServerLink, list[Any]], None],
        max_inbox_bytes: int,
        max_inbox_messages: int,
    ) -> None:
        self.identity = identity
        self._pid = os.getpid()
        self.reason: str | None = None
        self.said_bye = False
        self.on_event: Callable[[], None] = lambda: None
        self._post = post
        self._max_inbox_bytes, self._max_inbox_messages = max_inbox_bytes, max_inbox_messages
        self._inbox: deque[LargeMessage] = deque()
        self._inbox_bytes = 0
        self._last = -1  # the sequence number that came last
        # The lock itself is what is entered: a condition's way in runs Python code, and Ctrl-C there would leave it
        # locked, for the I/O thread too.
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._unsent: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._counting = threading.Lock()  # one thread may ask for room while another sends
        self._posted = self._posted_and_sent = 0  # bytes; each counted by one thread
        self._closed = False

    # -- called by the I/O thread --

    def sent(self, parts: list[Any]) -> None:
        """libzmq took a message of :meth:`post`."""
        self._posted_and_sent += sum(len(part) for part in parts)

    def deliver(self, message: LargeMessage) -> str | None:
        """Queues an arrived message; or says why the client is to be cut off."""
        nbytes = cost(message)
        if message[0] <= self._last:
            return f"message {message[0]} came after message {self._last}"
        self._last = message[0]
        with self._lock:
            if self._inbox_bytes + nbytes > self._max_inbox_bytes:
                return f"more than {self._max_inbox_bytes} bytes of unread messages were under way"
            if len(self._inbox) >= self._max_inbox_messages:
                return f"more than {self._max_inbox_messages} unread messages were under way"
            if not self._closed:
                self._inbox.append(message)
                self._inbox_bytes += nbytes
            self._arrived.notify_all()
        self.on_event()
        return None

    def end(self, reason: str | None) -> None:
        """The connection is over: by a goodbye (None) or by death."""
        with self._lock:
            if reason is None:
                self.said_bye = True
            elif self.reason is None and not self.said_bye:
                self.reason = reason
            self._arrived.notify_all()
        self.on_event()

    # -- called by the channel --

    def post(self, head: bytes, frames: Sequence[Any], sequence: int, deadline: float) -> zmq.MessageTracker:
        self._await_room(deadline)
        parts = multipart([self.identity, hs.envelope(hs.MESSAGE, sequence)], head, frames)
        tracker = trackers(parts)
        with self._counting:
            self._unsent.append((tracker, sum(len(frame) for frame in frames)))
        self._posted += sum(len(part) for part in parts)
        self._post(self, parts)  # emptied there once sent
        return tracker

    def _await_room(self, deadline: float) -> None:
        """A client that takes nothing must not make the listener's queue grow without end."""
        self._check_peer()
        while not self.can_send():
            if time.monotonic() >= deadline:
                raise WaitTimeoutError("the client takes no more large messages; wait longer or look at the client")
            time.sleep(0.001)
            self._check_peer()

    def recv(self, deadline: float) -> LargeMessage | None:
        with self._lock:
            if not self.wait(deadline):
                return None
            message = self._inbox.popleft()
            self._inbox_bytes -= cost(message)
            return message

    def wait(self, deadline: float) -> bool:
        with self._lock:
            while not self._inbox:
                self._check_peer()
                if time.monotonic() >= deadline:
                    return False
                self._arrived.wait(slice_until(deadline))
            return True

    def _check_peer(self) -> None:
        check_process(self._pid)
        if self._closed:
            raise ClosedError("this channel is closed; accept a new one")
        if self.reason:
            raise PeerDiedError(f"the client died: {self.reason}")
        if self.said_bye:
            raise ClosedError("the client closed the connection")

    @property
    def unread(self) -> int:
        return len(self._inbox)

    def pending(self) -> bool:
        return bool(self._inbox) or self.said_bye

    def dead(self) -> str | None:
        return self.reason

    def can_send(self) -> bool:
        """False while the client leaves too much unread: reading its next request would only grow the queue."""
        with self._counting:
            while self._unsent and self._unsent[0][0].done:
                self._unsent.popleft()
            borrowed = sum(nbytes for _, nbytes in self._unsent)
        return max(borrowed, self._posted - self._posted_and_sent) <= self._max_inbox_bytes

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._inbox.clear()
            self._arrived.notify_all()
        if not self.reason:
            self._post(self, [self.identity, hs.envelope(hs.BYE)])
