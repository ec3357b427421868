"""A transformers ``Cache`` whose K and V are on the server.

The runner's cache objects stay what users know: made by ``generate()`` or by hand, dynamic, sliding or static,
reordered by beams, cropped, repeated, copied. Their layers hold, in the place of K and V, one int64 number per row
and position (``[B, 1, S, 1]``), never used twice. transformers' own code moves these numbers as it would move K
and V, so what they say is what the server has to hold: a :class:`RemoteCache` compares them with those of the
last call and finds which rows to gather, which positions to drop and to keep. In a plain decode step it only sees
that the layer still has the very tensor it was left with.

A copy of a cache shares the server's sequence until one of the two goes on; that one then gets a sequence of its
own that builds upon the shared one, which stays as it is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from .client import GPUClient
from .errors import ModelError
from .fused_requests import KvSequence

_ATTRIBUTE = "tsqp_kv"
_KINDS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Change:
    """What the server has to do before it appends; see ``fused_requests``. ``keep`` None: keep all."""

    new: bool = False
    keep: int | None = None
    drop: int = 0
    batch_index: Tensor | None = None


_APPEND, _AFRESH = Change(), Change(new=True)


class Fingerprints:
    """The numbers of the new positions of one forward, the same in all its layers."""

    def __init__(self) -> None:
        self.forward = 0
        self._shape = (0, 0)
        self._numbers: Tensor | None = None

    def begin(self) -> None:
        """The next ones asked for are new."""
        self.forward += 1
        self._numbers = None

    def of(self, rows: int, count: int) -> Tensor:
        """Numbers ``[rows, 1, count, 1]`` of this forward."""
        if self._numbers is None or self._shape != (rows, count):
            first = next(_numbers) << 32  # below: room for every position of a forward
            self._numbers = torch.arange(first, first + rows * count).view(rows, 1, count, 1)
            self._shape = (rows, count)
        return self._numbers


class _Layer:
    """One layer: ``held``, the numbers of what the server holds in the sequence ``home``; ``tail``, the tensor the
    runner's cache layer was left with; ``known`` False where a call failed and nobody knows whether it was done.
    """

    __slots__ = ("before", "change", "forward", "held", "home", "known", "pending", "tail")

    def __init__(self) -> None:
        self.held: Tensor | None = None
        self.tail: Tensor | None = None
        self.home: KvSequence | None = None
        self.known = True
        self.forward = -1
        self.pending: Tensor | None = None
        self.change = _APPEND
        self.before: tuple[Any, ...] | None = None

    def copied(self) -> _Layer:
        copy = _Layer()
        copy.held, copy.home, copy.known = self.held, self.home, self.known
        return copy


class RemoteCache:
    """The server's side of one runner's cache; found on the cache by :func:`remote_cache`."""

    def __init__(self, client: GPUClient) -> None:
        self.client = client
        self.sequence = client.new_sequence()
        self._shared = False
        self._layers: dict[int, _Layer] = {}
        # The change of the last layer, which the next one most likely makes, too.
        self._alike: tuple[Tensor | None, Tensor, Tensor, Change, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteCache:
        copy = RemoteCache.__new__(RemoteCache)
        copy.client, copy.sequence, copy._alike = self.client, self.sequence, None
        copy._layers = {number: layer.copied() for number, layer in self._layers.items()}
        copy._shared = self._shared = True
        return copy

    def __reduce__(self) -> Any:
        return type(None), ()  # K and V can't be pickled: they are elsewhere

    # --- one layer of one forward --------------------------------------------------------------------------

    def update(
        self, cache: Cache, number: int, rows: int, count: int, fingerprints: Fingerprints
    ) -> tuple[Change, int]:
        """Adds ``count`` positions to the layer ``number`` of the runner's cache; what the server has to do, and how
        many positions it then holds. To be followed by :meth:`done` or :meth:`failed`.

        Raises :class:`~tsqp.errors.ModelError` where the server does not hold what the cache says.
        """
        if self._shared:
            self.sequence, self._shared = self.client.new_sequence(), False
        layer = self._layers.get(number)
        if layer is None:
            layer = self._layers[number] = _Layer()
        if layer.forward == fingerprints.forward:
            fingerprints.begin()  # a layer called twice: its new positions are others
        fresh = fingerprints.of(rows, count)
        held_by = _cache_layer(cache, number)
        layer.before = None
        if type(held_by) is DynamicLayer:
            change, full = self._grow(layer, held_by, fresh)
        else:
            change, full = self._let_grow(layer, cache, number, held_by, fresh)
        layer.forward, layer.change, layer.pending = fingerprints.forward, change, full
        return change, full.shape[2]

    def source(self, number: int) -> KvSequence | None:
        """The sequence the layer builds upon, if it is not the cache's own."""
        layer = self._layers[number]
        return None if layer.home is self.sequence or layer.change.new else layer.home

    def done(self, number: int) -> None:
        """The server has done the change of the last :meth:`update`."""
        layer = self._layers[number]
        layer.held, layer.home, layer.known = layer.pending, self.sequence, True
        layer.pending = None

    def failed(self, cache: Cache, number: int, refused: bool) -> None:
        """The call was ``refused``, or nobody knows what became of it: takes this forward's numbers out of all
        layers of the runner's cache.
        """
        layer = self._layers[number]
        layer.pending = None
        if not refused:
            builds = layer.change.drop or layer.change.batch_index is not None or layer.home is not self.sequence
            if layer.change.new or builds:
                layer.held = None
            layer.known = False
        for other, state in self._layers.items():
            if state.forward == layer.forward and state.before is not None:
                restore, *values = state.before
                restore(cache.layers[other], *values)
                state.tail = state.before = None
        self._alike = None

    def _grow(self, layer: _Layer, held_by: Any, fresh: Tensor) -> tuple[Change, Tensor]:
        """For transformers' plain growing layer, whose numbers all layers of a model share."""
        keys = held_by.keys
        if not held_by.is_initialized:
            held_by.lazy_initialization(fresh, fresh)
            keys = held_by.keys
        alike = self._alike
        layer.before = (_restore_dynamic, keys, held_by.values)
        if alike is not None and alike[2] is fresh and alike[0] is layer.held and layer.known and _same(keys, alike[1]):
            change, full = alike[3], alike[4]
        else:
            _check_numbers(keys)
            full = torch.cat([keys, fresh], dim=2) if keys.numel() else fresh
            change = _APPEND if layer.tail is keys and layer.known else _change(layer, full, fresh.shape[2])
            self._alike = (layer.held, keys, fresh, change, full) if layer.known else None
        held_by.keys = held_by.values = layer.tail = full
        return change, full

    def _let_grow(self, layer: _Layer, cache: Cache, number: int, held_by: Any, fresh: Tensor) -> tuple[Change, Tensor]:
        """For every other layer: its own ``update`` says what attention sees."""
        keys, static = held_by.keys, isinstance(held_by, StaticLayer)
        if keys is not None:
            _check_numbers(keys)
        vouched = keys is not None and layer.tail is keys and layer.known and layer.held is not None
        if isinstance(held_by, DynamicSlidingWindowLayer):
            layer.before = (_restore_sliding, keys, held_by.values, held_by.cumulative_length, held_by.is_initialized)
        full, _ = cache.update(fresh, fresh, number)
        if static:
            # What is behind the last position is empty yet; and the layer works in place.
            full = full[:, :, : int((full[0, 0, :, 0] != 0).sum())].clone()
        kept = full.shape[2] - fresh.shape[2]
        if vouched and kept and not static:
            assert layer.held is not None
            change = Change(drop=layer.held.shape[2] - kept)
        else:
            change = _change(layer, full, fresh.shape[2])
        layer.tail = None if static else held_by.keys
        return change, full


