"""Which carrier a message takes: one slot, tiles through the ring, or ZeroMQ. By size, or by what each costs here.

A carrier's cost is modelled as ``fixed + nbytes * per byte``. Both are measured once when the connection is made;
the part per byte goes on learning from every message that is timed anyway, and now and then a message is sent by
the carrier that seems the slower one, so that an estimate can't be wrong for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

RING, TILE, ZMQ = "ring", "tile", "zmq"
#: How much of a new observation enters an estimate.
_WEIGHT = 0.2
#: Of so many large messages one goes the other way.
_EXPLORE_EVERY = 32
#: A carrier that seems this many times slower is not tried again just to make sure.
_HOPELESS = 8.0
#: ZeroMQ has to be better than the ring by this factor before it is preferred below the slots' size.
_MARGIN = 1.25


@dataclass
class Cost:
    """What a carrier costs, in nanoseconds."""

    fixed_ns: float
    per_byte_ns: float

    def of(self, nbytes: int) -> float:
        return self.fixed_ns + nbytes * self.per_byte_ns

    def note(self, nbytes: int, spent_ns: float) -> None:
        """A message of `nbytes` took `spent_ns`."""
        seen = max(0.0, spent_ns - self.fixed_ns) / max(1, nbytes)
        self.per_byte_ns += _WEIGHT * (seen - self.per_byte_ns)


def cost_of(small: tuple[int, float], large: tuple[int, float]) -> Cost:
    """The line through two measurements, each bytes and nanoseconds; neither part is negative."""
    per_byte = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    return Cost(max(0.0, small[1] - small[0] * per_byte), per_byte)


#: Before anything was measured: about what a current machine does, so that the first choices are sensible.
DEFAULTS = {RING: Cost(3e3, 0.06), TILE: Cost(5e3, 0.08), ZMQ: Cost(9e4, 0.5)}


class Chooser:
    """Decides for one direction of one channel.

    `threshold`: bytes from which a message does not lie in one slot, or ``auto``; `large`: ``zmq``, ``tile`` or
    ``auto``; `slot_bytes`: the size of a slot, 0 where there is no ring.
    """

    def __init__(self, threshold: int | str, large: str, slot_bytes: int) -> None:
        self.learns_threshold = threshold == "auto" and slot_bytes > 0
        self.learns_large = large == "auto" and slot_bytes > 0
        self.costs = {carrier: Cost(cost.fixed_ns, cost.per_byte_ns) for carrier, cost in DEFAULTS.items()}
        self._large, self._slot_bytes = large, slot_bytes
        self._fixed = slot_bytes if isinstance(threshold, str) else min(threshold, slot_bytes)
        self._turn = 0
        self.threshold = self._find_threshold()

    def _find_threshold(self) -> int:
        """The size from which ZeroMQ is the better one, at most a slot's."""
        if not self.learns_threshold:
            return self._fixed
        ring, zmq = self.costs[RING], self.costs[ZMQ]
        gain = ring.per_byte_ns - zmq.per_byte_ns * _MARGIN
        if gain <= 0:
            return self._slot_bytes
        return min(self._slot_bytes, max(1, int((zmq.fixed_ns * _MARGIN - ring.fixed_ns) / gain)))

    def start(self, measured: dict[str, Cost]) -> None:
        """Takes what was measured when the connection was made."""
        self.costs.update(measured)
        self.threshold = self._find_threshold()

    def carrier(self, nbytes: int) -> str:
        """The carrier of a message of `nbytes` that is at or above the threshold, or could not go the short way."""
        if self._slot_bytes == 0:
            return ZMQ
        if nbytes < self.threshold:
            return RING
        if nbytes < self._slot_bytes and self.learns_threshold:
            return self._perhaps_other(ZMQ, RING, nbytes)
        if not self.learns_large:
            return self._large if self._large != "auto" else TILE
        best, other = sorted((TILE, ZMQ), key=lambda carrier: self.costs[carrier].of(nbytes))
        return self._perhaps_other(best, other, nbytes)

    def _perhaps_other(self, best: str, other: str, nbytes: int) -> str:
        self._turn += 1
        hopeless = self.costs[other].of(nbytes) > _HOPELESS * self.costs[best].of(nbytes)
        return other if self._turn % _EXPLORE_EVERY == 0 and not hopeless else best

    def note(self, carrier: str, nbytes: int, spent_ns: float) -> None:
        """A message took `spent_ns` from the call's start until the peer, or libzmq, had it all."""
        self.costs[carrier].note(nbytes, spent_ns)
        self.threshold = self._find_threshold()

    @property
    def learns(self) -> bool:
        """Whether anything is to be timed."""
        return self.learns_threshold or self.learns_large
