"""Requests in flight to servers that answer late, twice, in any order, wrongly or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rpc_support import (
    GEOMETRY,
    HIDDEN,
    PATIENCE_S,
    VOCAB,
    LyingServer,
    client_of,
    endpoint_in,
    serving,
    tiny_model,
    until,
)

from tsqp.client import GPUClient
from tsqp.errors import ClosedError, MessageError, PeerDiedError, ProtocolError, RemoteError
from tsqp.protocol import Method

#: Rows of which the reply has no room in a slot of the fake server, and takes ZeroMQ.
LARGE_ROWS = GEOMETRY["max_chunk_bytes"] // (4 * VOCAB) + 10


class Holding:
    """Keeps requests until there are ``count``, then answers them in the order ``order`` gives: indices, of which
    some may come twice or be left out.
    """

    def __init__(self, count: int = 0, order=()) -> None:
        self.expect(count, order)

    def expect(self, count: int, order) -> None:
        self.held: list = []
        self.count, self.order = count, list(order)

    def __call__(self, msg):
        if msg.tag == Method.INIT:
            return None
        # The payload of the request comes back in every element of the reply: each request has its own.
        self.held.append((msg.request_id, msg.tag, msg.tensors[0][:, :1].expand(-1, VOCAB).clone()))
        if len(self.held) < self.count:
            return []
        replies = [{"request_id": rid, "tag": tag, "tensors": [out]} for rid, tag, out in self.held]
        return [replies[index] for index in self.order]


def head_of(number: int, rows: int = 1) -> torch.Tensor:
    return torch.full((rows, HIDDEN), float(number))


def answer_of(number: int, rows: int = 1) -> torch.Tensor:
    return torch.full((rows, VOCAB), float(number))


@pytest.mark.watchdog(90)
def test_replies_in_any_order_find_their_calls(tmp_path):
    """Large replies travel by ZeroMQ, small ones by the ring, and results are asked for in a third order."""
    server = Holding()

    @st.composite
    def cases(draw):
        sizes = draw(st.lists(st.sampled_from([1, 1, 2, LARGE_ROWS]), min_size=1, max_size=4))  # as many as slots
        numbers = list(range(len(sizes)))
        return sizes, draw(st.permutations(numbers)), draw(st.permutations(numbers)), draw(st.sets(st.integers(0, 3)))

    with LyingServer(endpoint_in(tmp_path), server) as running, client_of(running) as client:
        client.init()

        @settings(max_examples=120, deadline=None, database=None, derandomize=True)
        @given(cases())
        def check(case):
            sizes, answered, asked, cancelled = case
            last = len(sizes)
            server.expect(last + 1, [*answered, last])
            stale = client.stale_replies
            calls = []
            for number, rows in enumerate(sizes):
                calls.append(client.submit.lm_head(head_of(number, rows)))
            final = client.submit.lm_head(head_of(7))
            dropped = [number for number in range(len(sizes)) if number in cancelled]
            for number in dropped:
                assert calls[number].cancel()
            for number in asked:
                if number not in dropped:
                    assert torch.equal(calls[number].result(PATIENCE_S), answer_of(number, sizes[number]))
            assert torch.equal(final.result(PATIENCE_S), answer_of(7))
            assert client.stale_replies == stale + len(dropped)
            assert client.stats["in_flight"] == 0

        check()
        assert client.stats["zmq_transfers"] > 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"request_id": 99}, "answered request 99, which was never made"),
        ({"request_id": 0}, "answered request 0, which was never made"),
        ({"request_id": 1}, "answered request 1, a second time"),  # Init's
        ({"request_id": 2}, "answered request 2, a second time"),
    ],
)
def test_a_reply_nobody_waits_for_ends_what_is_in_flight(tmp_path, wrong, words):
    seen = []

    def answer(msg):
        if msg.tag == Method.INIT:
            return None
        seen.append(msg.request_id)
        right = {"tensors": [answer_of(len(seen))], "tag": Method.LM_HEAD}
        if len(seen) < 4:
            return []
        if len(seen) > 4:
            return right
        replies = [{"request_id": number, **right} for number in seen]
        return [replies[0], {**right, **wrong}, *replies[1:]]

    with LyingServer(endpoint_in(tmp_path), answer) as server, client_of(server) as client:
        calls = [client.submit.lm_head(head_of(number)) for number in range(4)]
        assert torch.equal(calls[0].result(), answer_of(4))
        errors = [call.exception() for call in calls[1:]]
        assert all(isinstance(error, ProtocolError) and words in str(error) for error in errors)
        assert len({id(error) for error in errors}) == 3
        assert torch.equal(client.lm_head(head_of(0)), answer_of(5))  # after the three that came late
        assert client.stale_replies == 3
        assert client.stats["in_flight"] == 0


def test_a_wrong_reply_fails_its_call_alone(tmp_path):
    lies = iter(
        [
            {"tensors": [answer_of(0)]},
            {"tensors": [answer_of(1).double()]},
            {"tensors": [answer_of(2, 2)]},
            {"tensors": [answer_of(3)], "tag": Method.MATMUL},
            {"status": 8, "meta": {"error": "no"}},
            {"tensors": [answer_of(5)]},
        ]
    )
    with (
        LyingServer(endpoint_in(tmp_path), lambda msg: None if msg.tag == Method.INIT else next(lies)) as server,
        client_of(server) as client,
    ):
        calls = [client.submit.lm_head(head_of(number)) for number in range(6)]
        kinds = [type(call.exception()) for call in calls]
        assert kinds == [type(None), ProtocolError, ProtocolError, ProtocolError, RemoteError, type(None)]
        assert torch.equal(calls[5].result(), answer_of(5))


def test_bytes_that_are_no_message_end_what_is_in_flight(tmp_path):
    """Over ZeroMQ alone, where the fake server can send any bytes."""
    answered = threading.Event()

    def answer(msg):
        if msg.tag == Method.INIT:
            return None
        if msg.request_id == 3:
            (channel,) = server._listener._hub.channels
            channel._link.post(b"rubbish" * 30, [], 0, time.monotonic() + PATIENCE_S)
            answered.set()
            return []
        return {"tensors": [answer_of(1)]} if msg.request_id != 2 else []

    with (
        LyingServer(endpoint_in(tmp_path), answer) as server,
        client_of(server, shm=False) as client,
    ):
        calls = [client.submit.lm_head(head_of(number)) for number in range(2)]
        assert answered.wait(PATIENCE_S)
        for call in calls:
            with pytest.raises(MessageError):
                call.result()
        assert torch.equal(client.lm_head(head_of(1)), answer_of(1))


def test_times_a_server_claims_are_not_believed(tmp_path):
    lie = {"tensors": [answer_of(0)], "compute_ns": 2**63, "queue_ns": 2**64 - 1}
    with (
        LyingServer(endpoint_in(tmp_path), lambda msg: None if msg.tag == Method.INIT else lie) as server,
        client_of(server) as client,
    ):
        for call in [client.submit.lm_head(head_of(0)) for _ in range(2)]:
            call.result()
        client.lm_head(head_of(0))
        row = client.stats["operators"]["gpu_lm_head"]
        assert 0 < row["server_seconds"] + row["queue_seconds"] <= row["seconds"]


# --- ends

MUTE = """
import sys, tsqp
listener = tsqp.listen(sys.argv[1], max_chunk_bytes=1 << 18, max_chunks=64)
print("ready", flush=True)
channel = listener.accept(timeout=30.0)
print("accepted", flush=True)
while True:
    channel.recv(timeout=30.0)
