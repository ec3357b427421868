"""How many positions of K and V the server holds per layer, as the runner reckons it.

The length decides the shape of the next scores, so it has to be known before the replies to earlier requests
came: each request changes it when it is sent, on the assumption that the requests before it succeed. A reply
that says otherwise takes the assumption back.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Sequence

from .calls import Shape, Shapes
from .errors import ConfigError


class Outcome(enum.Enum):
    """What became of a request: done, refused (a refused request changes nothing), or nobody knows."""

    DONE = 0
    REFUSED = 1
    UNKNOWN = 2


class Change:
    """What one request does to the length of one layer: drop ``drop`` positions, keep ``keep`` of the rest
    (None: all), append ``count``. ``lead`` are the dimensions of its scores before the last, ``keys`` is how many
    positions those are for (None: all).
    """

    __slots__ = ("_kv", "answered", "before", "broken", "count", "drop", "keep", "keys", "layer", "lead")

    def __init__(
        self,
        kv: KvLengths,
        layer: int,
        count: int,
        keep: int | None,
        drop: int,
        lead: Shape,
        keys: int | None = None,
    ) -> None:
        self._kv = kv
        self.layer = layer
        self.count, self.keep, self.drop = count, keep, drop
        self.lead, self.keys = lead, keys
        self.before: int | None = 0
        self.answered = False
        #: An earlier request this one was built upon was refused.
        self.broken = False

    def plan(self) -> Shapes:
        """Reckons the change in, in the order of sending; returns the shapes of the reply.

        Raises :class:`ConfigError` where the length before is unknown and matters.
        """
        length = self._kv.apply(self)
        return ((*self.lead, length if self.keys is None else self.keys),)

    def settle(self, outcome: Outcome) -> None:
        """To be told once what became of the request."""
        self._kv.settle(self, outcome)


class Reset:
    """What DropCache does: every layer is empty afterwards."""

    def __init__(self, kv: KvLengths) -> None:
        self._kv = kv
        self._changes: Sequence[Change] = ()
        self.broken = False

    def plan(self) -> Shapes:
        self._changes = [Change(self._kv, layer, 0, 0, 0, ()) for layer in self._kv.layers()]
        for change in self._changes:
            self._kv.apply(change)
        return ()

    def settle(self, outcome: Outcome) -> None:
        for change in self._changes:
            self._kv.settle(change, outcome)


class _Layer:
    __slots__ = ("held", "unanswered")

    def __init__(self) -> None:
        self.held: int | None = 0  # after everything sent so far; None where nobody knows
        self.unanswered: list[Change] = []  # in the order of sending; answered ones until those before them are


class KvLengths:
    """The lengths of all layers. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: dict[int, _Layer] = {}

    def layers(self) -> list[int]:
        """The layers anything was ever sent for."""
        with self._lock:
            return list(self._layers)

    def apply(self, change: Change) -> int:
        """The layer's length after ``change``; raises :class:`ConfigError` where it can't be known."""
        with self._lock:
            layer = self._layers.setdefault(change.layer, _Layer())
            change.before = layer.held
            if change.keep is not None:
                after = change.keep + change.count
            elif layer.held is not None:
                after = layer.held - change.drop + change.count
            else:
                raise ConfigError(
                    f"an earlier call failed on its way: what the server holds of layer {change.layer} is unknown; "
                    "give keep=, or call drop_cache() and start afresh"
                )
            layer.held = after
            layer.unanswered.append(change)
            return after

    def settle(self, change: Change, outcome: Outcome) -> None:
        """Takes back what was assumed of ``change``, unless it is done, and of what was built upon it."""
        with self._lock:
            layer = self._layers[change.layer]
            changes = layer.unanswered
            change.answered = True
            if outcome is not Outcome.DONE:
                later = changes[changes.index(change) + 1 :]
                self._take_back(layer, change, later, outcome)
            while changes and changes[0].answered:
                del changes[0]

    def _take_back(self, layer: _Layer, change: Change, later: list[Change], outcome: Outcome) -> None:
        for successor in later:
            successor.before = None
            if successor.keep is not None:
                return  # what the layer holds after that one does not depend on this one
            successor.broken |= outcome is Outcome.REFUSED
        layer.held = change.before if outcome is Outcome.REFUSED and not later else None
