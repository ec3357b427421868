"""How often strangers may wake the listener's thread, and what they find when it comes to them late."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import zmq
from benchmarks.attackers import hello
from carriers import CARRIERS
from ends import assert_works, client_of
from patience import until
from peers import PATIENCE_S

import tsqp
from tsqp import door, pacing
from tsqp._ring import Segment
from tsqp.listener import Listener
from tsqp.pacing import Pace


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def holds(pace: Pace, pipe: tuple[int, int]) -> bool:
    """Whether the next wake-up waits, until somebody posts something."""
    waits, called = threading.Event(), pace._called
    pace._called = SimpleNamespace(poll=lambda ms: (waits.set(), called.poll(ms))[1])
    waiter = threading.Thread(target=pace.hold)
    waiter.start()
    until(lambda: waits.is_set() or not waiter.is_alive())
    held = waits.is_set()
    os.write(pipe[1], b"x")
    waiter.join(PATIENCE_S)
    assert not waiter.is_alive()
    os.read(pipe[0], 1)
    pace._called = called
    return held


@pytest.fixture
def pace(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Pace:
    """Three wake-ups at once, and then hardly any."""
    monkeypatch.setattr(pacing, "WAKES_AT_ONCE", 3.0)
    monkeypatch.setattr(pacing, "WAKES_PER_S", 1 / PATIENCE_S)
    return Pace(pipe[0])


def test_strangers_wait_once_they_are_many(pace, pipe):
    found = []
    for _ in range(5):
        pace.stranger = True
        found.append(holds(pace, pipe))
    assert found == [False, False, False, True, True]


def test_whoever_has_something_to_send_does_not_wait(pace, pipe):
    for _ in range(3):
        pace.stranger = True
        pace.hold()
    os.write(pipe[1], b"x")
    pace.stranger = True
    pace.hold()  # returns
    os.read(pipe[0], 1)


def test_no_wait_follows_a_client_or_nobody(pace, pipe):
    for _ in range(20):
        pace.stranger = pace.client = True
        assert not holds(pace, pipe)
        assert (pace.stranger, pace.client) == (False, False)
        pace.hold()
    pace.stranger = True
    assert not holds(pace, pipe)  # nothing of it was counted


# --- late --------------------------------------------------------------------------------------------------------


class Gate:
    """Holds listeners' threads while it is closed."""

    def __init__(self) -> None:
        self._open, self._held = threading.Event(), threading.Event()
        self._open.set()

    def hold(self) -> None:
        if not self._open.is_set():
            self._held.set()
            self._open.wait(PATIENCE_S)

    def close(self) -> None:
        self._open.clear()
        assert self._held.wait(PATIENCE_S)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(Pace, "hold", made.hold)
    yield made
    made.open()


@pytest.fixture
def listener(gate: Gate, endpoint: str) -> Iterator[Listener]:
    with tsqp.listen(endpoint, **CARRIERS["ring"].listen_options) as made:
        yield made


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def hello_and_gone(endpoint: str) -> None:
    """A client that is killed right after its first message."""
    before = descriptors()
    with zmq.Context() as context:
        sock = context.socket(zmq.DEALER)
        sock.linger = int(PATIENCE_S * 1000)  # what was sent arrives
        sock.connect(endpoint)
        sock.send_multipart(hello(shm=True))
        sock.close()
    until(lambda: descriptors() <= before)  # libzmq has closed its end, and said so


@pytest.mark.parametrize("stays", [False, True])
def test_the_hello_of_a_connection_that_has_ended_makes_no_client(listener, endpoint, gate, monkeypatch, stays):
    """`stays`: somebody silent has the descriptor now."""
    made = []

    def create(*args: object) -> Segment:
        made.append(args)
        return Segment.create(*args)

    monkeypatch.setattr(door, "Segment", SimpleNamespace(create=create))
    gate.close()
    for _ in range(5):
        hello_and_gone(endpoint)
    with zmq.Context() as context, context.socket(zmq.DEALER) as silent:
        if stays:
            before = descriptors()
            silent.connect(endpoint)
            until(lambda: descriptors() >= before + 2)  # both ends
        gate.open()
        with client_of(listener, CARRIERS["ring"]) as both:
            assert_works(*both)
            assert len(listener._hub.clients) == 1
            assert 1 <= len(made) <= 1 + stays  # of those that had the descriptor the last may be there still