"""


def test_the_death_of_the_server_ends_everything_in_flight(tmp_path):
    endpoint = endpoint_in(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", MUTE, endpoint], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with GPUClient(endpoint, timeout=PATIENCE_S) as client:
            assert process.stdout.readline() == "accepted\n"  # and its segment has no name any more
            calls = [client.submit.ping() for _ in range(50)]
            errors: list[BaseException | None] = [None] * 6
            threads = [
                threading.Thread(target=lambda n=n: errors.__setitem__(n, calls[n].exception(PATIENCE_S)))
                for n in range(6)
            ]
            for thread in threads:
                thread.start()
            until(lambda: len(client._flight._waiters) == 5)
            begin = time.monotonic()
            process.send_signal(signal.SIGKILL)
            for thread in threads:
                thread.join(PATIENCE_S)
            assert all(isinstance(error, PeerDiedError) for error in errors)
            for call in calls:
                with pytest.raises(PeerDiedError):
                    call.result(timeout=0)
            assert time.monotonic() - begin < 5.0
            for again in (client.submit.ping, client.ping):
                with pytest.raises(PeerDiedError):
                    again()
            assert client.stats["in_flight"] == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        (tmp_path / "rpc.sock").unlink()  # a killed server can't


def test_closing_ends_everything_in_flight(tmp_path):
    with LyingServer(endpoint_in(tmp_path), lambda msg: []) as server:
        client = client_of(server)
        calls = [client.submit.ping() for _ in range(3)]
        errors: list[BaseException | None] = []
        threads = [threading.Thread(target=lambda call=call: errors.append(call.exception())) for call in calls[:2]]
        for thread in threads:
            thread.start()
        until(lambda: len(client._flight._waiters) == 1)
        client.close()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        assert calls[2].done()
        assert all(isinstance(error, ClosedError) for error in [*errors, calls[2].exception()])
        assert len(errors) == 2
        for again in (client.submit.ping, client.ping):
            with pytest.raises(ClosedError):
                again()


class Interrupting:
    """A lock whose first release is followed by Ctrl-C at once."""

    def __init__(self, lock: Any) -> None:
        self._lock, self._once = lock, True

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
        if self._once:
            self._once = False
            raise KeyboardInterrupt


def test_an_interrupt_between_sending_and_receiving(tmp_path):
    """The reply is dropped when it comes, and whoever asks next reads."""
    with serving(tiny_model(), tmp_path) as server, client_of(server) as client:
        client.ping()
        client._flight._sending = Interrupting(client._flight._sending)
        with pytest.raises(KeyboardInterrupt):
            client.ping()
        assert not client._flight._reading.locked()
        for _ in range(3):
            assert client.ping() > 0
        assert client.stale_replies == 1


@pytest.mark.parametrize("step", ["_enlist", "_transmit", "_prepare"])
def test_an_interrupt_while_a_request_is_submitted(tmp_path, monkeypatch, step):
    """Nothing stays in flight that was never sent, and what builds upon it is told."""
    with serving(tiny_model(), tmp_path) as server, client_of(server) as client:
        client.ping()
        flight = client._flight
        after = getattr(flight, step)

        def interrupt(*arguments):
            monkeypatch.undo()
            after(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(flight, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.submit.ping()
        assert not flight._pending
        for _ in range(3):
            assert client.ping() > 0
        client.submit.ping().result()


def test_an_interrupt_leaves_the_call_usable(tmp_path):
    """Ctrl-C while a result is waited for: the handle can be asked again, a blocking call's reply is dropped."""
    server = Holding(1, [0])
    with LyingServer(endpoint_in(tmp_path), server) as running, client_of(running) as client:
        client.init()
        main = threading.main_thread().ident
        assert main is not None
        server.expect(3, [0, 1, 2])
        pending = client.submit.lm_head(head_of(1))

        def interrupt(held: int) -> None:
            until(lambda: len(server.held) == held and client._flight._reading.locked())
            time.sleep(0.05)  # now it waits
            signal.pthread_kill(main, signal.SIGINT)

        for held, ask in enumerate((pending.result, lambda: client.lm_head(head_of(2))), 1):
            interrupting = threading.Thread(target=interrupt, args=(held,))
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (it may come as soon as the thread runs)
                interrupting.start()
                ask()
            interrupting.join()
        assert torch.equal(client.lm_head(head_of(3)), answer_of(3))
        assert torch.equal(pending.result(), answer_of(1))
        assert client.stale_replies == 1
