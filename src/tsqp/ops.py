"""The trusted operators: what the runner computes itself between two round trips.

Torch CPU tensors in, torch CPU tensors out, inputs unchanged unless ``out=`` lies on one. The formulas, including
where a value is rounded to the tensor's dtype, are those of transformers' Llama
(``transformers/models/llama/modeling_llama.py``), so that a split model's results equal the stock model's.

float32 and bfloat16 are computed in C (``csrc/kernels.c``; AVX-512 or AVX2 where the machine has them), large
tensors by several threads (:func:`set_threads`); everything else, and whatever a gradient is wanted of, by torch.
What an input holds, or becomes while an operator runs, decides numbers only: it may be memory that somebody else
writes. ``out=`` takes the result instead of a new tensor. It has to have the result's shape and dtype and to be
contiguous, and lies exactly on an input or apart from all; anything else is a
:class:`~tsqp.errors.ConfigError`, never a resize.
"""

from __future__ import annotations

import atexit
from typing import overload

import torch
from torch import Tensor

from . import _formulas, _kernels
from .errors import ConfigError

atexit.register(_kernels.stop_threads)


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = ..., residual: None = ..., *, out: Tensor | None = ...
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = ...,
    *,
    residual: Tensor,
    out: Tensor | None = ...,
    total: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = ...,
    residual: Tensor | None = ...,
    *,
    out: Tensor | None = ...,
    total: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    out: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square layer normalisation (Zhang and Sennrich 2019, arXiv:1910.07467).

    ``x``: ``[..., D]``, floating point; ``weight``: ``[D]``. The mean square is taken in float32; the
    normalised value is rounded to ``x.dtype`` before it is multiplied with ``weight``, as in transformers.
    Returns a tensor like ``x``, or ``out``. Where ``residual`` (shape and dtype of ``x``) is given,
    ``x + residual`` is normalised and ``(normalised, x + residual)`` is returned: the second is the next
    residual; ``total`` takes it, and may be ``residual`` itself. Raises
    :class:`~tsqp.errors.ConfigError` where shapes don't fit.
    """
    found = _kernels.rms_norm(x, weight, eps, residual, out, total)
    return _formulas.rms_norm(x, weight, eps, residual, out, total) if found is None else found


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout of transformers.

    ``q``: ``[B, H, N, D]``, ``k``: ``[B, Hkv, N, D]``; ``cos``, ``sin``: ``[B or 1, N, D]`` in the dtype of
    ``q``, with the frequencies repeated in both halves of D. ``unsqueeze_dim`` is where the heads are (1, or
    2 for ``[B, N, H, D]``). Computed in the dtype of the inputs. Returns the rotated ``(q, k)``, or ``out``: of
    these and of ``q`` and ``k`` only the last dimension needs to be contiguous. Raises
    :class:`~tsqp.errors.ConfigError` where D is odd or differs.
    """
    out_q, out_k = (None, None) if out is None else out
    found = _kernels.apply_rotary(q, k, cos, sin, unsqueeze_dim, out_q, out_k)
    return _formulas.apply_rotary(q, k, cos, sin, unsqueeze_dim, out) if found is None else found


def apply_rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """:func:`apply_rotary` in place: ``q`` and ``k`` are rotated where they lie, and returned. Raises
    :class:`~tsqp.errors.ConfigError` where their memory is interleaved, as in views of one fused projection.
    """
    return apply_rotary(q, k, cos, sin, unsqueeze_dim, out=(q, k))


def causal_softmax(
    scores: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
    *,
    causal: bool = True,
    dtype: torch.dtype | None = None,
    first: int | None = None,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax over the last dimension of ``scores * scale`` under a mask, computed in float32.

    ``scores``: ``[..., Q, S]`` (Q queries, S keys), floating point. ``mask`` broadcasts to it: floating point
    is added after the scaling (0 = visible, the dtype's lowest number = hidden), bool says which keys are
    visible. Without a mask the query at position p sees the keys 0 to p; with ``causal=False`` it sees all.
    Query i is at position ``first + i``; by default the queries are the last positions, ``first = S - Q``. (A row
    tile of larger scores gives its own ``first`` and the mask's rows of the tile.) With ``window``, mask or not, a
    query sees at most the last ``window`` keys up to its own position. Keys hidden by position have
    probability 0. A row whose keys are all hidden by the mask gives some weights, not NaN (except where a
    floating-point mask holds -inf). Returns probabilities like ``scores``, rounded to ``dtype`` (default: that of
    ``scores``), or ``out``. Raises :class:`~tsqp.errors.ConfigError` where a query's position is not among the
    keys, or the mask doesn't fit.
    """
    found = _kernels.causal_softmax(scores, mask, scale, causal, dtype, first, window, out)
    if found is None:
        return _formulas.causal_softmax(scores, mask, scale, causal, dtype, first, window, out)
    return found


def silu_mul(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``: the gated activation of SwiGLU (Shazeer 2020, arXiv:2002.05202).

    ``gate``, ``up``: same shape and dtype; silu is rounded to the dtype before the product, as in
    transformers. Raises :class:`~tsqp.errors.ConfigError` where the shapes differ.
    """
    found = _kernels.silu_mul(gate, up, out)
    return _formulas.silu_mul(gate, up, out) if found is None else found


def set_threads(count: int) -> None:
    """How many threads share the work on a large tensor, the calling one included.

    Without a call it is settled by the first large tensor: ``TSQP_THREADS``, else ``torch.get_num_threads()``, but
    no more than there are cores. The threads are started once, when they are first needed, and sleep in between;
    a forked child starts its own. Raises :class:`~tsqp.errors.ConfigError` for less than 1 or more than 256.
    """
    if not 1 <= count <= _kernels.MAX_THREADS:
        raise ConfigError(f"set_threads got {count}; give a number from 1 to {_kernels.MAX_THREADS}")
    _kernels.set_threads(count)


def get_threads() -> int:
    """How many threads share the work on a large tensor."""
    return _kernels.threads()
