"""The fused operators of the server: attention, MLP or a whole decoder layer in one request.

The modules are transformers' own, of the served model, and are called as its forward calls them; see
``fused_requests`` for what a request holds. As in ``server_ops``: a request is checked completely before anything
is computed, what is used to index is copied before it is checked, and nothing changes before the computation has
passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .errors import ConfigError, RemoteError
from .fused_requests import CONTEXT_NAMES, MAX_SLOTS
from .layout import CACHE_ARGUMENTS, FusedModule, argument_names, required_arguments, takes_any
from .loading import ServedModel
from .protocol import FLOAT_NAMES, Method, Status, shown
from .server_ops import Operators, Reply, _meta
from .sessions import Growth, LayerCache, Session

_MAX_FREED = 64
_MAX_NUMBER = 1 << 62


class Context:
    """What the layers of one forward share, private and on the device: any of mask, cosine and sine, ids."""

    __slots__ = ("ids", "mask", "nbytes", "positions")

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.mask = tensors.get("mask")
        self.ids = tensors.get("ids")
        self.positions = (tensors["cos"], tensors["sin"]) if "cos" in tensors else None
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())


class Target:
    """What a request's meta names. Remembered by its bytes where they may come again."""

    __slots__ = ("drop", "free", "keep", "layer", "module", "names", "new", "reorder", "sequence", "slot", "source")

    module: Callable[..., Any]
    layer: int
    slot: int
    names: list[str] | None
    sequence: int | None
    source: int | None
    new: bool
    keep: int | None
    drop: int
    reorder: bool
    free: list[int]


class _Cache(Cache):
    """The cache a module of the model gets: one layer, planned in the request that is being answered."""

    def __init__(self, growth: Growth) -> None:
        self.growth = growth
        self.planned: LayerCache | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.planned = self.growth.extended(key_states, value_states)
        return self.planned.heads

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.growth.length


