"""Work cut into row tiles, so that the server computes one tile while the runner works on the one before.

A tile is sized in bytes of its largest message. How many bytes are best depends on caches, cores and what a message
costs, so it is learnt from the time work took in tiles of each size (:class:`TileSize`), within what fits a slot.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from .errors import ConfigError

#: Less than this is never cut: the messages would cost more than the overlap saves.
SMALLEST_BYTES = 1 << 20
#: Where a slot is larger, or there is none.
LARGEST_BYTES = 8 << 20
#: What a slot holds beside the tensors: header, descriptors, meta, alignment.
_HEAD_BYTES = 8192
#: How much of a new observation enters an estimate, where it is faster, and where it is slower: a busy machine
#: makes things slower, nothing makes them faster than they are.
_FASTER, _SLOWER = 0.5, 0.1
#: Observations of each size before the best one is used; the first, which warms up, does not count.
_TRIALS = 2
#: Of so many pieces of work one is done in tiles of another size; a size that was this many times slower is only tried
#: every so many such times.
_EXPLORE_EVERY, _HOPELESS, _HOPELESS_EVERY = 32, 1.2, 8
#: By so much tiles have to beat work that is whole: they keep more threads busy for the same result.
_MARGIN = 1.1


class Tile(NamedTuple):
    """Rows ``first .. stop`` and how many first keys they look at."""

    first: int
    stop: int
    keys: int


@functools.lru_cache(maxsize=256)
def row_tiles(limits: Sequence[int], element_bytes: int, tile_bytes: int, row_bytes: int = 0) -> tuple[Tile, ...]:
    """Cuts rows into tiles of at most ``tile_bytes``, but at least one row.

    ``limits[i]`` is how many first keys row ``i`` sees, at least 1; it is hashable. A row times a key is
    ``element_bytes`` (of all heads and batch rows together); a row's own operands are ``row_bytes``, which tiles
    don't exceed either.
    """
    tiles = []
    first = keys = 0
    for row, limit in enumerate(limits):
        wider = max(keys, limit)
        rows = row + 1 - first
        if row > first and (rows * wider * element_bytes > tile_bytes or rows * row_bytes > tile_bytes):
            tiles.append(Tile(first, row, keys))
            first, wider = row, limit
        keys = wider
    tiles.append(Tile(first, len(limits), keys))
    return tuple(tiles)


class TileSize:
    """How large the tiles of one kind of work are: a given number of bytes, or learnt from what each size costs.

    ``fixed``: bytes, 0 for no tiles at all, None to learn. ``slot_bytes``: the size of a slot, 0 where there is none.
    ``whole``: work that need not be cut is also tried uncut, and in tiles larger than a slot: a matrix product of few
    rows costs more per row on a CPU.
    """

    def __init__(self, fixed: int | None = None, slot_bytes: int = 0, *, whole: bool = False) -> None:
        largest = min(LARGEST_BYTES, slot_bytes - _HEAD_BYTES if slot_bytes else LARGEST_BYTES)
        self.fixed = fixed
        sizes = [size for size in (1 << 20, 2 << 20, 4 << 20) if size < largest] + [max(largest, _HEAD_BYTES)]
        self._sizes = [0, 2 * sizes[-1], sizes[-1]] if whole else sizes
        self._whole = whole
        self._cost: dict[int, float] = {}
        self._seen = dict.fromkeys(self._sizes, 0)
        self._turn = 0

    def smallest(self) -> int:
        """Work of at most so many bytes stays whole, whatever is learnt."""
        return SMALLEST_BYTES if self.fixed is None else self.fixed

    def choose(self) -> int:
        """Bytes of a tile for the next piece of work; 0 leaves it whole."""
        if self.fixed is not None:
            return self.fixed
        best = self.best()
        for before, size in zip([best, *self._sizes], self._sizes):  # noqa: B905 - the last has no successor
            # Where larger tiles lose to none at all, smaller ones lose more: they need not be tried.
            if self._whole and self._cost.get(before, 0) > _HOPELESS * self._cost.get(best, math.inf):
                self._cost.setdefault(size, math.inf)
            elif self._seen[size] < _TRIALS:
                return size
        self._turn += 1
        if self._turn % _EXPLORE_EVERY == 0:
            times = self._turn // _EXPLORE_EVERY
            other = self._sizes[times % len(self._sizes)]
            again = times // len(self._sizes) % _HOPELESS_EVERY == _HOPELESS_EVERY - 1
            if again or self._cost[other] <= _HOPELESS * self._cost[best]:
                return other
        return best

    def best(self) -> int:
        """The size that cost least so far; what need not be cut stays whole unless tiles are clearly faster."""
        if not self._cost:
            return self._sizes[0]
        return min(self._cost, key=lambda size: self._cost[size] * (_MARGIN if self._whole and size else 1.0))

    def note(self, tile_bytes: int, elements: int, spent_ns: int) -> None:
        """Work on so many elements took ``spent_ns`` in tiles of ``tile_bytes``."""
        if tile_bytes not in self._seen or elements <= 0:
            return
        self._seen[tile_bytes] += 1
        seen = spent_ns / elements
        before = self._cost.get(tile_bytes)
        if before is None or self._seen[tile_bytes] <= 2 or math.isinf(before):
            self._cost[tile_bytes] = seen  # the first observation warms up and is forgotten
        else:
            self._cost[tile_bytes] = before + (_FASTER if seen < before else _SLOWER) * (seen - before)


class Tiling:
    """The tile sizes of one split model: of its attention and of its gated MLPs.

    Each is ``auto`` or a number of bytes, 0 for no tiles. Raises :class:`ConfigError` for anything else.
    """

    def __init__(self, tile_bytes: object = "auto", mlp_tile_bytes: object = "auto", slot_bytes: int = 0) -> None:
        self.attention = TileSize(_fixed("tile_bytes", tile_bytes), slot_bytes)
        self.mlp = TileSize(_fixed("mlp_tile_bytes", mlp_tile_bytes), slot_bytes, whole=True)


def _fixed(name: str, value: object) -> int | None:
    if value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{name}={value!r} is neither 'auto' nor a number of bytes; give one of them")
    return value
