"""The trusted operators as torch formulas: those of transformers' Llama
(``transformers/models/llama/modeling_llama.py``), and what is wrong with arguments that fit no operator.

:mod:`tsqp.ops` comes here for what the kernels in C do not take (float16, float64, other devices, tensors that
need a gradient, odd strides); the tests hold the kernels against these formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .errors import ConfigError

Pair = tuple[Tensor, Tensor]


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor | None, total: Tensor | None
) -> Tensor | Pair:
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise ConfigError(
            f"rms_norm got x of shape {list(x.shape)} and weight of shape {list(weight.shape)}; "
            "the weight has one number per element of x's last dimension"
        )
    if residual is not None and residual.shape != x.shape:
        raise ConfigError(f"rms_norm's residual has shape {list(residual.shape)}, x has {list(x.shape)}")
    if residual is None and total is not None:
        raise ConfigError("rms_norm got total= without a residual; the sum it is for is x + residual")
    added = x if residual is None else x + residual
    dtype = torch.result_type(weight, added)
    sources = [x] if residual is None else [x, residual]
    check_out("rms_norm's out", out, x.shape, dtype, over=sources, apart=[weight, total])
    check_out("rms_norm's total", total, x.shape, added.dtype, over=sources, apart=[weight, out])
    wide = added.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = placed(weight * wide.to(added.dtype), out)
    return normed if residual is None else (normed, placed(added, total))


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads: int, out: Pair | None) -> Pair:
    dim = q.shape[-1]
    if dim % 2 or not dim == k.shape[-1] == cos.shape[-1] == sin.shape[-1]:
        raise ConfigError(
            f"apply_rotary got last dimensions {dim} (q), {k.shape[-1]} (k), {cos.shape[-1]} (cos) and "
            f"{sin.shape[-1]} (sin); they have to be one even number"
        )
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    turned_q, turned_k = (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)
    if out is None:
        return turned_q, turned_k
    out_q, out_k = out
    check_out("apply_rotary's out for q", out_q, q.shape, turned_q.dtype, [q], [k, cos, sin, out_k], lines=True)
    check_out("apply_rotary's out for k", out_k, k.shape, turned_k.dtype, [k], [q, cos, sin, out_q], lines=True)
    return placed(turned_q, out_q), placed(turned_k, out_k)


def causal_softmax(
    scores: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    dtype: torch.dtype | None,
    first: int | None,
    window: int | None,
    out: Tensor | None,
) -> Tensor:
    if scores.ndim < 2:
        raise ConfigError(f"causal_softmax got scores of shape {list(scores.shape)}; they are [..., queries, keys]")
    hidden = _hidden_keys(scores, mask is None and causal, first, window)
    wide = scores.to(torch.float32) * scale
    if mask is not None:
        _check_mask(mask, scores)
        lowest = torch.finfo(torch.float32).min
        wide = wide.masked_fill_(~mask, lowest) if mask.dtype == torch.bool else wide.add_(mask)
    dtype = dtype or scores.dtype
    check_out("causal_softmax's out", out, scores.shape, dtype, [scores], [mask])
    if hidden is None:
        return placed(torch.softmax(wide, dim=-1).to(dtype), out)
    probs = torch.softmax(wide.masked_fill_(hidden, float("-inf")), dim=-1)
    return placed(probs.masked_fill(hidden, 0).to(dtype), out)


def _hidden_keys(scores: Tensor, causal: bool, first: int | None, window: int | None) -> Tensor | None:
    """``[queries, keys]``: what the positions hide by themselves; None: nothing."""
    queries, keys = scores.shape[-2:]
    if first is not None and first < 0:
        raise ConfigError(f"causal_softmax got first={first}; the first query's position is 0 or more")
    if window is not None and window < 1:
        raise ConfigError(f"causal_softmax got window={window}; a query sees at least its own key, window=1")
    if not causal and window is None:
        return None
    if first is None and queries > keys:
        raise ConfigError(f"causal_softmax got {queries} queries for {keys} keys: the first ones would see no key")
    if first is not None and first + queries > keys:
        raise ConfigError(
            f"causal_softmax got {keys} keys for queries at the positions {first} to {first + queries - 1}; "
            "there is a key for each position up to the last query's"
        )
    start = keys - queries if first is None else first
    position = torch.arange(start, start + queries, device=scores.device)[:, None]
    key = torch.arange(keys, device=scores.device)
    hidden = key > position if causal else torch.zeros(queries, keys, dtype=torch.bool, device=scores.device)
    return hidden if window is None else hidden | (key <= position - window)


def _check_mask(mask: Tensor, scores: Tensor) -> None:
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ConfigError(f"a mask is bool or floating point, not {mask.dtype}")
    aligned = zip(reversed(mask.shape), reversed(scores.shape))  # noqa: B905 - a mask may have fewer dimensions
    if mask.ndim > scores.ndim or any(m not in (1, s) for m, s in aligned):
        raise ConfigError(f"a mask of shape {list(mask.shape)} doesn't broadcast to scores of {list(scores.shape)}")


def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None) -> Tensor:
    if gate.shape != up.shape:
        raise ConfigError(f"silu_mul got gate of shape {list(gate.shape)} and up of shape {list(up.shape)}")
    check_out("silu_mul's out", out, gate.shape, torch.result_type(gate, up), [gate, up], [])
    return placed(functional.silu(gate) * up, out)


# ---- where results go ----


def placed(result: Tensor, out: Tensor | None) -> Tensor:
    """The result, in ``out`` where that is given (and was checked)."""
    return result if out is None else out.copy_(result)


def check_out(
    name: str,
    out: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
    over: Sequence[Tensor],
    apart: Sequence[Tensor | None],
    lines: bool = False,
) -> None:
    """Raises :class:`ConfigError` unless ``out`` may take a result of this shape and dtype.

    It may lie exactly on a tensor of ``over``; it may touch none of ``apart``. ``lines``: only the last dimension
    has to be contiguous.
    """
    if out is None:
        return
    if out.shape != shape or out.dtype != dtype:
        raise ConfigError(
            f"{name} has shape {list(out.shape)} and {out.dtype}; the result has {list(shape)} and {dtype}"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise ConfigError(f"{name} requires a gradient; give a tensor that doesn't, or call under torch.no_grad()")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in over):
        raise ConfigError(f"{name} can't take a result that a gradient is wanted of; call under torch.no_grad()")
    if not (_lines_apart(out) if lines else out.is_contiguous()):
        wanted = "lines of contiguous elements that don't overlap" if lines else "a contiguous tensor"
        raise ConfigError(f"{name} has strides {list(out.stride())}; give {wanted}")
    for other in over:
        if _touch(out, other) and not _same_place(out, other):
            raise ConfigError(f"{name} overlaps an input in part; give that very tensor or memory of its own")
    for tensor in apart:
        if tensor is not None and _touch(out, tensor):
            raise ConfigError(f"{name} overlaps another tensor of the call; give it memory of its own")


def _lines_apart(tensor: Tensor) -> bool:
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return False
            extent += (size - 1) * stride
    return tensor.shape[-1] == 1 or tensor.stride(-1) == 1


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _touch(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    (a_begin, a_end), (b_begin, b_end) = _extent(a), _extent(b)
    return a_begin < b_end and b_begin < a_end


def _same_place(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() != b.data_ptr() or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return all(size == 1 or s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))
