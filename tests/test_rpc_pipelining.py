"""Many requests in flight on one channel, with a real server: results, order, bounds, carriers, threads, K and V."""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from rpc_support import (
    GEOMETRY,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    PATIENCE_S,
    VOCAB,
    client_of,
    endpoint_in,
    gated_model,
    run_all,
    serving,
    tiny_model,
    until,
)
from torch import nn

import tsqp
from tsqp import in_flight
from tsqp.client import GPUClient
from tsqp.errors import ConfigError, RemoteError
from tsqp.pending import PendingCall
from tsqp.protocol import Status

Q_PROJ = ["q_proj"]


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def server(model, tmp_path):
    with serving(model, tmp_path) as running:
        yield running


@pytest.fixture
def client(server):
    with client_of(server) as connected:
        yield connected


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


# --- threads


def test_threads_submit_and_wait_side_by_side(model, tmp_path):
    """Some hold several calls at a time, some one, some send what has no room in a slot; the ring has two."""
    heads = [layer.self_attn.q_proj for layer in model.model.layers]
    with serving(model, tmp_path, max_chunks=2) as server, client_of(server, max_in_flight=8) as client:
        client.init()

        def many(seed):
            generator = torch.Generator().manual_seed(seed)
            for _ in range(15):
                inputs = [torch.randn(1 + index % 2, HIDDEN, generator=generator) for index in range(10)]
                calls = [client.submit.batch_linear(index % LAYERS, Q_PROJ, h) for index, h in enumerate(inputs)]
                for index in reversed(range(10)):
                    expected = heads[index % LAYERS](inputs[index]).detach()
                    torch.testing.assert_close(calls[index].result(PATIENCE_S)[0], expected)

        def one_by_one():
            for step in range(100):
                h = torch.full((1, HIDDEN), float(step))
                torch.testing.assert_close(client.batch_linear(0, Q_PROJ, h)[0], heads[0](h).detach())

        def large():
            for _ in range(10):
                h = torch.randn(1500, HIDDEN)
                torch.testing.assert_close(client.submit.lm_head(h).result(PATIENCE_S), model.lm_head(h).detach())

        run_all(*[lambda seed=seed: many(seed) for seed in range(3)], one_by_one, one_by_one, large)
        assert client.round_trips == 1 + 3 * 150 + 2 * 100 + 10
        assert client.stats["in_flight"] == 0
        assert client._flight._waiters == []


def test_several_threads_wait_for_one_call(tmp_path):
    model = gated_model()
    with serving(model, tmp_path) as server, client_of(server) as client:
        h = torch.randn(2, HIDDEN)
        call = client.submit.lm_head(h)
        results = []

        def opened():
            until(lambda: len(client._flight._waiters) == 3)
            model.lm_head.gate.set()

        run_all(*[lambda: results.append(call.result())] * 4, opened)
        assert len(results) == 4
        for result in results:
            torch.testing.assert_close(result, model.lm_head(h).detach())


def test_who_stops_waiting_leaves_the_reading_to_the_next(tmp_path):
    model = gated_model()
    with serving(model, tmp_path) as server, client_of(server) as client:
        calls = [client.submit.lm_head(torch.full((1, HIDDEN), float(number))) for number in range(3)]

        def impatient():
            with pytest.raises(TimeoutError):
                calls[2].result(timeout=0.3)

        reader = threading.Thread(target=impatient)
        reader.start()
        until(client._flight._reading.locked)
        others = [threading.Thread(target=calls[number].result) for number in (1, 0)]
        for thread in others:
            thread.start()
        until(lambda: len(client._flight._waiters) == 2)
        reader.join()
        until(client._flight._reading.locked)  # one of the two reads now
        model.lm_head.gate.set()
        for thread in others:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        assert torch.equal(calls[2].result(), model.lm_head(torch.full((1, HIDDEN), 2.0)).detach())


def test_waiting_threads_sleep(tmp_path):
    model = gated_model()
    with serving(model, tmp_path) as server, client_of(server) as client:
        calls = [client.submit.lm_head(torch.zeros(1, HIDDEN)) for _ in range(4)]
        threads = [threading.Thread(target=call.result) for call in calls]
        for thread in threads:
            thread.start()
        until(lambda: len(client._flight._waiters) == 3)
        begin = time.process_time()
        time.sleep(0.6)
        assert time.process_time() - begin < 0.3  # all threads of this process, the server's among them
        model.lm_head.gate.set()
        for thread in threads:
            thread.join()


# --- the server


def test_a_client_with_much_in_flight_does_not_keep_others_waiting(tmp_path):
    model = gated_model()
    with (
        serving(model, tmp_path, max_chunks=32, batching=False) as server,
        client_of(server) as busy,
        client_of(server) as other,
    ):
        busy.init()
        other.init()
        h = torch.randn(1, HIDDEN)
        calls = [busy.submit.lm_head(h) for _ in range(20)]
        assert model.lm_head.entered.wait(PATIENCE_S)
        theirs = [other.submit.lm_head(torch.randn(2, HIDDEN)) for _ in range(5)]
        model.lm_head.gate.set()
        for call in [*calls, *theirs]:
            call.result()
        rows = model.lm_head.rows
        assert sorted(rows) == [1] * 20 + [2] * 5
        assert rows[:11].count(2) >= 4  # in turn, as long as both have requests


