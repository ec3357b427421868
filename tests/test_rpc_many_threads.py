"""Many requests in flight: of several threads, beside other clients, and upon K and V that the server keeps."""

from __future__ import annotations

import threading
import time

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
    gated_model,
    run_all,
    serving,
    tiny_model,
    until,
)
from torch import nn

from tsqp.errors import ConfigError, RemoteError
from tsqp.protocol import Status

pytest_plugins = ["rpc_fixtures"]

Q_PROJ = ["q_proj"]


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
                calls[2].result(timeout=3.0)

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
    gate = threading.Event()

    class Slow(nn.Linear):
        def forward(self, x):
            assert gate.wait(PATIENCE_S)
            time.sleep(0.02)
            return super().forward(x)

    model = tiny_model()
    model.lm_head = Slow(HIDDEN, VOCAB, bias=False)
    with serving(model, tmp_path) as server, client_of(server) as client:
        client.init()
        calls = [client.submit.lm_head(torch.zeros(1, HIDDEN)) for _ in range(GEOMETRY["max_chunks"])]
        gate.set()
        calls += [client.submit.lm_head(torch.zeros(1, HIDDEN)) for _ in range(6 - len(calls))]
        for call in calls:
            call.result()
        mine = client.stats["operators"]["gpu_lm_head"]
        # The first waits for nobody; that the second is there is noticed when the first is done; the third and the
        # fourth wait for the one before them, and the others for whatever they find.
        assert mine["queue_seconds"] > 2 * 0.02
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
