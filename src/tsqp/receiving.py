"""The receiving half of a channel: the next message, whatever carries it, in the order it was sent."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from ._message import FLAG_TILED, FLAG_VIA_ZMQ, Assembly, Lease, Message, deadline_ns
from ._ring import Ring
from .errors import MessageError, MessageTooLargeError, PeerDiedError, ProtocolError, WaitTimeoutError
from .links import LargeMessage, Link

if TYPE_CHECKING:
    from .channel import Channel

#: A deadline that has passed: take what is there.
NOW_NS = 0
_OUT_OF_SLOT = FLAG_VIA_ZMQ | FLAG_TILED


class HeldMessage:
    """A message in private memory, with the face of a lease."""

    def __init__(self, message: Message) -> None:
        self.message = message

    def __enter__(self) -> Message:
        return self.message

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Nothing to give back."""


class Receiver:
    """Reads one direction of a channel where a message is not simply the ring's next slot. Callers hold the channel's
    receive gate from a call's start to its end."""

    def __init__(self, channel: Channel, link: Link, max_message_bytes: int) -> None:
        self.zmq_count = self.zmq_bytes = 0
        self.ahead_bytes = 0
        self._channel, self._link, self._peer = channel, link, channel.peer
        self._codec, self._ring, self._max_message_bytes = channel._decoder, channel._rx, max_message_bytes
        self._ahead: deque[Message | MessageError] = deque()
        self._awaited: int | None = None  # an announced ZeroMQ message that has not arrived yet
        self._assembly: Assembly | None = None  # a tiled message of which tiles are missing

    def _note_state(self) -> None:
        """Lets the channel know whether its next message is simply the ring's next slot."""
        parts = self._awaited is not None or self._assembly is not None
        self._channel.direct_receive = not (self._ahead or parts or self._ring is None)

    # ---- state ----

    def ready(self) -> bool:
        """True if there is something to take now, or the peer is gone."""
        if self._ahead or self._link.dead():
            return True
        ring = self.wait_ring
        return self._link.pending() if ring is None else ring.ready()

    @property
    def ahead(self) -> int:
        """How many messages were read ahead."""
        return len(self._ahead)

    @property
    def wait_ring(self) -> Ring | None:
        """The ring whose next slot ends a wait; None while ZeroMQ is what this end waits for."""
        return self._ring if self._awaited is None else None

    # ---- taking a message ----

    def receive(self, deadline: int) -> Message:
        """The next message in private memory. Raises WaitTimeoutError at `deadline` (monotonic ns)."""
        if self._ahead:
            return self._take_ahead()
        message = None
        if self._ring is not None and self._awaited is None and self._assembly is None:
            message = self._read_slot(self._ring, deadline)
        if message is None:
            message = self._next(deadline)
        if message is None:
            raise WaitTimeoutError(f"no message from {self._peer} before the deadline; it is connected: wait longer")
        return message

    def lease(self, deadline: int) -> Lease | HeldMessage:
        """Like :meth:`receive`, but a ring message stays in its slot until released."""
        if self._ahead or self._ring is None or self._awaited is not None or self._assembly is not None:
            return HeldMessage(self.receive(deadline))
        leased = self._codec.lease(self._ring, deadline)
        if leased is None:
            raise WaitTimeoutError(f"no message from {self._peer} before the deadline; it is connected: wait longer")
        if not leased.message.flags & _OUT_OF_SLOT:
            return self._count_lease(leased)
        leased.release()  # first: begin may raise, and the error's frames would keep the slot
        self.begin(leased.message)
        return HeldMessage(self.receive(deadline))

    def take(self, lease: bool) -> Lease | HeldMessage | None:
        """What is there now as a lease or (``lease=False``) held in private memory; None if no whole message is."""
        if self._ahead:
            return HeldMessage(self._take_ahead())
        if self._ring is None or self._awaited is not None or self._assembly is not None or not lease:
            return self._held(self._next(NOW_NS))
        leased = self._codec.lease(self._ring, NOW_NS)
        if leased is None:
            self._check_alive(self._ring)
            return None
        if not leased.message.flags & _OUT_OF_SLOT:
            return self._count_lease(leased)
        leased.release()  # first: begin may raise, and the error's frames would keep the slot
        self.begin(leased.message)
        return self._held(self._next(NOW_NS))

    def read_ahead(self) -> bool:
        """Takes one message into the queue, if a whole one is there."""
        try:
            message = self._next(NOW_NS)
        except MessageError as error:
            self._ahead.append(error)  # in its turn: whoever sends meanwhile has nothing to do with it
            self._note_state()
            return True
        if message is None:
            return False
        self._ahead.append(message)
        self.ahead_bytes += message.nbytes
        self._note_state()
        return True

    def _take_ahead(self) -> Message:
        message = self._ahead.popleft()
        self._note_state()
        if isinstance(message, MessageError):
            raise message
        self.ahead_bytes -= message.nbytes
        return message

    def _held(self, message: Message | None) -> HeldMessage | None:
        return None if message is None else HeldMessage(message)

    def _count_ring(self, nbytes: int) -> None:
        self._channel._received += 1
        self._channel._received_bytes += nbytes

    def _count_lease(self, lease: Lease) -> Lease:
        self._count_ring(lease.message.nbytes)
        return lease

    def _next(self, deadline: int) -> Message | None:
        """The next whole message, or None where `deadline` passed before it was there."""
        while True:
            if self._awaited is not None or self._ring is None:
                return self._next_from_link(deadline)
            if deadline == NOW_NS and not self._ring.ready():
                self._check_alive(self._ring)
                return None
            if self._assembly is not None:
                if self._feed(self._assembly, deadline):
                    return self._finish(self._assembly)
                continue
            message = self._read_slot(self._ring, deadline)
            if message is not None:
                return message

    def _read_slot(self, ring: Ring, deadline: int) -> Message | None:
        """The message in the ring's next slot; None if the slot only says where a message is."""
        message = self._codec.read(ring, deadline)
        if message.flags & _OUT_OF_SLOT:
            self.begin(message)
            return None
        self._count_ring(message.nbytes)
        return message

    def _check_alive(self, ring: Ring) -> None:
        """An empty ring whose writer is gone stays empty."""
        reason = self._link.dead()
        if reason and not ring.ready():
            raise PeerDiedError(f"{self._peer} died: {reason}")

    def begin(self, note: Message) -> None:
        """`note` said where the message really is. Raises MessageTooLargeError where it is not taken."""
        if note.flags & FLAG_VIA_ZMQ:
            self._awaited = note.index
        else:
            self._assembly = self._codec.assemble(note, self._max_message_bytes)
        self._note_state()
        if self._assembly is not None and self._assembly.refusal is not None:
            raise self._assembly.refusal  # what follows of it is read and dropped

    def _feed(self, assembly: Assembly, deadline: int) -> bool:
        assert self._ring is not None
        try:
            if not assembly.complete and not assembly.feed(self._ring, deadline):
                self._assembly = None  # the sender gave it up; what follows is the next message
                self._note_state()
                return False
        except MessageError:
            self._assembly = None  # this slot held no tile of it
            self._note_state()
            raise
        if assembly.complete and assembly.refusal is not None:
            self._assembly = None
            self._note_state()
            return False
        return assembly.complete

    def _finish(self, assembly: Assembly) -> Message:
        self._assembly = None
        self._note_state()
        message = assembly.finish()
        self._count_ring(message.nbytes)
        return message

    def _from_link(self, deadline: int) -> LargeMessage | None:
        """The message that was announced, where one was; of those before it, the sends were interrupted."""
        while True:
            arrived = self._link.recv(deadline / 1e9)
            if arrived is None or self._awaited is None or arrived[0] >= self._awaited:
                return arrived
            if time.monotonic_ns() >= deadline:
                return None  # or a peer that sends nothing else could hold this end

    def _next_from_link(self, deadline: int) -> Message | None:
        arrived = self._from_link(deadline)
        if arrived is None:
            return None
        sequence, head, frames = arrived
        awaited, self._awaited = self._awaited, None
        self._note_state()
        if awaited is not None and sequence != awaited:
            raise ProtocolError(f"{self._peer} announced large message {awaited}, sent {sequence}; close the channel")
        nbytes = len(head) + sum(len(frame) for frame in frames)
        if nbytes > self._max_message_bytes:
            raise MessageTooLargeError(
                f"a message of {nbytes} bytes is over the limit of {self._max_message_bytes} bytes; send it in parts, "
                "or raise max_message_bytes at this end"
            )
        message = self._codec.decode_frames(head, frames)
        self.zmq_count += 1
        self.zmq_bytes += message.nbytes
        return message


__all__ = ["NOW_NS", "HeldMessage", "Receiver", "deadline_ns"]
