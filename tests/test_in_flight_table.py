"""The table of requests in flight, and the lengths of K and V that are reckoned for them, without a server."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rpc_support import PATIENCE_S, until

from tsqp.calls import Site
from tsqp.errors import ConfigError, ProtocolError, WaitTimeoutError
from tsqp.in_flight import InFlight
from tsqp.kv_lengths import Change, KvLengths, Outcome, Reset
from tsqp.pending import PendingCall
from tsqp.protocol import Method
from tsqp.telemetry import Telemetry

# --- the table by itself


class FakeChannel:
    """Replies come when the test says; sends block while ``full`` is set."""

    def __init__(self) -> None:
        self.replies: list = []
        self.arrived = threading.Condition()
        self.full = threading.Event()
        self.sent: list[int] = []
        self.receiving = 0

    def send(self, tensors, *, request_id, timeout, **_):
        end = time.monotonic() + timeout
        while self.full.is_set():
            assert time.monotonic() < end, "the send never got through"
            time.sleep(0.001)
        self.sent.append(request_id)

    def can_send(self):
        return not self.full.is_set()

    def recv(self, timeout=None, forecast=None):
        with self.arrived:
            self.receiving += 1
            try:
                if not self.arrived.wait_for(lambda: self.replies, timeout):
                    raise WaitTimeoutError("no message")
                return self.replies.pop(0)
            finally:
                self.receiving -= 1

    def answer(self, *request_ids):
        with self.arrived:
            self.replies += [FakeReply(number) for number in request_ids]
            self.arrived.notify_all()


class FakeReply:
    tag, status, compute_ns, queue_ns, meta = int(Method.PING), 0, 0, 0, {}
    tensors: tuple = ()

    def __init__(self, request_id):
        self.request_id = request_id


def ping_site():
    return Site(1, Method.PING, None, (), Telemetry())


def ping(site):
    return PendingCall(site, (), (), None)


def test_a_thread_that_has_its_reply_reads_on_for_one_that_can_not_send():
    """The sender found somebody reading, so it does not read itself; the server takes nothing until somebody does."""
    channel, site = FakeChannel(), ping_site()
    flight = InFlight(channel, 64)
    first, second = (flight.submit(ping(site), PATIENCE_S) for _ in range(2))
    reader = threading.Thread(target=first.result)
    reader.start()
    until(lambda: channel.receiving == 1)
    channel.full.set()
    sender = threading.Thread(target=lambda: flight.submit(ping(site), PATIENCE_S))
    sender.start()
    until(lambda: flight._writing)
    channel.answer(1)
    until(first.done)
    channel.answer(2)  # read by the thread that waited for the first
    until(second.done)
    assert reader.is_alive()
    channel.full.clear()
    reader.join(PATIENCE_S)
    sender.join(PATIENCE_S)
    assert not reader.is_alive()
    assert not sender.is_alive()
    assert channel.sent == [1, 2, 3]


def test_ids_that_were_given_up_are_not_kept_without_end(monkeypatch):
    monkeypatch.setattr("tsqp.call_table._MAX_LOST", 10)
    channel, site = FakeChannel(), ping_site()
    flight = InFlight(channel, 64)
    for _ in range(30):
        with pytest.raises(TimeoutError):
            flight.run(ping(site), 0.001)
    assert len(flight._lost) == 10
    channel.answer(30, 25)
    with pytest.raises(TimeoutError):
        flight.run(ping(site), 0.01)
    assert flight.stale_replies == 2
    channel.answer(5)
    with pytest.raises(ProtocolError, match="answered request 5, a second time"):
        flight.run(ping(site), 1.0)


# --- lengths of K and V


STEPS = st.tuples(
    st.sampled_from(["append", "append", "append", "keep", "drop", "reset", "tell"]),
    st.integers(0, 3),
    st.integers(0, 6),
    st.booleans(),
)


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(st.lists(STEPS, max_size=30))
def test_reckoned_lengths_are_the_servers(steps):
    """A server that refuses what does not fit, and now and then what does; its replies arrive in order, later."""
    kv, held = KvLengths(), 0
    kv.apply(first := Change(kv, 0, 0, None, 0, ()))
    first.settle(Outcome.DONE)
    unsettled: list[tuple[Change | Reset, int | None, int]] = []  # change, reckoned, really held; refused: -1

    def tell():
        change, reckoned, real = unsettled.pop(0)
        if real < 0:
            change.settle(Outcome.REFUSED)
            return
        if not change.broken:
            assert reckoned == real
        change.settle(Outcome.DONE)

    for kind, count, size, refused in steps:
        if kind == "tell":
            if unsettled:
                tell()
            continue
        if kind == "reset":
            reset = Reset(kv)
            reset.plan()
            held = 0
            unsettled.append((reset, 0, 0))
            continue
        keep, drop = (size if kind == "keep" else None), (size if kind == "drop" else 0)
        change = Change(kv, 0, count, keep, drop, ())
        try:
            ((reckoned,),) = change.plan()
        except ConfigError:
            assert keep is None
            continue
        if refused or drop > held or (keep is not None and keep > held - drop):
            unsettled.append((change, reckoned, -1))
        else:
            held = (held - drop if keep is None else keep) + count
            unsettled.append((change, reckoned, held))
    while unsettled:
        tell()
    layer = kv._layers[0]
    assert layer.unanswered == []
    assert layer.held in (held, None)
    if layer.held is None:
        with pytest.raises(ConfigError, match="give keep="):
            Change(kv, 0, 1, None, 0, ()).plan()


def test_a_failed_call_makes_the_length_unknown_until_it_is_said():
    kv = KvLengths()
    lost, later = Change(kv, 3, 2, None, 0, (1,)), Change(kv, 3, 1, None, 0, (1,))
    assert lost.plan() == ((1, 2),)
    assert later.plan() == ((1, 3),)
    lost.settle(Outcome.UNKNOWN)
    assert not later.broken
    later.settle(Outcome.REFUSED)
    with pytest.raises(ConfigError, match="layer 3 is unknown"):
        Change(kv, 3, 1, None, 0, ()).plan()
    assert Change(kv, 3, 1, 2, 0, ()).plan() == ((3,),)
    assert Change(kv, 3, 1, None, 1, ()).plan() == ((3,),)
