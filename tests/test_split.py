"""How a model is taken apart and put together again: placements, attach, detach, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYERS, assert_same, logits, make_model, serving
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsqp.attention import ATTENTION_NAME, split_attention
from tsqp.client import GPUClient
from tsqp.errors import (
    ClosedError,
    ConfigError,
    ModelError,
    ModelNotFoundError,
    UnplacedParameterError,
)
from tsqp.placement import PLACEMENTS, Placement, get_placement
from tsqp.remote import RemoteEmbedding, RemoteLinear
from tsqp.split import attach, detach, from_pretrained

REMOTE = ["linear", "ops"]


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture(scope="module")
def endpoint(stock: PreTrainedModel) -> Iterator[str]:
    with serving(stock) as server:
        yield server.endpoint


@pytest.fixture
def client(endpoint: str) -> Iterator[GPUClient]:
    with GPUClient(endpoint) as client:
        yield client


# --- placements ------------------------------------------------------------------------------------------------


def test_placements_count_their_round_trips() -> None:
    trips = {name: placement.round_trips(16) for name, placement in PLACEMENTS.items()}
    assert trips == {"local": 0, "linear": 66, "ops": 98, "fused": 34, "layer": 18}


def test_an_unknown_placement_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'gpu'.*local, linear, ops, fused, layer"):
        get_placement("gpu")


def test_a_placement_object_stands_for_itself() -> None:
    own = Placement("mine", "", frozenset({"linear"}), "runner", 4, 0)
    assert get_placement(own) is own


# --- attach and detach -----------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything a split touches: modules by identity, own attributes, hooks, attention of the configs."""
    state: dict[str, Any] = {"modules": {name: id(module) for name, module in model.named_modules()}}
    for name, module in model.named_modules():
        state[f"{name} attributes"] = sorted(vars(module))
        state[f"{name} hooks"] = [len(vars(module)[key]) for key in sorted(vars(module)) if key.endswith("_hooks")]
        config = getattr(module, "config", None)
        state[f"{name} attention"] = getattr(config, "_attn_implementation", None)
    state["parameters"] = {name: id(parameter) for name, parameter in model.named_parameters()}
    return state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("placement", [*REMOTE, "fused", "layer"])
def test_detach_gives_the_model_back_as_it_was(
    placement: str, attention: str, stock: PreTrainedModel, client: GPUClient
) -> None:
    model = copy.deepcopy(stock)
    model.set_attn_implementation(attention)
    before, expected, state = fingerprint(model), logits(model), torch.get_rng_state()
    assert attach(model, client, placement) is model
    assert isinstance(model.lm_head, RemoteLinear)
    assert isinstance(model.get_input_embeddings(), RemoteEmbedding)
    assert fingerprint(model) != before
    trips = client.round_trips
    assert_same(logits(model), expected)
    assert client.round_trips - trips == PLACEMENTS[placement].round_trips(LAYERS)
    assert detach(model) is model
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), expected)
    assert client.ping() > 0  # the client is its owner's


def test_attach_and_detach_take_turns(stock: PreTrainedModel, client: GPUClient) -> None:
    model = copy.deepcopy(stock)
    before, expected = fingerprint(model), logits(stock)
    for placement in ("ops", "linear", "ops"):
        attach(model, client, placement)
        assert_same(logits(model), expected)
        model.close()
    assert fingerprint(model) == before


def test_attaching_twice_is_refused(stock: PreTrainedModel, client: GPUClient) -> None:
    model = attach(copy.deepcopy(stock), client, "linear")
    with pytest.raises(ModelError, match="attached to a server already"):
        attach(model, client, "ops")
    detach(model)
    with pytest.raises(ModelError, match="not attached"):
        detach(model)


def test_attaching_nothing_is_refused(stock: PreTrainedModel, client: GPUClient) -> None:
    with pytest.raises(ConfigError, match="'local' uses no server"):
        attach(stock, client, "local")


@pytest.mark.parametrize(
    ("family", "overrides", "what"),
    [
        ("llama", {"intermediate_size": 96}, "gate_proj is 48x96 here and 48x80 there"),
        ("llama", {"num_hidden_layers": 3}, r"layers\.2.* missing there"),
        ("qwen2", {}, "q_proj is 48x48 with bias here and 48x48 there"),
    ],
)
def test_a_server_of_another_model_is_refused(
    family: str, overrides: dict[str, Any], what: str, client: GPUClient
) -> None:
    model = make_model(family, **overrides)
    before = fingerprint(model)
    with pytest.raises(ModelError, match=what):
        attach(model, client, "ops")
    assert fingerprint(model) == before


