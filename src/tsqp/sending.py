"""The sending half of a channel: into the ring below the threshold; above it over ZeroMQ, or in tiles."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import zmq

from . import _perf
from ._message import deadline_ns
from ._ring import Ring
from .choosing import RING, TILE, ZMQ, Chooser
from .errors import ClosedError, MessageTooLargeError, PeerDiedError, WaitTimeoutError
from .frames import wait_sent
from .links import MAX_FRAME_BYTES, Link
from .receiving import NOW_NS

if TYPE_CHECKING:
    from .channel import Channel

#: Header fields of one message: tag, flags, request_id, status, site, index, compute_ns, queue_ns.
Fields = tuple[int, int, int, int, int, int, int, int]
#: A tile small enough to be still in cache when the peer copies it out, large enough to make its cost vanish.
TILE_BYTES = 1 << 20
#: How long a flush that must not block waits for a reader that keeps up.
PATIENCE_S = 0.001
_WAYS = {RING: _perf.RING, ZMQ: _perf.ZMQ, TILE: _perf.TILES}


class Sender:
    """Writes one direction of a channel where that takes more than a slot that is free. Callers hold the channel's
    send gate."""

    def __init__(self, channel: Channel, link: Link, chooser: Chooser) -> None:
        self.zmq_count = self.zmq_bytes = 0
        #: Nanoseconds spent waiting for slots, or in ZeroMQ's send; and what carried the last message (see _perf).
        self.waited_ns = self.way = 0
        self._channel, self._link = channel, link
        self._codec, self._ring = channel._encoder, channel._tx
        ring = self._ring
        self.chooser = chooser
        self._tile_bytes = TILE_BYTES if ring is None else min(TILE_BYTES, ring.segment.max_chunk_bytes // 64 * 64)
        self._sequence = 0  # of messages over ZeroMQ
        self._tail: _Tail | None = None

    def send(
        self,
        tensors: Sequence[Any],
        meta: bytes,
        fields: Fields,
        deadline: int,
        transfer: bool | None,
        wire: Any,
    ) -> int:
        """Sends one message before `deadline` (monotonic ns) and returns its bytes. `transfer`: the tensors are given
        away; None: they are nobody else's, but all of a message in tiles is to be written."""
        self.clear(deadline)
        total = self._codec.plan(tensors, meta, *fields, wire)
        carrier = self._carrier(total)
        begin = time.perf_counter_ns() if self.chooser.learns else 0
        self.way = _WAYS[carrier] if self._ring is not None else _WAYS[ZMQ]
        if carrier == RING and self._ring is not None:
            self._codec.write(self._ring, meta, deadline)
            self._count_ring(total)
        elif carrier == TILE and self._ring is not None:
            self._send_tiles(self._ring, tensors, meta, deadline, transfer)
            self._count_ring(total)
        else:
            self._send_link(tensors, meta, deadline, transfer)
            self.zmq_count += 1
            self.zmq_bytes += total
        if begin and transfer is False:
            self._learn(carrier, total, time.perf_counter_ns() - begin)
        return total

    def _carrier(self, total: int) -> str:
        carrier = self.chooser.carrier(total)
        if carrier == RING:
            return carrier
        if total > MAX_FRAME_BYTES:
            raise MessageTooLargeError(
                f"a message of {total} bytes is over the limit of {MAX_FRAME_BYTES} bytes; send it in parts"
            )
        if carrier == TILE and self._ring is not None:
            fits = self._codec.planned_head_bytes <= self._ring.segment.max_chunk_bytes
            return TILE if fits else ZMQ
        return ZMQ

    def _learn(self, carrier: str, nbytes: int, spent_ns: int) -> None:
        # A slot is only written here; the reader's copy, about as long, is still to come.
        self.chooser.note(carrier, nbytes, 2 * spent_ns if carrier == RING else spent_ns)
        self._channel.threshold = self.chooser.threshold

    def _send_tiles(
        self, ring: Ring, tensors: Sequence[Any], meta: bytes, deadline: int, transfer: bool | None
    ) -> None:
        payload = self._codec.as_they_travel(tensors)
        self._channel.direct_send = False  # first, and undone by the next clear() if no more comes of it
        self._codec.write_tiled_head(ring, meta, deadline)
        self._tail = _Tail(payload, bool(transfer))
        self._channel.flush_due = bool(transfer)
        # What was given away can follow later; what the caller may change must be gone when this returns.
        self.flush(NOW_NS if transfer else deadline)

    def flush(self, deadline: int) -> bool:
        """Writes the tiles that are left: all of them before `deadline`, or with NOW_NS those there is room for.

        Returns True when nothing is left. Raises like a send; a message that was not given away is then broken off.
        """
        ring, tail, codec = self._ring, self._tail, self._codec
        if tail is None or ring is None:
            return True
        waits = deadline != NOW_NS
        patience_s = PATIENCE_S if tail.patient else 0.0
        keeps = tail.given
        try:
            while codec.tiles_due:
                if waits and not ring.ready():
                    self._make_room(deadline)
                codec.write_tile(ring, self._tile_bytes, deadline if waits else deadline_ns(patience_s))
        except WaitTimeoutError:
            if waits:
                raise
            tail.patient = False  # or a reader could make this end wait again for each slot it gives back
            return False
        except (ClosedError, PeerDiedError):
            keeps = False
            if waits:
                raise
            return True  # what it sent before may still be read
        finally:
            if not (keeps and codec.tiles_due):
                self._tail, self._channel.flush_due = None, False
            self._channel.direct_send = not codec.tiles_due
        return True

    def _count_ring(self, nbytes: int) -> None:
        self._channel._sent += 1
        self._channel._sent_bytes += nbytes

    def clear(self, deadline: int) -> None:
        """Makes sure of a free slot, and that the receiver does not wait for the rest of another message."""
        ring = self._ring
        if ring is None:
            return
        if self._tail is not None and not self._tail.given:
            self._tail = None  # of an interrupted send: the tensors are the caller's again
        self.flush(deadline)
        if not ring.ready():
            self._make_room(deadline)
        if self._codec.tiles_due:
            self._codec.give_up(ring, deadline)
            if not ring.ready():
                self._make_room(deadline)
        self._channel.direct_send = True

    def _make_room(self, deadline: int) -> None:
        begin_ns = time.monotonic_ns()
        self._channel._make_room(deadline)
        self.waited_ns += time.monotonic_ns() - begin_ns

    def _send_link(self, tensors: Sequence[Any], meta: bytes, deadline: int, transfer: bool | None) -> None:
        head = self._codec.head_bytes(meta)
        frames = self._codec.as_they_travel(tensors)
        sequence = self._sequence
        self._sequence += 1
        begin_ns = time.monotonic_ns()
        tracker = self._post(head, frames, sequence, deadline)
        if transfer is False:
            wait_sent(tracker, deadline / 1e9, self._link.dead)
        self.waited_ns += time.monotonic_ns() - begin_ns

    def _post(self, head: bytes, frames: list[Any], sequence: int, deadline: int) -> zmq.MessageTracker:
        """Announces a message in the ring and gives it to ZeroMQ; both or, where this raises, neither."""
        self._channel.link_used = True
        if self._ring is None:
            return self._link.post(head, frames, sequence, deadline / 1e9)
        note = self._codec.announce(self._ring, deadline)
        # The message before its note: the receiver would wait for ever for one that did not get away, and passes over
        # one that was not announced, as where Ctrl-C comes in between.
        try:
            tracker = self._link.post(head, frames, sequence, deadline / 1e9)
            note.publish(sequence)
        finally:
            note.cancel()  # unless published
        return tracker


class _Tail:
    """The payload of a tiled message on its way: what must live until it is through, and whether it was given away."""

    def __init__(self, kept: list[Any], given: bool) -> None:
        self.kept, self.given = kept, given
        self.patient = True


def seconds_until(deadline: int) -> float:
    """Seconds before `deadline` (monotonic ns); negative once it passed."""
    return deadline / 1e9 - time.monotonic()
