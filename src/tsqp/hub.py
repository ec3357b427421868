"""The I/O thread of a listener: one ROUTER for any number of clients.

It answers handshakes, creates each client's segment, moves large messages, and learns from libzmq's monitor at once
when a connection ends. Messages below the threshold never pass through it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from . import handshake as hs
from ._ring import Doorbell, Segment
from .binding import bind
from .config import Endpoint
from .descriptors import Reserve
from .errors import ProtocolError, SegmentError
from .fixed_segment import FixedSegment
from .links import ServerLink, frame_limit
from .transport import Channel, make_channel

HANDSHAKE_TIMEOUT_S = 5.0
_RETRY_MS = 10
#: How often file descriptors are looked after.
_LOOK_MS = 100
_FAREWELL_S = 0.5
#: How long a client waits for a place, where all are taken: one that was killed just now may hold it still.
_PLACE_S = 0.5
#: Longer than this between two looks is not the I/O thread's own doing.
_AWAY_S = 1.0
#: How many messages are taken before events and the outbox are looked at again, however busy one client is.
_AT_ONCE = 64
#: What libzmq has received and a client sent before it went is delivered; this many messages a client at most.
_RECEIVED_MAX = 2000
_DEALER_FRAMES_MIN = 2
#: How often a client may measure the connection before it is ready.
MAX_PROBES = 16


@dataclass(frozen=True)
class HubOptions:
    """The options of :func:`tsqp.listen`, checked."""

    max_chunk_bytes: int
    max_chunks: int
    max_clients: int
    shm: bool
    shm_name: str | None
    threshold: int | str
    large: str
    wait: str
    spin_us: float
    max_inbox_bytes: int
    max_message_bytes: int


@dataclass
class _Client:
    """One connection as the I/O thread sees it."""

    identity: bytes
    fd: int
    deadline: float
    futex: bool
    segment: Segment | None
    link: ServerLink | None = None
    channel: Channel | None = None
    probes: int = 0


class Hub:
    """Owns the ROUTER and everything that hangs on it. Rings `bell` when there is something for the listener's users:
    a channel in :attr:`accepted`, a message, a death, its own end.
    """

    def __init__(self, endpoint: Endpoint, options: HubOptions, bell: Doorbell) -> None:
        self._options, self._bell = options, bell
        self._scheme = endpoint.scheme
        self._fixed = FixedSegment(options)
        self.accepted: deque[Channel] = deque()
        self._numbers = itertools.count()
        self.channels: list[Channel] = []  # in the order of connecting, which is that of their numbers
        self.failure: BaseException | None = None  # what ended the I/O thread
        self.clients: dict[bytes, _Client] = {}
        #: Not answered yet: descriptor, body, and until when it waits for a place.
        self._hellos: dict[bytes, tuple[int, bytes, float]] = {}
        self.owner: object = None  # lives as long as the thread, so that a listener nobody holds is closed at exit
        self._outbox: deque[tuple[ServerLink, list[Any]]] = deque()
        self._stop = False
        self._looked = time.monotonic()
        self._stop_by = 0.0  # a client that takes nothing does not hold up the close for ever
        self._pipe_lock = threading.RLock()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._reserve = Reserve(self._wake_r)
        self._context = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        self._monitor: Any = None
        self._socket_path = ""  # ours to remove, once it is bound
        try:
            self._open(endpoint)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._run, name="tsqp-listener", daemon=True)
        self._thread.start()

    def _open(self, endpoint: Endpoint) -> None:
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.MAXMSGSIZE, frame_limit(self._options.max_message_bytes))
        self._monitor = self._router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self.endpoint = bind(self._router, endpoint)
        self._socket_path = endpoint.path

    def close(self) -> None:
        """Ends the thread; goodbyes that were posted have a moment to leave."""
        self._stop_by = time.monotonic() + _FAREWELL_S
        self._stop = True
        self._wake()
        self._bell.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with self._pipe_lock, contextlib.suppress(BlockingIOError):
            if self._wake_w >= 0:  # else the I/O thread has ended, and the descriptor may be somebody else's
                os.write(self._wake_w, b"x")

    def _post(self, link: ServerLink, parts: list[Any]) -> None:
        self._outbox.append((link, parts))
        self._wake()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._wake_r, zmq.POLLIN)
        try:
            while not self._stop or (self._outbox and time.monotonic() < self._stop_by):
                poller.poll(_RETRY_MS if self._outbox else self._next_timeout_ms())
                self._reserve.look()
                self._fixed.look()
                self._drain_wake()
                self._take_messages()
                self._take_events()
                self._answer_hellos()
                self._flush_outbox()
                self._expire_handshakes()
                if self._stop:
                    self._outbox = deque(item for item in self._outbox if not self._is_dead(item[0]))
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._fixed.close()
            for client in list(self.clients.values()):
                self._drop(client.identity, "the listener's I/O thread ended")
            self._release()
            self._bell.ring()

    def _is_dead(self, link: ServerLink) -> bool:
        return bool(link.reason) or link.said_bye or link.identity not in self.clients

    def _release(self) -> None:
        self._fixed.close()
        if self._monitor is not None:
            self._router.disable_monitor()
            self._monitor.close(0)
        if self._socket_path:  # libzmq leaves it; before the close, while nobody else can have bound it
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._socket_path)
        self._outbox.clear()  # gives back memory a sender still waits for
        # Goodbyes are with libzmq by now; give them a moment to leave.
        self._router.close(200)
        self.owner = None
        self._context.term()
        self._reserve.close()
        with self._pipe_lock:
            os.close(self._wake_r)
            os.close(self._wake_w)
            self._wake_r = self._wake_w = -1
        self.clients.clear()

    def _next_timeout_ms(self) -> int:
        waiting = [c.deadline for c in self.clients.values() if c.channel is None]
        return min(_LOOK_MS, max(1, int((min(waiting) - time.monotonic()) * 1000))) if waiting else _LOOK_MS

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_r, 4096):
                pass

    def _take_messages(self, limit: int = _AT_ONCE) -> None:
        for _ in range(limit):
            try:
                parts = self._router.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._take(parts)
            except ProtocolError:
                self._cut_off(parts[0].bytes)

    def _cut_off(self, identity: bytes) -> None:
        self._drop(identity, "it broke the protocol")
        self._say(identity, hs.BYE)

    def _take(self, parts: list[zmq.Frame]) -> None:
        identity = parts[0].bytes
        if len(parts) < _DEALER_FRAMES_MIN:
            raise ProtocolError("a message without an envelope")
        kind, sequence = hs.open_envelope(parts[1].buffer)
        client = self.clients.get(identity)
        if kind == hs.HELLO and client is None and identity not in self._hellos and len(parts) == 3:
            # Ends of older connections that used this descriptor were reported before this message came.
            self._take_events()
            self._hellos[identity] = int(parts[1].get(zmq.SRCFD)), parts[2].bytes, time.monotonic() + _PLACE_S
        elif client is None:
            raise ProtocolError("a message before the handshake")
        elif kind == hs.READY and client.channel is None and len(parts) == 3:
            self._ready(client, parts[2].bytes)
        elif kind == hs.PROBE and client.channel is None and client.probes < MAX_PROBES and len(parts) == 3:
            client.probes += 1
            with contextlib.suppress(zmq.ZMQError):  # gone already, or not reading
                self._router.send_multipart([identity, hs.envelope(hs.PROBE), b""], flags=zmq.NOBLOCK)
        elif kind == hs.MESSAGE and client.link is not None and len(parts) >= 3:
            client.link.deliver((sequence, parts[2], parts[3:]))
            if client.link.reason:
                self._forget(client)
        elif kind == hs.BYE:
            self._drop(identity, None)
        else:
            raise ProtocolError("a message out of order")

    def _say(self, identity: bytes, kind: int, *body: hs.Welcome | hs.Refuse) -> None:
        with contextlib.suppress(zmq.ZMQError):  # gone already, or not reading: it will time out
            self._router.send_multipart([identity, hs.envelope(kind), *map(hs.pack, body)], flags=zmq.NOBLOCK)

    def _answer_hellos(self) -> None:
        """A client that left before another came has said so, but libzmq may hand out the hello first. So a hello is
        answered once each connection's turn has come: whoever left holds neither a place nor the fixed name then."""
        if self._hellos:
            self._take_messages(_AT_ONCE + len(self.clients))
        most = self._options.max_clients
        while self._hellos:
            identity, (fd, data, until) = next(iter(self._hellos.items()))
            if len(self.clients) >= most >= len(self._hellos) and time.monotonic() < until:
                return  # in the order of coming, and no more of them than there are places
            del self._hellos[identity]
            try:
                self._hello(identity, fd, data)
            except ProtocolError:
                self._cut_off(identity)

    def _hello(self, identity: bytes, fd: int, data: bytes) -> None:
        hello = hs.unpack(hs.Hello, data)
        refusal = self._refusal(hello)
        if refusal:
            self._say(identity, hs.REFUSE, hs.Refuse(refusal))
            return
        futex = hello.futex and hs.futex_works()
        client = _Client(identity, fd, time.monotonic() + HANDSHAKE_TIMEOUT_S, futex, None)
        welcome = hs.Welcome(hs.PROTOCOL, False, futex)
        slot_bytes, slots = self._options.max_chunk_bytes, self._options.max_chunks
        if hello.shm and self._options.shm:
            try:
                segment = client.segment = self._fixed.take() or Segment.create(slot_bytes, slots, 2)
            except (SegmentError, MemoryError) as error:
                self._say(identity, hs.REFUSE, hs.Refuse(f"the server could not make a segment: {error}"[:2000]))
                return
            welcome = hs.Welcome(hs.PROTOCOL, True, futex, segment.name, segment.session, slot_bytes, slots)
        self.clients[identity] = client
        self._say(identity, hs.WELCOME, welcome)

    def _refusal(self, hello: hs.Hello) -> str | None:
        """Why this client can't be let in, or None."""
        if hello.protocol != hs.PROTOCOL:
            return f"the server speaks protocol {hs.PROTOCOL}, the client {hello.protocol}: use one version of tsqp"
        if len(self.clients) >= self._options.max_clients:
            return f"the server has its limit of {self._options.max_clients} clients (max_clients)"
        if self._reserve.scarce:
            return "the server process has too few file descriptors left (ulimit -n); it serves the clients it has"
        return None

    def _ready(self, client: _Client, data: bytes) -> None:
        ready = hs.unpack(hs.Ready, data)
        segment = client.segment if ready.shm else None
        if segment is not None and ready.native:
            segment.unlink()  # both ends have it mapped: from now on a kill leaves nothing behind
        if segment is None or ready.native:
            self._fixed.release(client.segment)  # an enclave that starts now finds a segment of its own
        if not client.futex:
            self._bell.set_futex(False)
        link = ServerLink(client.identity, self._post, self._options.max_inbox_bytes)
        channel = make_channel(
            link,
            segment,
            server=True,
            scheme=self._scheme,
            peer=f"client {client.identity.hex()[-8:]} of {self.endpoint}",
            threshold=self._options.threshold,
            large=self._options.large,
            wait=self._options.wait,
            spin_us=self._options.spin_us,
            futex=client.futex,
            max_message_bytes=self._options.max_message_bytes,
        )
        link.on_event = self._bell.ring
        channel.on_close = self._closed_channel
        channel.number = next(self._numbers)
        client.link, client.channel, client.segment = link, channel, segment
        self.channels.append(channel)
        self.accepted.append(channel)
        self._bell.ring()

    def _closed_channel(self, channel: Channel) -> None:
        with contextlib.suppress(ValueError):
            self.channels.remove(channel)
        with contextlib.suppress(ValueError):
            self.accepted.remove(channel)

    def _drop(self, identity: bytes, reason: str | None) -> None:
        self._hellos.pop(identity, None)
        client = self.clients.get(identity)
        if client is None:
            return
        self._forget(client)
        if client.link is not None:
            client.link.end(reason)

    def _forget(self, client: _Client) -> None:
        """The segment's memory goes with the last reference: the channel's, once its user closed it."""
        self.clients.pop(client.identity, None)
        self._fixed.release(client.segment)
        client.segment = None

    def _take_events(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            if event["event"] == zmq.EVENT_ACCEPTED:
                continue  # the wake-up was what it is for: the descriptors were looked after
            for identity in [identity for identity, (fd, *_) in self._hellos.items() if fd == event["value"]]:
                del self._hellos[identity]
            gone = [client for client in self.clients.values() if client.fd == event["value"]]
            if gone:
                self._take_messages(_RECEIVED_MAX * len(self.clients))
            for client in gone:
                self._drop(client.identity, "its end of the control connection was closed")

    def _flush_outbox(self) -> None:
        held: list[tuple[ServerLink, list[Any]]] = []  # what its client has no room for, in the order it was posted
        full: set[bytes] = set()
        for _ in range(len(self._outbox)):
            link, parts = self._outbox.popleft()
            if link.identity in full or not self._send(link, parts):
                full.add(link.identity)
                held.append((link, parts))
        self._outbox.extendleft(reversed(held))

    def _send(self, link: ServerLink, parts: list[Any]) -> bool:
        """False: the client has no room for it now."""
        try:
            self._router.send_multipart(parts, flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self._drop(link.identity, "it can't be reached any more")
            return True
        goodbye = len(parts) == _DEALER_FRAMES_MIN
        link.sent(parts)
        parts.clear()  # a frame object of ours would itself keep the sender's memory in use
        if goodbye:
            self._forget_identity(link.identity)
        return True

    def _forget_identity(self, identity: bytes) -> None:
        client = self.clients.get(identity)
        if client is not None:
            self._forget(client)

    def _expire_handshakes(self) -> None:
        now = time.monotonic()
        away_s, self._looked = now - self._looked, now
        if away_s > _AWAY_S:  # this process was stopped: what came meanwhile has not been taken yet
            for client in self.clients.values():
                client.deadline += away_s
        for client in [c for c in self.clients.values() if c.channel is None and c.deadline < now]:
            self._drop(client.identity, "it did not finish the handshake in time")
