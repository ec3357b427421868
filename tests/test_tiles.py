"""Work in row tiles gives what it gives whole: all families, masks, caches; errors in the middle of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import FAMILIES, assert_same, left_padded, logits, make_model, serving, token_ids
from rpc_support import until
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tsqp import ops
from tsqp.client import GPUClient
from tsqp.errors import ClosedError, ConfigError, RemoteError, WaitTimeoutError
from tsqp.protocol import Status
from tsqp.server import GPUServer
from tsqp.split import from_pretrained
from tsqp.tiled_attention import key_limits
from tsqp.tiles import Tile, TileSize, Tiling, row_tiles

#: Small enough that a prompt of 60 tokens takes many tiles.
TILE_BYTES = 2048
TOLERANCE = 1e-4


@dataclass
class Served:
    stock: PreTrainedModel
    server: GPUServer


@pytest.fixture(scope="module", params=list(FAMILIES))
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    stock = make_model(request.param)
    with serving(stock) as server:
        yield Served(stock, server)


@pytest.fixture(scope="module")
def llama() -> Iterator[Served]:
    stock = make_model("llama")
    with serving(stock) as server:
        yield Served(stock, server)


def tiled(served: Served, **options: Any) -> PreTrainedModel:
    sizes = {"tile_bytes": TILE_BYTES, "mlp_tile_bytes": TILE_BYTES}
    return from_pretrained(endpoint=served.server.endpoint, **{**sizes, **options})


@pytest.fixture
def split(served: Served) -> Iterator[PreTrainedModel]:
    model = tiled(served)
    yield model
    model.close()


# --- the cut ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (64, 64), (50, 173)])
@pytest.mark.parametrize("tile_bytes", [1, 300, 5000, 10**9])
def test_tiles_cover_every_row_once_and_no_hidden_key_decides(queries: int, keys: int, tile_bytes: int) -> None:
    tiles = row_tiles(key_limits(queries, keys, None, True), 4, tile_bytes)
    assert [row for tile in tiles for row in range(tile.first, tile.stop)] == list(range(queries))
    for tile in tiles:
        assert tile.keys == tile.stop + keys - queries
        assert tile.stop - tile.first == 1 or (tile.stop - tile.first) * tile.keys * 4 <= tile_bytes
    if tile_bytes == 10**9:
        assert tiles == (Tile(0, queries, keys),)


def test_a_rows_operands_bound_a_tile_too() -> None:
    assert {tile.stop - tile.first for tile in row_tiles((1,) * 40, 1, 100, 25)} == {4}


def test_limits_of_a_mask() -> None:
    hidden = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    hidden[0, 0, 1, 2] = hidden[1, 0, 1, 3] = hidden[0, 0, 3, 5] = hidden[1, 0, 2, 0] = False
    assert key_limits(4, 6, hidden, True) == (1, 4, 1, 6)
    assert key_limits(4, 6, hidden[:, :, 1:2], True) == (4, 4, 4, 4)


def test_a_size_is_learnt_from_what_each_cost() -> None:
    sizes = TileSize(None, 10 << 20)
    costs = {1 << 20: 5.0, 2 << 20: 3.0, 4 << 20: 4.0, 8 << 20: 9.0}
    chosen = []
    for _ in range(200):
        size = sizes.choose()
        chosen.append(size)
        sizes.note(size, 1000, int(1000 * costs[size]))
    assert set(chosen) == set(costs)
    assert sizes.best() == 2 << 20
    assert chosen.count(2 << 20) > 150
    for _ in range(200):  # what is learnt can change
        size = sizes.choose()
        sizes.note(size, 1000, 20_000 if size == 2 << 20 else 4_000)
    assert sizes.best() == 4 << 20


def test_sizes_stay_below_a_slot() -> None:
    for slot_bytes in (100_000, 1 << 20, 3 << 20, 10 << 20):
        sizes = TileSize(None, slot_bytes)
        for _ in range(50):
            size = sizes.choose()
            assert 0 < size < slot_bytes
            sizes.note(size, 1, 1)


def test_what_a_larger_tile_loses_a_smaller_one_is_not_tried_for() -> None:
    """Matrix products of few rows cost more per row: what 16 MiB lose, 8 MiB lose as well."""
    sizes, chosen = TileSize(None, 10 << 20, whole=True), []
    for _ in range(100):
        chosen.append(sizes.choose())
        sizes.note(chosen[-1], 1000, 1000 if chosen[-1] == 0 else 5000)
    assert set(chosen) == {0, 16 << 20}
    assert chosen.count(0) >= 98
    faster = TileSize(None, 10 << 20, whole=True)
    for _ in range(100):
        chosen.append(faster.choose())
        faster.note(chosen[-1], 1000, {0: 3000, 16 << 20: 2500, 8 << 20: 2000}[chosen[-1]])
    assert faster.best() == 8 << 20


@pytest.mark.parametrize("wrong", ["large", -1, True])
def test_a_wrong_tile_size_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="tile_bytes"):
        Tiling(wrong)


# --- parity -------------------------------------------------------------------------------------------------


def count_tiles(split: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """A list that gets, of each request for scores in tiles, its queries, new keys and meta ``keys``."""
    client, seen = split.tsqp_client, []
    ask = client.submit.attention_scores

    def recorded(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.append((q.shape[2], k.shape[2], options.get("keys")))
        return ask(layer, q, k, v, **options)

    monkeypatch.setattr(client.submit, "attention_scores", recorded)
    return seen


def test_logits(split: PreTrainedModel, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_tiles(split, monkeypatch)
    ids = token_ids(2, 70)
    assert_same(logits(split, input_ids=ids), logits(served.stock, input_ids=ids), TOLERANCE)
    layers = split.config.num_hidden_layers
    assert len(seen) > 10 * layers
    # Every query, and every key, travels once.
    assert sum(queries for queries, _, _ in seen) == 70 * layers
    assert sum(new for _, new, _ in seen) == 70 * layers


def test_logits_with_padding(split: PreTrainedModel, served: Served) -> None:
    inputs = left_padded([4, 63, 31])
    real = inputs["attention_mask"].bool()
    assert_same(logits(split, **inputs)[real], logits(served.stock, **inputs)[real], TOLERANCE)


def test_no_future_token_is_seen(split: PreTrainedModel) -> None:
    ids = token_ids(2, 60)
    changed = ids.clone()
    changed[:, 33] = (ids[:, 33] + 7) % 90 + 3
    before, after = logits(split, input_ids=ids), logits(split, input_ids=changed)
    assert torch.equal(before[:, :33], after[:, :33])
    assert not torch.allclose(before[:, 33:], after[:, 33:], rtol=0.01)


@pytest.mark.parametrize("form", ["bool", "float"])
def test_own_masks(form: str, split: PreTrainedModel, served: Served) -> None:
    visible = torch.ones(40, 40, dtype=torch.bool).tril()
    visible[3, 30] = True  # an early query that sees a late key: later tiles look at fewer keys than are held
    visible[20:, 5] = False
    mask = visible[None, None]
    if form == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    inputs = {"input_ids": token_ids(1, 40), "attention_mask": mask}
    assert_same(logits(split, **inputs), logits(served.stock, **inputs), TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "uncached", "static", "beams", "rollback"],
)
def test_generation(options: dict[str, Any], split: PreTrainedModel, served: Served) -> None:
    inputs = {"input_ids": token_ids(1, 50)} if "prompt_lookup_num_tokens" in options else left_padded([50, 33])
    found = split.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
    assert torch.equal(found, served.stock.generate(**inputs, max_new_tokens=12, do_sample=False, **options))


def test_pieces_equal_the_whole(split: PreTrainedModel, served: Served) -> None:
    ids = token_ids(2, 90)
    cache, found, start = DynamicCache(config=split.config), [], 0
    with torch.no_grad():
        for count in (40, 1, 30, 1, 18):
            found.append(split(ids[:, start : start + count], past_key_values=cache).logits)
            start += count
    assert_same(torch.cat(found, dim=1), logits(served.stock, input_ids=ids), TOLERANCE)


def test_attentions_are_put_together_when_asked_for(split: PreTrainedModel, served: Served) -> None:
    ids = token_ids(1, 50)
    before = served.stock.config._attn_implementation
    served.stock.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = split(ids, output_attentions=True)
            expected = served.stock(ids, output_attentions=True)
    finally:
        served.stock.set_attn_implementation(before)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert_same(ours, theirs, TOLERANCE)
    with torch.no_grad():
        assert split(ids).attentions is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_models(dtype: torch.dtype) -> None:
    exact, stock = make_model("llama"), make_model("llama", dtype=dtype)
    ids = token_ids(1, 60)
    reference = logits(exact, input_ids=ids)
    with serving(stock) as server:
        split = tiled(Served(stock, server))
        found = logits(split, input_ids=ids)
        split.close()
    error, stock_error = ((each.float() - reference).abs().max() for each in (found, logits(stock, input_ids=ids)))
    assert error <= 2 * stock_error


# --- gated MLPs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["linear", "ops"])
def test_gated_mlps(placement: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    split = tiled(served, placement=placement)
    rows: list[int] = []
    ask = split.tsqp_client.submit.batch_linear
    monkeypatch.setattr(
        split.tsqp_client.submit, "batch_linear", lambda layer, names, h: rows.append(len(h)) or ask(layer, names, h)
    )
    for inputs in ({"input_ids": token_ids(3, 20)}, {"input_ids": token_ids(1, 1)}):
        assert_same(logits(split, **inputs), logits(served.stock, **inputs), TOLERANCE)
    # 2 x 80 features of 4 bytes are 640 bytes a row, 3 rows a tile; a single row is never cut.
    assert rows == [3] * 20 * split.config.num_hidden_layers
    split.close()


def test_tiles_and_the_whole_are_timed(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself a model tries both for large inputs, and never cuts small ones."""
    split = from_pretrained(endpoint=llama.server.endpoint, placement="linear")
    size = split.tsqp_attachment.tiling.mlp
    monkeypatch.setattr(size, "smallest", lambda: 1000)
    monkeypatch.setattr(size, "_sizes", [0, 2000])
    monkeypatch.setattr(size, "_seen", {0: 0, 2000: 0})
    chosen = []
    choose = size.choose
    monkeypatch.setattr(size, "choose", lambda: chosen.append(choose()) or chosen[-1])
    for _ in range(4):
        ids = token_ids(1, 20)
        assert_same(logits(split, input_ids=ids), logits(llama.stock, input_ids=ids), TOLERANCE)
    assert chosen[:4] == [0, 0, 2000, 2000]
    count = len(chosen)
    logits(split, input_ids=token_ids(1, 1))
    assert len(chosen) == count
    split.close()