class FusedOperators:
    """The handlers of the fused methods, by tag, of one served model; see :class:`~tsqp.server_ops.Operators`."""

    def __init__(self, served: ServedModel, operators: Operators) -> None:
        self._served, self._common = served, operators
        self._layout = served.layout
        self._eager = self._layout.attention_implementation == "eager"
        self._positions = served.info.config.get("max_position_embeddings") or _MAX_NUMBER
        #: Elements per position of the largest result inside a module.
        self._widest = _widest(served)
        self._attention = self._callables(self._layout.attention, self._with_context)
        self._layers = self._callables(self._layout.layers, self._with_context)
        self._mlp = self._callables(self._layout.mlp, lambda module: module)
        self.handlers: dict[int, Callable[[Session, Any], Reply]] = {
            int(Method.FUSED_ATTENTION): self.attention,
            int(Method.FUSED_MLP): self.mlp,
            int(Method.FUSED_LAYER): self.layer,
        }

    def _callables(self, modules: tuple[FusedModule, ...], wrap: Callable[[nn.Module], Any]) -> list[Any]:
        return [wrap(self._served.fused[module.name]) for module in modules]

    # --- handlers ------------------------------------------------------------------------------------------

    def attention(self, session: Session, msg: Any) -> Reply:
        """h [B, N, hidden] through a layer's attention, K and V kept in a sequence, to [B, N, hidden]."""
        return self._run(session, msg, self._attention)

    def layer(self, session: Session, msg: Any) -> Reply:
        """h [B, N, hidden] through a whole decoder layer, K and V kept in a sequence, to [B, N, hidden]."""
        return self._run(session, msg, self._layers)

    def mlp(self, session: Session, msg: Any) -> Reply:
        """h [B, N, hidden] through a layer's MLP to [B, N, hidden]."""
        key = (msg.tag, msg.meta_bytes)
        module = session.targets.get(key)
        if module is None:
            module = self._mlp[self._layer_of(_meta(msg), self._mlp)]
            session.remember(*key, module)
        tensors = msg.tensors
        if len(tensors) != 1:
            raise RemoteError(f"the request holds {len(tensors)} tensors, expected 1", Status.BAD_REQUEST)
        h = self._checked_h(tensors[0])
        return [self._common._out(_first(module(self._common._in(h))), h.dtype)], None

    def _run(self, session: Session, msg: Any, modules: list[Any]) -> Reply:
        key = (msg.tag, msg.meta_bytes)
        target = session.targets.get(key)
        if target is None:
            target = self._read_target(_meta(msg), modules)
            if target.keep is None and not target.free:
                session.remember(*key, target)
        for number in target.free:
            session.drop_sequence(number)
        h, context, index = self._tensors(session, msg.tensors, target)
        rows, count, _ = h.shape
        new_bytes = 0 if target.names is None else context.nbytes
        cache = None if target.sequence is None else self._cache(session, target, rows, index, new_bytes)
        length = count + (0 if cache is None else cache.growth.length)
        mask = self._mask(context.mask, rows, count, length)
        reply = [self._common._out(target.module(self._common._in(h), context, mask, cache), h.dtype)]
        if cache is not None:
            assert target.sequence is not None
            if cache.planned is None:
                raise RemoteError(f"layer {target.layer} keeps no K and V; ask without a sequence", Status.BAD_REQUEST)
            session.commit(target.layer, cache.planned, target.sequence)
        if target.names is not None:
            held = session.contexts.get(target.slot)
            session.contexts[target.slot] = context
            session.context_bytes += context.nbytes - (0 if held is None else held.nbytes)
        return reply, None

    # --- what a request names ------------------------------------------------------------------------------

    def _layer_of(self, meta: dict[str, Any], modules: list[Any]) -> int:
        layer = meta.get("layer")
        try:
            self._served.table.check_layer(layer)
        except ConfigError as error:
            raise RemoteError(str(error), Status.UNKNOWN_MODULE) from None
        if not modules:
            raise RemoteError(f"this model has no such operator: {self._layout.why}", Status.UNKNOWN_MODULE)
        return layer  # type: ignore[return-value]

    def _read_target(self, meta: dict[str, Any], modules: list[Any]) -> Target:
        target = Target()
        target.layer = self._layer_of(meta, modules)
        target.module = modules[target.layer]
        target.slot = _number(meta, "slot", 0, MAX_SLOTS - 1) or 0
        target.names = _names(meta.get("set"))
        target.sequence = _number(meta, "seq")
        target.source = _number(meta, "from")
        target.keep = _number(meta, "keep")
        target.drop = _number(meta, "drop", 0) or 0
        target.new = meta.get("new") is True
        target.reorder = meta.get("reorder") is True
        free = meta.get("free", [])
        if not isinstance(free, list) or len(free) > _MAX_FREED or not all(_is_number(each) for each in free):
            raise RemoteError(f"meta 'free' is no list of at most {_MAX_FREED} sequence numbers", Status.BAD_REQUEST)
        target.free = free
        builds = target.source is not None or target.keep is not None or target.drop or target.reorder
        if builds and (target.new or target.sequence is None):
            raise RemoteError(
                "meta has 'from', 'keep', 'drop' or 'reorder' without a sequence that holds something",
                Status.BAD_REQUEST,
            )
        return target

    def _cache(self, session: Session, target: Target, rows: int, index: Tensor | None, new_bytes: int) -> _Cache:
        layer, sequence = target.layer, target.sequence
        assert sequence is not None
        if target.new:
            return _Cache(session.growth(layer, rows, keep=0, sequence=sequence, reserved_bytes=new_bytes))
        origin = sequence if target.source is None else target.source
        source = session.layer(layer, origin)
        if source is None:
            raise RemoteError(
                f"sequence {origin} holds no K and V of layer {layer}: they were dropped, or never made; start with a "
                "new cache",
                Status.BAD_REQUEST,
            )
        growth = session.growth(
            layer,
            rows,
            keep=target.keep,
            drop=target.drop,
            batch_index=index,
            sequence=sequence,
            source=source,
            reserved_bytes=new_bytes,
        )
        return _Cache(growth)

    # --- tensors -------------------------------------------------------------------------------------------

    def _checked_h(self, h: Tensor) -> Tensor:
        if h.dtype not in FLOAT_NAMES:
            raise RemoteError(f"activations are {h.dtype}; send {', '.join(FLOAT_NAMES.values())}", Status.BAD_DTYPE)
        shape = h.shape
        if len(shape) != 3 or shape[2] != self._layout.hidden or not (shape[0] and shape[1]):
            raise RemoteError(
                f"h has shape {list(shape)}, expected [batch, positions, {self._layout.hidden}], neither of them 0",
                Status.BAD_SHAPE,
            )
        self._common._check_reply(h.numel() // shape[2] * self._widest, h.dtype, 3)
        return h

    def _tensors(
        self, session: Session, tensors: list[Tensor], target: Target
    ) -> tuple[Tensor, Context, Tensor | None]:
        names = target.names or ()
        expected = 1 + len(names) + target.reorder
        if len(tensors) != expected:
            raise RemoteError(f"the request holds {len(tensors)} tensors, expected {expected}", Status.BAD_REQUEST)
        h = self._checked_h(tensors[0])
        rows, count, _ = h.shape
        index = self._common._row_index(tensors[-1], rows) if target.reorder else None
        if target.names is not None:
            return h, self._new_context(session, target.slot, names, tensors[1:], rows, count), index
        context = session.contexts.get(target.slot)
        if context is None:
            raise RemoteError(f"context slot {target.slot} holds nothing; send the context again", Status.BAD_REQUEST)
        for name in ("positions", "ids"):
            held = getattr(context, name)
            if held is not None:
                _check_rows(name, held[0] if name == "positions" else held, rows, count)
        return h, context, index

    def _new_context(
        self, session: Session, slot: int, names: Any, tensors: list[Tensor], rows: int, count: int
    ) -> Context:
        sent = dict(zip(names, tensors, strict=False))
        for name, tensor in sent.items():
            _check_context(name, tensor)
            if name != "mask":
                _check_rows(name, tensor, rows, count)
        if "cos" in sent:
            self._check_tables(sent["cos"], sent["sin"])
        held = session.contexts.get(slot)
        nbytes = sum(tensor.nbytes for tensor in sent.values())
        left = session.limits.kv_bytes - session.kv_bytes - session.context_bytes + (held.nbytes if held else 0)
        if nbytes > left:
            raise RemoteError(
                f"the context would need {nbytes} bytes and this client has {max(left, 0)} left; use a shorter prompt "
                "or start the server with a higher K/V limit",
                Status.LIMIT,
            )
        return Context({name: self._private(name, tensor) for name, tensor in sent.items()})

    def _check_tables(self, cos: Tensor, sin: Tensor) -> None:
        if cos.shape != sin.shape:
            raise RemoteError("cos and sin have different shapes", Status.BAD_SHAPE)
        widths = self._layout.widths
        if cos.shape[2] not in widths:
            known = ", ".join(map(str, sorted(widths))) or "none at all"
            raise RemoteError(
                f"rotary tables of width {cos.shape[2]} do not fit this model, which has {known}", Status.BAD_SHAPE
            )

    def _private(self, name: str, tensor: Tensor) -> Tensor:
        """A copy on the device; indices are checked after it was made."""
        dtype = self._common._dtype if tensor.is_floating_point() else tensor.dtype
        copy = tensor.to(device=self._common._device, dtype=dtype, copy=True)
        if name == "ids" and copy.numel():
            low, high = copy.aminmax()
            if int(low) < 0 or int(high) >= self._positions:
                raise RemoteError(f"a position id is outside 0..{self._positions - 1}", Status.BAD_REQUEST)
        return copy

    def _mask(self, mask: Tensor | None, rows: int, count: int, length: int) -> Tensor | None:
        """The mask as the model's attention takes it. None is causal, which only some kernels do by themselves."""
        if self._eager:  # scores are made in full
            self._common._check_reply(rows * self._served.geometry.heads * count * length, self._common._dtype, 4)
        if mask is None:
            if count == 1 or (count == length and not self._eager):
                return None
            self._common._check_reply(count * length, self._common._dtype, 4)
            seen = torch.ones(count, length, dtype=torch.bool, device=self._common._device)
            mask = seen.tril(length - count)[None, None]
        else:
            shape, heads = mask.shape, self._served.geometry.heads
            if shape[0] not in (1, rows) or shape[1] not in (1, heads) or shape[2:] != (count, length):
                raise RemoteError(
                    f"the mask has shape {list(shape)}, expected [1 or {rows}, 1 or {heads}, {count}, {length}]",
                    Status.BAD_SHAPE,
                )
        if self._eager and mask.dtype is torch.bool:
            dtype = self._common._dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
        return mask

    # --- modules -------------------------------------------------------------------------------------------

    def _with_context(self, module: nn.Module) -> Callable[..., Tensor]:
        """The module as a function of h, context, mask and cache, given what its forward takes of them."""
        own, every = argument_names(module), takes_any(module)
        cache_name = next((name for name in CACHE_ARGUMENTS if name in own), CACHE_ARGUMENTS[0])

        def has(name: str) -> bool:
            return every or name in own

        ids, positions, use_cache = has("position_ids"), has("position_embeddings"), has("use_cache")
        caches = has(cache_name)

        nothing = dict.fromkeys(required_arguments(module)[1:])  # what was seen to be None in a forward

        def call(h: Tensor, context: Context, mask: Tensor | None, cache: _Cache | None) -> Tensor:
            arguments: dict[str, Any] = {**nothing, "attention_mask": mask}
            if positions:
                arguments["position_embeddings"] = context.positions
            if ids:
                arguments["position_ids"] = context.ids
            if caches:
                arguments[cache_name] = cache
            if use_cache:
                arguments["use_cache"] = cache is not None
            return _first(module(h, **arguments))

        return call


def _widest(served: ServedModel) -> int:
    inside = tuple(f"{module.name}." for module in served.layout.layers)
    widths = [module.info.out_features for name, module in served.modules.items() if name.startswith(inside)]
    return max([served.layout.hidden, *widths]) if inside else served.layout.hidden


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _is_number(value: Any, highest: int = _MAX_NUMBER) -> bool:
    return type(value) is int and 0 <= value <= highest


def _number(meta: dict[str, Any], key: str, default: int | None = None, highest: int = _MAX_NUMBER) -> int | None:
    value = meta.get(key, default)
    if value is not None and not _is_number(value, highest):
        raise RemoteError(f"meta {key!r} is {shown(value)}, expected a number from 0 to {highest}", Status.BAD_REQUEST)
    return value


def _names(value: Any) -> list[str] | None:
    if value is None:
        return None
    known = isinstance(value, list) and len(value) <= len(CONTEXT_NAMES) and all(n in CONTEXT_NAMES for n in value)
    if not known or len(set(value)) != len(value) or ("cos" in value) != ("sin" in value):
        raise RemoteError(f"meta 'set' names other than {', '.join(CONTEXT_NAMES)}, or one twice", Status.BAD_REQUEST)
    return value


def _check_context(name: str, tensor: Tensor) -> None:
    dtype, rank = tensor.dtype, {"mask": 4, "ids": 2}.get(name, 3)
    integer, boolean = name == "ids" and dtype is torch.int64, name == "mask" and dtype is torch.bool
    if not (integer or boolean or (name != "ids" and dtype in FLOAT_NAMES)):
        raise RemoteError(f"{name} is {dtype}, which it can't be", Status.BAD_DTYPE)
    if tensor.dim() != rank or not tensor.numel():
        raise RemoteError(f"{name} has shape {list(tensor.shape)}, expected {rank} dimensions", Status.BAD_SHAPE)


def _check_rows(name: str, tensor: Tensor, rows: int, count: int) -> None:
    shape = tensor.shape
    if shape[0] not in (1, rows) or shape[1] != count:
        raise RemoteError(
            f"{name} has shape {list(shape)} but h has {rows} rows of {count} positions", Status.BAD_SHAPE
        )
