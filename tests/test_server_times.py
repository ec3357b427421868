"""Where the server's computations are placed on the runner's clock."""

from __future__ import annotations

import random

import pytest

from tsqp.server_times import Flight, place_computations


def test_the_way_there_is_as_long_as_the_way_back() -> None:
    assert place_computations([Flight(100, 200, 40, 20)]) == [(140, 180)]
    assert place_computations([]) == []


def test_a_computation_waits_for_the_one_before_it() -> None:
    # Both were sent at once and answered after each other: by itself each would lie in the middle.
    assert place_computations([Flight(0, 50, 40, 0), Flight(0, 90, 40, 40)]) == [(5, 45), (45, 85)]


def test_a_computation_leaves_room_for_those_behind_it() -> None:
    # The runner reads the first reply late, after sending the others: in the middle, they would not fit behind it.
    flights = [Flight(0, 100, 30, 0), Flight(1, 101, 30, 30), Flight(2, 102, 30, 60)]
    placed = place_computations(flights)
    assert [end - begin for begin, end in placed] == [30, 30, 30]
    assert placed[0][0] >= 0
    assert placed[2][1] <= 102


def test_claims_that_do_not_fit_are_cut() -> None:
    assert place_computations([Flight(10, 20, 1000, 500)]) == [(10, 20)]
    assert place_computations([Flight(10, 20, 10, 0), Flight(11, 21, 10, 0)]) == [(10, 20), (20, 21)]


def true_calls(rng: random.Random, pipelined: bool) -> tuple[list[Flight], list[tuple[float, float]]]:
    """Calls to a simulated server whose clock is the runner's, and when it really computed."""
    flights, truth, now, free = [], [], 0.0, 0.0
    for _ in range(40):
        way, compute, sent = rng.uniform(1, 5), rng.uniform(1, 30), now
        arrived = sent + way
        begin = max(arrived, free)
        free = begin + compute
        flights.append(Flight(sent, free + way, compute, begin - arrived))
        truth.append((begin, free))
        now = sent + rng.uniform(0.1, 20) if pipelined else free + way
    return flights, truth


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("pipelined", [False, True])
def test_a_server_with_equal_ways_is_found_where_it_was(pipelined: bool, seed: int) -> None:
    flights, truth = true_calls(random.Random(seed), pipelined)
    for (begin, end), (true_begin, true_end) in zip(place_computations(flights), truth, strict=True):
        assert begin == pytest.approx(true_begin, abs=1e-6)
        assert end == pytest.approx(true_end, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_claimed_nothing_overlaps_or_leaves_its_call(seed: int) -> None:
    rng = random.Random(seed)
    sent, flights = 0.0, []
    for _ in range(60):
        sent += rng.choice([0.0, 0.1, 5.0])
        flights.append(Flight(sent, sent + rng.choice([0.0, 1.0, 50.0]), rng.choice([0, 1, 60]), rng.choice([0, 9])))
    placed = place_computations(flights)
    busy_until = 0.0
    for flight, (begin, end) in zip(flights, placed, strict=True):
        assert flight.sent <= begin <= end <= flight.received
        assert begin == end or begin >= busy_until
        assert end - begin <= flight.compute + 1e-9
        busy_until = max(busy_until, end)