def test_a_failure_in_between_takes_everything_back(
    stock: PreTrainedModel, client: GPUClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(stock)
    before = fingerprint(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("in between")

    monkeypatch.setattr("tsqp.split.instrument", fail)
    with pytest.raises(RuntimeError, match="in between"):
        attach(model, client, "ops")
    assert fingerprint(model) == before


# --- models made from a config ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("from_path", [False, True])
def test_a_model_made_anew_is_complete(family: str, from_path: bool, tmp_path: Path) -> None:
    stock = make_model(family, tmp_path)
    with serving(stock) as server:
        model = from_pretrained(tmp_path if from_path else None, server.endpoint)
        assert type(model) is type(stock)
        assert model.device == torch.device("cpu")
        assert model.dtype == torch.float32
        assert not model.training
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        buffers, values = dict(model.named_buffers()), model.state_dict()
        for name, buffer in stock.named_buffers():
            assert torch.equal(buffers[name], buffer)
        for name, value in stock.state_dict().items():
            if "norm" in name:
                assert torch.equal(values[name], value)
        assert model.generation_config.to_dict() == stock.generation_config.to_dict()
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.close()


def test_the_local_placement_is_the_stock_model(stock: PreTrainedModel, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, placement="local")
    assert torch.equal(logits(model), logits(stock))
    assert model.tsqp_client is None
    model.close()


def test_local_needs_a_path() -> None:
    with pytest.raises(ConfigError, match="needs the path"):
        from_pretrained(placement="local")


@pytest.mark.parametrize("placement", ["local", "ops"])
def test_a_path_without_a_checkpoint_is_refused(placement: str, tmp_path: Path, endpoint: str) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        from_pretrained(tmp_path / "none", endpoint, placement=placement)
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
        from_pretrained(tmp_path, endpoint, placement=placement)


def test_a_broken_checkpoint_is_refused(stock: PreTrainedModel, tmp_path: Path, endpoint: str) -> None:
    stock.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="can't be loaded"):
        from_pretrained(tmp_path, placement="local")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json in .* can't be used"):
        from_pretrained(tmp_path, endpoint)


def test_options_of_a_client_are_not_given_beside_it(endpoint: str, client: GPUClient) -> None:
    for options in ({"endpoint": endpoint}, {"wire_dtype": "float16"}):
        with pytest.raises(ConfigError, match="to the client only"):
            from_pretrained(client=client, **options)


def test_unknown_options_are_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="device_map"):
        from_pretrained(endpoint=endpoint, device_map="auto")
    with pytest.raises(ConfigError, match="int8"):
        from_pretrained(endpoint=endpoint, dtype="int8")