# --- what goes wrong in the middle --------------------------------------------------------------------------


def test_a_limit_reached_in_a_later_tile_ends_that_forward_only() -> None:
    stock = make_model("llama")
    held = stock.config.num_key_value_heads * 12 * 2 * 4  # bytes of a position of a layer
    with serving(stock, kv_limit_bytes=held * 2 * 70) as server:
        split = tiled(Served(stock, server))
        client = split.tsqp_client
        with pytest.raises(RemoteError, match="K and V of this layer would need") as caught:
            logits(split, input_ids=token_ids(1, 300))
        assert caught.value.code == Status.LIMIT
        assert client.errors > 1  # those that were built upon the refused one
        assert (client.stats["in_flight"], client.stale_replies) == (0, 0)
        ids = token_ids(1, 40)
        client.drop_cache()
        assert_same(logits(split, input_ids=ids), logits(stock, input_ids=ids), TOLERANCE)
        split.close()


def test_a_refused_tile_of_an_mlp() -> None:
    stock = make_model("llama")
    with serving(stock) as server:
        split = tiled(Served(stock, server), placement="linear")
        client, ids = split.tsqp_client, token_ids(1, 40)
        ask, count = client.submit.batch_linear, iter(range(10**6))

        def refused(layer: int | None, names: Any, h: Tensor) -> Any:
            return ask(layer, names, h[:, :-1] if next(count) == 3 else h)

        client.submit.batch_linear = refused
        with pytest.raises(RemoteError, match=r"has shape \[3, 47\], expected \[.., 48\]"):
            logits(split, input_ids=ids)
        assert (client.errors, client.stats["in_flight"], client.stale_replies) == (1, 0, 0)
        assert_same(logits(split, input_ids=ids), logits(stock, input_ids=ids), TOLERANCE)
        split.close()