def remote_cache(cache: Any, client: GPUClient) -> RemoteCache:
    """The server's side of ``cache``, made where it has none yet.

    Raises :class:`~tsqp.errors.ModelError` for caches that can't be kept on the server, and for one that is kept on
    another connection.
    """
    found = vars(cache).get(_ATTRIBUTE) if isinstance(cache, Cache) else None
    if found is not None and found.client is client:
        return found
    if not isinstance(cache, Cache):
        raise ModelError(
            f"past_key_values is a {type(cache).__name__}; give a transformers Cache, such as DynamicCache()"
        )
    if found is not None and cache.get_seq_length() > 0:
        raise ModelError("this cache belongs to another connection, whose server holds its K and V; use a new cache")
    made = RemoteCache(client)
    vars(cache)[_ATTRIBUTE] = made
    return made


def _cache_layer(cache: Any, number: int) -> Any:
    layers = cache.layers
    if number >= len(layers) and cache.layer_class_to_replicate is not None:
        while len(layers) <= number:
            layers.append(cache.layer_class_to_replicate())
    if number >= len(layers) or type(layers[number]) not in _KINDS:
        kind = type(layers[number]).__name__ if number < len(layers) else "no layer"
        raise ModelError(
            f"layer {number} of this {type(cache).__name__} is {kind}, whose K and V can't be kept on the server; "
            "use DynamicCache or StaticCache, or a placement that keeps K and V in the runner (linear)"
        )
    return layers[number]


