"""Linear modules compute the same by torch and by oneDNN; nobody else's model is changed; plain weights go only where
nobody needs them."""

from __future__ import annotations

import copy

import pytest
import torch
from models import make_model
from rpc_support import HIDDEN, client_of, endpoint_in, server_of, serving, tiny_model
from torch import nn

from tsqp import linear_backends
from tsqp.errors import ConfigError
from tsqp.linear_backends import ONEDNN, PACKED, TORCH, choose_backends
from tsqp.loading import load_model

pytestmark = pytest.mark.skipif(not linear_backends._available(), reason="this torch has no oneDNN")

DTYPES = (torch.float32, torch.bfloat16)


def _clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _served(model, **options):
    served = load_model(model)
    return served, choose_backends(served, "onednn", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 3), (5,), (), (0,), (2, 0)])
def test_products_equal_torchs(dtype, pack, shape):
    model = tiny_model(dtype)
    served, ways = _served(model, pack=pack)
    assert ways == {PACKED if pack else ONEDNN: 15}
    h = torch.randn(*shape, HIDDEN).to(dtype)
    for name, module in served.modules.items():
        if module.linear is None or module.info.in_features != HIDDEN:
            continue
        with torch.no_grad():
            expected = model.get_submodule(name)(h)
            found = module.call(h)
        assert found.shape == expected.shape
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)


def test_biases_are_added():
    model = make_model("qwen2")
    served, _ = _served(model, pack=True)
    biased = [module for module in served.modules.values() if module.linear is not None and module.info.bias]
    assert biased
    for module in biased:
        h = torch.randn(1, 3, module.info.in_features)
        with torch.no_grad():
            torch.testing.assert_close(module.call(h), model.get_submodule(module.name)(h), rtol=1e-4, atol=1e-5)


def test_a_ready_model_stays_as_it_is(tmp_path):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(9).view(1, -1)
    with torch.no_grad():
        logits = model(ids).logits
    with serving(model, tmp_path, linear_backend="onednn", pack_weights=True) as server, client_of(server) as client:
        assert set(server.stats["linear_modules"]) == {PACKED}
        h = torch.randn(1, 4, HIDDEN)
        out = client.fused_mlp(0, h)
        with torch.no_grad():
            torch.testing.assert_close(out, model.model.layers[0].mlp(h), rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_modules_run_whole_use_the_backend(monkeypatch):
    model = tiny_model()
    served, _ = _served(model)
    asked = []
    mlp = served.fused["model.layers.1.mlp"]
    for inner, part in mlp.named_children():
        if type(part) is nn.Linear:
            assert "forward" in vars(part)
            monkeypatch.setattr(part, "forward", lambda x, real=part.forward, at=inner: (asked.append(at), real(x))[1])
    with torch.no_grad():
        mlp(torch.randn(1, 2, HIDDEN))
    assert asked == ["gate_proj", "up_proj", "down_proj"]
    # The layer and its MLP are one module still, so that one patch serves both.
    assert served.fused["model.layers.1"].mlp is served.fused["model.layers.1.mlp"]


def test_weights_of_an_owned_model_are_given_up_but_shared_ones_are_not():
    model = make_model("llama")  # its LM head is its embedding
    reference = _clone(model)
    _, ways = _served(model, owned=True)
    assert ways == {PACKED: 14, ONEDNN: 1}
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.isnan().all()
    assert weight.shape == reference.model.layers[0].mlp.up_proj.weight.shape
    assert weight.untyped_storage().nbytes() == weight.itemsize
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight)
    ids = torch.arange(1, 9).view(1, -1)
    with torch.no_grad():  # the owned model's own forward uses the packed weights
        torch.testing.assert_close(
            model.base_model(ids).last_hidden_state, reference.base_model(ids).last_hidden_state, rtol=1e-4, atol=1e-4
        )


def test_weights_used_past_their_module_are_kept():
    class Own(type(tiny_model().model.layers[0].mlp)):
        def forward(self, x):
            gate = nn.functional.linear(x, self.gate_proj.weight)
            return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.__class__ = Own
    before = _clone(model)
    _served(model, owned=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name


def test_compiled_mlps_keep_their_plain_weights():
    model = tiny_model()
    served, _ = _served(model, owned=True, compiled=True)
    layer = served.fused["model.layers.0"]
    assert not layer.mlp.up_proj.weight.isnan().any()
    assert "forward" not in vars(layer.mlp.up_proj)
    assert layer.self_attn.q_proj.weight.isnan().all()
    assert "forward" in vars(layer.self_attn.q_proj)


def test_a_wrong_or_failing_operator_is_not_used(monkeypatch):
    def wrong(linear, packed):
        if packed:
            raise RuntimeError("no kernel for this")
        return lambda x: x.new_zeros(*x.shape[:-1], linear.out_features)

    monkeypatch.setattr(linear_backends, "_onednn_product", wrong)
    model = tiny_model()
    _, ways = _served(model, pack=True)
    assert ways == {TORCH: 15}


def test_auto_takes_what_is_measured_to_be_faster(monkeypatch):
    monkeypatch.setattr(linear_backends, "_SMALL", 0)
    spent = {TORCH: 1.0, ONEDNN: 0.95, PACKED: 0.5}
    monkeypatch.setattr(linear_backends, "_costs", lambda products, linear, rows: {way: spent[way] for way in products})

    def ways(**options):
        return choose_backends(load_model(tiny_model()), "auto", **options)

    assert ways() == {TORCH: 15}  # too little is gained
    assert ways(pack=True) == {PACKED: 15}
    spent[ONEDNN] = 0.54
    assert ways(pack=True) == {ONEDNN: 15}  # packing gains too little more
    assert choose_backends(load_model(tiny_model()), "torch", pack=True) == {TORCH: 15}


def test_small_weights_are_torchs(monkeypatch):
    monkeypatch.setattr(linear_backends, "_costs", lambda *_: pytest.fail("nothing to measure"))
    assert choose_backends(load_model(tiny_model()), "auto") == {TORCH: 15}


def test_really_measured_costs_are_positive():
    module = nn.Linear(32, 48)
    products = linear_backends.working_products(module, (TORCH, ONEDNN, PACKED))
    assert set(products) == {TORCH, ONEDNN, PACKED}
    with torch.no_grad():
        costs = linear_backends._costs(products, module, (1, 4))
    assert set(costs) == set(products)
    assert all(cost > 0 for cost in costs.values())


def test_mistakes_are_told(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'mkl' is unknown; give auto, torch, onednn"):
        server_of(tiny_model(), endpoint_in(tmp_path), linear_backend="mkl")
    monkeypatch.setattr(linear_backends, "_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a model on the CPU and a torch with oneDNN"):
        server_of(tiny_model(), endpoint_in(tmp_path), linear_backend="onednn")
    assert choose_backends(load_model(tiny_model()), "auto") == {TORCH: 15}


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_are_only_set_for_measuring(dtype):
    before = torch.get_num_threads()
    choose_backends(load_model(tiny_model(dtype)), "onednn", threads=before + 1)
    assert torch.get_num_threads() == before