def fail_in_tile(number: int, monkeypatch: pytest.MonkeyPatch, fail: Any) -> None:
    """Makes the runner's softmax call ``fail()`` in this tile."""
    softmax, count = ops.causal_softmax, iter(range(10**6))

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        if next(count) == number:
            fail()
        return softmax(*args, **kwargs)

    monkeypatch.setattr(ops, "causal_softmax", failing)


def test_an_error_of_the_runner_in_a_later_tile(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    split, ids = tiled(llama), token_ids(1, 60)
    fail_in_tile(3, monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(split, input_ids=ids)
    assert_same(logits(split, input_ids=ids), logits(llama.stock, input_ids=ids), TOLERANCE)
    assert split.tsqp_client.stats["in_flight"] == 0
    split.close()


def test_a_timeout_in_a_later_tile(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    split, ids = tiled(llama), token_ids(1, 60)
    client = split.tsqp_client

    def no_time_left() -> None:
        client.timeout = 0.0

    fail_in_tile(3, monkeypatch, no_time_left)
    with pytest.raises(WaitTimeoutError):
        logits(split, input_ids=ids)
    client.timeout = 30.0
    assert_same(logits(split, input_ids=ids), logits(llama.stock, input_ids=ids), TOLERANCE)
    split.close()


def test_a_client_that_leaves_in_a_later_tile(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    split, ids = tiled(llama), token_ids(1, 60)
    fail_in_tile(3, monkeypatch, split.tsqp_client.close)
    with pytest.raises(ClosedError):
        logits(split, input_ids=ids)
    with GPUClient(llama.server.endpoint) as other:
        other.ping()
        until(lambda: llama.server.stats["clients"] == 1)
        assert llama.server.stats["kv_bytes"] == 0
    again = tiled(llama)
    assert_same(logits(again, input_ids=ids), logits(llama.stock, input_ids=ids), TOLERANCE)
    again.close()


_DIES = """
import os, sys
import torch
from tsqp import from_pretrained, ops
split = from_pretrained(endpoint=sys.argv[1], tile_bytes=2048)
softmax, tiles = ops.causal_softmax, []
def dying(*args, **kwargs):
    tiles.append(1)
    if len(tiles) == 4:
        os._exit(7)
    return softmax(*args, **kwargs)
ops.causal_softmax = dying
split(torch.arange(3, 63)[None])
"""


def test_a_client_that_dies_in_a_later_tile(llama: Served) -> None:
    seen = llama.server.stats["clients_seen"]
    died = subprocess.run([sys.executable, "-c", _DIES, llama.server.endpoint], timeout=120, check=False)
    assert died.returncode == 7
    assert llama.server.stats["clients_seen"] == seen + 1
    until(lambda: llama.server.stats["clients"] == 0)
    assert llama.server.stats["kv_bytes"] == 0
    split, ids = tiled(llama), token_ids(1, 60)
    assert_same(logits(split, input_ids=ids), logits(llama.stock, input_ids=ids), TOLERANCE)
    split.close()


def test_a_cache_dropped_meanwhile_is_sent_again(llama: Served) -> None:
    split, ids = tiled(llama), token_ids(1, 100)
    cache = DynamicCache(config=split.config)
    with torch.no_grad():
        first = split(ids[:, :50], past_key_values=cache).logits
        split.tsqp_client.drop_cache()
        second = split(ids[:, 50:], past_key_values=cache).logits
    assert_same(torch.cat([first, second], dim=1), logits(llama.stock, input_ids=ids), TOLERANCE)
    split.close()
