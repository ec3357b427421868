"""Embedding in the runner, whatever the placement: the same results, one round trip less, and no id is sent."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import tsqp_here
from models import FAMILIES, LAYERS, VOCAB_SIZE, assert_same, left_padded, logits, make_model, serving, token_ids
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from tsqp import demo, kept_embedding
from tsqp.client import GPUClient
from tsqp.demo.server_process import ServerProcess
from tsqp.errors import ModelError, ProtocolError, UnplacedParameterError
from tsqp.model_info import pack, unpack
from tsqp.placement import EMBEDDING, PLACEMENTS, Placement, get_placement
from tsqp.prefill import PrefillRuns, format_prefill
from tsqp.split import attach, detach, from_pretrained

REMOTE = ["linear", "ops", "fused", "layer"]
#: Scaled embeddings, a norm behind them, position embeddings with a table and with a forward of their own; each
#: with the placements it runs in.
MORE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gemma": ({"head_dim": 12, "tie_word_embeddings": True}, REMOTE),
    "gemma2": ({"head_dim": 12, "sliding_window": 8}, ["linear", "fused", "layer"]),
    "gemma3_text": ({"head_dim": 12, "sliding_window": 8, "tie_word_embeddings": True}, REMOTE),
    "phi3": ({}, REMOTE),
    "bloom": ({"n_head": 4, "n_layer": 2}, ["linear"]),
    "gpt2": ({"n_embd": 48, "n_head": 4, "n_layer": 2, "tie_word_embeddings": True}, ["fused", "layer"]),
}
#: Family, placement, and where the table comes from: that does not depend on the placement.
RUNS = [
    (family, placement, source)
    for family, placements in (*((family, REMOTE) for family in FAMILIES), *((f, p) for f, (_, p) in MORE.items()))
    for placement in placements
    for source in (("server", "path") if placement == placements[0] else ("server",))
]
SOURCES = ["server", "path"]


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A stock model, its checkpoint's directory and the endpoint of a server of it."""
    changes = MORE.get(request.param, ({}, []))[0]
    path = tmp_path_factory.mktemp("checkpoint")
    stock = make_model(request.param, path, **changes)
    with serving(stock) as server:
        yield stock, path, server.endpoint


def lookups(client: GPUClient) -> int:
    """How often the server was asked for rows of an embedding."""
    return client.stats["operators"].get("gpu_embedding", {"calls": 0})["calls"]


def sends_no_ids(client: GPUClient) -> bool:
    return lookups(client) == 0


# --- the placement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REMOTE)
def test_one_round_trip_less(name: str) -> None:
    stock, kept = PLACEMENTS[name], get_placement(name, keep_embedding=True)
    assert kept.round_trips(16) == stock.round_trips(16) - 1
    assert kept.remote == stock.remote - {EMBEDDING}
    assert (kept.name, kept.attention, kept.needs_server, kept.keeps_embedding) == (name, stock.attention, True, True)
    assert not stock.keeps_embedding
    assert kept.keeping_embedding() is kept
    assert "Embedding in the runner" in kept.summary
    assert kept.summary.count("Embedding") == 1
    assert str(kept) == f"{name}, embedding kept"
    assert f"placement {name}, embedding kept, 1 runs" in format_prefill(PrefillRuns(8, [1.0], 3), kept)


def test_local_keeps_it_anyway(tmp_path: Path) -> None:
    assert get_placement("local", keep_embedding=True) is PLACEMENTS["local"]
    assert str(PLACEMENTS["local"]) == "local"
    stock = make_model("llama", tmp_path)
    model = from_pretrained(tmp_path, placement="local", keep_embedding=True)
    assert torch.equal(logits(model), logits(stock))


def test_a_placement_of_ones_own_that_leaves_embedding_out_keeps_it() -> None:
    own = Placement("own", "", frozenset({"linear", "lm_head"}), "runner", 4, 1)
    stock = make_model("llama")
    with serving(stock) as server:
        model = from_pretrained(endpoint=server.endpoint, placement=own)
        assert_same(logits(model), logits(stock))
        model.close()


# --- the same results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("served", "placement", "source"), RUNS, indirect=["served"])
def test_parity_and_round_trips(placement: str, source: str, served: Any) -> None:
    stock, path, endpoint = served
    model = from_pretrained(path if source == "path" else None, endpoint, placement, keep_embedding=True)
    client, padded = model.tsqp_client, left_padded([3, 11])
    before = client.round_trips
    real = padded["attention_mask"].bool()
    assert_same(logits(model, **padded)[real], logits(stock, **padded)[real], 1e-4)
    assert client.round_trips - before == model.tsqp_placement.round_trips(LAYERS)
    asked = lookups(client)
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        found, expected = (each.generate(**padded, max_new_tokens=8, **options) for each in (model, stock))
        assert torch.equal(found, expected)
    assert lookups(client) == asked  # nothing was looked up at the server but, perhaps, the table before the prompt
    assert (asked == 0) == (source == "path")
    model.close()