@pytest.mark.parametrize("entries", [{"model_type": "nonsense"}, {"num_hidden_layers": 10**6}])
def test_a_config_of_the_server_that_can_not_be_is_refused(
    entries: dict[str, Any], client: GPUClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = client.init()
    monkeypatch.setitem(info.config, *next(iter(entries.items())))
    with pytest.raises(ModelError, match=r"nonsense|speaks of 1000000 layers"):
        from_pretrained(client=client)


def test_a_config_of_the_server_chooses_no_code(client: GPUClient, monkeypatch: pytest.MonkeyPatch) -> None:
    info = client.init()
    for key in ("attn_implementation", "experts_implementation", "_attn_implementation_internal"):
        monkeypatch.setitem(info.config, key, "somebody/kernel")
    model = from_pretrained(client=client, placement="linear")
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    ("value", "error", "what"),
    [
        (None, UnplacedParameterError, r"no values for model\.norm\.weight"),
        (torch.ones(47), ModelError, r"model\.norm\.weight .*shape \[47\]"),
        (torch.ones(48, dtype=torch.int64), ModelError, r"model\.norm\.weight is torch\.int64"),
    ],
)
def test_trusted_values_are_checked(
    value: Tensor | None,
    error: type[Exception],
    what: str,
    client: GPUClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trusted = client.init().trusted
    if value is None:
        monkeypatch.delitem(trusted, "model.norm.weight")
    else:
        monkeypatch.setitem(trusted, "model.norm.weight", value)
    with pytest.raises(error, match=what):
        from_pretrained(client=client)


def test_a_closed_model_says_so(endpoint: str) -> None:
    model = from_pretrained(endpoint=endpoint)
    logits(model)
    model.close()
    model.close()
    with pytest.raises(ClosedError, match="detached"):
        logits(model)
    with pytest.raises(ClosedError):
        model.tsqp_client.ping()


def test_closing_a_model_leaves_a_lent_client_open(client: GPUClient) -> None:
    model = from_pretrained(client=client)
    model.close()
    assert client.ping() > 0
    assert_same(logits(from_pretrained(client=client)), logits(make_model("llama")))


def test_weights_are_not_here_and_not_saved(client: GPUClient, tmp_path: Path) -> None:
    model = from_pretrained(client=client)
    with pytest.raises(AttributeError, match="on the server"):
        _ = model.lm_head.weight
    assert not hasattr(model.model.layers[0].mlp.up_proj, "bias")
    with pytest.raises(ModelError, match="can't be saved"):
        model.save_pretrained(tmp_path)
    assert "on the server" in repr(model)


def test_training_is_refused(client: GPUClient) -> None:
    model = from_pretrained(client=client)
    with pytest.raises(ModelError, match="only does inference"):
        logits(model.train())
    logits(model.eval())


def test_a_wrong_width_is_named(client: GPUClient) -> None:
    model = from_pretrained(client=client)
    with pytest.raises(ModelError, match=r"q_proj got \[1, 2, 47\]"):
        model.model.layers[0].self_attn.q_proj(torch.ones(1, 2, 47))


# --- models that can't be split --------------------------------------------------------------------------------


UNPLACED = {
    "mixtral": ({"num_local_experts": 4}, "experts"),
    "gpt2": ({"n_embd": 48, "n_head": 4, "n_layer": 2}, "c_attn"),
    "opt": ({"word_embed_proj_dim": 48, "ffn_dim": 80}, "embed_positions"),
}


@pytest.mark.parametrize("family", UNPLACED)
def test_weights_no_placement_covers_are_refused_by_name(family: str) -> None:
    overrides, name = UNPLACED[family]
    model = make_model(family, **overrides)
    before = fingerprint(model)
    with serving(model) as server, GPUClient(server.endpoint) as client:
        for placement in REMOTE:
            with pytest.raises(UnplacedParameterError, match=name):
                from_pretrained(client=client, placement=placement)
            with pytest.raises(UnplacedParameterError, match=name):
                attach(model, client, placement)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("family", "overrides", "what"),
    [
        ("gemma2", {"head_dim": 12}, "Gemma2Attention .*'softcap'"),
        ("bloom", {}, "BloomForCausalLM .*AttentionInterface"),
    ],
)
def test_attention_ops_does_not_know_is_refused_by_name(family: str, overrides: dict[str, Any], what: str) -> None:
    stock = make_model(family, **overrides)
    with serving(stock) as server, GPUClient(server.endpoint) as client:
        with pytest.raises(ModelError, match=what):
            logits(from_pretrained(client=client, placement="ops"))
        assert_same(logits(from_pretrained(client=client, placement="linear")), logits(stock))


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "softcap", "some_new_bias"])
def test_arguments_that_change_attention_are_refused(name: str, client: GPUClient) -> None:
    attention = from_pretrained(client=client).model.layers[0].self_attn
    q, kv = torch.ones(1, 4, 2, 12), torch.ones(1, 2, 2, 12)
    with pytest.raises(ModelError, match=name):
        split_attention(attention, q, kv, kv, None, **{name: torch.ones(4)})
    with pytest.raises(ModelError, match="elements in K and 6 in V"):
        split_attention(attention, q, kv, kv[..., :6], None)
    with pytest.raises(ModelError, match="covers 3 keys but there are 2"):
        split_attention(attention, q, kv, kv, torch.zeros(1, 1, 2, 3))


def test_the_attention_can_not_be_chosen_by_itself(stock: PreTrainedModel) -> None:
    model = copy.deepcopy(stock)
    model.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(ModelError, match="in no split model"):
        logits(model)
