"""K and V kept on the server: append, reorder, drop, keep, limits, isolation, freeing."""

from __future__ import annotations

import pytest
import torch
from rpc_support import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    PATIENCE_S,
    ask,
    client_of,
    serving,
    tiny_model,
    until,
)

import tsqp
from tsqp.errors import RemoteError
from tsqp.protocol import Method, Status

pytest_plugins = ["rpc_fixtures"]


class Reference:
    """The same in plain torch: K and V of one layer, repeated per query head when used."""

    def __init__(self) -> None:
        self.k = torch.empty(0, KV_HEADS, 0, HEAD_DIM)
        self.v = torch.empty(0, KV_HEADS, 0, HEAD_DIM)

    def scores(self, q, k_new, v_new, keep=None, batch_index=None, drop=0):
        if batch_index is not None:
            self.k, self.v = self.k[batch_index], self.v[batch_index]
        self.k, self.v = self.k[:, :, drop:], self.v[:, :, drop:]
        if keep is not None:
            self.k, self.v = self.k[:, :, :keep], self.v[:, :, :keep]
        if self.k.shape[2] == 0:
            self.k, self.v = k_new, v_new
        else:
            self.k, self.v = torch.cat([self.k, k_new], 2), torch.cat([self.v, v_new], 2)
        return q @ self.k.repeat_interleave(HEADS // KV_HEADS, 1).transpose(2, 3)

    def values(self, probs):
        return probs @ self.v.repeat_interleave(HEADS // KV_HEADS, 1)


def qkv(batch: int, new: int, queries: int | None = None):
    q = torch.randn(batch, HEADS, new if queries is None else queries, HEAD_DIM)
    return q, torch.randn(batch, KV_HEADS, new, HEAD_DIM), torch.randn(batch, KV_HEADS, new, HEAD_DIM)


def step(client, reference, layer, tensors, **how):
    """One step on both; checks scores and values."""
    got, expected = client.attention_scores(layer, *tensors, **how), reference.scores(*tensors, **how)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    probs = torch.rand_like(expected)
    torch.testing.assert_close(client.attention_values(layer, probs), reference.values(probs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_then_decode_grows(client, batch):
    references = [Reference() for _ in range(LAYERS)]
    for layer, reference in enumerate(references):
        step(client, reference, layer, qkv(batch, 17))
    for _ in range(150):  # beyond the room of the first allocation, more than once
        for layer, reference in enumerate(references):
            step(client, reference, layer, qkv(batch, 1))
    assert references[0].k.shape[2] == 167


def test_more_queries_than_new_positions_and_none_at_all(client):
    reference = Reference()
    step(client, reference, 0, qkv(2, 5, queries=3))
    step(client, reference, 0, qkv(2, 0, queries=2))
    step(client, reference, 0, qkv(2, 1, queries=0))


def test_keep_cuts_the_end(client):
    reference = Reference()
    step(client, reference, 0, qkv(1, 10))
    step(client, reference, 0, qkv(1, 2), keep=10)
    step(client, reference, 0, qkv(1, 3), keep=4)
    step(client, reference, 0, qkv(1, 1))
    step(client, reference, 0, qkv(2, 6), keep=0)  # afresh, with another batch
    step(client, reference, 0, qkv(2, 1))


def test_drop_slides_a_window(client):
    reference = Reference()
    step(client, reference, 1, qkv(2, 8))
    for _ in range(200):
        step(client, reference, 1, qkv(2, 1), drop=1)
    step(client, reference, 1, qkv(2, 2), drop=3, keep=2)
    step(client, reference, 1, qkv(2, 2), drop=4)  # everything


@pytest.mark.parametrize("index", [[1, 0, 2], [2, 2, 2], [0], [0, 0, 1, 1, 2, 2], [0, 1, 2]])
def test_batch_index_reorders(client, index):
    reference = Reference()
    step(client, reference, 0, qkv(3, 9))
    rows = torch.tensor(index)
    step(client, reference, 0, qkv(len(index), 1), batch_index=rows)
    step(client, reference, 0, qkv(len(index), 1))
    step(
        client, reference, 0, qkv(len(index), 2), batch_index=torch.zeros(len(index), dtype=torch.int64), drop=2, keep=5
    )


def test_a_rejected_request_changes_nothing(server, client):
    reference = Reference()
    step(client, reference, 0, qkv(2, 6))
    q, k, v = qkv(2, 1)
    bad = [
        ({"keep": 7}, Status.BAD_REQUEST, "keep=7 but layer 0 holds 6"),
        ({"drop": 7}, Status.BAD_REQUEST, "drop=7 but layer 0 holds 6"),
        ({"drop": 2, "keep": 5}, Status.BAD_REQUEST, "keep=5 but layer 0 holds 4"),
        ({"batch_index": torch.tensor([0, 2])}, Status.BAD_REQUEST, r"outside 0\.\.1"),
        ({"batch_index": torch.tensor([-1, 0])}, Status.BAD_REQUEST, r"outside 0\.\.1"),
        ({"batch_index": torch.tensor([0])}, Status.BAD_SHAPE, r"batch_index has shape \[1\], expected \[2\]"),
        ({"keep": -1}, Status.BAD_REQUEST, "'keep' is -1"),
    ]
    for how, status, words in bad:
        with pytest.raises(RemoteError, match=words) as caught:
            client.attention_scores(0, q, k, v, **how)
        assert caught.value.code == status
    with pytest.raises(RemoteError, match="holds 2 rows of K and V but the new ones have 3"):
        client.attention_scores(0, *qkv(3, 1))
    with pytest.raises(RemoteError, match=r"expected \[2, 4, queries, up to 6\]"):
        client.attention_values(0, torch.rand(2, HEADS, 1, 7))
    step(client, reference, 0, qkv(2, 1))
    assert client.errors == len(bad) + 2


def test_a_request_that_fails_after_its_checks_changes_nothing(server, client, monkeypatch):
    """Also not the positions behind a cut, which the new ones would have been written over."""
    reference = Reference()
    step(client, reference, 0, qkv(1, 6))
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *_: (_ for _ in ()).throw(MemoryError("values 3.14")))
    for how in ({"keep": 3}, {}, {"drop": 1}, {"batch_index": torch.tensor([0])}):
        with pytest.raises(RemoteError) as caught:
            client.attention_scores(0, *qkv(1, 2), **how)
        assert caught.value.code == Status.OUT_OF_MEMORY
        assert "3.14" not in str(caught.value)
    monkeypatch.setattr(torch, "bmm", real)
    step(client, reference, 0, qkv(1, 1))


def test_layers_and_clients_are_apart(server, client):
    with client_of(server) as other:
        mine, theirs, second = Reference(), Reference(), Reference()
        step(client, mine, 0, qkv(2, 7))
        step(other, theirs, 0, qkv(1, 3))
        step(client, second, 1, qkv(1, 4))
        step(client, mine, 0, qkv(2, 1))
        step(other, theirs, 0, qkv(1, 1))
        other.drop_cache()
        step(client, mine, 0, qkv(2, 1))
        with pytest.raises(RemoteError, match="layer 0 holds no V"):
            other.attention_values(0, torch.rand(1, HEADS, 1, 4))
        step(other, Reference(), 0, qkv(3, 2))


def test_drop_cache_frees(server, client):
    step(client, Reference(), 0, qkv(1, 50))
    assert server.stats["kv_bytes"] >= 2 * KV_HEADS * HEAD_DIM * 50 * 4
    assert client.server_stats()["kv_bytes"] == server.stats["kv_bytes"]
    client.drop_cache()
    assert server.stats["kv_bytes"] == 0
    step(client, Reference(), 0, qkv(2, 1))


def test_a_client_that_leaves_is_forgotten_at_once(server):
    with client_of(server) as client:
        step(client, Reference(), 0, qkv(1, 50))
        assert server.stats["kv_bytes"] > 0
    until(lambda: server.stats["clients"] == 0)
    assert server.stats["kv_bytes"] == 0


def test_the_limit_meets_only_the_client_that_reaches_it(tmp_path):
    position_bytes = 2 * KV_HEADS * HEAD_DIM * 4
    with (
        serving(tiny_model(), tmp_path, kv_limit_bytes=100 * position_bytes) as server,
        client_of(server) as client,
        client_of(server) as other,
    ):
        reference = Reference()
        step(client, reference, 0, qkv(1, 99))
        with pytest.raises(RemoteError, match="K/V limit") as caught:
            client.attention_scores(1, *qkv(1, 2))
        assert caught.value.code == Status.LIMIT
        with pytest.raises(RemoteError, match="K/V limit"):
            client.attention_scores(0, *qkv(2, 1), batch_index=torch.tensor([0, 0]))
        step(client, reference, 0, qkv(1, 1))  # exactly to the limit
        with pytest.raises(RemoteError, match="K/V limit"):
            client.attention_scores(0, *qkv(1, 1))
        step(other, Reference(), 0, qkv(1, 60))
        step(client, reference, 0, qkv(1, 1), drop=1)
        client.drop_cache()
        step(client, Reference(), 1, qkv(1, 100))


BAD_HEADS = [
    ((1, 3, 1, HEAD_DIM), (1, KV_HEADS, 1, HEAD_DIM), (1, KV_HEADS, 1, HEAD_DIM), "q has shape"),
    ((1, HEADS, 1, 8), (1, KV_HEADS, 1, HEAD_DIM), (1, KV_HEADS, 1, HEAD_DIM), "q has shape"),
    ((HEADS, 1, HEAD_DIM), (1, KV_HEADS, 1, HEAD_DIM), (1, KV_HEADS, 1, HEAD_DIM), "q has shape"),
    ((0, HEADS, 1, HEAD_DIM), (0, KV_HEADS, 1, HEAD_DIM), (0, KV_HEADS, 1, HEAD_DIM), "q has shape"),
    ((1, HEADS, 1, HEAD_DIM), (1, HEADS, 1, HEAD_DIM), (1, KV_HEADS, 1, HEAD_DIM), "k has shape"),
    ((1, HEADS, 1, HEAD_DIM), (1, KV_HEADS, 1, HEAD_DIM), (1, KV_HEADS, 1, 1), "v has shape"),
    ((1, HEADS, 1, HEAD_DIM), (1, KV_HEADS, 2, HEAD_DIM), (1, KV_HEADS, 1, HEAD_DIM), "k and v need one shape"),
    ((2, HEADS, 1, HEAD_DIM), (1, KV_HEADS, 1, HEAD_DIM), (1, KV_HEADS, 1, HEAD_DIM), "all three one batch"),
]


@pytest.mark.parametrize(("q", "k", "v", "words"), BAD_HEADS)
def test_shapes_are_checked_against_the_model(server, q, k, v, words):
    with tsqp.connect(server.endpoint, timeout=PATIENCE_S) as channel:
        tensors = [torch.zeros(shape) for shape in (q, k, v)]
        reply = ask(channel, Method.ATTENTION_SCORES, tensors, {"layer": 0})
        assert reply.status == Status.BAD_SHAPE
        assert words in reply.meta["error"]
        good = ask(channel, Method.ATTENTION_SCORES, qkv(1, 2), {"layer": 0}, 2)
        assert good.status == Status.OK
        assert good.tensors[0].shape == (1, HEADS, 2, 2)


def test_scores_over_the_reply_limit_are_refused_before_anything_is_kept(tmp_path):
    with serving(tiny_model(), tmp_path, reply_limit_bytes=10_000) as server, client_of(server) as client:
        with pytest.raises(RemoteError, match="the limit is 10000") as caught:
            client.attention_scores(0, *qkv(1, 40))
        assert caught.value.code == Status.LIMIT
        assert client.server_stats()["kv_bytes"] == 0
        step(client, Reference(), 0, qkv(1, 4))


def test_scores_of_some_keys_and_values_of_them(client):
    """Later tiles look at fewer keys than are held, and bring none; the state stays as if they had not been."""
    reference = Reference()
    q, k, v = qkv(2, 9)
    expected = reference.scores(q, k, v)
    got = client.attention_scores(0, q[:, :, :2], k[:, :, :5], v[:, :, :5], keep=0, keys=3)
    torch.testing.assert_close(got, expected[:, :, :2, :3], rtol=1e-5, atol=1e-5)
    got = client.attention_scores(0, q[:, :, 2:], k[:, :, 5:], v[:, :, 5:])
    torch.testing.assert_close(got, expected[:, :, 2:], rtol=1e-5, atol=1e-5)
    got = client.attention_scores(0, q[:, :, :2], k[:, :, :0], v[:, :, :0], keys=4)
    torch.testing.assert_close(got, expected[:, :, :2, :4], rtol=1e-5, atol=1e-5)
    probs = torch.rand(2, HEADS, 3, 6)
    full = torch.cat([probs, torch.zeros(2, HEADS, 3, 3)], dim=3)
    torch.testing.assert_close(client.attention_values(0, probs), reference.values(full), rtol=1e-5, atol=1e-5)
    with pytest.raises(RemoteError, match="up to 9"):
        client.attention_values(0, torch.rand(2, HEADS, 3, 10))
    step(client, reference, 0, qkv(2, 1))