@pytest.mark.parametrize("placement", REMOTE)
def test_prefill_and_decode_through_one_cache(placement: str) -> None:
    stock = make_model("llama")
    ids = token_ids(2, 24)
    with serving(stock) as server:
        model = from_pretrained(endpoint=server.endpoint, placement=placement, keep_embedding=True)
        cache, parts = DynamicCache(config=model.config), []
        with torch.no_grad():
            for first, last in ((0, 17), (17, 18), (18, 19), (19, 24)):
                before = model.tsqp_client.round_trips
                parts.append(model(ids[:, first:last], past_key_values=cache).logits)
                assert model.tsqp_client.round_trips - before == model.tsqp_placement.round_trips(LAYERS)
        assert_same(torch.cat(parts, dim=1), logits(stock, input_ids=ids), 1e-4)
        model.close()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_table_is_the_stock_one_bit_for_bit(family: str, tmp_path: Path) -> None:
    stock = make_model(family, tmp_path, dtype=torch.bfloat16, **MORE.get(family, ({}, []))[0])
    ids = torch.arange(VOCAB_SIZE)[None]
    with serving(stock) as server:
        for path in (tmp_path, None):
            model = from_pretrained(path, server.endpoint, keep_embedding=True)
            table = model.get_input_embeddings()
            assert isinstance(table, nn.Embedding)
            assert model.dtype == table.weight.dtype == torch.bfloat16
            assert not table.weight.requires_grad
            assert torch.equal(table(ids), stock.get_input_embeddings()(ids))
            if path is not None:
                assert type(table) is type(stock.get_input_embeddings())
            model.close()


@pytest.mark.parametrize("source", SOURCES)
def test_the_table_has_the_runners_dtype(source: str, tmp_path: Path) -> None:
    stock = make_model("llama", tmp_path, dtype=torch.bfloat16)
    with serving(stock) as server:
        path = tmp_path if source == "path" else None
        model = from_pretrained(path, server.endpoint, "linear", dtype="float32", keep_embedding=True)
        assert model.get_input_embeddings().weight.dtype == torch.float32
        assert_same(logits(model), logits(stock.float()), 0.02)
        model.close()


# --- attach ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", REMOTE)
def test_attach_leaves_the_models_own_embedding(placement: str) -> None:
    stock = make_model("llama")
    model, expected = copy.deepcopy(stock), logits(stock)
    embedding, weight = model.get_input_embeddings(), model.get_input_embeddings().weight
    with serving(stock) as server, GPUClient(server.endpoint) as client:
        attach(model, client, placement, keep_embedding=True)
        assert model.get_input_embeddings() is embedding
        before = client.round_trips
        assert_same(logits(model), expected)
        assert client.round_trips - before == PLACEMENTS[placement].round_trips(LAYERS) - 1
        assert sends_no_ids(client)
        detach(model)
        assert model.get_input_embeddings().weight is weight
        assert torch.equal(logits(model), expected)


def test_an_embedding_of_another_model_is_refused() -> None:
    with serving(make_model("llama")) as server, GPUClient(server.endpoint) as client:
        other = make_model("llama")
        other.set_input_embeddings(nn.Embedding(VOCAB_SIZE + 3, 48))
        with pytest.raises(ModelError, match=r"embedding model.embed_tokens is 100x48 here and 97x48 there"):
            attach(other, client, "ops", keep_embedding=True)


# --- where the table comes from --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PreTrainedModel, Path, str]]:
    path = tmp_path_factory.mktemp("llama")
    stock = make_model("llama", path)
    with serving(stock) as server:
        yield stock, path, server.endpoint


def test_the_checkpoint_is_preferred_and_only_its_table_is_used(
    llama: tuple[PreTrainedModel, Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock, path, endpoint = llama
    stock.config.save_pretrained(tmp_path)
    table = load_file(path / "model.safetensors")["model.embed_tokens.weight"] + 1
    save_file({"embed_tokens.weight": table}, tmp_path / "model.safetensors")  # without the base model's prefix
    with caplog.at_level(logging.INFO, "tsqp"):
        model = from_pretrained(tmp_path, endpoint, keep_embedding=True)
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert sends_no_ids(model.tsqp_client)
    assert "model.embed_tokens stays in the runner: 97x48, from the checkpoint" in caplog.text
    model.close()


def test_shards_are_found_by_the_index(llama: tuple[PreTrainedModel, Path, str], tmp_path: Path) -> None:
    stock, _, endpoint = llama
    stock.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(shards.values())) > 2
    for name in set(shards.values()) - {shards["model.embed_tokens.weight"]}:
        (tmp_path / name).write_bytes(b"not opened")
    model = from_pretrained(tmp_path, endpoint, keep_embedding=True)
    assert torch.equal(model.get_input_embeddings().weight, stock.get_input_embeddings().weight)
    assert sends_no_ids(model.tsqp_client)
    model.close()


@pytest.mark.parametrize("weights", [{}, {"other.weight": torch.zeros(3)}, "packed"], ids=["no", "others", "packed"])
def test_without_the_table_in_the_checkpoint_the_server_is_asked(
    weights: Any, llama: tuple[PreTrainedModel, Path, str], tmp_path: Path
) -> None:
    stock, _, endpoint = llama
    stock.config.save_pretrained(tmp_path)
    if weights == "packed":
        weights = {"model.embed_tokens.weight": torch.zeros(VOCAB_SIZE, 48, dtype=torch.int8)}
    if weights:
        save_file(weights, tmp_path / "model.safetensors")
    model = from_pretrained(tmp_path, endpoint, keep_embedding=True)
    assert torch.equal(model.get_input_embeddings().weight, stock.get_input_embeddings().weight)
    assert not sends_no_ids(model.tsqp_client)
    model.close()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"rubbish", r"can't be read \(SafetensorError\)"),
        ({"model.embed_tokens.weight": torch.zeros(5, 48)}, r"of shape \[5, 48\]; this model's is \[97, 48\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    content: Any, what: str, llama: tuple[PreTrainedModel, Path, str], tmp_path: Path
) -> None:
    stock, _, endpoint = llama
    stock.config.save_pretrained(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "model.safetensors").write_bytes(content)
    else:
        save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=what):
        from_pretrained(tmp_path, endpoint, keep_embedding=True)


