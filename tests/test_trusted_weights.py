"""A runner with trusted weights: an honest server passes, and whatever else one says is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYERS, assert_same, logits, make_model, serving, token_ids
from trusting import FAMILIES, NORM, Made, made, serving_checkpoint, without

from tsqp import model_info
from tsqp.client import GPUClient
from tsqp.errors import ModelError, ProtocolError, UntrustedServerError
from tsqp.model_info import InitInfo
from tsqp.protocol import ModuleInfo
from tsqp.server import GPUServer
from tsqp.split import attach, detach, from_pretrained
from tsqp.trusted_making import write_trusted_weights
from tsqp.trusted_weights import load_trusted_weights

pytest_plugins = ["trusting_fixtures"]


@pytest.fixture(scope="module")
def gpt2_server(gpt2: Made) -> Iterator[GPUServer]:
    with serving(gpt2.stock) as server:
        yield server


# --- honest servers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_path", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_an_honest_server_passes_and_computes_the_same(family: str, from_path: bool, tmp_path: Path) -> None:
    own, placement = made(family, tmp_path), FAMILIES[family][1]
    with serving(own.stock) as server:
        model = from_pretrained(
            own.checkpoint if from_path else None, server.endpoint, placement=placement, **own.options
        )
        assert_same(logits(model), logits(own.stock))
        ids = token_ids(1, 9)
        expected = own.stock.generate(ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
        assert model.generation_config.to_dict() == own.stock.generation_config.to_dict()
        model.close()


@pytest.mark.parametrize("served_dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_any_served_precision_of_the_same_checkpoint_passes(
    stored: torch.dtype, served_dtype: str, tmp_path: Path
) -> None:
    own = made("qwen3", tmp_path, dtype=stored)
    with serving_checkpoint(own.checkpoint, served_dtype) as server, GPUClient(server.endpoint) as client:
        model = from_pretrained(client=client, placement="linear", **own.options)
        plain = from_pretrained(client=client, placement="linear")
        assert model.dtype == plain.dtype
        assert_same(logits(model), logits(plain), tolerance=0.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_checkpoint_without_a_generation_config_passes(family: str, tmp_path: Path) -> None:
    make_model(family, tmp_path, **FAMILIES[family][0])
    (tmp_path / "generation_config.json").unlink()
    digest = write_trusted_weights(tmp_path, tmp_path / "file")
    with serving_checkpoint(tmp_path) as server:
        path = from_pretrained(
            tmp_path, server.endpoint, "layer", trusted_weights=tmp_path / "file", trusted_digest=digest
        )
        path.close()


def test_values_come_from_the_file_and_not_from_the_server(tmp_path: Path) -> None:
    own = made("qwen3", tmp_path)
    with serving_checkpoint(own.checkpoint, "bfloat16") as server:
        model = from_pretrained(
            endpoint=server.endpoint, placement="linear", dtype="float32", wire_dtype="float32", **own.options
        )
        weight, stored = model.model.norm.weight, own.stock.model.norm.weight
        assert torch.equal(weight, stored)
        assert not torch.equal(weight, stored.bfloat16().float()), "the server rounds them"
        model.close()


@pytest.mark.parametrize("from_path", [False, True])
def test_a_kept_embedding_comes_from_the_file_alone(
    llama: Made, server: GPUServer, from_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPUClient, "embedding", _never)
    path = llama.checkpoint if from_path else None
    digest = write_trusted_weights(llama.checkpoint, tmp_path / "with", embedding=True)
    pinned = {"trusted_weights": tmp_path / "with", "trusted_digest": digest}
    model = from_pretrained(path, server.endpoint, "ops", keep_embedding=True, **pinned)
    assert torch.equal(model.get_input_embeddings().weight, llama.stock.get_input_embeddings().weight)
    assert_same(logits(model), logits(llama.stock))
    model.close()
    with pytest.raises(ModelError, match=r"holds no model\.embed_tokens\.weight.*tsqp trust --embedding"):
        from_pretrained(path, server.endpoint, "ops", keep_embedding=True, **llama.options)


def _never(*_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("the server was asked for an embedding")


def test_a_loaded_model_is_attached_after_all_three_agree(llama: Made, server: GPUServer, tmp_path: Path) -> None:
    with GPUClient(server.endpoint) as client:
        model = make_model("llama", eos_token_id=5)
        attach(model, client, "linear", **llama.options)
        assert_same(logits(model), logits(llama.stock))
        model.close()
        for other, what in (
            (make_model("llama", eos_token_id=5, seed=1), r"input_layernorm\.weight differs in \d+ of 48 values"),
            (
                make_model("llama", eos_token_id=5, rms_norm_eps=1e-3),
                r"config\.rms_norm_eps is 0\.001, in the file 1e-06",
            ),
        ):
            with pytest.raises(ModelError, match=what):
                attach(other, client, "linear", **llama.options)
            with pytest.raises(ModelError, match="not attached"):
                detach(other)
    with lying(server, tied=False), GPUClient(server.endpoint) as client:
        with pytest.raises(UntrustedServerError, match="tied is False"):
            attach(model, client, "linear", **llama.options)
        with pytest.raises(ModelError, match="not attached"):
            detach(model)


# --- lies -------------------------------------------------------------------------------------------------------------


@contextmanager
def lying(teller: GPUServer, /, **changes: Any) -> Iterator[None]:
    """The server tells these fields of its Init reply otherwise."""
    operators = teller._operators
    honest = operators._init_reply
    operators._init_reply = model_info.pack(replace(teller._served.info, **changes))
    try:
        yield
    finally:
        operators._init_reply = honest


def changed(entries: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    """A copy of a config with one entry changed."""
    entries = json.loads(json.dumps(entries))
    place = entries
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return entries


def one_ulp(trusted: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    value = trusted[name].clone()
    value[7] = torch.nextafter(value[7], torch.tensor(torch.inf))
    return {**trusted, name: value}


def swapped(info: InitInfo) -> dict[str, Any]:
    return {"fused": replace(info.fused, layers=info.fused.layers[::-1])}


QUERY = "model.layers.0.self_attn.q_proj"
LIES: dict[str, tuple[Callable[[InitInfo], dict[str, Any]], str]] = {
    "a norm weight by one ulp": (
        lambda i: {"trusted": one_ulp(i.trusted, NORM)},
        r"model\.norm\.weight differs in 1 of 48 values",
    ),
    "the signs of a norm": (
        lambda i: {"trusted": {**i.trusted, NORM: -i.trusted[NORM]}},
        r"model\.norm\.weight differs in 48 of 48 values",
    ),
    "a norm's shape": (lambda i: {"trusted": {**i.trusted, NORM: torch.ones(4)}}, r"model\.norm\.weight .*shape \[4\]"),
    "a norm's kind": (
        lambda i: {"trusted": {**i.trusted, NORM: i.trusted[NORM].long()}},
        r"model\.norm\.weight is torch\.int64",
    ),
    "a norm left out": (lambda i: {"trusted": without(i.trusted, NORM)}, r"model\.norm\.weight is missing"),
    "a value more": (
        lambda i: {"trusted": {**i.trusted, "model.bias": torch.ones(3)}},
        r"model\.bias is not in the file",
    ),
    "the epsilon": (
        lambda i: {"config": changed(i.config, "rms_norm_eps", value=1e-5)},
        r"config\.rms_norm_eps is 1e-05, in the file 1e-06",
    ),
    "the rope theta": (
        lambda i: {"config": changed(i.config, "rope_parameters", "rope_theta", value=10001.0)},
        r"config\.rope_parameters\.rope_theta is 10001\.0, in the file 10000\.0",
    ),
    "the number of layers": (
        lambda i: {"config": changed(i.config, "num_hidden_layers", value=1)},
        r"config\.num_hidden_layers is 1, in the file 2",
    ),
    "the number of heads": (
        lambda i: {"config": changed(i.config, "num_attention_heads", value=8)},
        r"config\.num_attention_heads is 8, in the file 4",
    ),
    "the activation": (
        lambda i: {"config": changed(i.config, "hidden_act", value="gelu")},
        r"config\.hidden_act is 'gelu', in the file 'silu'",
    ),
    "the family": (
        lambda i: {"config": changed(i.config, "model_type", value="mistral")},
        r"config\.model_type is 'mistral', in the file 'llama'",
    ),
    "a config entry left out": (
        lambda i: {"config": without(i.config, "rms_norm_eps")},
        r"config\.rms_norm_eps is missing",
    ),
    "a config entry more": (
        lambda i: {"config": {**i.config, "sliding_window": 8}},
        r"config\.sliding_window is 8, which",
    ),
    "True for 1": (
        lambda i: {"config": changed(i.config, "bos_token_id", value=True)},
        r"config\.bos_token_id is True, in the file 1",
    ),
    "the ends of generation": (
        lambda i: {"generation_config": changed(i.generation_config, "eos_token_id", value=[5, 6])},
        r"generation_config\.eos_token_id is \[5, 6\], in the file 5",
    ),
    "a way to sample": (
        lambda i: {"generation_config": {**i.generation_config, "suppress_tokens": [3]}},
        r"generation_config\.suppress_tokens is \[3\]",
    ),
    "the tied flag": (lambda i: {"tied": False}, r"tied is False, in the file True"),
    "the geometry": (
        lambda i: {"geometry": replace(i.geometry, kv_heads=4)},
        r"geometry\.kv_heads is 4, in the file 2",
    ),
    "a module's size": (
        lambda i: {"modules": {**i.modules, QUERY: ModuleInfo("linear", 48, 96, False)}},
        r"module model\.layers\.0\.self_attn\.q_proj is linear 48x96, in the file linear 48x48",
    ),
    "a module's bias": (
        lambda i: {"modules": {**i.modules, QUERY: ModuleInfo("linear", 48, 48, True)}},
        r"q_proj is linear 48x48 with bias, in the file linear 48x48",
    ),
    "a module left out": (lambda i: {"modules": without(i.modules, QUERY)}, r"module .*q_proj is missing"),
    "a module more": (
        lambda i: {"modules": {**i.modules, "model.spy": ModuleInfo("linear", 48, 48, False)}},
        r"module model\.spy is not in the file",
    ),
    "the embedding's name": (
        lambda i: {
            "modules": {**i.modules, "model.other": i.modules["model.embed_tokens"]},
            "embedding": "model.other",
        },
        r"embedding is 'model\.other', in the file 'model\.embed_tokens'",
    ),
    "the head's name": (lambda i: {"lm_head": QUERY}, r"lm_head is '.*q_proj', in the file 'lm_head'"),
    "the order of the layers": (swapped, "list of fused layers differs"),
    "the hidden size": (lambda i: {"fused": replace(i.fused, hidden=96)}, r"hidden size is 96, in the file 48"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named_before_any_prompt(lie: str, llama: Made, server: GPUServer) -> None:
    changes, named = LIES[lie]
    with lying(server, **changes(server._served.info)), GPUClient(server.endpoint) as client:
        with pytest.raises(UntrustedServerError, match=named) as caught:
            from_pretrained(llama.checkpoint, placement="layer", client=client, **llama.options)
        assert "no prompt was sent" in str(caught.value)
        assert client.stats["calls"] == {"Init": 1}


def test_a_lie_about_one_of_two_embeddings_is_named(gpt2: Made, gpt2_server: GPUServer) -> None:
    with lying(gpt2_server, embedding="transformer.wpe"), pytest.raises(UntrustedServerError, match=r"wpe.*wte"):
        from_pretrained(None, gpt2_server.endpoint, "fused", **gpt2.options)


def test_a_lie_about_a_bias_is_named(gpt2: Made, gpt2_server: GPUServer) -> None:
    trusted = one_ulp(gpt2_server._served.info.trusted, "transformer.h.1.ln_2.bias")
    with (
        lying(gpt2_server, trusted=trusted),
        pytest.raises(UntrustedServerError, match=r"h\.1\.ln_2\.bias differs in 1 "),
    ):
        from_pretrained(None, gpt2_server.endpoint, "fused", **gpt2.options)


#: Of an Init document: what a server may say otherwise. Of these a runner uses its dtype and attention implementation.
FREE = ("server", "dtype", "fused.implementation", "fused.why", "config.transformers_version", "config.dtype")
FREE += ("config.architectures", "generation_config.transformers_version", "generation_config._from_model_config")
FREE += ("generation_config.compile_config",)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a document that hold no others."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = False
    for key, child in children:
        found = True
        yield from leaves(child, (*path, key))
    if not found:
        yield path


def other(value: Any) -> Any:
    """A value of the same type that is another one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + type(value)(1)
    return f"{value}x" if isinstance(value, str) else "something"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_no_entry_of_the_reply_can_be_changed(family: str, tmp_path: Path) -> None:
    own = made(family, tmp_path)
    with serving(own.stock) as server:
        first, *values = model_info.pack(server._served.info)
    document = json.loads(first.numpy().tobytes())
    trust = load_trusted_weights(own.file, own.digest)
    trust.checked(unpacked(document, values))
    free, caught = set(), 0
    for path in leaves(document):
        deceiving = json.loads(json.dumps(document))
        place = deceiving
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = other(place[path[-1]])
        try:
            trust.checked(unpacked(deceiving, values))
            free.add(".".join(map(str, path)))
        except (UntrustedServerError, ProtocolError):
            caught += 1
    assert caught > 100
    returns = (f"fused.{group}.{layer}.1" for group in ("layers", "attention", "mlp") for layer in range(LAYERS))
    allowed = (*FREE, *returns) if family == "mixtral" else FREE
    assert not [name for name in free if not name.startswith(allowed)]


