"""Attention in row tiles: the server computes the scores of later tiles while the runner takes the softmax of one.

A causal tile only looks at the keys up to its last row's, so about half the scores are neither computed nor sent. K
and V travel once, each tile bringing those that no tile before it needed. All requests are pipelined
(``client.submit``); a tile's pair of requests is a round trip of its own each. Where possible the softmax reads the
scores in the slot they came in and writes the weights into the one they leave by (:mod:`tsqp.in_place`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ops
from .client import GPUClient
from .errors import ProtocolError
from .mirror import Change
from .pending import PendingCall, settle_all
from .tiles import Tile
from .timing import Clock

#: Scores asked for beyond the tile whose softmax is next: one is computed, one waits, so that the server is never
#: without work.
_AHEAD = 2


class TiledAttention:
    """One attention over given tiles.

    ``query`` ``[B, H, Q, D]``, ``key``, ``value`` ``[B, Hkv, S, D]``, ``mask`` as in ``ops.causal_softmax`` for all of
    it. The queries are multiplied by ``factor`` before they are sent and the scores by ``fraction`` after.
    """

    def __init__(
        self,
        client: GPUClient,
        layer: int,
        clock: Clock,
        tensors: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        *,
        factor: float,
        fraction: float,
        causal: bool,
    ) -> None:
        self.client, self.layer, self.clock = client, layer, clock
        self.query, self.key, self.value = tensors
        self.mask, self.factor, self.fraction, self.causal = mask, factor, fraction, causal
        self._calls: list[PendingCall[Any]] = []
        #: Scores are read, and weights written, where they lie in a slot.
        self._direct = client.in_place.suits(self.query.dtype)
        #: Positions the server holds once all that was sent is done.
        self.held = 0

    def run(self, tiles: Sequence[Tile], change: Change, want_probs: bool) -> tuple[Tensor, Tensor | None]:
        """The output ``[B, Q, H, D]`` and, where wanted, the probabilities ``[B, H, Q, S]``.

        ``change`` brings the server's K and V up to date. Whatever goes wrong, nothing is left in flight that
        somebody might wait for: a :class:`RemoteError` is raised when the server has answered all that was sent.
        """
        direct = self._direct
        with settle_all(self.client.timeout) as self._calls, self.client.in_place.leaving_replies(direct):
            return self._run(tiles, change, want_probs)

    def _run(self, tiles: Sequence[Tile], change: Change, want_probs: bool) -> tuple[Tensor, Tensor | None]:
        batch, heads, queries, dim = self.query.shape
        out = self.query.new_empty(batch, queries, heads, dim)
        probs = self.query.new_zeros(batch, heads, queries, self.key.shape[2]) if want_probs else None
        scores: deque[PendingCall[Tensor]] = deque()
        values: deque[tuple[Tile, PendingCall[Tensor]]] = deque()
        largest = max((tile.stop - tile.first) * tile.keys for tile in tiles)
        self._scratch = self.query.new_empty(batch * heads * largest)
        waiting = iter(tiles)
        for number, tile in enumerate(tiles):
            begin = self.clock.now()
            while len(scores) <= _AHEAD and (coming := next(waiting, None)) is not None:
                scores.append(self._ask_scores(coming, change if not scores and number == 0 else None))
            values.append((tile, self._weigh(scores.popleft(), tile, begin, probs)))
            begin = self.clock.now()
            while values and values[0][1].done():
                _place(out, *values.popleft(), self.client.timeout)
            self.clock.remote_done(begin)
        begin = self.clock.now()
        for tile, call in values:
            _place(out, tile, call, self.client.timeout)
        self.clock.remote_done(begin)
        return out, probs

    def _weigh(self, scores: PendingCall[Tensor], tile: Tile, begin: int, probs: Tensor | None) -> PendingCall[Tensor]:
        """Requests a tile's values, with the weights of its scores, asked for at ``begin``."""
        in_place = self.client.in_place
        with in_place.result(scores, self._direct) as found:
            self._check(found, tile)
            self.clock.remote_done(begin)
            if self._direct and probs is None:
                sent = in_place.attention_values(self.layer, found, partial(self._softmax, found, tile))
                if sent is not None:
                    return self._sent(sent)
            # What is submitted may be changed afterwards: every tile's weights lie in the same memory.
            weights = self._scratch[: found.numel()].view(found.shape)
            self._softmax(found, tile, weights)
        if probs is not None:
            probs[:, :, tile.first : tile.stop, : tile.keys] = weights
        begin = self.clock.now()
        call = self._sent(self.client.submit.attention_values(self.layer, weights))
        self.clock.remote_done(begin)
        return call

    def _ask_scores(self, tile: Tile, change: Change | None) -> PendingCall[Tensor]:
        """Requests a tile's scores, with the keys and values up to its last that the server does not have."""
        options: dict[str, Any] = {}
        if change is not None:
            # Said in full: a server that forgot its K and V meanwhile has to refuse this one.
            options = {"keep": change.keep, "batch_index": change.batch_index, "drop": change.drop}
            self.held = change.keep
        held, self.held = self.held, max(self.held, tile.keys)
        if self.held > tile.keys:
            options["keys"] = tile.keys
        return self._sent(
            self.client.submit.attention_scores(
                self.layer,
                self.query[:, :, tile.first : tile.stop] * self.factor,
                self.key[:, :, held : self.held],
                self.value[:, :, held : self.held],
                **options,
            )
        )

    def _sent(self, call: PendingCall[Tensor]) -> PendingCall[Tensor]:
        self._calls.append(call)
        return call

    def _check(self, scores: Tensor, tile: Tile) -> None:
        if scores.shape[-1] != tile.keys:
            raise ProtocolError(f"the server's scores of layer {self.layer} do not cover the keys sent to it")

    def _softmax(self, scores: Tensor, tile: Tile, out: Tensor) -> None:
        begin = self.clock.now()
        mask = self.mask
        if mask is not None:
            rows = slice(tile.first, tile.stop) if mask.shape[-2] > 1 else slice(None)
            mask = mask[..., rows, : tile.keys]
        ops.causal_softmax(scores, mask, self.fraction, causal=self.causal, out=out)
        self.clock.add("tee_softmax", begin)


def _place(out: Tensor, tile: Tile, call: PendingCall[Tensor], timeout: float | None) -> None:
    out[:, tile.first : tile.stop] = call.result(timeout).transpose(1, 2)


def key_limits(queries: int, keys: int, hidden: Tensor | None, causal: bool) -> Sequence[int]:
    """How many first keys each query has to look at; hashable.

    ``hidden`` is bool, True where a mask (of any shape that broadcasts to ``[.., Q, S]``) hides a key; None: without
    a mask, the rule of ``ops.causal_softmax``.
    """
    if hidden is None:
        return range(keys - queries + 1, keys + 1) if causal else (keys,) * queries
    visible = (~hidden).reshape(-1, *hidden.shape[-2:]).any(dim=0)
    positions = torch.arange(1, keys + 1)
    limits = (visible * positions).amax(dim=-1).clamp(min=1).expand(queries)
    return tuple(limits.tolist())