def _check_numbers(keys: Tensor) -> None:
    if keys.dtype is not torch.int64 and keys.numel():
        raise ModelError(
            "this cache holds K and V that were computed in this process; with this placement they are kept on the "
            "server: start with a new cache"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _change(layer: _Layer, full: Tensor, count: int) -> Change:
    """From what the server holds of a layer to ``full``, whose last ``count`` positions are new."""
    keep = full.shape[2] - count
    if keep <= 0:
        return _AFRESH
    held = layer.held
    if held is None:
        raise ModelError(
            f"this cache has {keep} positions the server does not hold: it was filled elsewhere, or a call failed; "
            "start with a new cache"
        )
    kept = full[:, :, :keep]
    # Numbers are never used twice, so one of them tells how far the two are apart.
    places = (held == kept[0, 0, -1, 0]).nonzero()
    if not len(places) or int(places[0, 2]) + 1 < keep:
        raise ModelError(
            "this cache has positions the server has forgotten: a copy of it, or a call that failed, went on without "
            "them; start with a new cache, and copy caches with copy.deepcopy"
        )
    drop = int(places[0, 2]) + 1 - keep
    then = held[:, :, drop : drop + keep]
    everything = drop + keep == held.shape[2] and layer.known
    if then.shape == kept.shape and torch.equal(then, kept):
        return _APPEND if everything and not drop else Change(keep=None if everything else keep, drop=drop)
    return _gathered(then, kept, None if everything else keep, drop)


def _gathered(then: Tensor, kept: Tensor, keep: int | None, drop: int) -> Change:
    """The change that gathers rows: each row of ``kept`` is one of ``then``, told by its last number."""
    place = {number: row for row, number in reversed(list(enumerate(then[:, 0, -1, 0].tolist())))}
    rows = [place.get(number, -1) for number in kept[:, 0, -1, 0].tolist()]
    index = torch.tensor(rows, dtype=torch.int64)
    if -1 in rows or not torch.equal(then.index_select(0, index), kept):
        raise ModelError(
            "this cache has rows that are made of parts of others, which the server can't follow; start with a new one"
        )
    return Change(keep=keep, drop=drop, batch_index=index)


def _restore_dynamic(layer: Any, keys: Tensor, values: Tensor) -> None:
    layer.keys, layer.values = keys, values


def _restore_sliding(layer: Any, keys: Any, values: Any, length: int, initialized: bool) -> None:
    layer.keys, layer.values, layer.cumulative_length, layer.is_initialized = keys, values, length, initialized
