"""SIGSTOP for longer than a timeout: TimeoutError, and after SIGCONT every message arrives, once and whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from carriers import CARRIERS, SMALL, Carrier, recv_numbered
from ends import Ends, ends_over
from peers import PATIENCE_S, Peer
from wire_bytes import check_numbered, numbered

from tsqp.errors import WaitTimeoutError

#: More than the buffers of a socket hold; those of TCP grow.
LARGE, HUGE = 1 << 20, 12 << 20
#: How long an end waits for its stopped peer.
TIMEOUT_S = 0.3


@dataclass(frozen=True)
class Way:
    """How the messages of a test travel."""

    carrier: Carrier
    nbytes: int
    #: A send that timed out may be through nevertheless: libzmq has the message.
    may_be_queued: bool


WAYS = {
    "ring": Way(CARRIERS["ring"], SMALL, False),
    "zmq beside the ring": Way(CARRIERS["ring"], LARGE, True),
    "tiles": Way(CARRIERS["ring-tiled"], LARGE, False),
    "zmq alone": Way(CARRIERS["zmq-ipc"], LARGE, True),
    "tcp alone": Way(CARRIERS["zmq-tcp"], HUGE, True),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@pytest.fixture(params=["server", "client"])
def ends(request: pytest.FixtureRequest, way: Way, endpoint: str, start_peer: Callable[..., Peer]) -> Iterator[Ends]:
    """The parameter is what the process is that gets stopped."""
    with ends_over(way.carrier, request.param, endpoint, start_peer) as made:
        yield made


def assert_nothing_more(ends: Ends) -> None:
    """Neither end has anything left that the other sent."""
    with pytest.raises(WaitTimeoutError):
        ends.channel.recv(0.1)
    with pytest.raises(WaitTimeoutError):
        ends.peer.ask("recv", 0.1)


def send_until_timeout(ends: Ends, way: Way, number: int) -> int:
    """Sends numbered messages until one times out; returns the first number that will not arrive by itself."""
    while True:
        try:
            ends.channel.send([numbered(number, way.nbytes)], request_id=number, timeout=TIMEOUT_S)
        except WaitTimeoutError as error:
            queued = error.queued
            break
        number += 1
    assert way.may_be_queued or not queued
    return number + queued


def test_a_stopped_reader(ends, way):
    ends.peer.stop()
    count = send_until_timeout(ends, way, 0)
    ends.peer.go_on()
    ends.peer.say(("check", [way.nbytes] * (count + 1)))
    ends.channel.send([numbered(count, way.nbytes)], request_id=count, timeout=PATIENCE_S)
    assert ends.peer.hear() == count + 1
    assert_nothing_more(ends)


def test_a_stopped_writer(ends, way):
    ends.peer.stop()
    ends.peer.say(("send", [way.nbytes] * 2))
    for _ in range(2):
        with pytest.raises(TimeoutError):
            ends.channel.recv(TIMEOUT_S)
    ends.peer.go_on()
    recv_numbered(ends.channel, [way.nbytes] * 2)
    assert ends.peer.hear() == 2
    assert_nothing_more(ends)


IN_THE_MIDDLE = pytest.mark.parametrize("way", [name for name in WAYS if name != "tcp alone"], indirect=True)


@IN_THE_MIDDLE
def test_a_writer_stopped_in_the_middle(ends, way):
    """At some moment of a stream: what arrives before the timeout and after it is the whole stream."""
    count = 2000 if way.nbytes == SMALL else 12
    ends.peer.say(("send", [way.nbytes] * count))
    stopped = 0
    number = 0
    while number < count:
        if stopped < 3 and number == stopped * count // 4:
            ends.peer.stop()
            stopped += 1
        try:
            check_numbered(ends.channel.recv(TIMEOUT_S), number, way.nbytes)
            number += 1
        except TimeoutError:
            ends.peer.go_on()
    ends.peer.go_on()
    assert stopped == 3
    assert ends.peer.hear() == count
    assert_nothing_more(ends)


@IN_THE_MIDDLE
def test_a_reader_stopped_in_the_middle(ends, way):
    """A send that timed out is repeated where the message did not stay with libzmq: each arrives once."""
    rounds = 3
    count = 0
    for _ in range(rounds):
        ends.peer.say(("check_until_asked", way.nbytes, count))
        for number in range(count, count + 3):
            ends.channel.send([numbered(number, way.nbytes)], request_id=number, timeout=PATIENCE_S)
        ends.peer.stop()
        count = send_until_timeout(ends, way, count + 3)
        ends.peer.go_on()
        ends.channel.send([], request_id=count, timeout=PATIENCE_S)  # "that's all"
        assert ends.peer.hear() == count
    assert_nothing_more(ends)


@pytest.mark.parametrize("way", ["ring", "zmq alone"], indirect=True)
def test_a_long_stop_is_no_death(ends):
    ends.peer.stop()
    with pytest.raises(WaitTimeoutError, match="wait longer"):
        ends.channel.recv(1.5)
    ends.peer.go_on()
    ends.peer.say(("echo", 1))
    ends.channel.send([numbered(7, SMALL)], request_id=7, timeout=PATIENCE_S)
    check_numbered(ends.channel.recv(PATIENCE_S), 7, SMALL)
    assert ends.peer.hear() == 1
    assert_nothing_more(ends)


def test_small_messages_for_a_stopped_client_do_not_pile_up_without_end(endpoint, start_peer):
    """Where every message takes ZeroMQ the server's queue for a client has a limit, and all of it arrives."""
    carrier = CARRIERS["zmq-ipc"]
    with ends_over(carrier, "client", endpoint, start_peer, max_inbox_bytes=1 << 20) as ends:
        ends.peer.stop()
        count = send_until_timeout(ends, Way(carrier, SMALL, False), 0)
        assert count < 20_000
        ends.peer.go_on()
        ends.peer.say(("check", [SMALL] * (count + 1)))
        ends.channel.send([numbered(count, SMALL)], request_id=count, timeout=PATIENCE_S)
        assert ends.peer.hear() == count + 1
        assert_nothing_more(ends)
