"""What the server remembers of one client: its channel, what its metas name and, per layer, K and V of earlier
positions.

K and V never travel twice: a request brings those of its new positions, the earlier ones stay here. A change
is made in two steps. :meth:`LayerCache.extended` returns a new cache and leaves the old one as it was,
sharing its storage where the new positions fit behind the old ones; :meth:`Session.commit` then takes it
over. A request that fails in between changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from .cuda import PageLock
from .errors import RemoteError
from .protocol import AttentionGeometry, Status

#: Distinct metas remembered per client, and the bytes of the longest one remembered: a client can send any
#: number of them.
_REMEMBERED_METAS = 4096
_REMEMBERED_META_BYTES = 1024
#: Positions of room a new or grown cache gets at least.
_SPARE_POSITIONS = 64


class LayerCache:
    """K and V of one layer: positions ``start .. start+length`` of storage [B*Hkv, capacity, D].

    Rows and heads are one dimension because that is what a batched matrix product takes.
    """

    __slots__ = ("_k", "_v", "batch", "length", "start")

    def __init__(self, k: torch.Tensor, v: torch.Tensor, batch: int, start: int, length: int) -> None:
        self._k = k
        self._v = v
        self.batch = batch
        self.start = start
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, spare room included."""
        return self._k.nbytes + self._v.nbytes

    @property
    def k(self) -> torch.Tensor:
        """K [B*Hkv, length, D], a view."""
        return self._k.narrow(1, self.start, self.length)

    @property
    def v(self) -> torch.Tensor:
        """V [B*Hkv, length, D], a view."""
        return self._v.narrow(1, self.start, self.length)

    def gathered(self, index: torch.Tensor, budget: int) -> LayerCache:
        """A cache of the rows ``index`` (int64), of at most ``budget`` bytes."""
        batch = index.numel()
        index = index.to(self._k.device)
        _check_budget(self.nbytes // self.batch * batch, budget)
        k, v = (held.unflatten(0, (self.batch, -1)).index_select(0, index).flatten(0, 1) for held in (self._k, self._v))
        return LayerCache(k, v, batch, self.start, self.length)

    def extended(
        self, k_new: torch.Tensor, v_new: torch.Tensor, *, drop: int, keep: int | None, budget: int
    ) -> LayerCache:
        """A cache without the ``drop`` first positions, cut to ``keep`` positions, with the new ones added.

        ``k_new``, ``v_new`` are [B, Hkv, N, D]; the caller has checked them and that ``drop`` and ``keep``
        fit the length. Raises :class:`RemoteError` (LIMIT) if it would need more than ``budget`` bytes.
        """
        count = k_new.shape[2]
        start, kept = self.start + drop, self.length - drop if keep is None else keep
        truncated = kept < self.length - drop
        # Positions behind a cut still belong to the old cache, so they are written over in a copy only.
        if start + kept + count > self._k.shape[1] or (truncated and count):
            cache = LayerCache._allocate(k_new, kept, budget)
            cache._k.narrow(1, 0, kept).copy_(self._k.narrow(1, start, kept))
            cache._v.narrow(1, 0, kept).copy_(self._v.narrow(1, start, kept))
        else:
            cache = LayerCache(self._k, self._v, self.batch, start, kept)
        cache._append(k_new, v_new)
        return cache

    @classmethod
    def fresh(cls, k_new: torch.Tensor, v_new: torch.Tensor, budget: int) -> LayerCache:
        """A cache of ``k_new`` and ``v_new`` [B, Hkv, N, D] alone; raises as :meth:`extended`."""
        cache = cls._allocate(k_new, 0, budget)
        cache._append(k_new, v_new)
        return cache

    def _append(self, k_new: torch.Tensor, v_new: torch.Tensor) -> None:
        count = k_new.shape[2]
        at = self.start + self.length
        self._k.narrow(1, at, count).copy_(k_new.flatten(0, 1))
        self._v.narrow(1, at, count).copy_(v_new.flatten(0, 1))
        self.length += count

    @classmethod
    def _allocate(cls, k_new: torch.Tensor, kept: int, budget: int) -> LayerCache:
        """Storage for ``kept`` and the new positions and half as many again, as far as ``budget`` allows."""
        batch, heads, count, dim = k_new.shape
        position_bytes = 2 * batch * heads * dim * k_new.element_size()
        need = kept + count
        _check_budget(need * position_bytes, budget)
        capacity = min(need + max(need // 2, _SPARE_POSITIONS), budget // position_bytes)
        k, v = (torch.empty((batch * heads, capacity, dim), dtype=k_new.dtype, device=k_new.device) for _ in range(2))
        return cls(k, v, batch, 0, kept)


def _check_budget(nbytes: int, budget: int) -> None:
    if nbytes > budget:
        raise RemoteError(
            f"K and V of this layer would need {nbytes} bytes and this client has {max(budget, 0)} left; "
            "generate fewer tokens, use a smaller batch or start the server with a higher K/V limit",
            Status.LIMIT,
        )


class Session:
    """One connected client on the server."""

    __slots__ = (
        "_layers",
        "channel",
        "errors",
        "geometry",
        "kv_bytes",
        "kv_limit_bytes",
        "page_lock",
        "pipelines",
        "requests",
        "room",
        "seen_ns",
        "served_ns",
        "targets",
    )

    def __init__(self, channel: Any, geometry: AttentionGeometry, kv_limit_bytes: int) -> None:
        self.channel = channel
        self.geometry = geometry
        self.kv_limit_bytes = kv_limit_bytes
        self.kv_bytes = 0
        self.requests = 0
        self.errors = 0
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
        self._layers: dict[int, LayerCache] = {}

    def remember(self, method: int, meta: bytes, target: Any) -> None:
        """Keeps what a meta named, so that it is read and resolved once; forgets everything when there is too much."""
        if len(meta) <= _REMEMBERED_META_BYTES:
            if len(self.targets) >= _REMEMBERED_METAS:
                self.targets.clear()
            self.targets[method, meta] = target

    def layer(self, layer: int) -> LayerCache | None:
        """The layer's cache, if it has one."""
        return self._layers.get(layer)

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
        held = self._layers.get(layer, _EMPTY)
        rows, length = held.batch, held.length
        _check_history(layer, length, keep, drop)
        if batch_index is not None:
            rows = _check_rows(layer, rows, batch_index)
        budget = self.kv_limit_bytes - self.kv_bytes + held.nbytes
        remaining = length - drop if keep is None else keep
        if remaining == 0:
            return LayerCache.fresh(k_new, v_new, budget)
        if rows != k_new.shape[0]:
            raise RemoteError(
                f"layer {layer} holds {rows} rows of K and V but the new ones have {k_new.shape[0]}; "
                "reorder with batch_index or start afresh with keep=0",
                Status.BAD_SHAPE,
            )
        if batch_index is not None:
            held = held.gathered(batch_index, budget)
        return held.extended(k_new, v_new, drop=drop, keep=keep, budget=budget)

    def commit(self, layer: int, cache: LayerCache) -> None:
        """Takes ``cache`` over as the layer's."""
        held = self._layers.get(layer)
        self.kv_bytes += cache.nbytes - (held.nbytes if held is not None else 0)
        self._layers[layer] = cache

    def drop_cache(self) -> None:
        """Forgets K and V of every layer and frees their memory."""
        self._layers.clear()
        self.kv_bytes = 0


_EMPTY = LayerCache(torch.empty(0, 0, 0), torch.empty(0, 0, 0), 0, 0, 0)


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
