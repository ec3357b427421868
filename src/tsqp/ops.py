"""The trusted operators: what the runner computes itself between two round trips.

Torch CPU tensors in, torch CPU tensors out, inputs unchanged. The formulas, including where a value is
rounded to the tensor's dtype, are those of transformers' Llama
(``transformers/models/llama/modeling_llama.py``), so that a split model's results equal the stock model's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .errors import ConfigError


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square layer normalisation (Zhang and Sennrich 2019, arXiv:1910.07467).

    ``x``: ``[..., D]``, floating point; ``weight``: ``[D]``. The mean square is taken in float32; the
    normalised value is rounded to ``x.dtype`` before it is multiplied with ``weight``, as in transformers.
    Returns a tensor like ``x``. Where ``residual`` (shape and dtype of ``x``) is given, ``x + residual`` is
    normalised and ``(normalised, x + residual)`` is returned: the second is the next residual. Raises
    :class:`~tsqp.errors.ConfigError` where shapes don't fit.
    """
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise ConfigError(
            f"rms_norm got x of shape {list(x.shape)} and weight of shape {list(weight.shape)}; "
            "the weight has one number per element of x's last dimension"
        )
    total = x
    if residual is not None:
        if residual.shape != x.shape:
            raise ConfigError(f"rms_norm's residual has shape {list(residual.shape)}, x has {list(x.shape)}")
        total = x + residual
    wide = total.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = weight * wide.to(total.dtype)
    return normed if residual is None else (normed, total)


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout of transformers.

    ``q``: ``[B, H, N, D]``, ``k``: ``[B, Hkv, N, D]``; ``cos``, ``sin``: ``[B or 1, N, D]`` in the dtype of
    ``q``, with the frequencies repeated in both halves of D. ``unsqueeze_dim`` is where the heads are (1, or
    2 for ``[B, N, H, D]``). Computed in the dtype of the inputs. Returns the rotated ``(q, k)``. Raises
    :class:`~tsqp.errors.ConfigError` where D is odd or differs.
    """
    dim = q.shape[-1]
    if dim % 2 or not dim == k.shape[-1] == cos.shape[-1] == sin.shape[-1]:
        raise ConfigError(
            f"apply_rotary got last dimensions {dim} (q), {k.shape[-1]} (k), {cos.shape[-1]} (cos) and "
            f"{sin.shape[-1]} (sin); they have to be one even number"
        )
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (_rotate_half(q) * sin), (k * cos) + (_rotate_half(k) * sin)


def causal_softmax(
    scores: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
    *,
    causal: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Softmax over the last dimension of ``scores * scale`` under a mask, computed in float32.

    ``scores``: ``[..., Q, S]`` (Q queries, S keys), floating point. ``mask`` broadcasts to it: floating point
    is added after the scaling (0 = visible, the dtype's lowest number = hidden), bool says which keys are
    visible. Without a mask, query i of Q sees the keys up to i + S - Q, the queries being the last positions;
    with ``causal=False`` it sees all. A row whose keys are all hidden gives some weights, not NaN (except
    where a floating-point mask holds -inf). Returns probabilities like ``scores``, rounded to ``dtype``
    (default: that of ``scores``). Raises :class:`~tsqp.errors.ConfigError` where Q > S without a mask, or the
    mask doesn't fit.
    """
    queries, keys = scores.shape[-2:]
    wide = scores.to(torch.float32) * scale
    lowest = torch.finfo(torch.float32).min
    if mask is None:
        if causal and queries > keys:
            raise ConfigError(f"causal_softmax got {queries} queries for {keys} keys: the first ones would see no key")
        if causal and queries > 1:
            hidden = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
            wide = wide.masked_fill_(hidden, lowest)
    else:
        _check_mask(mask, scores)
        wide = wide.masked_fill_(~mask, lowest) if mask.dtype == torch.bool else wide.add_(mask)
    return torch.softmax(wide, dim=-1).to(dtype or scores.dtype)


def _check_mask(mask: Tensor, scores: Tensor) -> None:
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ConfigError(f"a mask is bool or floating point, not {mask.dtype}")
    aligned = zip(reversed(mask.shape), reversed(scores.shape))  # noqa: B905 - a mask may have fewer dimensions
    if mask.ndim > scores.ndim or any(m not in (1, s) for m, s in aligned):
        raise ConfigError(f"a mask of shape {list(mask.shape)} doesn't broadcast to scores of {list(scores.shape)}")


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``: the gated activation of SwiGLU (Shazeer 2020, arXiv:2002.05202).

    ``gate``, ``up``: same shape and dtype; silu is rounded to the dtype before the product, as in
    transformers. Raises :class:`~tsqp.errors.ConfigError` where the shapes differ.
    """
    if gate.shape != up.shape:
        raise ConfigError(f"silu_mul got gate of shape {list(gate.shape)} and up of shape {list(up.shape)}")
    return functional.silu(gate) * up
