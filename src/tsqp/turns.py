"""Whose turn it is: a server of one thread answers its clients in rounds, each at most once a round."""

from __future__ import annotations

from collections.abc import Sequence


class Turns:
    """Which of the clients that are ready begins a round.

    It is the next, in the order of connecting, after the one that began the last round in which there was a choice.
    So of `n` clients one that is always ready begins at least every `n`-th such round, whoever else comes and goes,
    and clients that are all ready all the time begin equally often.
    """

    def __init__(self) -> None:
        self._began = -1

    def start(self, numbers: Sequence[int]) -> int:
        """The place in `numbers`, ready clients' places in the order of connecting, of the one that begins."""
        place = next((place for place, number in enumerate(numbers) if number > self._began), 0)
        self._began = numbers[place]
        return place
