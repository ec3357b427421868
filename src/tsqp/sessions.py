"""What the server remembers of one client: its channel, what its metas name and K and V of earlier positions.

K and V (see ``layer_cache``) are kept per sequence and layer. Who splits attention itself has one sequence per
connection, :data:`OWN`; the fused operators keep one for each cache of the runner. A change is made in two steps:
a :class:`Growth` plans it, and :meth:`Session.commit` takes it over. A request that fails in between changes
nothing.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from .cuda import PageLock
from .errors import RemoteError
from .layer_cache import EMPTY, LayerCache
from .limits import Limits
from .protocol import AttentionGeometry, Status

#: Distinct metas remembered per client, and the bytes of the longest one remembered: a client can send any
#: number of them.
_REMEMBERED_METAS = 4096
_REMEMBERED_META_BYTES = 1024
#: The sequence of clients that name none; numbers from a client are not negative.
OWN = -1


class Growth:
    """What one request does to a layer's K and V: rows gathered, positions dropped and kept, and then, once the new
    ones are there, :meth:`extended`. Nothing is changed by it; ``length`` are the positions it keeps.
    """

    __slots__ = ("_budget", "_drop", "_held", "_index", "_keep", "length")

    def __init__(self, held: LayerCache, drop: int, keep: int | None, index: torch.Tensor | None, budget: int) -> None:
        self._held, self._drop, self._keep, self._index, self._budget = held, drop, keep, index, budget
        self.length = held.length - drop if keep is None else keep

    def extended(self, k_new: torch.Tensor, v_new: torch.Tensor) -> LayerCache:
        """The layer's cache with ``k_new`` and ``v_new`` [B, Hkv, N, D] behind what is kept."""
        if not self.length:
            return LayerCache.fresh(k_new, v_new, self._budget)
        return self._held.extended(
            k_new, v_new, drop=self._drop, keep=self._keep, budget=self._budget, index=self._index
        )


