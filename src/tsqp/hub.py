"""The I/O thread of a listener: one ROUTER for any number of clients.

It answers handshakes, creates each client's segment, moves large messages, and learns from libzmq's monitor at once
when a connection ends. Messages below the threshold never pass through it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from typing import Any

import zmq

from . import door
from . import handshake as hs
from ._ring import Doorbell
from .admission import Hello
from .binding import bind
from .config import Endpoint
from .connections import Connections
from .descriptors import Reserve
from .door import AT_ONCE, GONE, LEAVE_S, Client, Door, HubOptions
from .door_lock import DoorLock, key_of, seed_identities
from .errors import ProtocolError
from .fixed_segment import FixedSegment
from .frames import received
from .links import frame_limit
from .monitor import Events
from .pacing import Pace
from .server_link import ServerLink
from .transport import Channel, make_channel
from .wake_pipe import WakePipe

log = logging.getLogger("tsqp.listener")

_RETRY_MS = 10
_FAREWELL_S = 1.0
#: How long libzmq then goes on with what it has for clients that take it slowly.
_LINGER_MS = 1000
#: What libzmq takes ahead of the I/O thread, messages of each client; it knows no limit in bytes. Not fewer: on a Unix
#: socket it throws away what it has no room for when the other end closes, the goodbye among it.
_LIBZMQ_AHEAD = 1000
#: What libzmq has received and a client sent before it went is delivered; this many messages a client at most.
_RECEIVED_MAX = 2 * _LIBZMQ_AHEAD
_DEALER_FRAMES_MIN = 2
#: How often a client may measure the connection before it is ready.
MAX_PROBES = 16
#: Whoever broke the protocol and is told to go has this long to hear it.
_CUT_OFF_S = 1.0
#: How often deadlines are looked at.
_DEADLINES_S = 0.02


class Hub:
    """Owns the ROUTER and everything that hangs on it. Rings `bell` when there is something for the listener's users:
    a channel in :attr:`accepted`, a message, a death, its own end.
    """

    def __init__(self, endpoint: Endpoint, options: HubOptions, bell: Doorbell) -> None:
        self.options, self._bell = options, bell
        self._scheme = endpoint.scheme
        self.fixed = FixedSegment(options)
        self.accepted: deque[Channel] = deque()
        self._numbers = itertools.count()
        self.channels: list[Channel] = []  # in the order of connecting, which is that of their numbers
        #: Channels closed here and not by their users, who may want to know.
        self.outcasts: deque[weakref.ref[Channel]] = deque()
        self.failure: BaseException | None = None  # what ended the I/O thread
        self.clients: dict[bytes, Client] = {}
        self.connections = Connections(rationed=options.keys is None)
        self._door = Door(self)
        self._hellos = self._door.hellos
        self.owner: object = None  # lives as long as the thread, so that a listener nobody holds is closed at exit
        self._outbox: deque[tuple[ServerLink, list[Any]]] = deque()
        self._stop = False
        self._looked = time.monotonic()
        self._stop_by = 0.0  # a client that takes nothing does not hold up the close for ever
        self._pipe = WakePipe()
        self.reserve = Reserve(self._pipe.fd)
        self._pace = Pace(self._pipe.fd)
        self._context = zmq.Context(io_threads=1)
        seed_identities()
        self._router = self._context.socket(zmq.ROUTER)
        self._monitor: Any = None
        self._lock: DoorLock | None = None
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
        self._router.setsockopt(zmq.RCVHWM, _LIBZMQ_AHEAD)
        self._router.setsockopt(zmq.HANDSHAKE_IVL, int(door.HANDSHAKE_TIMEOUT_S * 1000))
        self._router.setsockopt(zmq.MAXMSGSIZE, frame_limit(self.options.max_message_bytes))
        self._lock = DoorLock(self._context, self._router, endpoint.scheme == "ipc", self.options.keys)
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | self._lock.events
        self._monitor = self._router.get_monitor_socket(events)
        self._events = Events(self._monitor)
        self.endpoint = bind(self._router, endpoint)
        self._socket_path = endpoint.path

    def close(self) -> None:
        """Ends the thread; goodbyes that were posted have a moment to leave."""
        self._stop_by = time.monotonic() + _FAREWELL_S
        self._stop = True
        self._pipe.ring()
        self._bell.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _post(self, link: ServerLink, parts: list[Any]) -> None:
        self._outbox.append((link, parts))
        self._pipe.ring()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._pipe.fd, zmq.POLLIN)
        lock = self._lock
        assert lock is not None
        lock.register(poller)
        try:
            while not self._stop or (self._outbox and time.monotonic() < self._stop_by):
                self._pace.hold()
                poller.poll(_RETRY_MS if self._outbox else self._door.patience_ms())
                self.reserve.look()
                self.fixed.look()
                self._pipe.drain()
                for identity in lock.look(self.clients, self._hellos):
                    self._expel(identity)
                self.take_messages()
                self._take_events()
                self._door.answer()
                self._flush_outbox()
                self._look_at_deadlines()
                if self._stop:
                    self._outbox = deque(item for item in self._outbox if not self._is_dead(item[0]))
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self.fixed.close()
            for client in list(self.clients.values()):
                self.drop(client.identity, "the listener's I/O thread ended")
            self._release()
            self._bell.ring()

    def _is_dead(self, link: ServerLink) -> bool:
        return bool(link.reason) or link.said_bye or link.identity not in self.clients

    def _release(self) -> None:
        self.fixed.close()
        if self._monitor is not None:
            self._router.disable_monitor()
            self._monitor.close(0)
        if self._socket_path:  # libzmq leaves it; before the close, while nobody else can have bound it
            with contextlib.suppress(OSError):  # gone, or not ours to remove any more
                os.unlink(self._socket_path)
        self._outbox.clear()  # gives back memory a sender still waits for
        # Goodbyes are with libzmq by now; give them a moment to leave.
        self._router.close(_LINGER_MS)
        if self._lock is not None:
            self._lock.close()
        self.owner = None
        self._context.term()
        self.reserve.close()
        self._pipe.close()
        self.clients.clear()

    def _look_at_deadlines(self) -> None:
        now = time.monotonic()
        if now < self._looked + _DEADLINES_S:
            return
        away_s, self._looked = now - self._looked, now
        self._door.look(now, away_s)
        self.connections.look(now, self.reserve.scarce)

    def take_messages(self, limit: int = AT_ONCE) -> None:
        for _ in range(limit):
            parts = received(self._router)
            if parts is None:
                return
            try:
                self._take(parts)
            except ProtocolError as error:
                self.cut_off(parts[0].bytes, int(parts[-1].get(zmq.SRCFD)), str(error))

    def cut_off(self, identity: bytes, fd: int, why: str) -> None:
        """Ends a connection for its own fault, and says so."""
        self._end(identity, fd, f"it broke the protocol: {why}", why, in_vain=True)

    def _end(self, identity: bytes, fd: int, reason: str, told: str, in_vain: bool = False) -> None:
        self.drop(identity, reason)
        self.bid_farewell(identity, fd, hs.BYE, told[:500], _CUT_OFF_S, in_vain)

    def bid_farewell(self, identity: bytes, fd: int, kind: int, why: str, stay_s: float, in_vain: bool = False) -> None:
        """Tells a connection why it is to go, and in how many seconds; ``in_vain``: for its own fault. One that has
        ended is told nothing, and whose its descriptor is now has nothing to do with it."""
        if self.say(identity, kind, hs.Refuse(why)):
            self.connections.claim(fd, identity)
            self.connections.end_at(fd, identity, time.monotonic() + stay_s, in_vain)

    def _expel(self, identity: bytes) -> None:
        """Cuts off a client whose key is gone, at once: whatever it has put into its ring is read by nobody."""
        client = self.clients.get(identity)
        if client is not None and client.channel is not None:
            client.channel.close()  # first: nobody can read from it any more
            self.outcasts.append(weakref.ref(client.channel))
            log.warning("cut off %s: its key was removed", client.channel.peer)
        known = client or self._hellos.get(identity)
        if known is not None:
            why = "its key was removed from the server's directory"
            self._end(identity, known.fd, why, why)
        self._bell.ring()

    def _take(self, parts: list[zmq.Frame]) -> None:
        identity, fd = parts[0].bytes, int(parts[-1].get(zmq.SRCFD))
        client = self.clients.get(identity)
        if client is None or client.link is None:
            self._pace.stranger = True
        else:
            self._pace.client = True
        if len(parts) < _DEALER_FRAMES_MIN:
            raise ProtocolError("a message without an envelope")
        if client is None and not self.connections.heeded(fd):
            self._take_events()  # the descriptor may be another connection's by now
            if not self.connections.heeded(fd):
                return
        kind, sequence = hs.open_envelope(parts[1].buffer)
        if client is not None and client.fd != fd:  # who had this identity is gone, and somebody else took it
            self.drop(identity, GONE)
            client = None
        if kind == hs.HELLO and client is None and identity not in self._hellos and len(parts) == 3:
            # Ends of older connections that used this descriptor were reported before this message came.
            self._take_events()
            if not self.connections.heeded(fd) or not self._door.is_live(identity, fd):
                return  # it has ended meanwhile
            assert self._lock is not None
            refusal = self._lock.refusal(identity, parts[1])
            if refusal:
                self.bid_farewell(identity, fd, hs.REFUSE, refusal, LEAVE_S)
                return
            now = time.monotonic()
            peer = self.connections.spoke(fd, identity, key_of(parts[1]).decode(), now + 2 * door.CROWDED_S)
            self._hellos[identity] = Hello(identity, fd, hs.unpack(hs.Hello, parts[2].bytes), peer, now)
        elif client is None and kind == hs.BYE:
            self.drop(identity, None)  # late, perhaps: its descriptor may be another connection's by now
        elif client is None:
            raise ProtocolError("a message before the handshake")
        elif kind == hs.READY and client.channel is None and len(parts) == 3:
            self._ready(client, parts[2].bytes)
        elif kind == hs.PROBE and client.channel is None and client.probes < MAX_PROBES and len(parts) == 3:
            client.probes += 1
            self.say(identity, hs.PROBE)
        elif kind == hs.MESSAGE and client.link is not None and len(parts) >= 3:
            fault = client.link.deliver((sequence, parts[2], parts[3:]))
            if fault:
                self.cut_off(identity, fd, fault)
        elif kind == hs.BYE:
            self.drop(identity, None)
            self.connections.end_at(fd, identity, time.monotonic() + LEAVE_S)
        else:
            raise ProtocolError("a message out of order")

    def say(self, identity: bytes, kind: int, *body: hs.Welcome | hs.Refuse) -> bool:
        """False: its connection has ended. One that does not read is told nothing, and times out."""
        bodies = [hs.pack(each) for each in body] or [b""]
        try:
            self._router.send_multipart([identity, hs.envelope(kind), *bodies], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            return error.errno != errno.EHOSTUNREACH
        return True

    def _ready(self, client: Client, data: bytes) -> None:
        ready = hs.unpack(hs.Ready, data)
        if client.segment is None and self._door.full():
            raise ProtocolError(self._door.full_text)
        self.connections.keep(client.fd, client.identity)
        segment = client.segment if ready.shm else None
        if segment is not None and ready.native:
            segment.unlink()  # both ends have it mapped: from now on a kill leaves nothing behind
        if segment is None or ready.native:
            self.fixed.release(client.segment)  # an enclave that starts now finds a segment of its own
        if not client.futex:
            self._bell.set_futex(False)
        options, number = self.options, next(self._numbers)
        link = ServerLink(client.identity, self._post, options.max_inbox_bytes, options.max_inbox_messages)
        channel = make_channel(
            link,
            segment,
            server=True,
            scheme=self._scheme,
            peer=f"client {number} of {self.endpoint}",
            threshold=options.threshold,
            large=options.large,
            wait=options.wait,
            spin_us=options.spin_us,
            futex=client.futex,
            max_message_bytes=options.max_message_bytes,
        )
        link.on_event = self._bell.ring
        channel.on_close = self._closed_channel
        channel.number = number
        client.link, client.channel, client.segment = link, channel, segment
        self.channels.append(channel)
        self.accepted.append(channel)
        self._bell.ring()

    def _closed_channel(self, channel: Channel) -> None:
        with contextlib.suppress(ValueError):
            self.channels.remove(channel)
        with contextlib.suppress(ValueError):
            self.accepted.remove(channel)

    def drop(self, identity: bytes, reason: str | None) -> None:
        """Forgets a client, or its hello; its channel's user is told ``reason``, or None: of a goodbye."""
        self._hellos.pop(identity, None)
        client = self.clients.get(identity)
        if client is None:
            return
        self._forget(client)
        if client.link is not None:
            client.link.end(reason)

    def _forget(self, client: Client) -> None:
        """The segment's memory goes with the last reference: the channel's, once its user closed and dropped it. Its
        name goes now: an enclave's client needed it so long, and the next one may need the same."""
        self.clients.pop(client.identity, None)
        if client.segment is not None:
            client.segment.drop_name()
            if client.channel is None:
                self._door.wasted(client)
        self.fixed.release(client.segment)
        client.segment = None

    def _take_events(self) -> None:
        while (found := self._events.next()) is not None:
            self._pace.stranger = True
            event, fd = found
            if event == zmq.EVENT_ACCEPTED:
                self.connections.accepted(fd, time.monotonic() + door.HANDSHAKE_TIMEOUT_S, self._events.ended)
            elif event == zmq.EVENT_DISCONNECTED:
                self._ended(fd)
            elif self._lock is not None:
                self._lock.hear(event)

    def _ended(self, fd: int) -> None:
        """A connection is no more."""
        self.connections.ended(fd)
        for identity in [identity for identity, hello in self._hellos.items() if hello.fd == fd]:
            del self._hellos[identity]
        gone = [client for client in self.clients.values() if client.fd == fd]
        if gone:
            self.take_messages(_RECEIVED_MAX * len(self.clients))
        for client in gone:
            self.drop(client.identity, GONE)

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
        client = self.clients.get(link.identity)
        if client is None or client.link is not link:
            parts.clear()  # it is gone; whoever may have its identity by now must not get it
            return True
        try:
            self._router.send_multipart(parts, flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self.drop(link.identity, "it can't be reached any more")
            parts.clear()
            return True
        goodbye = len(parts) == _DEALER_FRAMES_MIN
        link.sent(parts)
        parts.clear()  # a frame object of ours would itself keep the sender's memory in use
        if goodbye:
            self._forget(client)
            self.connections.end_at(client.fd, client.identity, time.monotonic() + LEAVE_S)
        return True
