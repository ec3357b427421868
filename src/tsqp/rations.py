"""Rations: of something that is scarce, each of many may take so much at once, and so much per second after that.

A token bucket (Turner, "New directions in communications", 1986) for each that has taken some.
"""

from __future__ import annotations

from collections.abc import Hashable


class Rations:
    """What each has taken; times are of time.monotonic."""

    def __init__(self, at_once: float, per_s: float) -> None:
        self._at_once, self._per_s = at_once, per_s
        self._taken: dict[Hashable, tuple[float, float]] = {}  # how much, and as of when

    def take(self, who: Hashable, amount: float, now: float) -> None:
        """``who`` takes so much; nobody is asked whether it may."""
        self._taken[who] = self._taken_by(who, now) + amount, now

    def left(self, who: Hashable, now: float) -> float:
        """How much ``who`` may take now; negative where it took too much."""
        return self._at_once - self._taken_by(who, now)

    def afford(self, who: Hashable, amount: float, now: float) -> bool:
        """Takes so much if ``who`` may take it, and says whether it did."""
        may = self.left(who, now) >= amount
        if may:
            self.take(who, amount, now)
        return may

    def _taken_by(self, who: Hashable, now: float) -> float:
        taken, since = self._taken.get(who, (0.0, now))
        return max(0.0, taken - self._per_s * (now - since))

    def forget(self, now: float) -> None:
        """Forgets those that have nothing on their account any more."""
        for who in [who for who in self._taken if not self._taken_by(who, now)]:
            del self._taken[who]

    def __len__(self) -> int:
        """How many have something on their account."""
        return len(self._taken)
