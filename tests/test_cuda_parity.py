"""A server on a CUDA device computes what the stock model on that device does: logits, tokens, cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import logits, make_model, serving, token_ids
from torch import Tensor
from transformers import PreTrainedModel

from tsqp.placement import PLACEMENTS
from tsqp.split import from_pretrained

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.watchdog(180),
]

REMOTE = [name for name, placement in PLACEMENTS.items() if placement.needs_server]
DEVICE = "cuda:0"
#: Greatest difference of logits allowed in float32, relative to the largest logit.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def stock(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model("llama", dtype=getattr(torch, request.param)).to(DEVICE)


@pytest.fixture(params=REMOTE)
def split(request: pytest.FixtureRequest, stock: PreTrainedModel) -> Iterator[PreTrainedModel]:
    with serving(stock, device=DEVICE) as server:
        model = from_pretrained(endpoint=server.endpoint, placement=request.param)
        yield model
        model.close()


@pytest.fixture(scope="module")
def exact(stock: PreTrainedModel) -> PreTrainedModel:
    """The same model in float64, on the CPU."""
    model = make_model("llama", dtype=torch.float64)
    model.load_state_dict({name: value.double().cpu() for name, value in stock.state_dict().items()})
    return model


def error(found: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative to the largest expected value."""
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("length", [1, 17, 200])
def test_logits(length: int, split: PreTrainedModel, stock: PreTrainedModel, exact: PreTrainedModel) -> None:
    ids = token_ids(2, length)
    expected = logits(exact, input_ids=ids)
    found = error(logits(split, input_ids=ids), expected)
    if stock.dtype is torch.float32:
        assert found <= TOLERANCE
    else:
        assert found <= 2 * error(logits(stock, input_ids=ids.to(DEVICE)), expected)


def test_steps_with_a_cache_give_the_logits_of_one_forward(split: PreTrainedModel, exact: PreTrainedModel) -> None:
    ids = token_ids(1, 24)
    expected = logits(exact, input_ids=ids)[:, -1]
    with torch.no_grad():
        out = split(ids[:, :16], use_cache=True)
        for place in range(16, 24):
            out = split(ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
    tolerance = TOLERANCE if split.dtype is torch.float32 else 0.05
    assert error(out.logits[:, -1], expected) <= tolerance


def test_greedy_tokens(split: PreTrainedModel, stock: PreTrainedModel) -> None:
    if stock.dtype is not torch.float32:
        pytest.skip("in bfloat16 two logits may be equally large")
    ids = token_ids(1, 12)
    wanted = stock.generate(ids.to(DEVICE), max_new_tokens=20, do_sample=False)
    assert torch.equal(split.generate(ids, max_new_tokens=20, do_sample=False), wanted.cpu())
