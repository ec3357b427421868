"""What a split model keeps on the server, and which of its operators the runner computes itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import LAYERS, assert_same, left_padded, logits, make_model, serving, token_ids
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from tsqp import instrument
from tsqp.client import GPUClient
from tsqp.errors import (
    WaitTimeoutError,
)
from tsqp.split import attach, from_pretrained

REMOTE = ["linear", "ops", "fused", "layer"]


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


def test_projections_called_twice_give_the_same(client: GPUClient, stock: PreTrainedModel) -> None:
    model = from_pretrained(client=client, placement="linear")
    attention, reference = model.model.layers[1].self_attn, stock.model.layers[1].self_attn
    x = torch.randn(1, 4, 48)
    for name in ("q_proj", "q_proj", "v_proj", "k_proj", "q_proj"):
        assert_same(getattr(attention, name)(x), getattr(reference, name)(x))
    x.mul_(-2)
    assert_same(attention.k_proj(x), reference.k_proj(x))


# --- state on the server ---------------------------------------------------------------------------------------


def test_models_on_one_client_do_not_mix(endpoint: str, stock: PreTrainedModel, client: GPUClient) -> None:
    models = [
        from_pretrained(client=client),
        attach(copy.deepcopy(stock), client),
        from_pretrained(endpoint=endpoint),
    ]
    prompts = [token_ids(1, 9, seed=seed) for seed in range(3)]
    caches = [DynamicCache(config=stock.config) for _ in models]
    with torch.no_grad():
        for step in range(9):
            for model, prompt, cache in zip(models, prompts, caches, strict=True):
                found = model(prompt[:, step : step + 1], past_key_values=cache).logits[0, -1]
                assert_same(found, stock(prompt[:, : step + 1]).logits[0, -1])
    models[2].close()


def test_conversations_of_one_model_take_turns(client: GPUClient, stock: PreTrainedModel) -> None:
    model = from_pretrained(client=client)
    prompts = [token_ids(2, 8, seed=seed) for seed in range(2)]
    caches = [DynamicCache(config=stock.config) for _ in prompts]
    with torch.no_grad():
        for step in range(8):
            for prompt, cache in zip(prompts, caches, strict=True):
                found = model(prompt[:, step : step + 1], past_key_values=cache).logits[:, -1]
                assert_same(found, stock(prompt[:, : step + 1]).logits[:, -1])


def test_a_dropped_cache_is_sent_again(client: GPUClient, stock: PreTrainedModel) -> None:
    model, ids, cache = from_pretrained(client=client), token_ids(1, 6), DynamicCache(config=stock.config)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
        client.drop_cache()
        assert_same(model(ids[:, 4:5], past_key_values=cache).logits, stock(ids[:, :5]).logits[:, -1:])
        for layer in cache.layers:
            layer.crop(-2)
        client.drop_cache()
        assert_same(model(ids[:, 3:], past_key_values=cache).logits, stock(ids).logits[:, 3:])


def test_a_call_that_failed_on_its_way_leaves_nothing_stale(
    client: GPUClient, stock: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, cache = from_pretrained(client=client), token_ids(1, 6), DynamicCache(config=stock.config)
    ask = client.attention_scores

    def lost(*args: Any, **kwargs: Any) -> Tensor:
        ask(*args, **kwargs)
        raise WaitTimeoutError("the reply never came")

    with torch.no_grad():
        model(ids[:, :3], past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(client, "attention_scores", lost)
            # As many positions as before, of another text: by their number alone nobody would notice.
            with pytest.raises(WaitTimeoutError):
                model(token_ids(1, 3, seed=8))
        assert_same(model(ids[:, 3:], past_key_values=cache).logits, stock(ids).logits[:, 3:])


def test_a_static_cache_sends_no_empty_positions(
    client: GPUClient, stock: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = from_pretrained(client=client), token_ids(1, 10)
    ask, sent = client.attention_scores, []

    def recorded(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        sent.append(k.shape[2])
        return ask(layer, q, k, v, **options)

    monkeypatch.setattr(client, "attention_scores", recorded)
    cache = StaticCache(config=stock.config, max_cache_len=32)
    with torch.no_grad():
        for step in range(10):
            found = model(ids[:, step : step + 1], past_key_values=cache).logits[:, -1]
            assert_same(found, stock(ids[:, : step + 1]).logits[:, -1])
    # Only at the second call all is sent again: that the cache is overwritten in place was not known before.
    assert sent[::LAYERS] == [1, 2, *[1] * 8]


@pytest.mark.parametrize("placement", REMOTE)
def test_inference_mode(placement: str, client: GPUClient, stock: PreTrainedModel) -> None:
    model = from_pretrained(client=client, placement=placement)
    inputs = left_padded([3, 8])
    with torch.inference_mode():
        found = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, stock.generate(**inputs, max_new_tokens=12, do_sample=False))


def test_gradients_are_not_recorded(stock: PreTrainedModel, client: GPUClient) -> None:
    model = attach(copy.deepcopy(stock), client)  # its norm weights ask for gradients
    found = model(token_ids(1, 5)).logits
    assert_same(found.detach(), logits(stock, input_ids=token_ids(1, 5)))


# --- the runner's operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides", "norm", "mlp"),
    [
        ("llama", {}, True, True),
        ("qwen3", {}, True, True),
        ("gemma", {"head_dim": 12}, False, False),  # (1 + weight) norms, gelu
        ("starcoder2", {}, False, False),  # layer norms, no gate
        ("olmo2", {}, True, True),
    ],
)
def test_own_operators_run_only_where_they_are_the_same(
    family: str, overrides: dict[str, Any], norm: bool, mlp: bool
) -> None:
    model = make_model(family, **overrides)
    layer = model.model.layers[0]
    norms = [module for module in layer.modules() if "norm" in type(module).__name__.lower()]
    assert norms
    assert all(instrument.is_plain_rms_norm(module) == norm for module in norms)
    assert instrument.is_gated_mlp(layer.mlp) == mlp


def test_a_norm_that_only_looks_plain_is_told() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)

    assert not instrument.is_plain_rms_norm(Odd())


@pytest.mark.parametrize("placement", REMOTE)
def test_every_operator_is_timed(placement: str, client: GPUClient) -> None:
    model = from_pretrained(client=client, placement=placement)
    client.telemetry.reset()
    logits(model)
    operators = client.stats["operators"]
    fused = {"fused": {"gpu_fused_attention", "gpu_fused_mlp"}, "layer": {"gpu_fused_layer"}}
    heavy = fused.get(placement, {"gpu_linear", "tee_silu"})
    expected = {"gpu_embedding", "gpu_lm_head", "tee_rmsnorm", "tee_rotary", "tee_other", *heavy}
    if placement == "ops":
        expected |= {"gpu_matmul", "tee_softmax"}
    assert set(operators) == expected
    assert operators["tee_rmsnorm"]["calls"] == (1 if placement == "layer" else 2 * LAYERS + 1)
    assert all(operators[name]["calls"] == LAYERS for name in heavy - {"gpu_linear"})
    assert operators["tee_other"]["calls"] == 1