def test_limits_per_client_hold_with_many_in_flight(tmp_path):
    with (
        serving(tiny_model(), tmp_path, reply_limit_bytes=100_000, kv_limit_bytes=100_000) as server,
        client_of(server) as client,
    ):
        results = [client.submit.lm_head(torch.zeros(rows, HIDDEN)) for rows in (1, 200, 1, 200, 1)]
        assert [call.exception() is None for call in results] == [True, False, True, False, True]
        assert {error.code for call in results if (error := call.exception())} == {Status.LIMIT}
        scores = [client.submit.attention_scores(layer, *qkv(1, 100)) for layer in (0, 1, 0)]
        codes = [getattr(call.exception(), "code", Status.OK) for call in scores]
        assert codes.count(Status.LIMIT) >= 1
        assert server.stats["kv_bytes"] <= 100_000


def test_the_time_in_the_servers_queue_is_told(tmp_path):
    class Slow(nn.Linear):
        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x)

    model = tiny_model()
    model.lm_head = Slow(HIDDEN, VOCAB, bias=False)
    with serving(model, tmp_path) as server, client_of(server) as client:
        for call in [client.submit.lm_head(torch.zeros(1, HIDDEN)) for _ in range(6)]:
            call.result()
        mine = client.stats["operators"]["gpu_lm_head"]
        # The first waits for nobody; that the second is there is noticed when the first is done.
        assert mine["queue_seconds"] > 4 * 0.02
        assert mine["queue_seconds"] + mine["server_seconds"] <= mine["seconds"]
        until(lambda: server.stats["calls"].get("LMHead") == 6)
        assert server.stats["operators"]["gpu_lm_head"]["queue_seconds"] == pytest.approx(mine["queue_seconds"])
        assert GEOMETRY["max_chunks"] == 4  # more in flight than slots


# --- K and V


def qkv(batch: int, new: int):
    return [torch.randn(batch, heads, new, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def test_scores_in_flight_build_upon_each_other(client):
    keys = [torch.empty(1, KV_HEADS, 0, HEAD_DIM) for _ in range(LAYERS)]
    pending = []
    for step in range(60):
        layer = step % LAYERS
        q, k, v = qkv(1, 7 if step < LAYERS else 1)
        how = {}
        if step % 10 == 8:
            how["keep"] = keep = keys[layer].shape[2] - 2
            keys[layer] = keys[layer][:, :, :keep]
        elif step % 10 == 9:
            how["drop"] = 3
            keys[layer] = keys[layer][:, :, 3:]
        keys[layer] = torch.cat([keys[layer], k], 2)
        call = client.submit.attention_scores(layer, q, k, v, **how)
        pending.append((call, q @ keys[layer].repeat_interleave(HEADS // KV_HEADS, 1).transpose(2, 3)))
    for call, expected in reversed(pending):
        torch.testing.assert_close(call.result(), expected, rtol=1e-5, atol=1e-5)


def test_a_cancelled_call_still_counts_for_k_and_v(client):
    for call in (client.submit.attention_scores(0, *qkv(1, 3)), client.submit.attention_scores(0, *qkv(1, 2))):
        assert call.cancel()
    assert client.attention_scores(0, *qkv(1, 1)).shape == (1, HEADS, 1, 6)


def test_what_builds_upon_a_refused_call_is_refused_too(client):
    client.attention_scores(0, *qkv(1, 4))
    refused = client.submit.attention_scores(0, *qkv(1, 1), keep=9)
    second = client.submit.attention_scores(0, *qkv(1, 1))
    other_layer = client.submit.attention_scores(1, *qkv(1, 2))
    with pytest.raises(RemoteError, match="keep=9 but layer 0 holds 4"):
        refused.result()
    with pytest.raises(RemoteError, match="an earlier request that was in flight"):
        second.result()
    assert other_layer.result().shape == (1, HEADS, 2, 2)
    with pytest.raises(ConfigError, match="layer 0 is unknown"):
        client.attention_scores(0, *qkv(1, 1))
    assert client.attention_scores(0, *qkv(1, 1), keep=5).shape == (1, HEADS, 1, 6)
    assert client.attention_scores(0, *qkv(1, 1)).shape == (1, HEADS, 1, 7)


def test_a_refused_call_at_the_end_changes_nothing(client):
    client.attention_scores(0, *qkv(1, 4))
    good = client.submit.attention_scores(0, *qkv(1, 1))
    bad = client.submit.attention_scores(0, *qkv(1, 1), keep=9)
    assert bad.exception() is not None
    assert client.attention_scores(0, *qkv(1, 1)).shape == (1, HEADS, 1, 6)
    assert good.result().shape == (1, HEADS, 1, 5)


def test_a_cache_dropped_in_flight(client):
    before = client.submit.attention_scores(0, *qkv(1, 4))
    dropped = client.submit.drop_cache()
    after = client.submit.attention_scores(0, *qkv(2, 3))
    assert after.result().shape == (2, HEADS, 3, 3)
    assert before.result().shape == (1, HEADS, 4, 4)
    assert dropped.result() is None