def unpacked(document: dict[str, Any], values: list[torch.Tensor]) -> InitInfo:
    text = bytearray(json.dumps(document).encode())
    return model_info.unpack([torch.frombuffer(text, dtype=torch.uint8), *values])


@pytest.mark.parametrize("bit", [0, 7, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_a_value_can_be_changed(bit: int, dtype: torch.dtype, llama: Made) -> None:
    trust = load_trusted_weights(llama.file, llama.digest)
    honest = {name: value.to(dtype) for name, value in trust.info.trusted.items()}
    trust.checked(replace(trust.info, trusted=honest))
    for name, value in honest.items():
        lie = value.clone()
        lie.view(torch.int16)[3] ^= 1 << bit if bit < 15 else -(1 << 15)
        with pytest.raises(UntrustedServerError, match=rf"{name} differs in 1 of 48 values"):
            trust.checked(replace(trust.info, trusted={**honest, name: lie}))


def test_without_the_file_the_same_lie_is_believed(server: GPUServer) -> None:
    trusted = one_ulp(server._served.info.trusted, NORM)
    with lying(server, trusted=trusted):
        model = from_pretrained(None, server.endpoint, "linear")
        assert torch.equal(model.model.norm.weight, trusted[NORM])
        model.close()


def test_what_a_server_may_say_otherwise(llama: Made, server: GPUServer) -> None:
    info = server._served.info
    config = {**info.config, "transformers_version": "5.99", "architectures": None, "dtype": "float16"}
    fused = dataclasses.replace(info.fused, mlp=(), attention=(), attention_implementation="eager")
    with lying(server, config=config, server={"device": "mars"}, fused=fused):
        from_pretrained(None, server.endpoint, "layer", **llama.options).close()


def test_what_a_server_says_is_shown_harmlessly_and_shortly(llama: Made, server: GPUServer) -> None:
    config = changed(server._served.info.config, "hidden_act", value="\x1b[2J\u202e" + "x" * 5000)
    config["\x1b[31m" + "k" * 4000] = 1
    with lying(server, config=config), pytest.raises(UntrustedServerError) as caught:
        from_pretrained(None, server.endpoint, **llama.options)
    assert str(caught.value).isprintable()
    assert "\u202e" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_many_lies_are_counted(llama: Made, server: GPUServer) -> None:
    trusted = {name: value * 2 for name, value in server._served.info.trusted.items()}
    with (
        lying(server, trusted=trusted, tied=False),
        pytest.raises(UntrustedServerError, match="and 2 more differences"),
    ):
        from_pretrained(None, server.endpoint, **llama.options)


def test_a_config_nested_deeply_is_refused(llama: Made, server: GPUServer) -> None:
    deep: Any = 1
    for _ in range(30):
        deep = [deep]
    config = changed(server._served.info.config, "hidden_act", value=deep)
    with lying(server, config=config), pytest.raises(UntrustedServerError, match=r"config\.hidden_act"):
        from_pretrained(None, server.endpoint, **llama.options)
