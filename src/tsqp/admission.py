"""Who of those that knock is let in next, and who has to go for it.

A handshake that is under way takes a place, and hundreds of megabytes of shared memory that were made for it. So only
a few are under way at once, one that lingers gives way to whoever waits, whoever has fewest of them comes first, and
the time that making memory takes is rationed. What is shared here is shared among peers (see ``connections``): a
process, an address, or a key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from . import handshake
from .connections import Peer, oldest_of_most
from .rations import Rations

#: A handshake that took longer may have to give way to another one: of others, or of its own process or key. An honest
#: one takes milliseconds, but on a busy machine a client may be kept from its core meanwhile.
LINGER_S, OWN_LINGER_S = 0.5, 2.0
#: What making and freeing segments may cost the I/O thread for one peer, in seconds: at once, and per second after
#: that. A segment of the default size takes 0.1 s: 16 clients of one process are let in as fast as they come.
BURST_S, SHARE = 2.0, 0.1
#: What a handshake that is not finished counts as beside that.
WASTE_S = 1.0


class Handshake(Protocol):
    """A handshake under way: whose it is, and when it began (time.monotonic seconds)."""

    @property
    def peer(self) -> Peer: ...
    @property
    def began(self) -> float: ...


H = TypeVar("H", bound=Handshake)


@dataclass(frozen=True)
class Hello:
    """A hello that is not answered yet: whose, what it says, and since when it waits (time.monotonic seconds)."""

    identity: bytes
    fd: int
    said: handshake.Hello
    peer: Peer
    since: float

    @property
    def shm(self) -> bool:
        """The client can map this host's shared memory."""
        return self.said.shm


class Admission:
    """The hellos that wait, by identity and in the order of coming, and what each peer has cost."""

    def __init__(self) -> None:
        self.hellos: dict[bytes, Hello] = {}
        self._spent = Rations(BURST_S, SHARE)  # seconds

    def in_turn(self, under_way: Sequence[Handshake]) -> list[Hello]:
        """The hellos in the order of their turns: each peer's one by one, first of those with fewest handshakes."""
        counts = Counter(handshake.peer for handshake in under_way)
        turns = []
        for number, hello in enumerate(self.hellos.values()):
            turns.append((counts[hello.peer], number, hello))
            counts[hello.peer] += 1
        return [hello for _, _, hello in sorted(turns, key=lambda turn: turn[:2])]

    def gives_way(self, under_way: Sequence[H], peer: Peer, now: float) -> H | None:
        """The handshake that has to go for one of ``peer``: the oldest of the peer that has most of them, if that is
        clearly more than ``peer`` has or it took too long; None: all may stay."""
        victim = oldest_of_most(under_way, lambda handshake: handshake.peer)
        if victim is None:
            return None
        counts = Counter(handshake.peer for handshake in under_way)
        unfair = counts[victim.peer] >= counts[peer] + 2
        own = victim.peer == peer and peer[0] != "address"  # which others share
        lingers_s = OWN_LINGER_S if own else LINGER_S
        return victim if unfair or now - victim.began > lingers_s else None

    def spend(self, peer: Peer, seconds: float, now: float) -> None:
        """Making something for ``peer`` took this long."""
        self._spent.take(peer, seconds, now)

    def wasted(self, peer: Peer, now: float) -> None:
        """A handshake of ``peer`` was not finished. An address is not blamed: others share it."""
        if peer[0] != "address":
            self.spend(peer, WASTE_S, now)

    def may_spend(self, peer: Peer, now: float) -> bool:
        """False while making things for ``peer`` has taken too long."""
        return self._spent.left(peer, now) > 0.0

    def forget(self, now: float) -> None:
        """Forgets peers that have nothing on their account any more."""
        self._spent.forget(now)
