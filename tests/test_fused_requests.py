"""The fused operators as remote calls: what they compute, what they refuse, whose K and V they touch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import FAMILIES, assert_same, left_padded, logits, make_model, token_ids
from models import serving as serving_of
from rpc_support import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, PATIENCE_S, ask, client_of, serving, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache

import tsqp
from tsqp.client import GPUClient
from tsqp.errors import ConfigError, ModelError, RemoteError
from tsqp.fused_requests import MAX_SLOTS
from tsqp.layout import find_layout
from tsqp.protocol import Method, Status
from tsqp.server import GPUServer
from tsqp.split import from_pretrained

H = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(3))
COS, SIN = torch.ones(1, 5, HEAD_DIM), torch.zeros(1, 5, HEAD_DIM)
MASK = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
TABLES = {"layer": 0, "set": ["cos", "sin"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GPUServer]:
    with serving(
        tiny_model(), tmp_path_factory.mktemp("fused"), kv_limit_bytes=100_000, reply_limit_bytes=4_000_000
    ) as running:
        yield running


@pytest.fixture
def client(server: GPUServer) -> Iterator[GPUClient]:
    with client_of(server) as connected:
        yield connected


def tables(start: int, count: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(start, start + count)[None]
    return tiny_model().model.rotary_emb(H, positions)


# --- what they compute ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@torch.no_grad()
def test_one_call_is_the_module(mask: str, client: GPUClient) -> None:
    model = tiny_model()
    layer, positions = model.model.layers[1], tables(0, 5)
    given = {"none": None, "bool": MASK, "float": torch.zeros(MASK.shape).masked_fill(~MASK, -1e4)}[mask]
    how = {"position_embeddings": positions, "attention_mask": given}
    found = client.fused_attention(1, H, position_embeddings=positions, mask=given)
    torch.testing.assert_close(found, layer.self_attn(H, **how)[0])
    torch.testing.assert_close(client.fused_layer(1, H, reuse=True), layer(H, **how))
    torch.testing.assert_close(client.fused_mlp(1, H), layer.mlp(H))
    assert client.submit("fused_mlp", 0, H).result().shape == H.shape


@torch.no_grad()
def test_a_sequence_grows_and_its_changes_are_those_of_a_cache(client: GPUClient) -> None:
    model = tiny_model()
    layer, cache, sequence = model.model.layers[0], DynamicCache(), client.new_sequence()

    def step(start: int, count: int, **changes: Any) -> None:
        h, positions = H[: changes.pop("rows", 2), :count], tables(start, count)
        mask = torch.ones(count, start + count, dtype=torch.bool).tril(start)[None, None]
        expected = layer(h, position_embeddings=positions, attention_mask=mask, past_key_values=cache)
        # No mask: the server makes the causal one itself.
        found = client.fused_layer(0, h, position_embeddings=positions, sequence=sequence, **changes)
        torch.testing.assert_close(found, expected)

    step(0, 5, new=True)
    step(5, 1)
    step(6, 3)
    cache.crop(-4)
    step(5, 2, keep=5)
    index = torch.tensor([1, 1])
    cache.reorder_cache(index)
    step(7, 1, batch_index=index)
    held = [layer.keys.shape[2] for layer in cache.layers]
    branch = client.new_sequence()
    client.fused_layer(0, H[:, :1], position_embeddings=tables(8, 1), sequence=branch, source=sequence)
    step(held[0], 1)  # the branch changed nothing here


def test_the_meta_of_a_plain_step_is_the_same_every_time(client: GPUClient) -> None:
    sequence = client.new_sequence()
    options: dict[str, Any] = {"position_embeddings": (COS, SIN), "sequence": sequence}
    client.fused_attention(0, H, new=True, **options)
    calls = [client.submit.fused_attention(0, H, **options) for _ in range(3)]
    assert len({call.meta for call in calls}) == 1
    assert all(call.result().shape == H.shape for call in calls)


def test_clients_never_see_each_others_sequences(server: GPUServer, client: GPUClient) -> None:
    with client_of(server) as other:
        mine, theirs = client.new_sequence(), other.new_sequence()
        assert mine.number == theirs.number
        options: dict[str, Any] = {"position_embeddings": (COS, SIN)}
        client.fused_attention(0, H, sequence=mine, new=True, **options)
        with pytest.raises(RemoteError, match="holds no K and V of layer 0"):
            other.fused_attention(0, H, sequence=theirs, **options)
        with pytest.raises(RemoteError, match="context slot 0 holds nothing"):
            other.fused_attention(0, H, reuse=True)
        with pytest.raises(ConfigError, match="reuse=True"):
            client.fused_attention(0, H, reuse=True, mask=MASK)


# --- what they refuse -------------------------------------------------------------------------------------------

ATTENTION, MLP, LAYER = Method.FUSED_ATTENTION, Method.FUSED_MLP, Method.FUSED_LAYER
BAD: dict[str, tuple[int, list[Tensor], Any, Status, str]] = {
    "no meta": (ATTENTION, [H], None, Status.UNKNOWN_MODULE, "layer None"),
    "meta no mapping": (ATTENTION, [H], b"\x91\x01", Status.BAD_REQUEST, "not a mapping"),
    "layer too high": (LAYER, [H, COS, SIN], {**TABLES, "layer": 2}, Status.UNKNOWN_MODULE, "layers 0 to 1"),
    "mlp layer": (MLP, [H], {"layer": -1}, Status.UNKNOWN_MODULE, "layer -1"),
    "mlp tensors": (MLP, [H, H], {"layer": 0}, Status.BAD_REQUEST, "holds 2 tensors, expected 1"),
    "mlp width": (MLP, [H[..., :9]], {"layer": 0}, Status.BAD_SHAPE, r"shape [2, 5, 9], expected"),
    "mlp dtype": (MLP, [H.double()], {"layer": 0}, Status.BAD_DTYPE, "torch.float64"),
    "mlp rank": (MLP, [H[0]], {"layer": 0}, Status.BAD_SHAPE, "expected [batch, positions, 64]"),
    "mlp too large": (MLP, [H.repeat(1, 1200, 1)], {"layer": 0}, Status.LIMIT, "the limit is 4000000"),
    "mlp empty": (MLP, [H[:0]], {"layer": 0}, Status.BAD_SHAPE, "neither of them 0"),
    "no context": (ATTENTION, [H], {"layer": 0, "slot": 7}, Status.BAD_REQUEST, "slot 7 holds nothing"),
    "slot too high": (ATTENTION, [H], {"layer": 0, "slot": MAX_SLOTS}, Status.BAD_REQUEST, "'slot' is 64"),
    "slot a bool": (ATTENTION, [H], {"layer": 0, "slot": True}, Status.BAD_REQUEST, "'slot' is True"),
    "set a string": (ATTENTION, [H, COS], {"layer": 0, "set": "cos"}, Status.BAD_REQUEST, "'set' names"),
    "set unknown": (ATTENTION, [H, COS], {"layer": 0, "set": ["keys"]}, Status.BAD_REQUEST, "'set' names"),
    "set unhashable": (ATTENTION, [H, COS], {"layer": 0, "set": [["cos"]]}, Status.BAD_REQUEST, "'set' names"),
    "cos alone": (ATTENTION, [H, COS], {"layer": 0, "set": ["cos"]}, Status.BAD_REQUEST, "'set' names"),
    "set twice": (ATTENTION, [H, MASK, MASK], {"layer": 0, "set": ["mask"] * 2}, Status.BAD_REQUEST, "'set' names"),
    "set missing": (ATTENTION, [H, COS], TABLES, Status.BAD_REQUEST, "holds 2 tensors, expected 3"),
    "cos rows": (ATTENTION, [H, COS.expand(3, 5, HEAD_DIM), SIN], TABLES, Status.BAD_SHAPE, "cos has shape"),
    "cos count": (ATTENTION, [H, COS[:, :4], SIN[:, :4]], TABLES, Status.BAD_SHAPE, "5 positions"),
    "cos rank": (ATTENTION, [H, COS[0], SIN[0]], TABLES, Status.BAD_SHAPE, "expected 3 dimensions"),
    "cos and sin": (ATTENTION, [H, COS, SIN[..., :4]], TABLES, Status.BAD_SHAPE, "different shapes"),
    "cos integers": (ATTENTION, [H, COS.int(), SIN.int()], TABLES, Status.BAD_DTYPE, "cos is torch.int32"),
    "cos width": (ATTENTION, [H, COS[..., :5], SIN[..., :5]], TABLES, Status.BAD_SHAPE, "width 5 do not fit"),
    "mask shape": (
        ATTENTION,
        [H, COS, SIN, MASK[..., :4]],
        {"layer": 0, "set": ["cos", "sin", "mask"]},
        Status.BAD_SHAPE,
        "expected [1 or 2, 1 or 4, 5, 5]",
    ),
    "mask integers": (ATTENTION, [H, MASK.long()], {"layer": 0, "set": ["mask"]}, Status.BAD_DTYPE, "mask is"),
    "ids negative": (
        ATTENTION,
        [H, torch.full((1, 5), -1)],
        {"layer": 0, "set": ["ids"]},
        Status.BAD_REQUEST,
        "position id is outside",
    ),
    "seq negative": (LAYER, [H, COS, SIN], {**TABLES, "seq": -1}, Status.BAD_REQUEST, "'seq' is -1"),
    "seq huge": (LAYER, [H, COS, SIN], {**TABLES, "seq": 1 << 63}, Status.BAD_REQUEST, "'seq' is"),
    "seq unknown": (LAYER, [H, COS, SIN], {**TABLES, "seq": 9}, Status.BAD_REQUEST, "sequence 9 holds no K and V"),
    "from unknown": (LAYER, [H, COS, SIN], {**TABLES, "seq": 0, "from": 9}, Status.BAD_REQUEST, "sequence 9 holds"),
    "keep too many": (LAYER, [H, COS, SIN], {**TABLES, "seq": 0, "keep": 6}, Status.BAD_REQUEST, "keep=6 but"),
    "drop too many": (LAYER, [H, COS, SIN], {**TABLES, "seq": 0, "drop": 6}, Status.BAD_REQUEST, "drop=6 but"),
    "other rows": (LAYER, [H[:1], COS, SIN], {**TABLES, "seq": 0}, Status.BAD_SHAPE, "holds 2 rows"),
    "new and keep": (
        LAYER,
        [H, COS, SIN],
        {**TABLES, "seq": 0, "new": True, "keep": 1},
        Status.BAD_REQUEST,
        "without a sequence that holds something",
    ),
    "rows outside": (
        LAYER,
        [H, COS, SIN, torch.tensor([0, 2])],
        {**TABLES, "seq": 0, "reorder": True},
        Status.BAD_REQUEST,
        "outside 0..1",
    ),
    "rows of int32": (
        LAYER,
        [H, COS, SIN, torch.tensor([0, 1], dtype=torch.int32)],
        {**TABLES, "seq": 0, "reorder": True},
        Status.BAD_DTYPE,
        "batch_index is torch.int32",
    ),
    "free no list": (LAYER, [H, COS, SIN], {**TABLES, "free": 3}, Status.BAD_REQUEST, "'free' is no list"),
    "free too many": (LAYER, [H, COS, SIN], {**TABLES, "free": [5] * 65}, Status.BAD_REQUEST, "at most 64"),
    "K and V too large": (
        LAYER,
        [H.repeat(1, 80, 1), COS.repeat(1, 80, 1), SIN.repeat(1, 80, 1)],
        {**TABLES, "seq": 1, "new": True},
        Status.LIMIT,
        "K/V limit",
    ),
    "context too large": (
        ATTENTION,
        [H, torch.ones(2, HEADS, 5, 30_000, dtype=torch.bool)],
        {"layer": 0, "set": ["mask"]},
        Status.LIMIT,
        "the context would need",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_and_changes_nothing(case: str, server: GPUServer) -> None:
    tag, tensors, meta, status, words = BAD[case]
    good = {**TABLES, "seq": 0}
    with tsqp.connect(server.endpoint, timeout=PATIENCE_S) as channel:
        first = ask(channel, LAYER, [H, COS, SIN], {**good, "new": True})
        assert first.status == Status.OK
        stats = ask(channel, Method.STATS).meta
        reply = ask(channel, tag, tensors, meta)
        assert reply.status == status, reply.meta
        assert words in reply.meta["error"]
        assert not reply.tensors
        assert ask(channel, Method.STATS).meta["kv_bytes"] == stats["kv_bytes"]
        # What was there before is used as if nothing had happened.
        again = ask(channel, LAYER, [H, COS, SIN], {**good, "keep": 0})
        torch.testing.assert_close(again.tensors[0], first.tensors[0])


def test_a_fault_inside_a_module_changes_nothing(server: GPUServer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nn.functional.scaled_dot_product_attention
    with tsqp.connect(server.endpoint, timeout=PATIENCE_S) as channel:
        good = {**TABLES, "seq": 0}
        assert ask(channel, LAYER, [H, COS, SIN], {**good, "new": True}).status == Status.OK
        expected = ask(channel, LAYER, [H, COS, SIN], {**good, "keep": 5})
        for changes in ({"keep": 3}, {}, {"drop": 1}, {"new": True}):
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _out_of_memory)
                reply = ask(channel, LAYER, [H, COS, SIN], {**good, **changes})
            assert reply.status == Status.OUT_OF_MEMORY
            assert "3.14" not in reply.meta["error"]
        assert nn.functional.scaled_dot_product_attention is real
        found = ask(channel, LAYER, [H, COS, SIN], {**good, "keep": 5})
        assert torch.equal(found.tensors[0], expected.tensors[0])


def _out_of_memory(*_: Any, **__: Any) -> Tensor:
    raise MemoryError("values 3.14")


def test_every_layer_counts(server: GPUServer, client: GPUClient) -> None:
    sequence = client.new_sequence()
    for layer in range(LAYERS):
        client.fused_layer(layer, H, position_embeddings=(COS, SIN), sequence=sequence, new=True)
    position = 2 * KV_HEADS * HEAD_DIM * 4
    assert client.server_stats()["kv_bytes"] >= LAYERS * 2 * 5 * position
    operators = server.stats["operators"]
    assert operators["gpu_fused_layer"]["calls"] >= LAYERS
    client.drop_cache()
    assert client.server_stats()["kv_bytes"] == 0


# --- families ---------------------------------------------------------------------------------------------------

#: Families beyond those of the parity tests: experts, several rotary tables and masks, biases, parallel residuals,
#: learned positions, soft caps, sinks, layers that return tuples.
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "gemma2": {"head_dim": 12, "sliding_window": 8},
    "gemma3_text": {"head_dim": 12, "sliding_window": 8},
    "gpt2": {"n_embd": 48, "n_head": 4, "n_layer": 2},
    "falcon": {},
    "gpt_neox": {},
    "gpt_oss": {"head_dim": 12, "num_local_experts": 4, "sliding_window": 8},
}


@pytest.mark.parametrize("placement", ["fused", "layer"])
@pytest.mark.parametrize("family", MORE)
def test_every_family_of_decoders(family: str, placement: str) -> None:
    stock = make_model(family, **MORE[family])
    with serving_of(stock) as server, GPUClient(server.endpoint) as client:
        split = from_pretrained(client=client, placement=placement)
        ids = token_ids(2, 12)
        assert_same(logits(split, input_ids=ids), logits(stock, input_ids=ids))
        for options in ({"max_new_tokens": 20}, {"max_new_tokens": 8, "num_beams": 3}):
            inputs = left_padded([3, 13])
            found = split.generate(**inputs, do_sample=False, **options)
            assert torch.equal(found, stock.generate(**inputs, do_sample=False, **options))


@pytest.mark.parametrize(
    ("family", "overrides", "placement", "what"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}, "layer", "is given alibi, which does not travel"),
        ("opt", {"word_embed_proj_dim": 48, "ffn_dim": 80}, "fused", "not made of one attention and one MLP"),
    ],
)
def test_families_that_can_not_be_fused_are_told_why(
    family: str, overrides: dict[str, Any], placement: str, what: str
) -> None:
    stock = make_model(family, **overrides)
    with serving_of(stock) as server, GPUClient(server.endpoint) as client, pytest.raises(ModelError, match=what):
        from_pretrained(client=client, placement=placement)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_is_found_by_watching(family: str) -> None:
    layout = find_layout(make_model(family), torch.device("cpu"))
    assert [module.name for module in layout.layers] == ["model.layers.0", "model.layers.1"]
    assert [(module.name, module.returns) for module in layout.attention] == [
        ("model.layers.0.self_attn", 2),
        ("model.layers.1.self_attn", 2),
    ]
    assert [(module.name, module.returns) for module in layout.mlp] == [
        ("model.layers.0.mlp", 0),
        ("model.layers.1.mlp", 0),
    ]
    assert layout.hidden == 48
    assert layout.attention_implementation == "sdpa"
