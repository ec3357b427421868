"""Carriers chosen by what they cost: the model alone, and channels that measure and learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from carriers import CARRIERS, CHUNK, LARGE, SMALL, Pair, pass_on
from peers import PATIENCE_S
from wire_bytes import check_numbered, numbered

import tsqp
from tsqp.choosing import DEFAULTS, RING, TILE, ZMQ, Chooser, Cost, cost_of
from tsqp.errors import ConfigError

SLOT = 10 << 20
CHEAP, DEAR = Cost(1e3, 0.05), Cost(1e5, 1.0)


def choices(chooser: Chooser, nbytes: int, count: int = 200) -> dict[str, int]:
    taken = [chooser.carrier(nbytes) for _ in range(count)]
    return {carrier: taken.count(carrier) for carrier in set(taken)}


# --- the model ------------------------------------------------------------------------------------------------


def test_a_line_goes_through_two_measurements() -> None:
    cost = cost_of((1000, 5000.0), (101000, 55000.0))
    assert cost.per_byte_ns == pytest.approx(0.5)
    assert cost.of(1000) == pytest.approx(5000)
    assert cost.of(101000) == pytest.approx(55000)
    assert cost_of((1000, 5000.0), (2000, 4000.0)) == Cost(5000.0, 0.0)  # noise: never a negative price
    assert cost_of((1000, 10.0), (2000, 5000.0)).fixed_ns == 0.0


@pytest.mark.parametrize(("threshold", "expected"), [("slot", SLOT), (5000, 5000), (1 << 40, SLOT)])
def test_a_fixed_threshold_stays_whatever_is_noted(threshold: int | str, expected: int) -> None:
    chooser = Chooser(threshold, "zmq", SLOT)
    for _ in range(100):
        chooser.note(ZMQ, 1 << 20, 1.0)
        chooser.note(RING, 1 << 20, 1e12)
    assert chooser.threshold == expected
    assert choices(chooser, expected - 1) == {RING: 200}
    assert choices(chooser, SLOT) == {ZMQ: 200}
    assert not chooser.learns


def test_without_a_ring_everything_takes_zmq() -> None:
    for large in ("zmq", "tile", "auto"):
        assert choices(Chooser("auto", large, 0), 1) == {ZMQ: 200}


def test_the_ring_keeps_what_it_does_better() -> None:
    chooser = Chooser("auto", "auto", SLOT)
    chooser.start({RING: CHEAP, TILE: CHEAP, ZMQ: DEAR})
    assert chooser.threshold == SLOT
    assert choices(chooser, SLOT)[TILE] > 180


def test_zmq_gets_what_it_does_better_and_the_ring_is_still_tried() -> None:
    chooser = Chooser("auto", "auto", SLOT)
    chooser.start({RING: Cost(1e3, 1.0), TILE: Cost(1e3, 1.0), ZMQ: Cost(1e5, 0.3)})
    threshold = chooser.threshold
    assert 1e5 < threshold < 1e6
    assert chooser.costs[ZMQ].of(threshold) < chooser.costs[RING].of(threshold)
    below, above = choices(chooser, threshold - 1), choices(chooser, threshold)
    assert below == {RING: 200}
    assert 0 < above[RING] < 20
    assert choices(chooser, 2 * SLOT)[ZMQ] > 180


@pytest.mark.parametrize("nbytes", [1 << 20, 40 << 20])
def test_what_turns_out_slower_is_left(nbytes: int) -> None:
    """A wrong start is corrected by what messages are seen to take."""
    chooser = Chooser("auto", "auto", SLOT)
    chooser.start({RING: Cost(1e3, 1.0), TILE: Cost(1e3, 1.0), ZMQ: Cost(1e4, 0.3)})
    really = {RING: CHEAP, TILE: CHEAP, ZMQ: Cost(1e4, 0.5)}
    for _ in range(2000):
        carrier = chooser.carrier(nbytes)
        chooser.note(carrier, nbytes, really[carrier].of(nbytes))
    assert choices(chooser, nbytes).get(ZMQ, 0) < 20


def test_a_hopeless_carrier_is_not_tried_again() -> None:
    chooser = Chooser("slot", "auto", SLOT)
    chooser.start({TILE: CHEAP, ZMQ: DEAR})
    assert choices(chooser, 4 * SLOT) == {TILE: 200}


def test_one_channel_does_not_change_anothers_start() -> None:
    before = {carrier: Cost(cost.fixed_ns, cost.per_byte_ns) for carrier, cost in DEFAULTS.items()}
    Chooser("auto", "auto", SLOT).note(ZMQ, 1000, 1e9)
    assert before == DEFAULTS


# --- channels -------------------------------------------------------------------------------------------------


@pytest.fixture(params=[{"threshold": "auto"}, {"large": "auto"}, {"threshold": "auto", "large": "auto"}], ids=str)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture(params=["ring", "ring-tcp", "zmq-ipc"])
def pair(request: pytest.FixtureRequest, endpoint: str, options: dict[str, Any]) -> Iterator[Pair]:
    carrier = CARRIERS[request.param]
    with (
        tsqp.listen(carrier.endpoint(endpoint), **{**carrier.listen_options, **options}) as listener,
        tsqp.connect(listener.endpoint, PATIENCE_S, **{**carrier.connect_options, **options}) as client,
        listener.accept(PATIENCE_S) as server,
    ):
        yield Pair(listener, client, server)


def test_every_size_arrives_in_order_whatever_is_chosen(pair: Pair) -> None:
    sizes = [0, SMALL, CHUNK - 320, CHUNK, LARGE, 10 * CHUNK, SMALL, CHUNK // 2] * 6
    for number, nbytes in enumerate(sizes):
        sender, receiver = (pair.client, pair.server) if number % 3 else (pair.server, pair.client)
        message = pass_on(sender, receiver, [numbered(number, nbytes)], request_id=number)
        check_numbered(message, number, nbytes)
    assert pair.client.stats["sent_messages"] + pair.client.stats["received_messages"] == len(sizes)


def test_the_threshold_never_exceeds_a_slot(pair: Pair) -> None:
    for channel in (pair.client, pair.server):
        assert 0 <= channel.threshold <= CHUNK


def test_a_fixed_threshold_below_a_slot(endpoint: str) -> None:
    with (
        tsqp.listen(endpoint, max_chunk_bytes=CHUNK, max_chunks=4) as listener,
        tsqp.connect(listener.endpoint, PATIENCE_S, threshold=5000) as client,
        listener.accept(PATIENCE_S) as server,
    ):
        carriers = [pass_on(client, server, [numbered(1, nbytes)]).carrier for nbytes in (4000, 6000)]
        assert carriers == ["ring", "zmq"]
        assert pass_on(server, client, [numbered(1, 6000)]).carrier == "ring"  # the other end's own choice


@pytest.mark.parametrize(
    "wrong",
    [{"large": "udp"}, {"threshold": 0}, {"threshold": -5}, {"threshold": "fast"}, {"threshold": True}],
    ids=str,
)
def test_what_is_no_choice_is_refused(endpoint: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        tsqp.listen(endpoint, **wrong)
    with pytest.raises(ConfigError):
        tsqp.connect(endpoint, 0.1, **wrong)
