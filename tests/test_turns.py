"""The order in which a server's clients begin its rounds, without a server."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.turns import Turns


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 30))
def test_clients_that_are_always_ready_begin_equally_often(count: int, rounds: int) -> None:
    turns, begun = Turns(), Counter[int]()
    for _ in range(count * rounds):
        begun[turns.start(range(count))] += 1
    assert set(begun.values()) == {rounds}
    assert len(begun) == count


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 9)), min_size=30, max_size=60), st.integers(0, 9))
def test_one_that_is_always_ready_begins_every_so_often(others: list[set[int]], patient: int) -> None:
    """However the others come and go."""
    turns, waited = Turns(), 0
    for more in others:
        ready = sorted(more | {patient})
        waited = 0 if ready[turns.start(ready)] == patient else waited + 1
        assert waited < 10


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1))
def test_who_begins_is_ready(rounds: list[set[int]]) -> None:
    turns = Turns()
    for ready in rounds:
        assert 0 <= turns.start(sorted(ready)) < len(ready)


def test_one_that_left_is_no_gap() -> None:
    turns = Turns()
    assert [turns.start([0, 1, 2]) for _ in range(2)] == [0, 1]
    assert turns.start([0, 1]) == 0  # after 1 comes 2, which is gone
    assert turns.start([5, 7]) == 0
    assert turns.start([5, 7]) == 1
    assert turns.start([5, 7, 9]) == 2