class Session:
    """One connected client on the server."""

    __slots__ = (
        "__weakref__",
        "_sequences",
        "channel",
        "context_bytes",
        "contexts",
        "errors",
        "geometry",
        "kv_bytes",
        "limits",
        "page_lock",
        "pipelines",
        "refused",
        "requests",
        "room",
        "seen_ns",
        "served_ns",
        "since_ns",
        "targets",
    )

    def __init__(self, channel: Any, geometry: AttentionGeometry, limits: Limits) -> None:
        self.channel = channel
        self.geometry = geometry
        self.limits = limits
        self.kv_bytes = 0
        self.requests = 0
        self.errors = 0
        #: Requests refused since one was not.
        self.refused = 0
        #: When the client was let in, in ns of perf_counter.
        self.since_ns = time.perf_counter_ns()
        #: What (method, meta) of earlier requests named; to be added to by :meth:`remember`.
        self.targets: dict[tuple[int, bytes], Any] = {}
        #: Since when the next request is known to wait, in ns of perf_counter; 0 where none is known of.
        self.seen_ns = 0
        #: When its last reply was sent, in ns of perf_counter.
        self.served_ns = 0
        #: The channel had room for a reply, and none was sent since.
        self.room = False
        #: The client sends requests before it has the replies to earlier ones.
        self.pipelines = False
        #: Keeps the channel's memory page-locked where the device is a GPU.
        self.page_lock: PageLock | None = None
        #: What the fused operators were told of a forward, by slot; see ``server_fused``.
        self.contexts: dict[int, Any] = {}
        self.context_bytes = 0
        self._sequences: dict[int, dict[int, LayerCache]] = {}

    def remember(self, method: int, meta: bytes, target: Any) -> None:
        """Keeps what a meta named, so that it is read and resolved once; forgets everything when there is too much."""
        if len(meta) <= _REMEMBERED_META_BYTES:
            if len(self.targets) >= _REMEMBERED_METAS:
                self.targets.clear()
            self.targets[method, meta] = target

    def layer(self, layer: int, sequence: int = OWN) -> LayerCache | None:
        """The layer's cache, if it has one."""
        layers = self._sequences.get(sequence)
        return None if layers is None else layers.get(layer)

    def growth(
        self,
        layer: int,
        rows: int,
        *,
        keep: int | None = None,
        drop: int = 0,
        batch_index: torch.Tensor | None = None,
        sequence: int = OWN,
        source: LayerCache | None = None,
        reserved_bytes: int = 0,
    ) -> Growth:
        """The plan to re-gather, drop and keep, for ``rows`` rows of new positions.

        ``source`` is what the layer builds upon, by default what it holds itself; ``reserved_bytes`` of the client's
        limit are for something else. Raises :class:`RemoteError` where
        what is asked does not fit that.
        """
        old = self.layer(layer, sequence)
        held = source or old or EMPTY
        _check_history(layer, held.length, keep, drop)
        found = held.batch if batch_index is None else _check_rows(layer, held.batch, batch_index)
        remaining = held.length - drop if keep is None else keep
        if remaining and found != rows:
            raise RemoteError(
                f"layer {layer} holds {found} rows of K and V but the new ones have {rows}; "
                "reorder with batch_index or start afresh with keep=0",
                Status.BAD_SHAPE,
            )
        most = self.limits.sequences
        if sequence not in self._sequences and len(self._sequences) >= most:
            raise RemoteError(f"this client has its limit of {most} sequences; drop some of its caches", Status.LIMIT)
        budget = self.limits.kv_bytes - self.kv_bytes - self.context_bytes - reserved_bytes
        return Growth(held, drop, keep, batch_index, budget + (old.exclusive_bytes if old is not None else 0))

    def planned(
        self,
        layer: int,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        *,
        keep: int | None = None,
        drop: int = 0,
        batch_index: torch.Tensor | None = None,
    ) -> LayerCache:
        """The layer's cache after re-gathering, dropping, keeping and appending, not yet taken over.

        Tensors are on the device in the model's dtype, shapes are checked against the geometry. Raises
        :class:`RemoteError` where what is asked does not fit what is held.
        """
        growth = self.growth(layer, k_new.shape[0], keep=keep, drop=drop, batch_index=batch_index)
        return growth.extended(k_new, v_new)

    def commit(self, layer: int, cache: LayerCache, sequence: int = OWN) -> None:
        """Takes ``cache`` over as the layer's."""
        layers = self._sequences.setdefault(sequence, {})
        held = layers.get(layer)
        layers[layer] = cache
        self.kv_bytes += cache.acquire()
        if held is not None:
            self.kv_bytes -= held.release()

    def drop_sequence(self, sequence: int) -> None:
        """Forgets K and V of one sequence, if there is one of that number."""
        for cache in self._sequences.pop(sequence, {}).values():
            self.kv_bytes -= cache.release()

    def drop_cache(self) -> None:
        """Forgets K and V of every sequence and layer, and the contexts, and frees their memory."""
        self._sequences.clear()
        self.contexts.clear()
        self.kv_bytes = self.context_bytes = 0


def _check_history(layer: int, length: int, keep: int | None, drop: int) -> None:
    if drop > length:
        raise RemoteError(f"drop={drop} but layer {layer} holds {length} positions", Status.BAD_REQUEST)
    if keep is not None and keep > length - drop:
        raise RemoteError(
            f"keep={keep} but layer {layer} holds {length - drop} positions; send the earlier ones again with keep=0",
            Status.BAD_REQUEST,
        )


def _check_rows(layer: int, rows: int, batch_index: torch.Tensor) -> int:
    """Checks that every index names one of ``rows`` rows; returns how many rows come out."""
    if rows == 0:
        raise RemoteError(f"batch_index given but layer {layer} holds no K and V", Status.BAD_REQUEST)
    low, high = batch_index.aminmax()
    if int(low) < 0 or int(high) >= rows:
        raise RemoteError(f"batch_index names a row outside 0..{rows - 1} of layer {layer}", Status.BAD_REQUEST)
    return batch_index.numel()
