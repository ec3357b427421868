"""The ZeroMQ side of one channel: the control connection, and the carrier of large messages.

A link sends and receives ``(sequence, head, frames)`` and knows whether the peer is still connected. The client
owns a DEALER socket; the server's links (:mod:`tsqp.server_link`) share the listener's ROUTER.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import zmq

from . import descriptors
from . import handshake as hs
from .binding import check_permission
from .curve import ClientKeys
from .errors import ClosedError, PeerDiedError, ProtocolError, RingUsageError, WaitTimeoutError
from .frames import SLICE_S, multipart, received, slice_until, trackers
from .greeting import EVENTS, Greeting
from .monitor import next_event
from .wake_pipe import WakePipe

#: One frame of a peer may not be larger; libzmq drops a connection that tries.
MAX_FRAME_BYTES = 4 << 30
#: Handshakes pass, whatever the limit on messages is.
MIN_FRAME_LIMIT = 4 << 20
#: How long a close waits for a server that does not take what was sent.
_FAREWELL_MS = 2000
#: What a message costs beside its bytes; without it a peer could fill the memory with empty ones.
_MESSAGE_BYTES = 1 << 10
#: What the client takes from libzmq ahead of its reader, in messages; the rest waits there and then at the server.
_MAX_INBOX = 1000
#: What libzmq takes ahead of that; it knows no limit in bytes.
_LIBZMQ_AHEAD = 64

LargeMessage = tuple[int, Any, list[Any]]


class Link(Protocol):
    """What a channel needs of its ZeroMQ side."""

    def post(self, head: bytes, frames: Sequence[Any], sequence: int, deadline: float) -> zmq.MessageTracker:
        """Gives one message to ZeroMQ; returns what tells when the frames' memory is not needed any more. Where it
        raises nothing was sent."""

    def recv(self, deadline: float) -> LargeMessage | None:
        """The next message, or None when `deadline` (time.monotonic seconds) passed."""

    def wait(self, deadline: float) -> bool:
        """True once there is a message to receive, False when `deadline` passed; raises like :meth:`recv`."""

    def pending(self) -> bool: ...
    @property
    def unread(self) -> int:
        """How many messages have arrived and were not received."""

    def dead(self) -> str | None: ...
    def can_send(self) -> bool: ...
    def close(self) -> None: ...


def frame_limit(max_message_bytes: int) -> int:
    """The largest frame libzmq lets in: it allocates what a frame claims."""
    return max(MIN_FRAME_LIMIT, min(MAX_FRAME_BYTES, max_message_bytes))


def check_process(pid: int) -> None:
    """Sockets belong to the process that made them: in a forked child even looking at one may hang."""
    if os.getpid() != pid:
        raise RingUsageError("this channel was inherited by fork; connect anew in the child")


def cost(message: LargeMessage) -> int:
    """Bytes of memory a queued message takes."""
    return _MESSAGE_BYTES + len(message[1]) + sum(len(frame) for frame in message[2])


class ClientLink:
    """The client's DEALER socket. One lock: the calling threads use the socket themselves, there is no I/O thread.

    A ZeroMQ socket must not even be polled by a second thread, so waiting is done on its descriptor; whoever uses
    the socket meanwhile may swallow the descriptor's edge, takes what came, and wakes the waiter by a pipe.
    """

    def __init__(
        self, endpoint: str, max_message_bytes: int, max_inbox_bytes: int, keys: ClientKeys | None = None
    ) -> None:
        check_permission(endpoint)
        descriptors.require(descriptors.CONNECTING, f"connect to {endpoint}")
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, frame_limit(max_message_bytes))
        self._socket.setsockopt(zmq.RCVHWM, _LIBZMQ_AHEAD)
        self._socket.setsockopt(zmq.IPV6, ":" in endpoint.partition("://")[2].rpartition(":")[0])
        if keys is not None:
            keys.apply(self._socket)
        self._greeting = Greeting(endpoint, keys is not None)
        self._monitor = self._socket.get_monitor_socket(EVENTS)
        self._connected = False
        self._reason: str | None = None
        self._said_bye = False
        self._why = ""  # the server's reason for that
        self._max_inbox_bytes = max_inbox_bytes
        self._inbox: deque[LargeMessage] = deque()
        self._inbox_bytes = 0
        self._closed = False
        self._cut = False
        self._waiting = 0
        self._nobody_waits = threading.Condition(self._lock)
        self._pipe = WakePipe()
        self._descriptors = (int(self._socket.getsockopt(zmq.FD)), int(self._monitor.getsockopt(zmq.FD)), self._pipe.fd)
        # Dropped without a close, perhaps in a cycle: the garbage collector may finalise the context before its
        # sockets, and pyzmq's context would then wait for them for ever.
        self._sockets = self._socket, self._monitor, self._pipe
        self._finalizer = weakref.finalize(self, _give_back, self._pid, self._context, *self._sockets)
        self._finalizer.atexit = False  # what is open then is closed as it should be
        self._socket.connect(endpoint)

    def meet(self, deadline: float) -> str | None:
        """Waits for a server that is one to talk to, before anything is said; returns None, or at `deadline` what is
        known of why there is none, perhaps nothing. Raises AuthenticationError."""
        while True:
            self.dead()
            if self._connected:
                return None
            if self._greeting.error is not None:
                raise self._greeting.error
            seconds = slice_until(deadline)
            if not seconds:
                return self._greeting.hint
            self._monitor.poll(int(seconds * 1000) or 1)

    def say(self, kind: int, body: bytes) -> None:
        """Sends a handshake message; :meth:`hear` tells if the server was gone."""
        with self._lock, contextlib.suppress(zmq.Again):
            self._socket.send_multipart([hs.envelope(kind), body], flags=zmq.NOBLOCK)

    def hear(self, deadline: float) -> tuple[int, bytes] | None:
        """The next handshake message, or None at `deadline`. Raises PeerDiedError once the server that took our
        hello is gone: one that comes after it knows nothing of us."""
        while True:
            reason = self.dead()  # before the look for what it said: that counts even so
            if self._socket.poll(int(slice_until(deadline) * 1000)):
                parts = self._socket.recv_multipart()
                kind, _ = hs.open_envelope(parts[0])
                if len(parts) != 2:
                    raise ProtocolError("a handshake message has two frames; the peer speaks something else")
                return kind, parts[1]
            if reason:
                raise PeerDiedError(f"the server died during the handshake: {reason}; connect again")
            if time.monotonic() >= deadline:
                return None

    def post(self, head: bytes, frames: Sequence[Any], sequence: int, deadline: float) -> zmq.MessageTracker:
        parts = multipart([hs.envelope(hs.MESSAGE, sequence)], head, frames)
        while True:
            with self._lock:
                self._check_open()
                if self._cut:
                    raise ClosedError("the sending of a large message was interrupted, perhaps within; connect again")
                self._check_peer(self._look())
                try:
                    self._socket.send_multipart(parts, flags=zmq.NOBLOCK, copy=False)
                    break
                except zmq.Again:
                    pass
                except BaseException:
                    self._cut = True  # Ctrl-C, perhaps between two frames: the next message would be taken for the rest
                    raise
            if time.monotonic() >= deadline:
                raise WaitTimeoutError("the server takes no more large messages; wait longer or look at the server")
            time.sleep(0.001)
        tracker = trackers(parts)
        parts.clear()  # a frame object of ours would itself keep the memory in use
        return tracker

    def recv(self, deadline: float) -> LargeMessage | None:
        while self.wait(deadline):
            with self._lock:
                if self._inbox:  # else another thread took it
                    message = self._inbox.popleft()
                    self._inbox_bytes -= cost(message)
                    return message
        return None

    def wait(self, deadline: float) -> bool:
        while True:
            with self._lock:
                self._check_open()
                self._pump()
                reason = None if self._inbox else self._look()
                if self._inbox:
                    return True
                self._check_peer(reason)
                if time.monotonic() >= deadline:
                    return False
                self._waiting += 1
            # Outside the lock: another thread may send meanwhile.
            try:
                self._wait(slice_until(deadline))
            finally:
                with self._lock:
                    self._waiting -= 1
                    self._nobody_waits.notify_all()
                    if not self._closed:
                        self._pipe.drain()

    def _wait(self, seconds: float) -> None:
        poll = select.poll()
        for descriptor in self._descriptors:
            poll.register(descriptor, select.POLLIN)
        poll.poll(max(1, int(seconds * 1000)))

    def _wake(self) -> None:
        if self._waiting:
            self._pipe.ring()

    def _look(self) -> str | None:
        """Takes what came; returns why the server is known to be gone. What it sent before is in the inbox then."""
        reason = self.dead()
        self._pump()
        return reason

    def _check_peer(self, reason: str | None) -> None:
        if self._said_bye:
            why = f": {self._why}" if self._why else "; connect again to go on"
            raise ClosedError(f"the server closed the connection{why}")
        if reason:
            raise PeerDiedError(f"the server died: {reason}")

    def _pump(self) -> None:
        """Takes what libzmq has received, until that is too much: then libzmq takes no more either, and the server
        has to wait. Never blocks."""
        while not self._said_bye and self._has_room() and (parts := received(self._socket)) is not None:
            self._wake()
            kind, sequence = hs.open_envelope(parts[0].buffer)
            if kind == hs.BYE:
                self._said_bye, self._why = True, hs.reason_of([part.bytes for part in parts[1:2]])
            elif kind == hs.MESSAGE and len(parts) >= 2:
                self._inbox.append((sequence, parts[1], parts[2:]))
                self._inbox_bytes += cost(self._inbox[-1])
            else:
                raise ProtocolError("the server sent something that is neither a message nor a goodbye")

    def _has_room(self) -> bool:
        return len(self._inbox) < _MAX_INBOX and self._inbox_bytes < self._max_inbox_bytes

    @property
    def unread(self) -> int:
        return len(self._inbox)

    def pending(self) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._pump()
            return bool(self._inbox) or self._said_bye

    def dead(self) -> str | None:
        """Why the server is known to be gone, or None. Cheap enough for every slice of a wait."""
        check_process(self._pid)
        with self._lock:
            while self._reason is None and not self._closed and (found := next_event(self._monitor)) is not None:
                if not self._connected:  # a connection that ends before it is one: libzmq tries again
                    self._connected = self._greeting.hear(*found)
                elif found[0] == zmq.EVENT_DISCONNECTED:
                    self._reason = "its end of the control connection was closed"
            return self._reason

    def can_send(self) -> bool:
        return True

    def _check_open(self) -> None:
        check_process(self._pid)
        if self._closed:
            raise ClosedError("this channel is closed; connect again")

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            self._finalizer.detach()
            nobody = self.dead() or not self._connected  # to hear a goodbye
            self._closed = True
            self._wake()
            # Not for ever: a signal handler may close the channel in whose wait it runs.
            self._nobody_waits.wait_for(lambda: self._waiting == 0, 2 * SLICE_S)
            if not nobody:
                with contextlib.suppress(zmq.ZMQError):
                    self._socket.send(hs.envelope(hs.BYE), flags=zmq.NOBLOCK)
            _close_sockets(*self._sockets, 0 if nobody else _FAREWELL_MS)
        self._context.term()


def _give_back(pid: int, context: zmq.Context, socket: zmq.Socket, monitor: zmq.Socket, pipe: WakePipe) -> None:
    """Ends a connection whose link is no more."""
    if os.getpid() == pid:
        _close_sockets(socket, monitor, pipe, 0)
        context.term()


def _close_sockets(socket: zmq.Socket, monitor: zmq.Socket, pipe: WakePipe, linger_ms: int) -> None:
    socket.disable_monitor()
    monitor.close(0)
    socket.close(linger_ms)
    pipe.close()
