"""The door of a listener: answers hellos, and makes each client's segment.

A part of the I/O thread: everything here is its alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import handshake as hs
from ._ring import Segment
from .admission import Admission, Hello
from .connections import Peer
from .curve import ServerKeys
from .errors import SegmentError, SharedMemoryFullError
from .server_link import ServerLink
from .transport import Channel

if TYPE_CHECKING:
    from .hub import Hub

HANDSHAKE_TIMEOUT_S = 5.0
#: How long a client waits for a place, where all are taken: one that was killed just now may hold it still.
_PLACE_S = 0.5
#: How long it waits where other handshakes are in its way.
CROWDED_S = 3.0
#: Whoever was refused, or said goodbye, has this long to go by itself.
LEAVE_S = 2.0
#: Longer than this between two looks is not the I/O thread's own doing.
_AWAY_S = 1.0
#: How often file descriptors are looked after.
_LOOK_MS = 100
#: How often waiting hellos are looked at, if nothing else wakes the thread: what makes room for one does, mostly.
_HELLO_LOOK_MS = 50
#: Why a client is no more whose connection ended without a goodbye.
GONE = "its end of the control connection was closed"
#: How many messages are taken before events and the outbox are looked at again, however busy one client is.
AT_ONCE = 64


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
    max_inbox_messages: int
    max_message_bytes: int
    max_handshakes: int
    keys: ServerKeys | None = None


@dataclass
class Client:
    """One connection as the I/O thread sees it."""

    identity: bytes
    fd: int
    peer: Peer
    began: float
    deadline: float
    futex: bool
    segment: Segment | None = None
    link: ServerLink | None = None
    channel: Channel | None = None
    probes: int = 0


class Door:
    """Lets clients in, for a hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._options = hub, hub.options
        self._admission = Admission()
        self.hellos = self._admission.hellos
        self.full_text = f"the server has its limit of {hub.options.max_clients} clients (max_clients)"

    def look(self, now: float, away_s: float) -> None:
        """Called now and then, ``away_s`` seconds after the last time: ends handshakes that take too long, and forgets
        what is not needed any more."""
        if away_s > _AWAY_S:  # this process was stopped: what came meanwhile has not been taken yet
            for client in self._hub.clients.values():
                client.deadline += away_s
        for client in [client for client in self.unfinished() if client.deadline < now]:
            self._hub.cut_off(client.identity, client.fd, "the handshake was not finished in time")
        self._admission.forget(now)

    def patience_ms(self) -> int:
        """How long the I/O thread may sleep."""
        if self.hellos:
            return _HELLO_LOOK_MS
        waiting = [client.deadline for client in self.unfinished()]
        return min(_LOOK_MS, max(1, int((min(waiting) - time.monotonic()) * 1000))) if waiting else _LOOK_MS

    def wasted(self, client: Client) -> None:
        """The handshake ended unfinished, and a segment was made for nothing."""
        self._admission.wasted(client.peer, time.monotonic())

    def unfinished(self) -> list[Client]:
        """Handshakes under way, in the order of coming."""
        return [client for client in self._hub.clients.values() if client.channel is None]

    def under_way(self) -> list[Client]:
        """Those that have a segment. The others cost nothing, and are few because connections of no client are."""
        return [client for client in self.unfinished() if client.segment is not None]

    def full(self) -> bool:
        """All places are taken, by clients or by segments made for clients to come."""
        taken = sum(client.channel is not None or client.segment is not None for client in self._hub.clients.values())
        return taken >= self._options.max_clients

    def is_live(self, identity: bytes, fd: int) -> bool:
        """False for a hello that came over an earlier connection than another one with the same descriptor. Whoever
        there is of them is asked; what has ended is forgotten, and whose the descriptor is now does not pay for it."""
        others = [hello.identity for hello in self.hellos.values() if hello.fd == fd]
        for other in others:
            if not self._hub.say(other, hs.PROBE):
                del self.hellos[other]
        return not others or self._hub.say(identity, hs.PROBE)

    def answer(self) -> None:
        """A client that left before another came has said so, but libzmq may hand out the hello first. So a hello is
        answered once each connection's turn has come: whoever left holds neither a place nor the fixed name then."""
        if not self.hellos:
            return
        self._hub.take_messages(AT_ONCE + len(self._hub.clients))
        now, patience_s = time.monotonic(), {}  # where one of a peer's has no place its next ones have none
        for number, hello in enumerate(self._admission.in_turn(self.under_way())):
            kind = hello.peer, self._wants_segment(hello)
            if kind in patience_s or not self._has_place(hello, now):
                if kind not in patience_s:
                    crowded = bool(self.under_way()) or not self._admission.may_spend(hello.peer, now)
                    patience_s[kind] = CROWDED_S if crowded else _PLACE_S
                if number < self._options.max_clients and now < hello.since + patience_s[kind]:
                    continue  # no more of them than there are places
            if self.hellos.pop(hello.identity, None) is None:
                continue  # its connection ended meanwhile
            self._hello(hello)
            now = time.monotonic()  # a segment takes its time

    def _has_place(self, hello: Hello, now: float) -> bool:
        """Whether the client could be let in now. A handshake that took too long goes for it."""
        if self._wants_segment(hello) and not self._admission.may_spend(hello.peer, now):
            return False
        self._end_one(self.under_way() if self.full() else self._rivals(hello), hello.peer, now)
        return not self._rivals(hello) and not self.full()

    def _wants_segment(self, hello: Hello) -> bool:
        return hello.shm and self._options.shm

    def _rivals(self, hello: Hello) -> list[Client]:
        """The handshakes of which one has to end before this one can begin; none where there is room for it. A process
        or a key has one at a time, an address has what there is: others share it."""
        if not self._wants_segment(hello):
            return []
        under_way = self.under_way()
        own = [client for client in under_way if client.peer == hello.peer and hello.peer[0] != "address"]
        return own or (under_way if len(under_way) >= self._options.max_handshakes else [])

    def _end_one(self, candidates: list[Client], peer: Peer, now: float) -> bool:
        """Ends the handshake that has to give way to one of ``peer``, if there is one."""
        victim = self._admission.gives_way(candidates, peer, now)
        if victim is not None:
            self._hub.cut_off(victim.identity, victim.fd, "the handshake was not finished while others waited")
        return victim is not None

    def _hello(self, hello: Hello) -> None:
        said, now = hello.said, time.monotonic()
        refusal = self._refusal(hello, now)
        if refusal:
            self._refuse(hello, refusal)
            return
        futex = said.futex and hs.futex_works()
        client = Client(hello.identity, hello.fd, hello.peer, now, now + HANDSHAKE_TIMEOUT_S, futex)
        welcome = hs.Welcome(hs.PROTOCOL, False, futex)
        slot_bytes, slots = self._options.max_chunk_bytes, self._options.max_chunks
        if self._wants_segment(hello):
            try:
                client.segment = segment = self._new_segment(hello.peer)
            except (SegmentError, MemoryError) as error:
                self._refuse(hello, f"the server could not make a segment: {error}"[:2000])
                return
            welcome = hs.Welcome(hs.PROTOCOL, True, futex, segment.name, segment.session, slot_bytes, slots)
        client.began = time.monotonic()
        self._hub.clients[hello.identity] = client
        if not self._hub.say(hello.identity, hs.WELCOME, welcome):
            self._hub.drop(hello.identity, GONE)  # while its segment was made
        elif client.segment is not None:
            self._hub.connections.keep(hello.fd, hello.identity)

    def _refuse(self, hello: Hello, why: str) -> None:
        self._hub.bid_farewell(hello.identity, hello.fd, hs.REFUSE, why, LEAVE_S)

    def _new_segment(self, peer: Peer) -> Segment:
        """A segment; where there is no memory for it, handshakes that took too long give theirs back first."""
        begin = time.thread_time()  # not what others had of the cores meanwhile
        try:
            while True:
                try:
                    options = self._options
                    return self._hub.fixed.take() or Segment.create(options.max_chunk_bytes, options.max_chunks, 2)
                except SharedMemoryFullError:
                    if not self._end_one(self.under_way(), peer, time.monotonic()):
                        raise
        finally:
            # To free it takes half as long again, or as long.
            self._admission.spend(peer, 2 * (time.thread_time() - begin), time.monotonic())

    def _refusal(self, hello: Hello, now: float) -> str | None:
        """Why this client can't be let in, or None."""
        said = hello.said
        if said.protocol != hs.PROTOCOL:
            return f"the server speaks protocol {hs.PROTOCOL}, the client {said.protocol}: use one version of tsqp"
        if self.full():
            return self.full_text
        if self._hub.reserve.scarce:
            return "the server process has too few file descriptors left (ulimit -n); it serves the clients it has"
        if self._rivals(hello):
            return f"the server has its limit of {self._options.max_handshakes} handshakes under way; try again"
        if self._wants_segment(hello) and not self._admission.may_spend(hello.peer, now):
            return "too many connections came from there in a short time; try again in some seconds"
        return None
