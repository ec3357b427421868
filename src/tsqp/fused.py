"""Attention, MLP or whole decoder layers on the server (placements ``fused`` and ``layer``).

The modules stay in the runner's model, without their children, and their ``forward`` is replaced per instance: so
their class, attributes and hooks are what transformers expects. What the layers of one forward share (mask, rotary
tables) is sent once; K and V are on the server, see :mod:`tsqp.remote_cache`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .client import GPUClient
from .errors import ClosedError, ModelError, RemoteError
from .fused_requests import context_tensors
from .layout import CACHE_ARGUMENTS, CONTEXT_ARGUMENTS, IGNORED_ARGUMENTS, FusedLayout, FusedModule, argument_names
from .placement import FUSED_ATTENTION, FUSED_LAYER, FUSED_MLP, Placement
from .protocol import FLOAT_NAMES, Method
from .remote_cache import Fingerprints, remote_cache
from .timing import Clock

_KNOWN = frozenset((*CONTEXT_ARGUMENTS, *CACHE_ARGUMENTS, *IGNORED_ARGUMENTS))
#: Contexts of one model at a time: forwards of known families have one per kind of layer.
_MODEL_SLOTS = 8


class _Slot:
    """What the server holds in one context slot: the very tensors, and of the mask how many keys."""

    __slots__ = ("ids", "length", "mask", "number", "positions")

    def __init__(self, number: int) -> None:
        self.number = number
        self.clear()

    def clear(self) -> None:
        self.mask = self.positions = self.ids = None
        self.length = -1

    def holds(self, mask: Any, positions: Any, ids: Any, length: int) -> bool:
        # By identity, the tensors being held here: layers are passed the same objects.
        return (
            self.length == length
            and self.mask is mask
            and self.ids is ids
            and (self.positions is positions or _same_pair(self.positions, positions))
        )


class FusedRuntime:
    """One split model's link to the fused operators of its server."""

    def __init__(self, client: GPUClient, clock: Clock, layout: FusedLayout) -> None:
        self._client, self._clock, self._layout = client, clock, layout
        self._ask, self._requests = client.ask, client.fused
        self._fingerprints = Fingerprints()
        self._slots: list[_Slot] = []
        self._used = 0
        # One call at a time: what a slot holds must not change between the look at it and the request.
        self._lock = threading.Lock()

    def begin_forward(self, *_: Any) -> None:
        """A forward pre-hook of the model."""
        self._fingerprints.begin()
        self._used = 0
        for slot in self._slots:
            slot.clear()

    def close(self) -> None:
        """Gives the context slots back."""
        for slot in self._slots:
            self._requests.give_slot(slot.number)
        self._slots.clear()

    # --- stand-ins -----------------------------------------------------------------------------------------

    def mlp_forward(self, module: nn.Module, layer: int, returns: int) -> Callable[..., Any]:
        """What replaces the ``forward`` of a layer's MLP."""
        own = argument_names(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            h = self._input(module, own, args, kwargs)
            _refuse_unknown(module, kwargs)
            begin = self._clock.now()
            out = self._ask(self._requests.mlp(layer, h))
            self._clock.remote_done(begin)
            return (out, *(None,) * (returns - 1)) if returns else out

        return forward

    def layer_forward(self, module: nn.Module, method: Method, layer: int, returns: int) -> Callable[..., Any]:
        """What replaces the ``forward`` of a layer's attention, or of a whole layer."""
        own = argument_names(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            h = self._input(module, own, args, kwargs)
            get = kwargs.get
            mask, positions, ids = get("attention_mask"), get("position_embeddings"), get("position_ids")
            cache = get("past_key_values")
            if cache is None:
                cache = get("layer_past")
            _refuse_unknown(module, kwargs)
            with self._lock:
                out = self._call(method, layer, h, (mask, positions, None if positions is not None else ids), cache)
            return (out, *(None,) * (returns - 1)) if returns else out

        return forward

    def _input(self, module: nn.Module, own: tuple[str, ...], args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states; all other positional arguments are put among ``kwargs``."""
        if module.training:
            raise ModelError("a split model only does inference; call model.eval() before the forward")
        if len(args) > 1:
            kwargs.update(zip(own[1:], args[1:], strict=False))
        h: Tensor = args[0] if args else kwargs.pop(own[0])
        if h.dim() != 3 or h.shape[2] != self._layout.hidden:
            raise ModelError(
                f"{type(module).__name__} got {list(h.shape)}; it has to be [batch, positions, {self._layout.hidden}]"
            )
        return h

    def _call(self, method: Method, layer: int, h: Tensor, context: tuple[Any, Any, Any], cache: Any) -> Tensor:
        rows, count = h.shape[0], h.shape[1]
        if cache is None:
            return self._send(method, layer, h, context, count, {})
        kept = remote_cache(cache, self._client)
        change, length = kept.update(cache, layer, rows, count, self._fingerprints)
        options: dict[str, Any] = {"sequence": kept.sequence, "source": kept.source(layer)}
        if change.new:
            options["new"] = True
        else:
            options.update(keep=change.keep, drop=change.drop, batch_index=change.batch_index)
        try:
            out = self._send(method, layer, h, context, length, options)
        except BaseException as error:
            kept.failed(cache, layer, isinstance(error, RemoteError))
            raise
        kept.done(layer)
        return out

    def _send(
        self, method: Method, layer: int, h: Tensor, context: tuple[Any, Any, Any], length: int, options: dict[str, Any]
    ) -> Tensor:
        """One round trip, with the context where no slot holds it."""
        mask, positions, ids = context
        slot = next((slot for slot in self._slots[: self._used] if slot.holds(mask, positions, ids, length)), None)
        names: tuple[str, ...] | None = None
        tensors: list[Tensor] = []
        if slot is None:
            slot = self._next_slot()
            names, tensors = context_tensors(_pair(positions), _sendable_mask(mask, length), ids)
        call = self._requests.layer(method, layer, h, slot=slot.number, names=names, context=tensors, **options)
        begin = self._clock.now()
        out = self._ask(call)
        self._clock.remote_done(begin)
        if names is not None:
            slot.mask, slot.positions, slot.ids, slot.length = mask, positions, ids, length
        return out

    def _next_slot(self) -> _Slot:
        """A slot that no layer of this forward needs any more; what it held is forgotten."""
        if self._used == _MODEL_SLOTS:
            self._used = 0
        if self._used == len(self._slots):
            self._slots.append(_Slot(self._requests.take_slot()))
        slot = self._slots[self._used]
        self._used += 1
        slot.clear()
        return slot


def _same_pair(held: Any, given: Any) -> bool:
    return held is not None and given is not None and held[0] is given[0] and held[1] is given[1]


def _pair(positions: Any) -> tuple[Tensor, Tensor] | None:
    if positions is None:
        return None
    if not isinstance(positions, (tuple, list)) or len(positions) != 2:
        raise ModelError("position_embeddings are not a cosine and a sine; use placement 'linear'")
    cos, sin = positions
    if cos.dtype not in FLOAT_NAMES or cos.dim() != 3:
        raise ModelError(
            f"rotary tables are {cos.dtype} of {cos.dim()} dimensions, which does not travel; use placement 'linear'"
        )
    return cos, sin


def _sendable_mask(mask: Any, length: int) -> Tensor | None:
    """A 4-D mask as it travels: bool where it only hides, one row where all rows are the same, cut to the keys there
    are (a static cache has room for more).
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise ModelError(
            f"the attention mask is a {type(mask).__name__}{list(getattr(mask, 'shape', ()))}, not of four dimensions; "
            "use placement 'linear'"
        )
    if mask.shape[-1] < length:
        raise ModelError(f"the attention mask covers {mask.shape[-1]} keys but there are {length}")
    mask = mask[..., :length]
    for dimension in (0, 1):
        if mask.shape[dimension] > 1 and mask.stride(dimension) == 0:
            mask = mask.narrow(dimension, 0, 1)
    if mask.is_floating_point():
        hidden = mask <= torch.finfo(mask.dtype).min
        only_hides = bool((hidden | (mask == 0)).all())
        # Finite also in float16: a row of nothing but infinities would have no softmax.
        mask = ~hidden if only_hides else mask.float().clamp(min=torch.finfo(torch.float16).min)
    return mask


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name not in _KNOWN and isinstance(value, Tensor):
            raise ModelError(
                f"{type(module).__name__} is given {name!r}, which does not travel; use placement 'linear'"
            )


def modules_of(model: nn.Module, layout: FusedLayout, placement: Placement) -> dict[Method, tuple[FusedModule, ...]]:
    """The modules the server is to run whole, by the method that does it.

    Raises :class:`~tsqp.errors.ModelError` where it can't, or where the model has none of these names.
    """
    kinds = {
        FUSED_ATTENTION: (Method.FUSED_ATTENTION, layout.attention),
        FUSED_MLP: (Method.FUSED_MLP, layout.mlp),
        FUSED_LAYER: (Method.FUSED_LAYER, layout.layers),
    }
    found = {method: modules for kind, (method, modules) in kinds.items() if kind in placement.remote}
    for modules in found.values():
        if not modules:
            raise ModelError(
                f"the server can't run this model in placement {placement.name!r}: {layout.why}; use placement 'linear'"
            )
        for module in modules:
            try:
                model.get_submodule(module.name)
            except AttributeError:
                raise ModelError(
                    f"the server does not serve this model: {module.name} is missing here and served there"
                ) from None
    return found


def install(attachment: Any, layout: FusedLayout, kinds: dict[Method, tuple[FusedModule, ...]]) -> None:
    """Replaces the ``forward`` of all modules in ``kinds``, takes their children away, and chooses the attention
    whose masks the server needs. All through ``attachment``, reversibly.
    """
    runtime = FusedRuntime(attachment.client, attachment.clock, layout)
    model = attachment.model
    attachment.on_undo(runtime.close)
    attachment.choose_attention(layout.attention_implementation)
    attachment.hook(model.register_forward_pre_hook(runtime.begin_forward))
    for method, modules in kinds.items():
        for number, fused in enumerate(modules):
            module = model.get_submodule(fused.name)
            if method is Method.FUSED_MLP:
                forward = runtime.mlp_forward(module, number, fused.returns)
            else:
                forward = runtime.layer_forward(module, method, number, fused.returns)
            attachment.hollow(module, forward, partial(_refuse, fused.name))


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise ClosedError(f"{name} is on a server this model was detached from; make the model anew")
