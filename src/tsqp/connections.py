"""The connections that libzmq has accepted: who is at the other end, how long each may stay, and how one is ended.

libzmq has no call that ends one peer's connection. It is ended from below: its descriptor is shut down, which libzmq
sees as the peer's leaving. A descriptor's number may have gone to another socket meanwhile, so a connection is known
by its socket's inode, looked at through a duplicate that can't change hands any more.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .descriptors import EXHAUSTED
from .peer_uid import credentials
from .rations import Rations

#: Connections of no client, at most: of more, the oldest of whoever has most are ended, those first that are to go
#: anyway, then those that have not said what they are.
MAX_STRANGERS = 64
#: The same while few descriptors are left.
FEW_STRANGERS = 8
#: How many connections of one process may come to nothing, at once and per second after that: no client was made of
#: them, or one that was cut off. Each costs the clients that are served 0.3 ms of a core; more are ended as they come.
IN_VAIN, IN_VAIN_PER_S = 50.0, 10.0
LEAVING, SILENT, WAITING = range(3)
T = TypeVar("T")

#: Who is at the other end: ("process", pid) on a Unix socket, ("address", text) over TCP, ("key", text) where the
#: connection is authenticated. What peers share among them is shared by these.
Peer = tuple[str, Any]
NOBODY: Peer = ("unknown", "")


def oldest_of_most(candidates: Iterable[T], peer_of: Callable[[T], Peer]) -> T | None:
    """Of candidates in the order of their coming, the first one of the peer that has most of them."""
    found = list(candidates)
    if not found:
        return None
    counts = Counter(map(peer_of, found))
    most = max(counts.values())
    return next(each for each in found if counts[peer_of(each)] == most)


class Connection:
    """One accepted connection. It is ended at ``deadline`` (time.monotonic seconds; None: it is a client's)."""

    __slots__ = ("deadline", "fd", "identity", "in_vain", "inode", "peer", "state")

    def __init__(self, fd: int, inode: int, peer: Peer, deadline: float) -> None:
        self.fd, self.inode, self.peer = fd, inode, peer
        self.deadline: float | None = deadline
        self.state = SILENT
        self.in_vain = True  # so far
        self.identity: bytes | None = None  # once it has spoken


class Connections:
    """All of a listener's connections by descriptor; one thread's.

    ``rationed``: those of one process that come to nothing are. Not where clients have keys: who has none gets no
    further than libzmq then, and whose connection is ended in its handshake would take the server for another one.
    """

    def __init__(self, rationed: bool = True) -> None:
        self._open: dict[int, Connection] = {}
        self._in_vain = Rations(IN_VAIN if rationed else math.inf, IN_VAIN_PER_S)

    def __len__(self) -> int:
        return len(self._open)

    def accepted(self, fd: int, deadline: float, ended: Callable[[int], bool]) -> None:
        """libzmq has accepted a connection, or at least had: its end may be reported already, which ``ended`` tells of
        a descriptor that may be somebody else's by now.

        Of a process of which too many came to nothing it is ended at once. An address is not blamed: others share it.
        """
        if ended(fd):
            return
        with contextlib.suppress(OSError):
            made = Connection(fd, os.fstat(fd).st_ino, _peer(fd), deadline)
            if ended(fd):
                return  # and that may have been looked at
            self._open[fd] = made
            if self._in_vain.left(made.peer, time.monotonic()) < 1.0:
                self._cut(made)

    def ended(self, fd: int) -> None:
        """libzmq has reported the connection's end."""
        found = self._open.pop(fd, None)
        if found is not None and found.in_vain and found.peer[0] == "process":
            self._in_vain.afford(found.peer, 1.0, time.monotonic())  # no more on its account than it may

    def spoke(self, fd: int, identity: bytes, key: str, deadline: float) -> Peer:
        """The connection has said what it is, and has an answer by ``deadline``; ``key`` is who it was authenticated
        as, or empty. Returns its peer."""
        found = self._open.get(fd)
        if found is None:
            return NOBODY
        found.state, found.deadline, found.identity = WAITING, deadline, identity
        if key:
            found.peer = ("key", key)
        return found.peer

    def keep(self, fd: int, identity: bytes) -> None:
        """The connection is a client's."""
        found = self._open.get(fd)
        if found is not None:
            found.deadline, found.in_vain, found.identity = None, False, identity

    def end_at(self, fd: int, identity: bytes, deadline: float, in_vain: bool = False) -> None:
        """The connection is to go; at ``deadline`` it is ended if it is still there. ``in_vain``: for its own fault.

        Nothing is done where the descriptor belongs to somebody else by now, who has said hello by another identity, or
        nothing yet: what `identity` said, it said over an earlier connection.
        """
        found = self._open.get(fd)
        if found is not None and found.identity == identity:
            found.deadline, found.state = deadline, LEAVING
            found.in_vain |= in_vain

    def claim(self, fd: int, identity: bytes) -> None:
        """Whoever has this identity, and is there, is who has the descriptor, if that has said nothing so far."""
        found = self._open.get(fd)
        if found is not None and found.identity is None:
            found.identity = identity

    def heeded(self, fd: int) -> bool:
        """False where the connection is to go, or is gone: what it still says counts no more."""
        found = self._open.get(fd)
        return found is not None and found.state != LEAVING

    def look(self, now: float, scarce: bool = False) -> None:
        """Ends what is due, and of too many connections those that are least worth; ``scarce``: few descriptors are
        left."""
        self._in_vain.forget(now)
        most = FEW_STRANGERS if scarce else MAX_STRANGERS
        strangers: list[Connection] = []
        due: list[Connection] = []
        for each in self._open.values():
            if each.deadline is not None:
                (strangers if each.deadline >= now else due).append(each)
        for connection in due:
            self._cut(connection)
        if len(strangers) > most:
            for connection in _least_worth(strangers)[: len(strangers) - most]:
                self._cut(connection)

    def _cut(self, connection: Connection) -> None:
        """Ends a connection for both ends. libzmq reports it as any other end."""
        try:
            with _duplicate(connection.fd) as sock:
                if os.fstat(sock.fileno()).st_ino == connection.inode:
                    sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno in EXHAUSTED:
                return  # the next look tries again
        self.ended(connection.fd)  # or it has by itself


def _least_worth(connections: list[Connection]) -> list[Connection]:
    """The connections, those first that can best be spared: of a state, the oldest of whoever has most."""
    counts: Counter[tuple[int, Peer]] = Counter()
    ranked = []
    for age, connection in enumerate(reversed(connections)):
        key = connection.state, connection.peer
        ranked.append((connection.state, -counts[key], -age, connection))  # how many of its peer's are newer
        counts[key] += 1
    return [connection for *_, connection in sorted(ranked, key=lambda each: each[:3])]


def _duplicate(fd: int) -> socket.socket:
    """A duplicate of a connection's descriptor. OSError where that is closed, or something else's by now."""
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _peer(fd: int) -> Peer:
    """Who is at the other end; nobody known where there is no descriptor left to ask with. OSError: nobody is."""
    try:
        asked = _duplicate(fd)
    except OSError as error:
        if error.errno in EXHAUSTED:
            return NOBODY
        raise
    with asked as sock:
        if sock.family == socket.AF_UNIX:
            return "process", credentials(sock)[0]
        return "address", sock.getpeername()[0]
