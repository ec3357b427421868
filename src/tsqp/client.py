"""The runner's end of the remote procedure calls.

The server is not trusted: every reply is checked against what was asked (request id, method, number of
tensors, exact shapes and dtype) before any of it is used, and what does not fit is a :class:`ProtocolError`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import msgpack
import torch
from torch import Tensor

from . import config, model_info
from .calls import (
    NoProtection,
    Protection,
    Shape,
    Site,
    checked_tensors,
    remote_error,
    reply_meta,
)
from .errors import ClosedError, ConfigError, ProtocolError, RemoteError, WaitTimeoutError
from .model_info import InitInfo
from .protocol import (
    FLOAT_DTYPES,
    METHOD_NAMES,
    METHOD_OPERATORS,
    Method,
    ModuleTable,
    matmul_shape,
)
from .telemetry import Telemetry, print_stats
from .transport import connect


class GPUClient:
    """Calls the heavy modules of a model on a :class:`GPUServer`.

    ``endpoint``: as the server's. ``timeout``: seconds one call may take, None for ever. ``wire_dtype``: the
    dtype of activations on the wire, ``auto`` (the served model's), ``float32``, ``bfloat16`` or ``float16``.
    ``wait``: how to wait for a reply, see :func:`connect`.

    Inputs are cast to the wire dtype before they are sent; the server computes in its model's dtype and
    rounds the result to the wire dtype; results come back in the caller's dtype. Each rounding has a relative
    error of at most 2^-24 (float32), 2^-11 (float16) or 2^-8 (bfloat16) of each element, so for a linear
    module ``y = W x + b`` narrower wires add at most ``u (|W| |x| + |y|)`` to the model's own error, ``u``
    being that bound. float16 also turns magnitudes over 65504 into infinities; bfloat16 and float32 share one
    range.

    A call that times out raises :class:`WaitTimeoutError` and leaves the connection usable: the late reply is
    told by its request id, dropped and counted. Calls raise :class:`RemoteError` with the server's status for
    a refused request, :class:`ProtocolError` for a reply that is not what was asked for,
    :class:`PeerDiedError` and :class:`ClosedError`. Several threads may use one client; a lock lets one call
    through at a time.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        timeout: float | None = 30.0,
        wire_dtype: str = "auto",
        connect_timeout: float = 10.0,
        wait: str = "auto",
        *,
        shm: bool = True,
        large: str = "tile",
        protection: Protection | None = None,
    ) -> None:
        if wire_dtype != "auto" and wire_dtype not in FLOAT_DTYPES:
            raise ConfigError(f"wire_dtype {wire_dtype!r} is unknown; give auto, {', '.join(FLOAT_DTYPES)}")
        self.endpoint = endpoint or config.default_endpoint()
        self.timeout = timeout
        self.wire_dtype = wire_dtype
        self.telemetry = Telemetry()
        self.round_trips = 0
        self.stale_replies = 0
        self.errors = 0
        self._busy_ns = 0
        self._protection: Protection = protection or NoProtection()
        self._lock = threading.RLock()
        self._next_id = 1
        self._wire: torch.dtype | None = None if wire_dtype == "auto" else FLOAT_DTYPES[wire_dtype]
        self._info: InitInfo | None = None
        self._table: ModuleTable | None = None
        self._linear_sites: dict[tuple[int | None, tuple[str, ...]], Site] = {}
        self._sites: dict[Any, Site] = {}
        self._site_count = 0
        self._kv_lengths: dict[int, int | None] = {}
        self._closed = False
        self._channel = connect(self.endpoint, timeout=connect_timeout, shm=shm, large=large, wait=wait)

    # --- calls ---------------------------------------------------------------------------------------------

    def init(self) -> InitInfo:
        """What the runner has to know of the served model; asked for once, then remembered.

        Other calls ask by themselves where it is needed.
        """
        with self._lock:
            if self._info is None:
                info = model_info.unpack(self._call(self._site("init", Method.INIT), ()).tensors)
                self._info, self._table = info, info.table()
                if self._wire is None:
                    self._wire = info.torch_dtype
            return self._info

    def embedding(self, ids: Tensor, module: str | None = None) -> Tensor:
        """Rows of an embedding: ``ids`` integers [..] to [.., out] in the served model's dtype.

        ``module`` is a full name, by default the model's input embedding.
        """
        info = self.init()
        name = info.embedding if module is None else module
        out = self._modules().modules[self._modules().embedding(name)].out_features
        meta = {"module": name, "dtype": str(self._wire).rpartition(".")[2]}
        site = self._site(("embedding", name), Method.EMBEDDING, meta)
        reply = self._call(site, (ids.detach().to(device="cpu", dtype=torch.int64),))
        (rows,) = self._checked(reply, ((*ids.shape, out),))
        return rows.to(info.torch_dtype)

    def batch_linear(self, layer_idx: int, names: Sequence[str], h: Tensor) -> list[Tensor]:
        """``h`` [.., in] through several linear modules of a layer in one round trip: one [.., out_i] each.

        ``names`` are relative to the layer (``self_attn.q_proj``), or their last word where the layer has one
        such module (``q_proj``). Raises :class:`ConfigError` for a layer or module that does not exist.
        """
        key = (layer_idx, tuple(names))
        site = self._linear_sites.get(key) or self._linear_site(*key)
        return self._protection.linear(self._linear, site, h)

    def linear(self, name: str, h: Tensor) -> Tensor:
        """``h`` [.., in] through the linear module of this full name: [.., out]."""
        key = (None, (name,))
        site = self._linear_sites.get(key) or self._linear_site(*key)
        return self._protection.linear(self._linear, site, h)[0]

    def lm_head(self, h: Tensor) -> Tensor:
        """``h`` [.., hidden] through the model's output embedding: logits [.., vocab]."""
        site = self._sites.get("lm_head")
        if site is None:
            info = self.init()
            if not info.lm_head:
                raise ConfigError("the served model has no LM head")
            outs = (info.modules[info.lm_head].out_features,)
            site = self._site("lm_head", Method.LM_HEAD, None, outs)
        return self._protection.linear(self._linear, site, h)[0]

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``torch.matmul(a, b)`` on the server, batch dimensions broadcast; both operands travel."""
        shape = matmul_shape(a.shape, b.shape)
        site = self._sites.get("matmul") or self._site("matmul", Method.MATMUL)
        reply = self._call(site, (self._outgoing(a), self._outgoing(b)))
        return self._checked(reply, (shape,))[0].to(a.dtype)

    def attention_scores(
        self,
        layer_idx: int,
        q: Tensor,
        k_new: Tensor,
        v_new: Tensor,
        *,
        keep: int | None = None,
        batch_index: Tensor | None = None,
        drop: int = 0,
    ) -> Tensor:
        """Unscaled attention scores Q·Kᵀ against every K of this layer the server holds: [B, H, Q, S].

        ``q`` is [B, H, Q, D]; ``k_new``, ``v_new`` [B, Hkv, N, D] are added to the server's K and V of the
        layer, which then have S positions. Before that, in this order: rows are gathered by ``batch_index``
        (int64 [B]), the ``drop`` first positions are dropped, all but the ``keep`` first of the rest are
        dropped (``keep=0`` starts afresh, None keeps all).

        After a call of this layer that failed on the way (a timeout), how much the server holds is unknown:
        give ``keep`` in the next one, or :class:`ConfigError` is raised.
        """
        layer, shape = int(layer_idx), q.shape
        expected = self._kv_length_after(layer, k_new.shape[-2] if k_new.dim() > 1 else 0, keep, drop)
        tensors = [self._outgoing(q), self._outgoing(k_new), self._outgoing(v_new)]
        site = self._sites.get(layer) or self._site(layer, Method.ATTENTION_SCORES, {"layer": layer})
        meta = site.meta
        if keep is not None or drop or batch_index is not None:
            fields: dict[str, Any] = {"layer": layer}
            if keep is not None:
                fields["keep"] = int(keep)
            if drop:
                fields["drop"] = int(drop)
            if batch_index is not None:
                fields["reorder"] = True
                tensors.append(batch_index.detach().to(device="cpu", dtype=torch.int64))
            meta = msgpack.packb(fields)
        before = self._kv_lengths.get(layer, 0)
        self._kv_lengths[layer] = None
        try:
            reply = self._call(site, tensors, meta)
        except RemoteError:
            self._kv_lengths[layer] = before  # a refused request changes nothing
            raise
        (scores,) = self._checked(reply, ((*shape[:-1], expected),))
        self._kv_lengths[layer] = expected
        return scores.to(q.dtype)

    def attention_values(self, layer_idx: int, probs: Tensor) -> Tensor:
        """``probs`` [B, H, Q, S] times the V of this layer the server holds: [B, H, Q, D]."""
        key = ("values", layer_idx)
        site = self._sites.get(key) or self._site(key, Method.ATTENTION_VALUES, {"layer": int(layer_idx)})
        reply = self._call(site, (self._outgoing(probs),))
        shape = (*probs.shape[:-1], self.init().geometry.head_dim)
        return self._checked(reply, (shape,))[0].to(probs.dtype)

    def drop_cache(self) -> None:
        """Makes the server forget the K and V of this connection."""
        self._checked(self._call(self._site("drop_cache", Method.DROP_CACHE), ()), ())
        self._kv_lengths.clear()

    def ping(self) -> float:
        """Seconds of a round trip in which the server does a small real computation."""
        begin = time.perf_counter()
        self._checked(self._call(self._site("ping", Method.PING), ()), ())
        return time.perf_counter() - begin

    def server_stats(self) -> dict[str, float]:
        """The server's numbers of this connection: requests, errors, kv_bytes, kv_limit_bytes, uptime_seconds."""
        reply = self._call(self._site("stats", Method.STATS), ())
        self._checked(reply, ())
        numbers = reply_meta(reply)
        if not all(isinstance(key, str) and type(value) in (int, float) for key, value in numbers.items()):
            raise ProtocolError("the server's Stats reply holds something other than numbers")
        return numbers

    # --- statistics and end --------------------------------------------------------------------------------

    @property
    def info(self) -> InitInfo | None:
        """What :meth:`init` returned, None before it was called."""
        return self._info

    @property
    def stats(self) -> dict[str, Any]:
        """Plain numbers: transfers per carrier, calls per method, ``operators`` (see :class:`Telemetry`),
        round trips.

        ``busy_seconds`` is the time spent in calls, ``seconds`` that since the client was made.
        """
        return {
            "side": "runner",
            "endpoint": self.endpoint,
            "protection": self._protection.name,
            "round_trips": self.round_trips,
            "errors": self.errors,
            "stale_replies": self.stale_replies,
            "busy_seconds": self._busy_ns / 1e9,
            **self.telemetry.snapshot(),
            **self._channel.stats,
        }

    def print_stats(self) -> None:
        """Prints :attr:`stats` as tables."""
        print_stats(self.stats, "tsqp runner")

    def close(self) -> None:
        """Closes the connection; the server frees what it kept for it. May be called more than once."""
        if not self._closed:
            self._closed = True
            self._channel.close()

    def __enter__(self) -> GPUClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one round trip ------------------------------------------------------------------------------------

    def _linear(self, site: Site, h: Tensor) -> list[Tensor]:
        """The one place every remote linear module is called from."""
        reply = self._call(site, (self._outgoing(h),))
        lead, dtype = h.shape[:-1], h.dtype
        outs = self._checked(reply, [(*lead, out) for out in site.outs])
        return outs if dtype is self._wire else [out.to(dtype) for out in outs]

    def _call(self, site: Site, tensors: Sequence[Tensor], meta: bytes | None = None) -> Any:
        """Sends one request and returns the message that answers it; raises :class:`RemoteError` if it is refused."""
        method = site.method
        with self._lock:
            if self._closed:
                raise ClosedError("this client is closed; make a new one")
            request_id = self._next_id
            self._next_id += 1
            site.index += 1
            begin = time.perf_counter_ns()
            try:
                self._channel.send(
                    tensors,
                    tag=method,
                    meta=site.meta if meta is None else meta,
                    request_id=request_id,
                    site=site.id,
                    index=site.index,
                    timeout=self.timeout,
                )
                reply = self._receive(method, request_id, begin)
            finally:
                spent = time.perf_counter_ns() - begin
                self._busy_ns += spent
            self.round_trips += 1
            self.telemetry.count(METHOD_NAMES[method])
            operator = METHOD_OPERATORS.get(method)
            if operator is not None:
                self.telemetry.add(operator, spent, min(reply.compute_ns, spent))
            if reply.status:
                self.errors += 1
                raise remote_error(reply)
            return reply

    def _receive(self, method: Method, request_id: int, begin_ns: int) -> Any:
        """The reply to ``request_id``; drops and counts replies to earlier requests that timed out."""
        remaining = self.timeout
        while True:
            reply = self._channel.recv(timeout=remaining)
            if reply.request_id == request_id:
                if reply.tag != method:
                    raise ProtocolError(
                        f"request {request_id} of method {int(method)} was answered as method {reply.tag}"
                    )
                return reply
            if not 0 < reply.request_id < request_id:
                raise ProtocolError(f"the server answered request {reply.request_id}, which was never made")
            self.stale_replies += 1
            if self.timeout is not None:
                remaining = self.timeout - (time.perf_counter_ns() - begin_ns) / 1e9
                if remaining <= 0:
                    raise WaitTimeoutError(f"no reply to request {request_id} in {self.timeout} s")

    def _checked(self, reply: Any, shapes: Sequence[Shape]) -> list[Tensor]:
        return checked_tensors(reply, shapes, self._wire)

    def _outgoing(self, tensor: Tensor) -> Tensor:
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

    # --- sites and bookkeeping -----------------------------------------------------------------------------

    def _modules(self) -> ModuleTable:
        self.init()
        assert self._table is not None
        return self._table

    def _site(self, key: Any, method: Method, meta: dict[str, Any] | None = None, outs: tuple[int, ...] = ()) -> Site:
        with self._lock:
            site = self._sites.get(key)
            if site is None:
                self._site_count += 1
                site = self._sites[key] = Site(self._site_count, method, meta, outs)
            return site

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

    def _kv_length_after(self, layer: int, count: int, keep: int | None, drop: int) -> int:
        """Positions the server holds after a request that appends ``count``."""
        if keep is not None:
            return keep + count
        held = self._kv_lengths.get(layer, 0)
        if held is None:
            raise ConfigError(
                f"an earlier call failed on its way: what the server holds of layer {layer} is unknown; "
                "give keep=, or call drop_cache() and start afresh"
            )
        return held - drop + count
