"""A gated MLP in row tiles: the server multiplies one tile while the runner takes SiLU·gate of the one before, from
slot to slot where possible (:mod:`tsqp.in_place`).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .client import GPUClient
from .pending import PendingCall, settle_all
from .remote import RemoteLinear
from .tiles import TileSize
from .timing import Clock

#: Tiles whose gate and up are asked for beyond the one whose activation is next.
_AHEAD = 1


class GatedMlp:
    """The forward of ``module``: ``down_proj(gated(gate_proj(x), up_proj(x)))``, in tiles where that is faster.

    ``gated(gate, up)`` is the timed activation. Tiles need all three projections on the server.
    """

    def __init__(
        self,
        module: nn.Module,
        gated: Callable[..., Tensor],
        client: GPUClient,
        clock: Clock,
        size: TileSize,
    ) -> None:
        self._module, self._gated = module, gated
        self._client, self._clock, self._size = client, clock, size

    def __call__(self, x: Tensor) -> Tensor:
        module: Any = self._module
        gate, up, down = module.gate_proj, module.up_proj, module.down_proj
        if not all(_is_plain(part) for part in (gate, up, down)) or x.shape[-1] != gate.in_features:
            out: Tensor = down(self._gated(gate(x), up(x)))
            return out
        rows = math.prod(x.shape[:-1])
        row_bytes = (gate.out_features + up.out_features) * self._client.wire_itemsize
        if rows > 1 and rows * row_bytes > self._size.smallest():
            return self._measured(x, rows, row_bytes)
        return self._whole(x)

    def _whole(self, x: Tensor) -> Tensor:
        module: Any = self._module
        begin = self._clock.now()
        gate, up = self._client.batch_linear(None, (module.gate_proj.name, module.up_proj.name), x)
        self._clock.remote_done(begin)
        out: Tensor = module.down_proj(self._gated(gate, up, out=gate))  # both are this call's own
        return out

    def _measured(self, x: Tensor, rows: int, row_bytes: int) -> Tensor:
        tile_bytes = self._size.choose()
        tile_rows = max(1, tile_bytes // row_bytes)
        begin = time.perf_counter_ns()
        tiled = tile_bytes > 0 and tile_rows < rows
        out = self._in_tiles(x, rows, tile_rows) if tiled else self._whole(x)
        self._size.note(tile_bytes, rows, time.perf_counter_ns() - begin)
        return out

    def _in_tiles(self, x: Tensor, rows: int, tile_rows: int) -> Tensor:
        direct = self._client.in_place.suits(x.dtype)
        with settle_all(self._client.timeout) as calls, self._client.in_place.leaving_replies(direct):
            return self._run(x.detach().reshape(rows, -1), tile_rows, calls, direct).view(*x.shape[:-1], -1)

    def _run(self, x: Tensor, tile_rows: int, calls: list[PendingCall[Any]], direct: bool) -> Tensor:
        module: Any = self._module
        inner = (module.gate_proj.name, module.up_proj.name)
        submit, clock, timeout = self._client.submit, self._clock, self._client.timeout
        out = x.new_empty(x.shape[0], module.down_proj.out_features)
        waiting = iter(x.split(tile_rows))
        first: deque[PendingCall[list[Tensor]]] = deque()
        second: deque[tuple[int, PendingCall[Tensor]]] = deque()
        for row in range(0, x.shape[0], tile_rows):
            begin = clock.now()
            while len(first) <= _AHEAD and (tile := next(waiting, None)) is not None:
                first.append(submit.batch_linear(None, inner, tile))
                calls.append(first[-1])
            second.append((row, self._activate(first.popleft(), begin, direct)))
            calls.append(second[-1][1])
            begin = clock.now()
            while second and second[0][1].done():
                _place(out, *second.popleft(), timeout)
            clock.remote_done(begin)
        begin = clock.now()
        for row, call in second:
            _place(out, row, call, timeout)
        clock.remote_done(begin)
        return out

    def _activate(self, inner: PendingCall[list[Tensor]], begin: int, direct: bool) -> PendingCall[Tensor]:
        """Requests the rest of a tile, with the activation of its gate and up, asked for at ``begin``."""
        module: Any = self._module
        down, client, clock = module.down_proj.name, self._client, self._clock
        with client.in_place.result(inner, direct) as (gate, up):
            clock.remote_done(begin)
            if direct:
                sent = client.in_place.linear(down, gate, lambda out: self._gated(gate, up, out=out))
                if sent is not None:
                    return sent
            # Both are this call's own, but in a slot they are not alone.
            active = self._gated(gate, up, out=None if direct else gate)
        begin = clock.now()
        call = client.submit.linear(down, active)
        clock.remote_done(begin)
        return call


def _is_plain(part: nn.Module) -> bool:
    """True for a projection on the server that nobody looks at by a hook, so that its call may be left out."""
    return isinstance(part, RemoteLinear) and not (part.training or part._forward_hooks or part._forward_pre_hooks)


def _place(out: Tensor, row: int, call: PendingCall[Tensor], timeout: float | None) -> None:
    tile = call.result(timeout)
    out[row : row + tile.shape[0]] = tile
