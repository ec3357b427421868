"""K and V of one layer and one sequence on the server: storage that grows, is cut, gathered and shared.

K and V never travel twice: a request brings, or computes, those of its new positions, the earlier ones stay
here. :meth:`LayerCache.extended` returns a new cache and leaves the old one as it was, sharing its storage where
the new positions fit behind the old ones: a change is complete before anybody takes it over.
"""

from __future__ import annotations

import torch

from .errors import RemoteError
from .protocol import Status

#: Positions of room a new or grown cache gets at least.
_SPARE_POSITIONS = 64


class _Storage:
    """Memory of K and V, ``[B*Hkv, capacity, D]`` each: rows and heads are one dimension because that is what a
    batched matrix product takes.

    ``end`` is behind the last position ever written, ``owners`` counts the caches in force that use it.
    """

    __slots__ = ("end", "k", "owners", "v")

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v
        self.end = self.owners = 0

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class LayerCache:
    """K and V of one layer: positions ``start .. start+length`` of a storage that other caches may share."""

    __slots__ = ("_storage", "batch", "length", "start")

    def __init__(self, storage: _Storage, batch: int, start: int, length: int) -> None:
        self._storage = storage
        self.batch = batch
        self.start = start
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, spare room included."""
        return self._storage.nbytes

    @property
    def k(self) -> torch.Tensor:
        """K [B*Hkv, length, D], a view."""
        return self._storage.k.narrow(1, self.start, self.length)

    @property
    def v(self) -> torch.Tensor:
        """V [B*Hkv, length, D], a view."""
        return self._storage.v.narrow(1, self.start, self.length)

    @property
    def heads(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as attention takes them, [B, Hkv, length, D], views."""
        return self.k.unflatten(0, (self.batch, -1)), self.v.unflatten(0, (self.batch, -1))

    # --- who uses the storage ------------------------------------------------------------------------------

    @property
    def exclusive_bytes(self) -> int:
        """What would be freed if this cache in force were given up."""
        return self.nbytes if self._storage.owners == 1 else 0

    def acquire(self) -> int:
        """Takes the cache into force; returns by how many bytes that raises what is held."""
        self._storage.owners += 1
        return self.nbytes if self._storage.owners == 1 else 0

    def release(self) -> int:
        """Takes the cache out of force; returns how many bytes that frees."""
        self._storage.owners -= 1
        return self.nbytes if self._storage.owners == 0 else 0

    # --- changes -------------------------------------------------------------------------------------------

    def extended(
        self,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        *,
        drop: int,
        keep: int | None,
        budget: int,
        index: torch.Tensor | None = None,
    ) -> LayerCache:
        """A cache of the rows ``index`` (int64; None: as they are) without the ``drop`` first positions, cut to
        ``keep`` positions, with the new ones added.

        ``k_new``, ``v_new`` are [B, Hkv, N, D]; the caller has checked them, that the rows agree and that ``drop``
        and ``keep`` fit the length. Raises :class:`RemoteError` (LIMIT) if it would need more than ``budget``
        bytes.
        """
        count, storage = k_new.shape[2], self._storage
        start, kept = self.start + drop, self.length - drop if keep is None else keep
        end = start + kept
        # Behind the end lies nothing that is anybody's: no cut-off positions (a failure would need them back) and
        # no positions of another cache on the same storage.
        free = end == storage.end or (storage.owners <= 1 and end == self.start + self.length)
        if index is None and (not count or (free and end + count <= storage.k.shape[1])):
            cache = LayerCache(storage, self.batch, start, kept)
        else:
            cache = LayerCache._allocate(k_new, v_new, kept, budget)
            cache._copy(self, start, index)
        cache._append(k_new, v_new)
        return cache

    @classmethod
    def fresh(cls, k_new: torch.Tensor, v_new: torch.Tensor, budget: int) -> LayerCache:
        """A cache of ``k_new`` and ``v_new`` [B, Hkv, N, D] alone; raises as :meth:`extended`."""
        cache = cls._allocate(k_new, v_new, 0, budget)
        cache._append(k_new, v_new)
        return cache

    def _copy(self, source: LayerCache, start: int, index: torch.Tensor | None) -> None:
        """Fills the positions this cache has from those of ``source`` from ``start`` on, row by row of ``index``."""
        for to, held in ((self._storage.k, source._storage.k), (self._storage.v, source._storage.v)):
            into, old = to.narrow(1, 0, self.length), held.narrow(1, start, self.length)
            if index is None:
                into.copy_(old)
            else:
                into = into.unflatten(0, (self.batch, -1))
                into.copy_(old.unflatten(0, (source.batch, -1)).index_select(0, index.to(held.device)))

    def _append(self, k_new: torch.Tensor, v_new: torch.Tensor) -> None:
        count, at = k_new.shape[2], self.start + self.length
        if not count:
            return
        storage = self._storage
        storage.k.narrow(1, at, count).unflatten(0, (self.batch, -1)).copy_(k_new)
        storage.v.narrow(1, at, count).unflatten(0, (self.batch, -1)).copy_(v_new)
        self.length += count
        storage.end = at + count

    @classmethod
    def _allocate(cls, k_new: torch.Tensor, v_new: torch.Tensor, kept: int, budget: int) -> LayerCache:
        """Storage for ``kept`` and the new positions and half as many again, as far as ``budget`` allows."""
        batch, _, count, _ = k_new.shape
        rows = [batch * new.shape[1] for new in (k_new, v_new)]
        position_bytes = sum(
            row * new.shape[3] * new.element_size() for row, new in zip(rows, (k_new, v_new), strict=True)
        )
        need = kept + count
        _check_budget(need * position_bytes, budget)
        capacity = min(need + max(need // 2, _SPARE_POSITIONS), budget // max(position_bytes, 1))
        k, v = (
            torch.empty((row, capacity, new.shape[3]), dtype=new.dtype, device=new.device)
            for row, new in zip(rows, (k_new, v_new), strict=True)
        )
        storage = _Storage(k, v)
        storage.end = kept
        return cls(storage, batch, 0, kept)


def _check_budget(nbytes: int, budget: int) -> None:
    if nbytes > budget:
        raise RemoteError(
            f"K and V of this layer would need {nbytes} bytes and this client has {max(budget, 0)} left; "
            "generate fewer tokens, use a smaller batch or start the server with a higher K/V limit",
            Status.LIMIT,
        )


#: What a layer holds before its first positions came.
EMPTY = LayerCache(_Storage(torch.empty(0, 0, 0), torch.empty(0, 0, 0)), 0, 0, 0)
