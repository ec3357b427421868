"""What libzmq says of a socket's connections (zmq_socket_monitor(3))."""

from __future__ import annotations

import struct
from collections import Counter, deque

import zmq

#: The first frame of an event: which, and its value, a descriptor mostly.
_EVENT = struct.Struct("=Hi")


def next_event(monitor: zmq.Socket[bytes]) -> tuple[int, int] | None:
    """The next event and its value, or None where there is none now. pyzmq's own reader looks names up for both, which
    costs more than all the rest."""
    try:
        head, _ = monitor.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
    event, value = _EVENT.unpack(head)
    return event, value


class Events:
    """A monitor's events in their order, with a look ahead: an event may be old when it is taken, and its descriptor
    another connection's."""

    def __init__(self, monitor: zmq.Socket[bytes]) -> None:
        self._monitor = monitor
        self._ahead: deque[tuple[int, int]] = deque()
        self._ends: Counter[int] = Counter()  # of those ahead, by descriptor

    def next(self) -> tuple[int, int] | None:
        """The next event and its value, or None."""
        self._look()
        if not self._ahead:
            return None
        event, value = self._ahead.popleft()
        if event == zmq.EVENT_DISCONNECTED:
            self._ends[value] -= 1
            if not self._ends[value]:
                del self._ends[value]
        return event, value

    def ended(self, fd: int) -> bool:
        """Whether the connection that has this descriptor, as of the last event taken, is no more. libzmq says so
        before it closes the descriptor: what was seen of a descriptor before this call, and False, was seen of that
        connection."""
        self._look()
        return fd in self._ends

    def _look(self) -> None:
        while (found := next_event(self._monitor)) is not None:
            self._ahead.append(found)
            if found[0] == zmq.EVENT_DISCONNECTED:
                self._ends[found[1]] += 1
