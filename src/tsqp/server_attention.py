"""The attention of placement ``ops`` on the server: the matrix products around the softmax, which is the runner's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .errors import RemoteError
from .loading import ServedModel
from .protocol import Method, Status, shown
from .server_ops import Operators, Reply, _meta, _tensors, _wire_dtype
from .sessions import Session


class AttentionOperators:
    """Handlers as those of :class:`Operators`, of which they use the checks and conversions."""

    def __init__(self, served: ServedModel, operators: Operators) -> None:
        self._geometry = served.geometry
        self._operators = operators
        self.handlers: dict[int, Callable[[Session, Any], Reply]] = {
            int(Method.ATTENTION_SCORES): self.scores,
            int(Method.ATTENTION_VALUES): self.values,
        }

    def scores(self, session: Session, msg: Any) -> Reply:
        """Updates the layer's K and V, then q [B, H, Q, D] to q·Kᵀ [B, H, Q, S], unscaled; of the S positions only
        the first ``keys``, where the meta says so.

        The H query heads share Hkv kv heads in groups of H/Hkv neighbours; K is not repeated, the group's
        queries are stacked along Q instead.
        """
        ops = self._operators
        layer, keep, drop, reorder, keys = self._scores_meta(msg)
        q, k_new, v_new, *rest = _tensors(msg, 4 if reorder else 3)
        wire = _wire_dtype(q, k_new, v_new)
        self._check_heads(q, k_new, v_new)
        index = ops._row_index(rest[0], q.shape[0]) if reorder else None
        k, v = ops._in(k_new), ops._in(v_new)
        held = session.layer(layer)
        kept = keep if keep is not None else max((held.length if held else 0) - drop, 0)
        length = _checked_keys(keys, kept + k.shape[2])
        ops._check_reply(math.prod(q.shape[:3]) * length, wire, 4)
        cache = session.planned(layer, k, v, keep=keep, drop=drop, batch_index=index)
        batch, heads, queries, dim = q.shape
        kv_heads = session.geometry.kv_heads
        stacked = ops._in(q).reshape(batch * kv_heads, heads // kv_heads * queries, dim)
        held_k = cache.k if keys is None else cache.k.narrow(1, 0, keys)
        product = partial(torch.bmm, stacked, held_k.transpose(1, 2))
        rows = (*stacked.shape[:2], length)
        return ops._computed(
            (batch, heads, queries, length), wire, product, rows, partial(session.commit, layer, cache)
        )

    def values(self, session: Session, msg: Any) -> Reply:
        """probs [B, H, Q, S] times the first S positions of the layer's V to [B, H, Q, D]."""
        ops = self._operators
        layer = ops._target(session, msg, ops._layer_target)
        (probs,) = _tensors(msg, 1)
        wire = _wire_dtype(probs)
        cache = session.layer(layer)
        if cache is None:
            raise RemoteError(f"layer {layer} holds no V; send attention scores first", Status.BAD_REQUEST)
        geometry = session.geometry
        shape = tuple(probs.shape)
        if len(shape) != 4 or shape[:2] != (cache.batch, geometry.heads) or shape[3] > cache.length:
            raise RemoteError(
                f"attention weights of layer {layer} have shape {list(shape)}, "
                f"expected [{cache.batch}, {geometry.heads}, queries, up to {cache.length}]",
                Status.BAD_SHAPE,
            )
        batch, heads, queries, length = shape
        ops._check_reply(batch * heads * queries * geometry.head_dim, wire, 4)
        kv_heads = geometry.kv_heads
        stacked = ops._in(probs).reshape(batch * kv_heads, heads // kv_heads * queries, length)
        product = partial(torch.bmm, stacked, cache.v.narrow(1, 0, length))
        rows = (*stacked.shape[:2], geometry.head_dim)
        return ops._computed((batch, heads, queries, geometry.head_dim), wire, product, rows)

    def _scores_meta(self, msg: Any) -> tuple[int, int | None, int, bool, int | None]:
        # Not remembered by its bytes: "keep" grows with every token.
        meta = _meta(msg)
        layer = self._operators._layer_target(meta)
        keep, drop, keys = (_positions(meta, name) for name in ("keep", "drop", "keys"))
        if drop is None and "drop" in meta:
            raise RemoteError("meta 'drop' is None, expected a number of positions", Status.BAD_REQUEST)
        return layer, keep, drop or 0, meta.get("reorder") is True, keys

    def _check_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        geometry = self._geometry
        wanted = (("q", q, geometry.heads), ("k", k, geometry.kv_heads), ("v", v, geometry.kv_heads))
        for name, tensor, heads in wanted:
            shape = tensor.shape
            if len(shape) != 4 or shape[1] != heads or shape[3] != geometry.head_dim or shape[0] < 1:
                raise RemoteError(
                    f"{name} has shape {list(shape)}, expected [batch, {heads}, count, {geometry.head_dim}]",
                    Status.BAD_SHAPE,
                )
        if k.shape != v.shape or k.shape[0] != q.shape[0]:
            raise RemoteError(
                f"q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; "
                "k and v need one shape, all three one batch",
                Status.BAD_SHAPE,
            )


def _positions(meta: dict[str, Any], name: str) -> int | None:
    """A number of positions from a meta, which need not have one."""
    number = meta.get(name)
    if number is not None and (type(number) is not int or number < 0):
        raise RemoteError(f"meta {name!r} is {shown(number)}, expected a number of positions", Status.BAD_REQUEST)
    return number


def _checked_keys(keys: int | None, length: int) -> int:
    """How many positions scores are for, of a layer that will hold ``length``."""
    if keys is None:
        return length
    if not 1 <= keys <= length:
        raise RemoteError(f"meta 'keys' is {shown(keys)} but the layer holds {length} positions", Status.BAD_REQUEST)
    return keys