def test_trusted_parameters_come_first(llama: tuple[PreTrainedModel, Path, str]) -> None:
    stock, path, endpoint = llama
    name = "model.embed_tokens"
    with GPUClient(endpoint) as client:
        kept = {name: stock.get_submodule(name)}
        before = client.round_trips
        trusted = {f"{name}.weight": stock.get_input_embeddings().weight}
        assert kept_embedding.tables(stock, client, trusted, kept, path) == {}
        assert client.round_trips == before


def test_the_server_is_asked_for_all_ids_in_order_and_in_parts(
    llama: tuple[PreTrainedModel, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, _, endpoint = llama
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(kept_embedding, "_CHUNK_BYTES", 10 * 48 * 4)
    with GPUClient(endpoint) as client:
        ask = client.embedding

        def recorded(ids: torch.Tensor, module: str | None = None) -> torch.Tensor:
            asked.append(ids)
            return ask(ids, module)

        monkeypatch.setattr(client, "embedding", recorded)
        model = from_pretrained(client=client, keep_embedding=True)
        assert [len(ids) for ids in asked] == [10] * 9 + [7]
        assert torch.equal(torch.cat(asked), torch.arange(VOCAB_SIZE))
        assert torch.equal(model.get_input_embeddings().weight, stock.get_input_embeddings().weight)
        model.close()


def test_a_table_beyond_reason_is_refused(
    llama: tuple[PreTrainedModel, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_embedding, "MAX_TABLE_BYTES", 97 * 48 * 4 - 1)
    with pytest.raises(ModelError, match=r"97x48 takes 18624 bytes; the runner keeps up to 18623"):
        from_pretrained(endpoint=llama[2], keep_embedding=True)


def test_a_server_may_not_send_the_table_as_a_trusted_parameter(llama: tuple[PreTrainedModel, Path, str]) -> None:
    with GPUClient(llama[2]) as client:
        info = client.init()
    lie = replace(info, trusted={**info.trusted, "model.embed_tokens.weight": torch.zeros(97, 48)})
    with pytest.raises(ProtocolError, match=r"model\.embed_tokens\.weight, which belongs to a module it serves"):
        unpack(pack(lie))


def test_positions_with_a_forward_of_their_own_need_a_checkpoint(tmp_path: Path) -> None:
    stock = make_model("opt", tmp_path, word_embed_proj_dim=48, ffn_dim=80)
    with serving(stock) as server:
        with pytest.raises(UnplacedParameterError, match=r"embed_positions needs more than ids"):
            from_pretrained(endpoint=server.endpoint, placement="linear", keep_embedding=True)
        model = from_pretrained(tmp_path, server.endpoint, "linear", keep_embedding=True)
        inputs = left_padded([4, 9])
        real = inputs["attention_mask"].bool()
        assert_same(logits(model, **inputs)[real], logits(stock, **inputs)[real], 1e-4)
        model.close()


# --- the commands ----------------------------------------------------------------------------------------------


@pytest.mark.watchdog(180)  # it starts two servers
def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with ServerProcess(demo.model_path()) as server:
        server.connect().close()
        where = ("--endpoint", server.endpoint)
        texts = []
        for option in ((), ("--keep-embedding",)):
            done = tsqp_here(capsys, "generate", "--prompt", demo.PROMPT, "--max-new-tokens", "8", *where, *option)
            assert done.code == 0
            assert (kept_embedding.NOTE in done.err) == bool(option)
            texts.append(done.out)
        assert texts[0] == texts[1]
        done = tsqp_here(capsys, "prefill", "--tokens", "16", "--repeat", "1", "--keep-embedding", *where)
        assert "placement ops, embedding kept" in done.out
        assert "round trips   31 per prefill" in done.out
    done = tsqp_here(capsys, "demo", "--max-new-tokens", "4", "--keep-embedding")
    assert done.code == 0
    assert "round trips   31 for the prefill" in done.out
    assert "31 per token" in done.out
