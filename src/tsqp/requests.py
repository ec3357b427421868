"""What the runner asks: each remote method as a request, with everything its reply has to be.

Blocking and pipelined calls are made from the same requests, so that both send the same bytes and check the
same things.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import torch
from torch import Tensor

from . import model_info
from .calls import Protection, Shape, Site, check_tensors, reply_meta
from .errors import ConfigError, ProtocolError
from .kv_lengths import Change, KvLengths, Reset
from .model_info import InitInfo
from .pending import PendingCall
from .protocol import Method, ModuleTable, matmul_shape
from .telemetry import Telemetry


class Requests:
    """Makes requests for one connection. Threads may share it.

    ``ask`` sends one and waits; it is used for Init, which other requests make by themselves where they need
    it. ``wire`` is the dtype of activations on the wire, None for the served model's.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        ask: Callable[[PendingCall[Any]], Any],
        wire: torch.dtype | None,
        protection: Protection | None,
    ) -> None:
        self.info: InitInfo | None = None
        self._telemetry = telemetry
        self._ask = ask
        self._wire = wire
        self._protection = protection
        self._table: ModuleTable | None = None
        self._kv = KvLengths()
        self._lock = threading.RLock()
        self._linear_sites: dict[tuple[int | None, tuple[str, ...]], Site] = {}
        self._sites: dict[Any, Site] = {}

    def init(self) -> InitInfo:
        """What the server said of the model; asked for once."""
        with self._lock:
            if self.info is None:
                call: PendingCall[InitInfo] = PendingCall(
                    self._site("init", Method.INIT), (), None, None, finish=_unpack_info
                )
                info = self._ask(call)
                self._table = info.table()
                self._wire = self._wire or info.torch_dtype
                self.info = info
            return self.info

    def wire(self) -> torch.dtype:
        """The dtype of activations on the wire."""
        if self._wire is None:
            self.init()
        assert self._wire is not None
        return self._wire

    def embedding(self, ids: Tensor, module: str | None) -> PendingCall[Tensor]:
        info, table = self.init(), self._modules()
        name = info.embedding if module is None else module
        out = table.modules[table.embedding(name)].out_features
        site = self._sites.get(("embedding", name))
        if site is None:
            meta = {"module": name, "dtype": str(self._wire).rpartition(".")[2]}
            site = self._site(("embedding", name), Method.EMBEDDING, meta)
        rows = ids.detach().to(device="cpu", dtype=torch.int64)
        cast = info.torch_dtype if info.torch_dtype is not self._wire else None
        return PendingCall(site, (rows,), ((*ids.shape, out),), self._wire, True, cast)

    def batch_linear(self, layer_idx: int | None, names: Sequence[str], h: Tensor) -> PendingCall[list[Tensor]]:
        key = (layer_idx, tuple(names))
        return self._linear(self._linear_sites.get(key) or self._linear_site(*key), h, False)

    def linear(self, name: str, h: Tensor) -> PendingCall[Tensor]:
        key = (None, (name,))
        return self._linear(self._linear_sites.get(key) or self._linear_site(*key), h, True)

    def lm_head(self, h: Tensor) -> PendingCall[Tensor]:
        site = self._sites.get("lm_head")
        if site is None:
            info = self.init()
            if not info.lm_head:
                raise ConfigError("the served model has no LM head")
            outs = (info.modules[info.lm_head].out_features,)
            site = self._site("lm_head", Method.LM_HEAD, None, outs)
        return self._linear(site, h, True)

    def matmul(self, a: Tensor, b: Tensor) -> PendingCall[Tensor]:
        shape = matmul_shape(a.shape, b.shape)
        site = self._sites.get("matmul") or self._site("matmul", Method.MATMUL)
        tensors = (self._outgoing(a), self._outgoing(b))
        return PendingCall(site, tensors, (shape,), self._wire, True, self._back(a))

    def attention_scores(
        self,
        layer_idx: int,
        q: Tensor,
        k_new: Tensor,
        v_new: Tensor,
        keep: int | None,
        batch_index: Tensor | None,
        drop: int,
        keys: int | None,
    ) -> PendingCall[Tensor]:
        layer = int(layer_idx)
        tensors = [self._outgoing(q), self._outgoing(k_new), self._outgoing(v_new)]
        site = self._sites.get(layer) or self._site(layer, Method.ATTENTION_SCORES, {"layer": layer})
        meta = None
        if keep is not None or drop or batch_index is not None or keys is not None:
            fields: dict[str, Any] = {"layer": layer}
            if keep is not None:
                fields["keep"] = int(keep)
            if drop:
                fields["drop"] = int(drop)
            if keys is not None:
                fields["keys"] = int(keys)
            if batch_index is not None:
                fields["reorder"] = True
                tensors.append(batch_index.detach().to(device="cpu", dtype=torch.int64))
            meta = msgpack.packb(fields)
        count = k_new.shape[-2] if k_new.dim() > 1 else 0
        change = Change(self._kv, layer, count, keep, drop, tuple(q.shape[:-1]), keys)
        return PendingCall(site, tensors, None, self._wire, True, self._back(q), meta=meta, history=change)

    def attention_values(self, layer_idx: int, probs: Tensor) -> PendingCall[Tensor]:
        visible = self._outgoing(probs)
        return self.values_of(layer_idx, probs.shape, (visible,), self._back(probs))

    # --- requests whose tensors are written later, in the wire's dtype ---------------------------------------

    def values_of(
        self, layer_idx: int, shape: Shape, tensors: Sequence[Tensor] = (), cast: torch.dtype | None = None
    ) -> PendingCall[Tensor]:
        """:meth:`attention_values` of weights of this shape."""
        key = ("values", layer_idx)
        site = self._sites.get(key) or self._site(key, Method.ATTENTION_VALUES, {"layer": int(layer_idx)})
        values = (*shape[:-1], self.init().geometry.head_dim)
        return PendingCall(site, tensors, (values,), self._wire, True, cast)

    def linear_of(self, name: str, shape: torch.Size) -> PendingCall[Tensor]:
        """:meth:`linear` of an input of this shape. Not for a protected client: what travels is the input itself."""
        key = (None, (name,))
        site = self._linear_sites.get(key) or self._linear_site(*key)
        return PendingCall(site, (), site.shapes(shape), self._wire, True)

    @property
    def protected(self) -> bool:
        """Whether the server sees something else than the inputs and outputs of linear modules."""
        return self._protection is not None

    def drop_cache(self) -> PendingCall[None]:
        site = self._site("drop_cache", Method.DROP_CACHE)
        return PendingCall(site, (), (), None, finish=_nothing, history=Reset(self._kv))

    def ping(self) -> PendingCall[None]:
        return PendingCall(self._site("ping", Method.PING), (), (), None, finish=_nothing)

    def server_stats(self) -> PendingCall[dict[str, float]]:
        return PendingCall(self._site("stats", Method.STATS), (), (), None, finish=_numbers)

    # --- parts ---------------------------------------------------------------------------------------------

    def _linear(self, site: Site, h: Tensor, single: bool) -> PendingCall[Any]:
        """The one place every remote linear module is asked for."""
        visible, wire = self._outgoing(h), self._wire
        if self._protection is not None:
            return self._concealed(self._protection, site, visible, single, h.dtype)
        return PendingCall(site, (visible,), site.shapes(h.shape), wire, single, None if h.dtype is wire else h.dtype)

    def _concealed(
        self, protection: Protection, site: Site, h: Tensor, single: bool, dtype: torch.dtype
    ) -> PendingCall[Any]:
        index, shapes, wire = site.next_index(), site.shapes(h.shape), self._wire
        visible, secret = protection.conceal(site, index, h)

        def reveal(reply: Any) -> Any:
            check_tensors(reply, shapes, wire)
            outs = [out.to(dtype) for out in protection.reveal(site, secret, reply.tensors)]
            return outs[0] if single else outs

        return PendingCall(site, (visible,), shapes, wire, index=index, finish=reveal)

    def _outgoing(self, tensor: Tensor) -> Tensor:
        """The tensor as it travels."""
        wire = self._wire
        if wire is None:
            self.init()
            wire = self._wire
        if tensor.requires_grad:
            tensor = tensor.detach()
        if tensor.dtype is wire and tensor.is_cpu:
            return tensor
        if not tensor.is_floating_point():
            raise ConfigError(f"activations are {tensor.dtype}; give a floating-point tensor")
        return tensor.to(device="cpu", dtype=wire)

    def _back(self, tensor: Tensor) -> torch.dtype | None:
        """The dtype a result has to be cast to, None where it comes in the caller's."""
        return None if tensor.dtype is self._wire else tensor.dtype

    def _modules(self) -> ModuleTable:
        self.init()
        assert self._table is not None
        return self._table

    def _site(self, key: Any, method: Method, meta: dict[str, Any] | None = None, outs: tuple[int, ...] = ()) -> Site:
        with self._lock:
            site = self._sites.get(key)
            if site is None:
                site = self._sites[key] = Site(len(self._sites) + 1, method, meta, outs, self._telemetry)
            return site

    # For the requests of the fused operators, which are made elsewhere.
    outgoing, back, site = _outgoing, _back, _site

    def _linear_site(self, layer: int | None, names: tuple[str, ...]) -> Site:
        table = self._modules()
        number = None if layer is None else int(layer)
        outs = tuple(table.modules[name].out_features for name in table.resolve(names, number))
        meta: dict[str, Any] = {"modules": list(names)}
        if number is not None:
            meta["layer"] = number
        site = self._site((number, names), Method.BATCH_LINEAR, meta, outs)
        self._linear_sites[(layer, names)] = site
        return site


def _unpack_info(reply: Any) -> InitInfo:
    return model_info.unpack(reply.tensors)


def _nothing(_: Any) -> None:
    return None


def _numbers(reply: Any) -> dict[str, float]:
    numbers = reply_meta(reply)
    if not all(isinstance(key, str) and type(value) in (int, float) for key, value in numbers.items()):
        raise ProtocolError("the server's Stats reply holds something other than numbers")
    return numbers
