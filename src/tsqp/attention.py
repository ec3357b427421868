"""Attention with its matmuls on the server and its softmax in the runner (placement ``ops``).

The function is registered with transformers' ``AttentionInterface`` **and** its mask function with
``AttentionMaskInterface``: an attention without the latter gets no mask and silently loses causality. Which
server and layer a call is for is found on the attention module itself (:class:`SplitAttention`), so one
registration serves any number of models.
"""

from __future__ import annotations

import math
import time
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from . import ops
from .client import GPUClient
from .errors import ModelError, ProtocolError, RemoteError
from .mirror import Change, Mirror
from .protocol import Status
from .tiled_attention import TiledAttention, key_limits
from .tiles import Tile, Tiling, row_tiles
from .timing import Clock

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # nobody knows then whether the probabilities are wanted
    _active_collector = None

#: The name under which transformers knows the split attention (``config._attn_implementation``).
ATTENTION_NAME = "tsqp_ops"
#: The attribute of an attention module that holds its :class:`SplitAttention`.
MODULE_ATTRIBUTE = "tsqp_attention"

#: Arguments some families pass that change the formula of attention.
_UNSUPPORTED = (
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "alibi",
    "head_mask",
    "cache",
    "indices",
    "block_table",
)
#: Tensors every family may pass along that don't.
_HARMLESS = ("position_ids", "cache_position", "token_type_ids", "position_embeddings", "input_ids")

#: Per client and layer, whose K and V the server holds: models that share a client take turns.
_OWNERS: weakref.WeakKeyDictionary[GPUClient, dict[int, weakref.ref[Mirror]]] = weakref.WeakKeyDictionary()


