"""The operators of the server: each checks one request completely, then computes its reply.

A request comes from an untrusted client. Its tensors are views into memory that client can write, so what is
used to index (token ids, batch rows) is copied before it is checked; the values of activations decide
nothing. A fault is a :class:`RemoteError` with its status and one sentence that holds no tensor values.
Nothing changes before every check and the computation have passed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import model_info
from .batching import Request
from .cuda import Graphs
from .errors import ConfigError, MetaError, RemoteError
from .in_slot import InSlot
from .limits import Limits
from .loading import ServedModel, ServedModule
from .protocol import (
    FLOAT_DTYPES,
    FLOAT_NAMES,
    MAX_MODULES_PER_CALL,
    MAX_RANK,
    Method,
    Status,
    matmul_elements,
    matmul_shape,
    shown,
)
from .sessions import Session

Reply = tuple[list[torch.Tensor], dict[str, Any] | None] | InSlot
_FLOATS = frozenset(FLOAT_NAMES)
#: A smaller result is copied into its slot in less time than it takes to reserve one.
_IN_SLOT_FROM_BYTES = 1 << 16


class LinearTarget:
    """Linear modules of one input width that are called together."""

    __slots__ = ("key", "modules", "outs", "passed", "width")

    def __init__(self, modules: tuple[ServedModule, ...], width: int) -> None:
        self.modules = modules
        #: Equal for targets of different clients that name the same modules.
        self.key = tuple(module.name for module in modules)
        self.width = width
        self.outs = sum(module.info.out_features for module in modules)
        #: The dtype and shape that passed the checks last; they depend on nothing else.
        self.passed: tuple[torch.dtype | None, torch.Size | None] = (None, None)

    def rows(self, h: torch.Tensor) -> int:
        """Rows of a checked input."""
        return h.numel() // self.width


class Operators:
    """The method whitelist of a server: ``handlers`` maps a message's tag to what answers it.

    A handler takes the client's session and the request message and returns the reply's tensors (on the device,
    in the request's wire dtype) and meta, or an :class:`InSlot` that computes them where they are sent from.
    Computation is in the model's dtype.
    """

    def __init__(self, served: ServedModel, limits: Limits) -> None:
        self._served = served
        self._device = served.device
        self._on_cpu = served.device.type == "cpu"
        self._graphs = Graphs(share=limits.graphs) if served.device.type == "cuda" else None
        self._dtype = served.dtype
        self._reply_limit_bytes = limits.reply_bytes
        self._init_reply = model_info.pack(served.info)
        head = served.modules.get(served.info.lm_head)
        self._head = None if head is None else LinearTarget((head,), head.info.in_features)
        self._probe = _probe(served)
        self._started = time.monotonic()
        self.handlers: dict[int, Callable[[Session, Any], Reply]] = {
            int(Method.INIT): self.init,
            int(Method.EMBEDDING): self.embedding,
            int(Method.BATCH_LINEAR): self.batch_linear,
            int(Method.MATMUL): self.matmul,
            int(Method.LM_HEAD): self.lm_head,
            int(Method.PING): self.ping,
            int(Method.STATS): self.stats,
            int(Method.DROP_CACHE): self.drop_cache,
        }

    def warm_up(self) -> None:
        """Computes with one module of every shape, so that no client waits for what a device prepares at first use."""
        seen = set()
        for module in self._served.modules.values():
            info = module.info
            shape = (info.kind, info.in_features, info.out_features)
            if shape not in seen:
                seen.add(shape)
                module.call(_example(module, self._device)).cpu()

    # --- handlers ------------------------------------------------------------------------------------------

    def init(self, session: Session, msg: Any) -> Reply:
        """The description of the model and its trusted parameters (see ``model_info``)."""
        _tensors(msg, 0)
        return self._init_reply, None

    def embedding(self, session: Session, msg: Any) -> Reply:
        """ids int64 [..] to rows of the embedding [.., out], in the dtype the meta names."""
        module, wire = self._target(session, msg, self._embedding_target)
        (ids,) = _tensors(msg, 1)
        if ids.dtype is not torch.int64:
            raise RemoteError(f"token ids are {ids.dtype}; send torch.int64", Status.BAD_DTYPE)
        info = module.info
        self._check_reply(ids.numel() * info.out_features, wire, ids.dim() + 1)
        ids = ids.clone()
        if ids.numel():
            low, high = ids.aminmax()
            if int(low) < 0 or int(high) >= info.in_features:
                raise RemoteError(
                    f"a token id is outside 0..{info.in_features - 1}; is the tokenizer the model's?",
                    Status.BAD_REQUEST,
                )
        return [self._out(module.call(ids if self._on_cpu else ids.to(self._device)), wire)], None

    def batch_linear(self, session: Session, msg: Any) -> Reply:
        """h [.., in] through one or several linear modules, each to [.., out_i]."""
        target = self._target(session, msg, self._linear_target)
        (h,) = _tensors(msg, 1)
        return self.linear(target, h, session), None

    def lm_head(self, session: Session, msg: Any) -> Reply:
        """h [.., in] through the model's output embedding to [.., vocab]."""
        head = self._head
        if head is None:
            raise RemoteError("the model has no LM head", Status.UNKNOWN_MODULE)
        (h,) = _tensors(msg, 1)
        return self.linear(head, h, session), None

    def matmul(self, session: Session, msg: Any) -> Reply:
        """a, b to ``torch.matmul(a, b)``, batch dimensions broadcast."""
        a, b = _tensors(msg, 2)
        wire = _wire_dtype(a, b)
        try:
            shape = matmul_shape(a.shape, b.shape)
        except ConfigError as error:
            raise RemoteError(str(error), Status.BAD_SHAPE) from None
        self._check_reply(matmul_elements(a.shape, b.shape, shape), wire, len(shape))
        return self._computed(shape, wire, partial(torch.matmul, self._in(a), self._in(b)))

    def drop_cache(self, session: Session, msg: Any) -> Reply:
        """Forgets this client's K and V."""
        _tensors(msg, 0)
        session.drop_cache()
        return [], None

    def ping(self, session: Session, msg: Any) -> Reply:
        """A real operation, so that an answer says that the device works: one vector through the smallest module."""
        _tensors(msg, 0)
        module, probe = self._probe
        module.call(probe).cpu()
        return [], None

    def stats(self, session: Session, msg: Any) -> Reply:
        """Numbers of this client's own connection only: other clients' are none of its business."""
        _tensors(msg, 0)
        return [], {
            "requests": session.requests,
            "errors": session.errors,
            "kv_bytes": session.kv_bytes,
            "kv_limit_bytes": session.limits.kv_bytes,
            "uptime_seconds": time.monotonic() - self._started,
        }

    # --- targets named by a meta ---------------------------------------------------------------------------

    def _target(self, session: Session, msg: Any, resolve: Callable[[dict[str, Any]], Any]) -> Any:
        """What the request's meta names, read and resolved once per distinct meta of a client."""
        tag, meta = msg.tag, msg.meta_bytes
        found = session.targets.get((tag, meta))
        if found is None:
            found = resolve(_meta(msg))
            session.remember(tag, meta, found)
        return found

    def _linear_target(self, meta: dict[str, Any]) -> LinearTarget:
        names = meta.get("modules")
        if not isinstance(names, list) or not 1 <= len(names) <= MAX_MODULES_PER_CALL:
            raise RemoteError(f"meta 'modules' is no list of 1 to {MAX_MODULES_PER_CALL} names", Status.BAD_REQUEST)
        try:
            full = self._served.table.resolve(names, meta.get("layer"))
        except ConfigError as error:
            raise RemoteError(str(error), Status.UNKNOWN_MODULE) from None
        modules = tuple(self._served.modules[name] for name in full)
        widths = {module.info.in_features for module in modules}
        if len(widths) > 1:
            raise RemoteError(f"the modules take different inputs: {sorted(widths)} features", Status.BAD_SHAPE)
        return LinearTarget(modules, widths.pop())

    def _embedding_target(self, meta: dict[str, Any]) -> Any:
        wire = meta.get("dtype")
        if not isinstance(wire, str) or wire not in FLOAT_DTYPES:
            raise RemoteError(f"dtype {shown(wire)} is none of {', '.join(FLOAT_DTYPES)}", Status.BAD_DTYPE)
        try:
            name = self._served.table.embedding(meta.get("module"))
        except ConfigError as error:
            raise RemoteError(str(error), Status.UNKNOWN_MODULE) from None
        return self._served.modules[name], FLOAT_DTYPES[wire]

    def _layer_target(self, meta: dict[str, Any]) -> int:
        layer = meta.get("layer")
        try:
            self._served.table.check_layer(layer)
        except ConfigError as error:
            raise RemoteError(str(error), Status.UNKNOWN_MODULE) from None
        return layer  # type: ignore[return-value]

    # --- checks and conversions ----------------------------------------------------------------------------

    def target_of(self, request: Request) -> LinearTarget | None:
        """The modules a request's one tensor goes through; None for other methods, and for a request with a fault."""
        session, msg = request.session, request.message
        try:
            if msg.tag == Method.LM_HEAD:
                target = self._head
            elif msg.tag == Method.BATCH_LINEAR:
                target = self._target(session, msg, self._linear_target)
            else:
                return None
            (h,) = _tensors(msg, 1)
            if target is not None:
                self._check_linear(h, target)
            return target if h.numel() else None
        except RemoteError:
            return None  # its answer will say what is wrong

    def linear(self, target: LinearTarget, h: torch.Tensor, session: Session | None = None) -> list[torch.Tensor]:
        """``h`` [.., in], checked here, through the target's modules: one [.., out_i] each, on the device.

        ``session`` is whose request it is, None where it is several clients'.
        """
        self._check_linear(h, target)
        wire = h.dtype
        if self._graphs is not None:
            on_device = h.to(self._device, non_blocking=True)
            key = (target.key, wire, h.shape)
            replies: list[torch.Tensor] = self._graphs.run(
                key, partial(_through, target.modules, wire), on_device, target.rows(h), session
            )
            return replies
        return _through(target.modules, wire, h)

    def _check_linear(self, h: torch.Tensor, target: LinearTarget) -> None:
        passed = target.passed
        if h.dtype is passed[0] and h.shape == passed[1]:
            return
        wire, shape, width = _wire_dtype(h), h.shape, target.width
        if not shape or shape[-1] != width:
            raise RemoteError(
                f"input of {target.modules[0].name} has shape {list(shape)}, expected [.., {width}]",
                Status.BAD_SHAPE,
            )
        self._check_reply(h.numel() // width * target.outs, wire, len(shape))
        target.passed = (wire, shape)

    def _row_index(self, index: torch.Tensor, batch: int) -> torch.Tensor:
        if index.dtype is not torch.int64:
            raise RemoteError(f"batch_index is {index.dtype}; send torch.int64", Status.BAD_DTYPE)
        if tuple(index.shape) != (batch,):
            raise RemoteError(f"batch_index has shape {list(index.shape)}, expected [{batch}]", Status.BAD_SHAPE)
        return index.clone()

    def _check_reply(self, elements: int, wire: torch.dtype, rank: int) -> None:
        """Refuses what would be larger than the limit, in the wire's or the model's dtype, before computing it."""
        if rank > MAX_RANK:
            raise RemoteError(f"the result would have {rank} dimensions; a message holds {MAX_RANK}", Status.BAD_SHAPE)
        nbytes = elements * max(wire.itemsize, self._dtype.itemsize)
        if nbytes > self._reply_limit_bytes:
            raise RemoteError(
                f"the computation needs {nbytes} bytes for a result, the limit is {self._reply_limit_bytes}; "
                "send fewer rows per request",
                Status.LIMIT,
            )

    def _computed(
        self,
        shape: tuple[int, ...],
        wire: torch.dtype,
        product: Callable[..., torch.Tensor],
        rows: tuple[int, ...] | None = None,
        commit: Callable[[], None] | None = None,
    ) -> Reply:
        """The reply ``product()``, which takes ``out=``, as ``shape``; its own shape is ``rows``, where that is another
        one. ``commit()`` takes over what it was computed from."""

        def compute_into(outs: list[torch.Tensor]) -> None:
            (out,) = outs
            if wire is self._dtype:
                product(out=out if rows is None else out.view(rows))
            else:
                out.copy_(product().view(shape))
            if commit is not None:
                commit()

        if self._on_cpu and math.prod(shape) * wire.itemsize >= _IN_SLOT_FROM_BYTES:
            return InSlot(((shape, wire),), compute_into)
        reply = [self._out(product().view(shape), wire)]
        if commit is not None:
            commit()
        return reply, None

    def _in(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._on_cpu:
            return tensor if tensor.dtype is self._dtype else tensor.to(self._dtype)
        # As it is, straight from its slot: the device converts faster.
        return tensor.to(self._device, non_blocking=True).to(self._dtype)

    def _out(self, tensor: torch.Tensor, wire: torch.dtype) -> torch.Tensor:
        """Still on the device: who sends it copies it into its slot."""
        return tensor if tensor.dtype is wire else tensor.to(wire)


def _through(modules: tuple[ServedModule, ...], wire: torch.dtype, x: torch.Tensor) -> list[torch.Tensor]:
    replies = []
    for module in modules:
        # A test for the dtype costs less than torch's conversion that turns out to be none.
        out = module.call(x if wire is module.dtype else x.to(module.dtype))
        replies.append(out if out.dtype is wire else out.to(wire))
    return replies


def _probe(served: ServedModel) -> tuple[ServedModule, torch.Tensor]:
    """The smallest linear module (or else embedding) and one zero input for it."""
    linear = [module for module in served.modules.values() if module.info.kind == "linear"]
    candidates = linear or list(served.modules.values())
    module = min(candidates, key=lambda candidate: candidate.info.in_features * candidate.info.out_features)
    return module, _example(module, served.device)


def _example(module: ServedModule, device: torch.device) -> torch.Tensor:
    if module.info.kind == "embedding":
        return torch.zeros(1, dtype=torch.int64, device=device)
    return torch.zeros(1, module.info.in_features, dtype=module.dtype, device=device)


def _tensors(msg: Any, count: int) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = msg.tensors
    if len(tensors) != count:
        raise RemoteError(f"the request holds {len(tensors)} tensors, expected {count}", Status.BAD_REQUEST)
    return tensors


def _wire_dtype(first: torch.Tensor, *others: torch.Tensor) -> torch.dtype:
    wire = first.dtype
    if wire not in _FLOATS:
        raise RemoteError(f"activations are {wire}; send {', '.join(FLOAT_DTYPES)}", Status.BAD_DTYPE)
    for other in others:
        if other.dtype is not wire:
            raise RemoteError(f"tensors of one request are {wire} and {other.dtype}; send one dtype", Status.BAD_DTYPE)
    return wire


def _meta(msg: Any) -> dict[str, Any]:
    try:
        meta = msg.meta
    except MetaError as error:
        raise RemoteError(f"the request's meta is unreadable: {error}", Status.BAD_REQUEST) from None
    if not isinstance(meta, dict):
        raise RemoteError("the request's meta is no mapping", Status.BAD_REQUEST)
    return meta
