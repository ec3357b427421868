"""Models on the meta device, built without torch's symbolic shapes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from models import FAMILIES, make_model
from torch import nn
from transformers import AutoModelForCausalLM

from tsqp.plain_meta import PlainMeta


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.arange(0, 10, 3),
        lambda: torch.arange(2.5, dtype=torch.float64),
        lambda: 1.0 / (10000.0 ** (torch.arange(0, 8, 2).float() / 8)),
        lambda: torch.arange(4) / 2,
        lambda: torch.arange(4).bfloat16() * 0.5,
        lambda: torch.where(torch.arange(4) > 2, torch.zeros(4), torch.ones(3, 4)),
        lambda: torch.empty_like(torch.zeros(2, 3), dtype=torch.int8),
        lambda: nn.init.kaiming_uniform_(torch.empty(3, 4)),
        lambda: torch.empty(5).normal_(),
    ],
)
def test_shape_and_dtype_are_those_of_a_real_tensor(made) -> None:
    real = made()
    with torch.device("meta"), PlainMeta():
        meta = made()
    assert meta.is_meta
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype)


def test_real_tensors_are_worked_on_as_ever() -> None:
    with PlainMeta():
        assert torch.equal(torch.arange(4) * 2, torch.tensor([0, 2, 4, 6]))
        assert nn.Linear(8, 8).weight.std() > 0
        meta = torch.empty(3, device="meta")
        assert meta.add_(1) is meta
        assert torch.empty_like(meta, device="cpu").device.type == "cpu"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_is_the_stock_model(family: str) -> None:
    config = make_model(family).config
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
        with PlainMeta():
            plain = AutoModelForCausalLM.from_config(config)

    def state(model: nn.Module) -> dict[str, tuple[object, ...]]:
        named = [*model.named_parameters(), *model.named_buffers()]
        return {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in named}

    assert state(plain) == state(stock)


def test_a_llama_needs_no_sympy() -> None:
    code = """if True:
        import sys, torch
        from tsqp.lean import lean_imports
        with lean_imports():
            from transformers import LlamaConfig, AutoModelForCausalLM
            from tsqp.plain_meta import PlainMeta
            with torch.device("meta"), PlainMeta():
                AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, vocab_size=8, hidden_size=64))
        print("sympy" in sys.modules)
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "False\n"
