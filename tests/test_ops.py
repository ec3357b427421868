"""The trusted operators against references in float64 and against transformers' own code."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.llama import modeling_llama

from tsqp import ops
from tsqp.errors import ConfigError

#: Half a unit in the last place, relative, and a few roundings.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: torch.Tensor, reference: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    scale = reference.abs().max().item() or 1.0
    torch.testing.assert_close(found.double(), reference, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (1, 1, 8), (2, 3, 64), (0, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], seed=1, dtype=dtype)
    before = x.clone()
    found = ops.rms_norm(x, weight, 1e-5)
    wide = x.double()
    reference = weight.double() * wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert torch.equal(x, before)
    if x.numel():
        assert_close(found, reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_transformers(dtype: torch.dtype) -> None:
    norm = modeling_llama.LlamaRMSNorm(32, eps=1e-6).to(dtype)
    norm.weight.data = randn(32, seed=1, dtype=dtype)
    x = randn(2, 7, 32, dtype=dtype) * 20
    assert torch.equal(ops.rms_norm(x, norm.weight, 1e-6), norm(x))


def test_rms_norm_with_residual_normalises_the_sum() -> None:
    x, residual, weight = randn(3, 8), randn(3, 8, seed=1), randn(8, seed=2)
    normed, total = ops.rms_norm(x, weight, 1e-6, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(x + residual, weight, 1e-6))


def test_rms_norm_of_zeros_and_large_values_is_finite() -> None:
    weight = torch.ones(4)
    assert torch.equal(ops.rms_norm(torch.zeros(2, 4), weight, 1e-6), torch.zeros(2, 4))
    large = torch.full((1, 4), 3e4, dtype=torch.float16)  # its square does not fit float16
    assert torch.allclose(ops.rms_norm(large, weight.half(), 1e-6).float(), torch.ones(1, 4), atol=1e-3)


@pytest.mark.parametrize(
    ("x", "weight", "residual"),
    [((2, 4), (5,), None), ((2, 4), (1, 4), None), ((), (4,), None), ((2, 4), (4,), (1, 4))],
)
def test_rms_norm_refuses_shapes_that_do_not_fit(x: tuple, weight: tuple, residual: tuple | None) -> None:
    with pytest.raises(ConfigError, match="shape"):
        ops.rms_norm(torch.ones(x), torch.ones(weight), residual=None if residual is None else torch.ones(residual))


def rotation(positions: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, dim, 2).double() / dim))
    angles = torch.arange(positions).double()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[None]
    return angles.cos(), angles.sin()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + D/2) as complex numbers turned by their angle; x [B, H, N, D]."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[..., :half], sin[..., :half])[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_apply_rotary(kv_heads: int, dtype: torch.dtype) -> None:
    q, k = randn(2, 4, 9, 16, dtype=dtype), randn(2, kv_heads, 9, 16, seed=1, dtype=dtype)
    cos, sin = (table.to(dtype) for table in rotation(9, 16))
    found_q, found_k = ops.apply_rotary(q, k, cos, sin)
    assert found_q.dtype == found_k.dtype == dtype
    assert_close(found_q, rotated(q.double(), cos.double(), sin.double()))
    assert_close(found_k, rotated(k.double(), cos.double(), sin.double()))
    theirs = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    assert torch.equal(found_q, theirs[0])
    assert torch.equal(found_k, theirs[1])


def test_apply_rotary_with_heads_behind_positions() -> None:
    q, k = randn(1, 4, 5, 8), randn(1, 2, 5, 8, seed=1)
    cos, sin = (table.float() for table in rotation(5, 8))
    expected = ops.apply_rotary(q, k, cos, sin)
    found = ops.apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    assert torch.equal(found[0].transpose(1, 2), expected[0])
    assert torch.equal(found[1].transpose(1, 2), expected[1])


@pytest.mark.parametrize(("dim", "kv_dim", "table_dim"), [(7, 7, 7), (8, 6, 8), (8, 8, 4)])
def test_apply_rotary_refuses_other_dimensions(dim: int, kv_dim: int, table_dim: int) -> None:
    table = torch.ones(1, 3, table_dim)
    with pytest.raises(ConfigError, match="even"):
        ops.apply_rotary(torch.ones(1, 2, 3, dim), torch.ones(1, 2, 3, kv_dim), table, table)


def softmax_reference(scores: torch.Tensor, visible: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.softmax((scores.double() * scale).masked_fill(~visible, -math.inf), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 5), (3, 9)])
def test_causal_softmax_without_a_mask_is_causal(queries: int, keys: int, dtype: torch.dtype) -> None:
    scores = randn(2, 3, queries, keys, dtype=dtype) * 5
    before = scores.clone()
    found = ops.causal_softmax(scores, scale=0.3)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    assert found.dtype == dtype
    assert torch.equal(scores, before)
    assert_close(found, softmax_reference(scores, visible, 0.3))
    assert not found.masked_select(~visible.expand_as(found)).any()


def test_causal_softmax_can_see_all() -> None:
    scores = randn(1, 2, 4, 4)
    assert_close(ops.causal_softmax(scores, causal=False), torch.softmax(scores.double(), -1))


@pytest.mark.parametrize("kind", ["bool", "lowest", "minus infinity"])
def test_causal_softmax_masks(kind: str) -> None:
    scores = randn(2, 3, 4, 6)
    visible = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(3)) < 0.6
    visible[..., 0] = True
    hidden = {"lowest": torch.finfo(torch.float32).min, "minus infinity": -math.inf}.get(kind)
    mask = visible if hidden is None else torch.zeros(visible.shape).masked_fill(~visible, hidden)
    assert_close(ops.causal_softmax(scores, mask, 0.5), softmax_reference(scores, visible, 0.5))


def test_causal_softmax_takes_a_bias_as_it_is() -> None:
    scores, bias = randn(1, 2, 3, 5), randn(1, 2, 3, 5, seed=1)
    assert_close(ops.causal_softmax(scores, bias, 2.0), torch.softmax(scores.double() * 2 + bias.double(), -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_softmax_of_a_hidden_row_is_no_nan(dtype: torch.dtype) -> None:
    scores = randn(1, 1, 2, 4, dtype=dtype)
    mask = torch.zeros(1, 1, 2, 4, dtype=dtype)
    mask[..., 0, :] = torch.finfo(dtype).min
    for form in (mask, mask == 0):
        found = ops.causal_softmax(scores, form)
        assert torch.isfinite(found).all()
        assert torch.allclose(found.float().sum(-1), torch.ones(1, 1, 2), atol=1e-2)
        assert_close(found[0, 0, 1], torch.softmax(scores[0, 0, 1].double(), -1))


def test_causal_softmax_of_large_scores_is_finite() -> None:
    scores = torch.tensor([[[[3e38, -3e38, 0.0]]]])
    assert torch.equal(ops.causal_softmax(scores), torch.tensor([[[[1.0, 0.0, 0.0]]]]))


def test_causal_softmax_rounds_to_the_dtype_asked_for() -> None:
    assert ops.causal_softmax(randn(1, 1, 2, 2), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, 3, 5),
        torch.ones(2, 1, 3, 4),
        torch.ones(1, 1, 1, 3, 4),
        torch.ones(3, 4, dtype=torch.int64),
    ],
    ids=["keys", "batch", "rank", "integers"],
)
def test_causal_softmax_refuses_masks_that_do_not_fit(mask: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="mask"):
        ops.causal_softmax(torch.ones(1, 2, 3, 4), mask)


def test_causal_softmax_refuses_more_queries_than_keys() -> None:
    with pytest.raises(ConfigError, match="3 queries for 2 keys"):
        ops.causal_softmax(torch.ones(1, 1, 3, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate, up = randn(3, 50, dtype=dtype) * 6, randn(3, 50, seed=1, dtype=dtype)
    found = ops.silu_mul(gate, up)
    wide = gate.double()
    assert found.dtype == dtype
    assert_close(found, wide / (1 + torch.exp(-wide)) * up.double())


def test_silu_mul_refuses_other_shapes() -> None:
    with pytest.raises(ConfigError, match="shape"):
        ops.silu_mul(torch.ones(2, 3), torch.ones(3))
