"""The sending half of a channel: into the ring below the threshold; above it over ZeroMQ, or in tiles."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ._message import Codec, deadline_ns, give_up
from ._ring import Ring
from .links import Link

#: A tile small enough to be still in cache when the peer copies it out, large enough to make its cost vanish.
TILE_BYTES = 1 << 20


class Sender:
    """Writes one direction of a channel. Callers hold :attr:`lock`.

    `make_room` waits for a free slot while it reads what the peer sends; it is called only when the ring is full.
    """

    def __init__(self, link: Link, ring: Ring | None, threshold: int, large: str, make_room: Callable[[int], None]):
        self.lock = threading.Lock()
        self.ring_count = self.ring_bytes = self.zmq_count = self.zmq_bytes = 0
        self._link, self._ring, self._make_room = link, ring, make_room
        self._threshold = threshold if ring is not None else 0
        self._tiled = large == "tile" and ring is not None
        self._tile_bytes = TILE_BYTES if ring is None else min(TILE_BYTES, ring.segment.max_chunk_bytes // 64 * 64)
        self._codec = Codec()
        self._sequence = 0  # of messages over ZeroMQ
        self._unfinished = False  # a tiled message was broken off

    def send(
        self, tensors: Sequence[Any], meta: bytes, fields: tuple[int, ...], timeout: float | None, transfer: bool
    ) -> int:
        """Sends one message and returns its bytes. `fields`: tag, flags, request_id, status, site, index,
        compute_ns, queue_ns."""
        total = self._codec.plan(tensors, meta, *fields)
        ring = self._ring
        if ring is not None and total < self._threshold:
            deadline = deadline_ns(timeout)
            if self._unfinished or not ring.ready():
                self._clear(ring, deadline)
            self._codec.write(ring, meta, deadline)
            self.ring_count += 1
            self.ring_bytes += total
        elif (
            self._tiled
            and ring is not None
            and self._send_tiled(ring, list(tensors), meta, deadline_ns(timeout), total)
        ):
            self.ring_count += 1
            self.ring_bytes += total
        else:
            self._send_link(tensors, meta, deadline_ns(timeout), transfer)
            self.zmq_count += 1
            self.zmq_bytes += total
        return total

    def _clear(self, ring: Ring, deadline: int) -> None:
        """Makes sure of a free slot, and that the receiver does not wait for the rest of a broken-off message."""
        if not ring.ready():
            self._make_room(deadline)
        if self._unfinished:
            give_up(ring, deadline)
            self._unfinished = False
            self._clear(ring, deadline)

    def _send_tiled(self, ring: Ring, tensors: list[Any], meta: bytes, deadline: int, total: int) -> bool:
        if self._unfinished or not ring.ready():
            self._clear(ring, deadline)
        kept = self._codec.make_contiguous(tensors)
        if not self._codec.write_tiled_head(ring, meta, deadline):
            return False
        self._unfinished = True
        payload = total - self._codec.planned_head_bytes
        for start in range(0, payload, self._tile_bytes):
            if not ring.ready():
                self._make_room(deadline)
            self._codec.write_tile(ring, start, min(self._tile_bytes, payload - start), deadline)
        self._unfinished = False
        del kept
        return True

    def _send_link(self, tensors: Sequence[Any], meta: bytes, deadline: int, transfer: bool) -> None:
        head = self._codec.head_bytes(meta)
        frames = self._codec.payload(tensors)
        sequence = self._sequence
        self._sequence += 1
        if self._ring is not None:
            if self._unfinished or not self._ring.ready():
                self._clear(self._ring, deadline)
            self._codec.announce(self._ring, deadline).publish(sequence)
        self._link.send(head, frames, sequence, deadline / 1e9, transfer)


def seconds_until(deadline: int) -> float:
    """Seconds before `deadline` (monotonic ns); negative once it passed."""
    return deadline / 1e9 - time.monotonic()
