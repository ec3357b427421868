"""What a runner asks of the fused operators, and the sequences and contexts it keeps on the server for them.

A *sequence* is the K and V of one cache of the runner, all layers of it, by number. A *context* is what the
layers of one forward share (the mask, the rotary tables), stored in a numbered slot by the first request that
needs it and named by those that follow. The meta of a request:

============  ==========================================================================================
``layer``     the layer's number
``slot``      the context's slot, 0 where left out
``set``       names (:data:`CONTEXT_NAMES`) of the tensors after ``h``: they replace what the slot holds; left
              out where the slot is used as it is
``seq``       the sequence; without it nothing is kept, and the positions of ``h`` see only each other
``new``       the layer holds nothing yet in this sequence, or what it holds is to be forgotten
``from``      the sequence whose layer this one builds upon instead of its own; that one stays as it is
``keep``      positions to keep, all where left out
``drop``      first positions to drop
``reorder``   a last tensor, int64 [B], names the rows to gather
``free``      numbers of sequences to forget before anything else is done
============  ==========================================================================================

Rows are gathered, then positions dropped, then kept, as in ATTENTION_SCORES. The bytes of a plain decode step's
meta are the same in every step.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgpack
import torch
from torch import Tensor

from .calls import Site
from .errors import ConfigError
from .pending import PendingCall
from .protocol import Method
from .requests import Requests

#: The tensors of a context: attention mask, rotary cosine and sine, position ids.
CONTEXT_NAMES = ("mask", "cos", "sin", "ids")
#: Contexts one client may have at once.
MAX_SLOTS = 64
_REMEMBERED = 4096


class KvSequence:
    """The K and V of one cache, on the server; forgotten there with one of the requests after this object is gone.

    Made by ``client.new_sequence()``.
    """

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"<KvSequence {self.number}>"


class FusedRequests:
    """Makes the requests of the fused operators for one connection. Threads may share it."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._lock = threading.Lock()
        self._next_sequence = 0
        self._to_free: deque[int] = deque()
        self._slots: set[int] = set()
        self._metas: dict[Any, bytes] = {}
        self._sites: dict[tuple[Method, int], Site] = {}

    # --- sequences and slots -------------------------------------------------------------------------------

    def new_sequence(self) -> KvSequence:
        with self._lock:
            number = self._next_sequence
            self._next_sequence += 1
        sequence = KvSequence(number)
        # Only noted: a collector may run anywhere, also where a lock is held.
        weakref.finalize(sequence, self._to_free.append, number).atexit = False
        return sequence

    def take_slot(self) -> int:
        """A context slot nobody else uses; raises :class:`ConfigError` where there is none left."""
        with self._lock:
            free = next((slot for slot in range(MAX_SLOTS) if slot not in self._slots), None)
            if free is None:
                raise ConfigError(f"{MAX_SLOTS} contexts are in use on this connection; close models that are not used")
            self._slots.add(free)
            return free

    def give_slot(self, slot: int) -> None:
        """Gives a slot back."""
        with self._lock:
            self._slots.discard(slot)

    # --- requests ------------------------------------------------------------------------------------------

    def mlp(self, layer: int, h: Tensor) -> PendingCall[Tensor]:
        site = self._sites.get((Method.FUSED_MLP, layer)) or self._site(Method.FUSED_MLP, int(layer))
        requests = self._requests
        visible = requests.outgoing(h)
        return PendingCall(site, (visible,), (h.shape,), visible.dtype, True, requests.back(h))

    def call(
        self,
        method: Method,
        layer: int,
        h: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        reuse: bool = False,
        **options: Any,
    ) -> PendingCall[Tensor]:
        """FUSED_ATTENTION or FUSED_LAYER with the context as tensors; see :meth:`GPUClient.fused_attention`."""
        if reuse:
            if position_embeddings is not None or mask is not None or position_ids is not None:
                raise ConfigError("reuse=True is for the context of an earlier call; give no other one with it")
            return self.layer(method, layer, h, **options)
        names, context = context_tensors(position_embeddings, mask, position_ids)
        return self.layer(method, layer, h, names=names, context=context, **options)

    def layer(
        self,
        method: Method,
        layer: int,
        h: Tensor,
        *,
        slot: int = 0,
        names: tuple[str, ...] | None = None,
        context: Sequence[Tensor] = (),
        sequence: KvSequence | None = None,
        new: bool = False,
        source: KvSequence | None = None,
        keep: int | None = None,
        drop: int = 0,
        batch_index: Tensor | None = None,
    ) -> PendingCall[Tensor]:
        """FUSED_ATTENTION or FUSED_LAYER; without ``names`` the slot's context is used as it is."""
        site = self._sites.get((method, layer)) or self._site(method, int(layer))
        requests = self._requests
        visible = requests.outgoing(h)
        number = -1 if sequence is None else sequence.number
        plain = keep is None and batch_index is None and source is None and not self._to_free
        key = (layer, slot, names, number, new, drop)
        meta = self._metas.get(key) if plain else None
        if meta is None:
            fields = _fields(*key)
            if not plain:
                self._extend(fields, keep, batch_index, source)
            meta = msgpack.packb(fields)
            if plain:
                if len(self._metas) >= _REMEMBERED:
                    self._metas.clear()
                self._metas[key] = meta
        tensors = [visible, *context]
        if batch_index is not None:
            tensors.append(batch_index.detach().to(device="cpu", dtype=torch.int64))
        return PendingCall(site, tensors, (h.shape,), visible.dtype, True, requests.back(h), meta=meta)

    def _extend(
        self, fields: dict[str, Any], keep: int | None, batch_index: Tensor | None, source: KvSequence | None
    ) -> None:
        if keep is not None:
            fields["keep"] = int(keep)
        if batch_index is not None:
            fields["reorder"] = True
        if source is not None:
            fields["from"] = source.number
        # A request that is lost takes these with it: the server then keeps them until the connection ends.
        freed: list[int] = []
        while self._to_free and len(freed) < 64:
            freed.append(self._to_free.popleft())
        if freed:
            fields["free"] = freed

    def _site(self, method: Method, layer: int) -> Site:
        meta = {"layer": layer} if method is Method.FUSED_MLP else None
        site = self._sites[method, layer] = self._requests.site((method, layer), method, meta)
        site.layer = layer
        return site


def _fields(layer: int, slot: int, names: tuple[str, ...] | None, number: int, new: bool, drop: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"layer": int(layer)}
    if slot:
        fields["slot"] = int(slot)
    if names is not None:
        fields["set"] = list(names)
    if number >= 0:
        fields["seq"] = number
    if new:
        fields["new"] = True
    if drop:
        fields["drop"] = int(drop)
    return fields


def context_tensors(
    position_embeddings: tuple[Tensor, Tensor] | None, mask: Tensor | None, position_ids: Tensor | None
) -> tuple[tuple[str, ...], list[Tensor]]:
    """Names and tensors of a context as they travel."""
    names: list[str] = []
    tensors: list[Tensor] = []
    if mask is not None:
        names.append("mask")
        tensors.append(mask)
    if position_embeddings is not None:
        names += ("cos", "sin")
        tensors += position_embeddings
    if position_ids is not None:
        names.append("ids")
        tensors.append(position_ids)
    return tuple(names), [tensor.detach().cpu() for tensor in tensors]
