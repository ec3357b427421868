"""Many requests in flight on one channel, with a real server: results, order, bounds, carriers."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import CancelledError

import pytest
import torch
from rpc_support import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    PATIENCE_S,
    client_of,
    endpoint_in,
    gated_model,
    run_all,
    serving,
    tiny_model,
    until,
)

import tsqp
from tsqp import in_flight
from tsqp.client import GPUClient
from tsqp.errors import ConfigError, RemoteError
from tsqp.pending import PendingCall
from tsqp.protocol import Status

pytest_plugins = ["rpc_fixtures"]

Q_PROJ = ["q_proj"]


# --- results


def test_every_call_can_be_submitted(model, client):
    h, a, b = torch.randn(3, HIDDEN), torch.randn(2, 3), torch.randn(3, 4)
    q, k, v = (torch.randn(1, heads, 2, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    probs = torch.rand(1, HEADS, 2, 2)
    calls = [
        ("ping", (), {}),
        ("embedding", (torch.arange(4),), {}),
        ("embedding", (torch.arange(4),), {"module": "model.embed_tokens"}),
        ("batch_linear", (1, ["q_proj", "k_proj"], h), {}),
        ("linear", ("lm_head", h), {}),
        ("lm_head", (h,), {}),
        ("matmul", (a, b), {}),
        ("attention_scores", (0, q, k, v), {"keep": 0}),
        ("attention_values", (0, probs), {}),
        ("drop_cache", (), {}),
    ]
    by_method = [getattr(client.submit, name)(*args, **how) for name, args, how in calls]
    by_name = [client.submit(name, *args, **how) for name, args, how in calls]
    for (name, args, how), *pending in zip(calls, by_method, by_name, strict=True):
        expected = getattr(client, name)(*args, **how)
        for call in pending:
            assert isinstance(call, PendingCall)
            assert call.exception() is None
            result = call.result()
            if name == "ping":
                assert result is None
            else:
                torch.testing.assert_close(result, expected, rtol=0, atol=0)
            assert call.done()
            assert not call.cancelled()
    numbers = client.submit.server_stats().result()
    assert numbers["requests"] == client.round_trips == 3 * len(calls) + 2  # with Init, and itself


def test_results_come_in_the_callers_dtype(tmp_path):
    with serving(tiny_model(torch.bfloat16), tmp_path) as server, client_of(server) as client:
        h = torch.randn(2, HIDDEN)
        single, several = client.submit.lm_head(h), client.submit.batch_linear(0, ["q_proj", "k_proj"], h)
        assert single.result().dtype == torch.float32
        assert [out.dtype for out in several.result()] == [torch.float32] * 2
        assert client.submit.embedding(torch.arange(2)).result().dtype == torch.bfloat16


def test_results_may_be_asked_for_in_any_order_and_twice(model, client):
    inputs = [torch.randn(1 + number % 3, HIDDEN) for number in range(40)]
    calls = [client.submit.lm_head(h) for h in inputs]
    order = list(range(40))
    random.Random(1).shuffle(order)
    for number in [*order, *order]:
        torch.testing.assert_close(calls[number].result(), model.lm_head(inputs[number]).detach())
    assert calls[0].result() is calls[0].result()
    assert client.stats["in_flight"] == 0


def test_inputs_may_be_changed_once_submitted(model, client):
    h = torch.randn(2, HIDDEN)
    expected = model.lm_head(h).detach()
    call = client.submit.lm_head(h)
    h.zero_()
    torch.testing.assert_close(call.result(), expected)


def test_blocking_calls_go_between(model, client):
    h = torch.randn(2, HIDDEN)
    for _ in range(20):
        calls = [client.submit.lm_head(h * number) for number in range(3)]
        torch.testing.assert_close(
            client.batch_linear(0, Q_PROJ, h)[0], model.model.layers[0].self_attn.q_proj(h).detach()
        )
        assert all(call.done() for call in calls)  # the server answers in order, and who waits reads for all
        for number, call in enumerate(calls):
            torch.testing.assert_close(call.result(timeout=0), model.lm_head(h * number).detach())


def test_what_is_wrong_with_the_arguments_is_told_at_once(client):
    h = torch.randn(1, HIDDEN)
    client.init()
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        client.submit.batch_linear(9, Q_PROJ, h)
    with pytest.raises(ConfigError, match="there is no call 'close' to submit; there are embedding, batch_linear"):
        client.submit("close")
    with pytest.raises(ConfigError, match="there is no call '_send'"):
        client.submit("_send")
    assert client.round_trips == 1


def test_a_refused_request_fails_alone(model, client):
    good, bad = torch.randn(2, HIDDEN), torch.randn(2, HIDDEN - 1)
    calls = [client.submit.lm_head(good if number % 2 else bad) for number in range(10)]
    for number, call in enumerate(calls):
        if number % 2:
            torch.testing.assert_close(call.result(), model.lm_head(good).detach())
        else:
            for _ in range(2):
                with pytest.raises(RemoteError, match=r"expected \[\.\., 64\]") as caught:
                    call.result()
            assert caught.value.code == Status.BAD_SHAPE
            assert call.exception() is caught.value
    assert client.errors == 5
    assert client.round_trips == 11


def test_a_message_that_can_not_be_sent_leaves_nothing_behind(model, client):
    h = torch.randn(1, HIDDEN)
    call = client.submit.lm_head(h)
    with pytest.raises(tsqp.errors.RankError):
        client.submit.lm_head(h.reshape((1,) * 8 + (HIDDEN,)))
    torch.testing.assert_close(call.result(), model.lm_head(h).detach())
    assert client.stats["in_flight"] == 0
    torch.testing.assert_close(client.lm_head(h), model.lm_head(h).detach())


# --- waiting, cancelling


def test_a_result_that_timed_out_can_be_asked_for_again(tmp_path):
    model = gated_model()
    with serving(model, tmp_path) as server, client_of(server) as client:
        h = torch.randn(2, HIDDEN)
        call = client.submit.lm_head(h)
        for wait in (0, 0.05):
            with pytest.raises(TimeoutError, match="it may still come, ask again"):
                call.result(timeout=wait)
            with pytest.raises(TimeoutError):
                call.exception(timeout=wait)
        assert not call.done()
        model.lm_head.gate.set()
        torch.testing.assert_close(call.result(PATIENCE_S), model.lm_head(h).detach())
        assert client.stale_replies == 0


def test_a_cancelled_call_drops_its_reply(tmp_path):
    model = gated_model()
    with serving(model, tmp_path) as server, client_of(server) as client:
        h = torch.randn(2, HIDDEN)
        calls = [client.submit.lm_head(h * number) for number in range(4)]
        assert calls[1].cancel()
        assert calls[1].cancel()
        assert calls[1].cancelled()
        assert calls[1].done()
        for ask in (calls[1].result, calls[1].exception):
            with pytest.raises(CancelledError):
                ask()
        model.lm_head.gate.set()
        for number in (0, 2, 3):
            torch.testing.assert_close(calls[number].result(), model.lm_head(h * number).detach())
            assert not calls[number].cancel()
            assert not calls[number].cancelled()
        assert client.stale_replies == 1
        assert client.stats["in_flight"] == 0
        assert client.stats["calls"]["LMHead"] == 3


def test_a_cancel_ends_another_threads_wait(tmp_path):
    model = gated_model()
    with serving(model, tmp_path) as server, client_of(server) as client:
        first, second = (client.submit.lm_head(torch.randn(1, HIDDEN)) for _ in range(2))
        ended = threading.Event()

        def wait():
            with pytest.raises(CancelledError):
                second.result()
            ended.set()

        def cancel():
            until(lambda: len(client._flight._waiters) == 1)
            assert second.cancel()
            assert ended.wait(PATIENCE_S)
            model.lm_head.gate.set()

        reader = threading.Thread(target=first.result)
        reader.start()
        until(client._flight._reading.locked)
        run_all(wait, cancel)
        reader.join()


# --- bounds


@pytest.mark.parametrize(("slots", "bound"), [(2, 1000), (2, 64), (1, 1000), (4, 1)])
def test_a_thousand_submits_get_through_a_small_ring(model, tmp_path, slots, bound):
    with (
        serving(model, tmp_path, max_chunks=slots) as server,
        client_of(server, max_in_flight=bound) as client,
    ):
        h = torch.randn(1, HIDDEN)
        expected = model.lm_head(h).detach()
        calls = []
        for number in range(1000):
            calls.append(client.submit.lm_head(h * (number % 7)))
            assert len(client._flight) <= bound
        for number, call in enumerate(calls):
            torch.testing.assert_close(call.result(), expected * (number % 7))


def test_replies_are_taken_while_requests_are_submitted(model, client):
    """Else the server, whose ring of replies is full after four, would stop until somebody waits for a result."""
    client.init()
    h = torch.randn(1, HIDDEN)
    calls = []
    for number in range(30):
        if number >= 8:
            until(client._channel.poll)
        calls.append(client.submit.lm_head(h))
        assert len(client._flight) <= 8
    assert sum(call.done() for call in calls) >= 22
    for call in calls:
        torch.testing.assert_close(call.result(), model.lm_head(h).detach())


def test_at_the_bound_a_submit_waits_and_times_out(tmp_path):
    model = gated_model()
    with serving(model, tmp_path) as server, client_of(server, max_in_flight=3) as client:
        client.init()
        h = torch.randn(1, HIDDEN)
        calls = [client.submit.lm_head(h) for _ in range(3)]
        client.timeout = 0.1
        with pytest.raises(TimeoutError, match=r"3 requests of \d+ bytes are in flight"):
            client.submit.lm_head(h)
        with pytest.raises(TimeoutError):
            client.lm_head(h)
        client.timeout = PATIENCE_S
        threading.Timer(0.1, model.lm_head.gate.set).start()
        calls.append(client.submit.lm_head(h))
        for call in calls:
            torch.testing.assert_close(call.result(), model.lm_head(h).detach())
        assert len(model.lm_head.rows) == 4 + 4  # those that timed out were never sent
    with pytest.raises(ConfigError, match="max_in_flight=0"):
        GPUClient(endpoint_in(tmp_path), max_in_flight=0)


@pytest.mark.parametrize("large", ["zmq", "tile"])
def test_bytes_in_flight_are_bounded_and_a_larger_call_travels_alone(model, tmp_path, monkeypatch, large):
    monkeypatch.setattr(in_flight, "MAX_BYTES_IN_FLIGHT", 3_000_000)
    with serving(model, tmp_path, large=large) as server, client_of(server, large=large) as client:
        small, middle, huge = (torch.randn(rows, HIDDEN) for rows in (1, 800, 4000))  # about 1 MB, 5 MB
        calls = []
        for h in [middle, small, middle, middle, huge, small, huge, middle]:
            calls.append((h, client.submit.lm_head(h)))
            flight = client._flight
            assert flight._bytes <= 3_000_000 or len(flight) == 1
        for h, call in calls:
            torch.testing.assert_close(call.result(), model.lm_head(h).detach())
        assert client._flight._bytes == 0


# --- carriers


@pytest.mark.parametrize("shm", [True, False])
@pytest.mark.parametrize(("mine", "theirs"), [*itertools.product(["zmq", "tile"], repeat=2)])
def test_large_tensors_between_small_ones(model, tmp_path, mine, theirs, shm):
    """A slot has 256 KiB: of 1 row nothing is large, of 300 the reply, of 2000 request and reply."""
    with serving(model, tmp_path, large=theirs) as server, client_of(server, large=mine, shm=shm) as client:
        inputs = [torch.randn(rows, HIDDEN) for rows in (1, 300, 1, 1, 2000, 1, 2000, 300, 1, 1, 1, 1, 1, 300)]
        calls = [client.submit.lm_head(h) for h in inputs]
        for h, call in zip(inputs, calls, strict=True):
            torch.testing.assert_close(call.result(), model.lm_head(h).detach())
        stats = client.stats
        assert (stats["zmq_transfers"] > 0) == (not shm or "zmq" in (mine, theirs))
        assert (stats["shm_transfers"] > 0) == shm