class SplitAttention:
    """One attention module's link to the server: its client, its layer, and what the server holds of its K
    and V.
    """

    def __init__(self, client: GPUClient, layer: int, clock: Clock, tiling: Tiling) -> None:
        self.client, self.layer, self.clock, self.tiling = client, layer, clock, tiling
        self.mirror = Mirror()
        self._cache_layer: Any = None

    def before_forward(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the attention module: shows the mirror the cache layer before its update."""
        layers = getattr(kwargs.get("past_key_values"), "layers", ())
        self._cache_layer = layers[self.layer] if self.layer < len(layers) else None
        self.mirror.before_update(self._cache_layer)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        causal: bool,
        want_probs: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` ``[B, H, Q, D]`` over ``key``, ``value`` ``[B, Hkv, S, D]``.

        Returns the output ``[B, Q, H, D]`` and the probabilities ``[B, H, Q, S]``, both in the query's dtype. The
        latter are None where they never were in one place and ``want_probs`` is False.
        """
        self.clock.attention_entered()
        key, value, mask = _visible(key, value, mask)
        # A power of two goes with the query, exactly; the factor in [0.5, 1) that is left goes into the
        # softmax. So the scores have their final magnitude on the wire, and float16 does not overflow where
        # unscaled ones would.
        fraction, exponent = math.frexp(scale)
        tile_bytes, tiles = self._tiles(query, key, mask, causal)
        if len(tiles) > 1:
            attention = TiledAttention(
                self.client,
                self.layer,
                self.clock,
                (query, key, value),
                mask,
                factor=2.0**exponent,
                fraction=fraction,
                causal=causal,
            )
            return self._in_tiles(attention, tiles, tile_bytes, want_probs)
        scores = self._scores(query * 2.0**exponent, key, value)
        begin = self.clock.now()
        probs = ops.causal_softmax(scores, mask, fraction, causal=causal, dtype=query.dtype)
        self.clock.add("tee_softmax", begin)
        begin = self.clock.now()
        out = self.client.attention_values(self.layer, probs)
        self.clock.remote_done(begin)
        return out.to(query.dtype).transpose(1, 2).contiguous(), probs

    def _tiles(
        self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[int, tuple[Tile, ...] | tuple[()]]:
        """The tiles and the bytes they were cut by; none where it is not worth it."""
        sizes = self.tiling.attention
        (batch, heads, queries, dim), keys = query.shape, key.shape[2]
        element_bytes = batch * heads * self.client.wire_itemsize
        if queries == 1 or queries * keys * element_bytes <= sizes.smallest() or not (tile_bytes := sizes.choose()):
            return 0, ()
        limits = key_limits(queries, keys, None if mask is None else _hidden(mask), causal)
        row_bytes = element_bytes * dim + 2 * element_bytes * dim * key.shape[1] // heads
        return tile_bytes, row_tiles(limits, element_bytes, tile_bytes, row_bytes)

    def _in_tiles(
        self, attention: TiledAttention, tiles: tuple[Tile, ...], tile_bytes: int, want_probs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The attention, after which the server's K and V are its ``key`` and ``value``."""
        begin = time.perf_counter_ns()
        key, value = attention.key, attention.value
        self._take_over()
        change = self.mirror.change_to(key, value, attention.query.shape[2])
        # Until all calls have succeeded nobody knows what the server holds.
        self.mirror.forget()
        try:
            result = attention.run(tiles, change, want_probs)
        except RemoteError as error:
            if not change.keep or error.code != Status.BAD_REQUEST:
                raise
            # Its K and V were dropped meanwhile (GPUClient.drop_cache).
            result = attention.run(tiles, Change(keep=0), want_probs)
        held = attention.held
        self.mirror.remember(key[:, :, :held], value[:, :, :held], self._cache_layer)
        self._cache_layer = None
        elements = sum((tile.stop - tile.first) * tile.keys for tile in tiles)
        self.tiling.attention.note(tile_bytes, elements, time.perf_counter_ns() - begin)
        return result

    def _scores(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Q·Kᵀ ``[B, H, Q, S]``, after the server's K and V were brought up to ``key`` and ``value``."""
        self._take_over()
        change = self.mirror.change_to(key, value, query.shape[2])
        # Until the call has succeeded nobody knows what the server holds.
        self.mirror.forget()
        scores = self._request(query, key, value, change)
        if scores is None:
            scores = self._request(query, key, value, Change(keep=0))
        if scores is None:
            raise ProtocolError(f"the server's scores of layer {self.layer} do not cover the keys sent to it")
        self.mirror.remember(key, value, self._cache_layer)
        self._cache_layer = None
        return scores

    def _request(self, query: Tensor, key: Tensor, value: Tensor, change: Change) -> Tensor | None:
        """One round trip; None where the server turns out not to hold what the change builds on."""
        begin = self.clock.now()
        try:
            scores = self.client.attention_scores(
                self.layer,
                query,
                key[:, :, change.keep :],
                value[:, :, change.keep :],
                # Without `keep` the request says the same in every step, and both ends know it by heart.
                keep=None if change.only_appends else change.keep,
                batch_index=change.batch_index,
                drop=change.drop,
            )
        except RemoteError as error:
            if change.keep and error.code == Status.BAD_REQUEST:
                return None  # its K and V were dropped meanwhile (GPUClient.drop_cache)
            raise
        finally:
            self.clock.remote_done(begin)
        return scores if scores.shape[-1] == key.shape[2] else None

    def _take_over(self) -> None:
        """Makes this model the owner of the layer's K and V on the server; another one's are replaced, not
        extended.
        """
        owners = _OWNERS.setdefault(self.client, {})
        owner = owners.get(self.layer)
        if owner is None or owner() is not self.mirror:
            self.mirror.forget()
            owners[self.layer] = weakref.ref(self.mirror)


def split_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function transformers calls; see ``transformers.AttentionInterface``.

    Raises :class:`~tsqp.errors.ModelError` for a module of no split model, in training, and for arguments
    that would change the formula.
    """
    split = getattr(module, MODULE_ATTRIBUTE, None)
    if split is None:
        raise ModelError(
            f"{type(module).__name__} is in no split model: {ATTENTION_NAME!r} can't be chosen by itself; "
            "use tsqp.from_pretrained or tsqp.attach with placement 'ops'"
        )
    _refuse_unsupported(module, key, value, dropout, kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return split(
        query.detach(),
        key.detach(),
        value.detach(),
        attention_mask,
        scale=scale,
        causal=is_causal,
        want_probs=_wants_probs(module, kwargs),
    )


def _wants_probs(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether somebody collects the probabilities (``output_attentions``)."""
    if _active_collector is None or kwargs.get("output_attentions"):
        return True
    collected = _active_collector.get()
    return bool(getattr(getattr(module, "config", None), "output_attentions", False)) or (
        collected is not None and "attentions" in collected
    )


def split_attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' eager mask (added to the scores; the dtype's lowest number hides).

    None where that would hide just what :func:`split_attention` hides by itself without a mask.
    """
    kwargs["allow_is_bidirectional_skip"] = False
    if not args and _is_plain_causal(**kwargs):
        return None
    return eager_mask(*args, **kwargs)


def _is_plain_causal(
    q_length: int = 0,
    kv_length: int = -1,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    **_: Any,
) -> bool:
    """True where each query sees all keys up to its own, and the last query's is the last key.

    ``allow_is_causal_skip`` is transformers' word that nothing but padding and a window deviates from that. Its own
    rule for leaving a mask out is wider than this one: it fits an attention whose queries are the *first* positions.
    """
    if not allow_is_causal_skip or (local_size is not None and kv_length >= local_size):
        return False
    if kv_offset or int(q_offset) + q_length != kv_length:
        return False
    return attention_mask is None or (attention_mask.shape[-1] == kv_length and bool(attention_mask.all()))


def _refuse_unsupported(module: nn.Module, key: Tensor, value: Tensor, dropout: float, kwargs: dict[str, Any]) -> None:
    if module.training or dropout:
        raise ModelError("a split model only does inference; call model.eval() before the forward")
    for name, argument in kwargs.items():
        tensor = isinstance(argument, Tensor) and argument.is_floating_point() and name not in _HARMLESS
        if tensor or (name in _UNSUPPORTED and argument is not None):
            raise ModelError(
                f"{type(module).__name__} computes its attention with {name!r}, which placement 'ops' "
                "does not support; use placement 'linear'"
            )
    if key.shape[-1] != value.shape[-1]:
        raise ModelError(
            f"{type(module).__name__} has heads of {key.shape[-1]} elements in K and {value.shape[-1]} in V, "
            "which placement 'ops' does not support; use placement 'linear'"
        )


def _visible(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cuts off last positions that no query sees: the part of a static cache that is still empty."""
    if mask is None:
        return key, value, mask
    if mask.shape[-1] != key.shape[2]:
        raise ModelError(f"the attention mask covers {mask.shape[-1]} keys but there are {key.shape[2]}")
    if not _hidden(mask[..., -1]).all():
        return key, value, mask
    seen = (~_hidden(mask)).reshape(-1, mask.shape[-1]).any(dim=0).nonzero()
    if not len(seen):
        return key, value, mask
    length = int(seen[-1]) + 1
    return key[:, :, :length], value[:, :, :length], mask[..., :length]


def _hidden(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min


AttentionInterface.register(ATTENTION_NAME, split_attention)
AttentionMaskInterface.register(ATTENTION_NAME, split_attention_mask)
