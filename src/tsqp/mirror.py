"""What changed in K and V since the last call, so that only that is sent.

The runner's cache (any transformers ``Cache``) owns K and V; the server holds a mirror per layer. A
:class:`Mirror` remembers the tensors the server has and, given those of the next call, finds the cheapest way
from the one to the other: positions dropped in front (sliding window), a kept prefix (decode; rollback), rows
gathered anew (beam search), new positions appended. What it can't explain is sent whole: it never guesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True)
class Change:
    """From what the server holds to what it needs, in the order the server applies it.

    Rows are gathered by ``batch_index`` (int64 ``[B]``, None = as they are), the first ``drop`` positions are
    dropped, the first ``keep`` of the rest are kept, and the positions of the new tensors from ``keep`` on
    are appended, at least one. ``only_appends``: everything held is kept as it is.
    """

    keep: int
    drop: int = 0
    batch_index: Tensor | None = None
    only_appends: bool = False


class _Held:
    """A K or V tensor ``[B, Hkv, S, D]`` as it was when the server got it.

    A reference is enough while nobody writes to the tensor, which torch's version counter tells; caches that
    update in place (static ones) and tensors without a counter (inference mode) need a copy.
    """

    __slots__ = ("_version", "tensor")

    def __init__(self, tensor: Tensor, copy: bool) -> None:
        copy = copy or tensor.is_inference()
        self.tensor = tensor.clone() if copy else tensor
        self._version = None if copy else tensor._version

    def intact(self) -> bool:
        """False where the values were overwritten since."""
        return self._version is None or self._version == self.tensor._version


class Mirror:
    """The runner's knowledge of one layer's K and V on the server."""

    def __init__(self) -> None:
        self._key: _Held | None = None
        self._value: _Held | None = None
        self._copy = False
        self._tail: tuple[_Held, _Held] | None = None
        self._vouched = False

    def forget(self) -> None:
        """The server's state is unknown: the next change starts afresh."""
        self._key = self._value = self._tail = None
        self._vouched = False

    def before_update(self, cache_layer: Any) -> None:
        """Told of the cache layer about to be extended.

        Where it is transformers' own growing layer and still holds the very tensors it had after the last
        call, what it will return is those with the new positions behind, and comparing values is not needed.
        """
        self._vouched = (
            self._tail is not None
            and type(cache_layer) in (DynamicLayer, DynamicSlidingWindowLayer)
            and cache_layer.keys is self._tail[0].tensor
            and cache_layer.values is self._tail[1].tensor
            and self._tail[0].intact()
            and self._tail[1].intact()
        )

    def change_to(self, key: Tensor, value: Tensor, new_positions: int) -> Change:
        """The change to ``key`` and ``value`` (``[B, Hkv, S, D]``), of which ``new_positions`` are expected
        to be new.
        """
        vouched, self._vouched = self._vouched, False
        old = self._held_tensors(key, value)
        if old is None:
            return Change(keep=0)
        keep = key.shape[2] - new_positions
        drop = old[0].shape[2] - keep
        if vouched and self._tail is not None and self._tail[0].tensor.shape[2] == keep:
            return Change(keep, drop, only_appends=drop == 0)
        if keep > 0 and drop >= 0:
            rows = _matching_rows(old, (key, value), keep, drop)
            if rows is not None:
                if rows == list(range(old[0].shape[0])):
                    return Change(keep, drop, only_appends=drop == 0)
                return Change(keep, drop, torch.tensor(rows, dtype=torch.int64))
        # A rollback (assisted decoding, a cropped or reused cache) shares a prefix of another length.
        return Change(keep=min(_common_prefix(old, (key, value)), key.shape[2] - 1))

    def remember(self, key: Tensor, value: Tensor, cache_layer: Any = None) -> None:
        """The server now holds ``key`` and ``value``; ``cache_layer`` is the runner's cache layer they came
        from.
        """
        self._key, self._value = _Held(key, self._copy), _Held(value, self._copy)
        self._tail = None
        keys: Any = getattr(cache_layer, "keys", None)
        values: Any = getattr(cache_layer, "values", None)
        if _is_suffix(keys, key) and _is_suffix(values, value):
            self._tail = (_Held(keys, False), _Held(values, False))

    def _held_tensors(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """The tensors the server has, where they are known and of the same kind as the new ones."""
        if self._key is None or self._value is None:
            return None
        if not (self._key.intact() and self._value.intact()):
            self._copy = True  # this cache works in place: from now on keep copies
            return None
        old = self._key.tensor, self._value.tensor
        for before, now in zip(old, (key, value), strict=True):
            if before.dtype != now.dtype or (before.shape[1], before.shape[3]) != (
                now.shape[1],
                now.shape[3],
            ):
                return None
        return old


def _is_suffix(part: Any, whole: Tensor) -> bool:
    """True where ``part`` is ``whole`` itself or a view of its last positions, seen by its memory."""
    if part is whole:
        return not part.is_inference()
    if not isinstance(part, Tensor) or part.is_inference() or part.ndim != whole.ndim:
        return False
    first = whole.shape[2] - part.shape[2]
    return (
        first >= 0
        and part.numel() > 0
        and part.dtype == whole.dtype
        and part.stride() == whole.stride()
        and (part.shape[0], part.shape[1], part.shape[3]) == (whole.shape[0], whole.shape[1], whole.shape[3])
        and part.data_ptr() == whole[:, :, first:].data_ptr()
    )


def _matching_rows(old: tuple[Tensor, ...], new: tuple[Tensor, ...], keep: int, drop: int) -> list[int] | None:
    """For each row of ``new`` the row of ``old`` with the same first ``keep`` positions (from ``drop`` on in
    ``old``).
    """
    before = [tensor[:, :, drop : drop + keep] for tensor in old]
    now = [tensor[:, :, :keep] for tensor in new]
    old_rows, new_rows = before[0].shape[0], now[0].shape[0]
    if old_rows == new_rows and all(torch.equal(a, b) for a, b in zip(before, now, strict=True)):
        return list(range(old_rows))
    found = []
    for row in range(new_rows):
        order = sorted(range(old_rows), key=lambda candidate: candidate != row)
        match = next((candidate for candidate in order if _same_row(before, candidate, now, row)), None)
        if match is None:
            return None
        found.append(match)
    return found


def _same_row(before: list[Tensor], old_row: int, now: list[Tensor], new_row: int) -> bool:
    # The last position differs in nearly every row that differs at all, and is cheap to look at.
    last = zip(before, now, strict=True)
    if not all(torch.equal(a[old_row, :, -1], b[new_row, :, -1]) for a, b in last):
        return False
    return all(torch.equal(a[old_row], b[new_row]) for a, b in zip(before, now, strict=True))


def _common_prefix(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> int:
    """Number of first positions that are equal in all rows of all tensors; 0 where the row counts differ."""
    if old[0].shape[0] != new[0].shape[0]:
        return 0
    length = min(old[0].shape[2], new[0].shape[2])
    same = torch.ones(length, dtype=torch.bool)
    for before, now in zip(old, new, strict=True):
        same &= (before[:, :, :length] == now[:, :, :length]).all(dim=3).all(dim=1).all(dim=0)
    differing = (~same).nonzero()
    return int(differing[0]) if len(differing) else length
