"""One end of a connection: messages in the order they were sent, whatever carries them.

The short way of a message is Port's, in Cython; here is what is left where that is not open.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from . import aio
from ._channel import Holder, Port
from ._message import Lease, Message, deadline_ns
from ._ring import Doorbell, Ring, Segment
from .choosing import RING, TILE, Chooser, Cost, cost_of
from .errors import ClosedError, PeerDiedError, WaitTimeoutError
from .links import Link
from .receiving import NOW_NS, HeldMessage, Receiver
from .sending import Fields, Sender, seconds_until

#: What a sender that waits for a slot reads ahead at most, so that two full rings can't block each other.
MAX_READ_AHEAD_BYTES = 1 << 30
_REQUEST_ID = 2  # among the fields of a message

_open: weakref.WeakSet[Any] = weakref.WeakSet()


def close_at_exit(closable: Any) -> None:
    """Registers an object whose ``close()`` is called if the interpreter ends before its user did."""
    _open.add(closable)


os.register_at_fork(after_in_child=_open.clear)  # they are the parent's to close


@atexit.register
def _close_open() -> None:
    for closable in list(_open):
        closable.close()


class Channel(Port):
    """One end of a connection. Threads may share it: sends are one at a time, and so are receives.

    Attributes: ``threshold`` (bytes from which a message is large), ``peer`` (text), ``transport`` (``shm+ipc``,
    ``shm+tcp``, ``ipc`` or ``tcp``).
    """

    def __init__(
        self,
        link: Link,
        segment: Segment | None,
        tx: Ring | None,
        rx: Ring | None,
        *,
        scheme: str,
        chooser: Chooser,
        peer: str,
        spin_us: float,
        futex: bool,
        wait: str,
        max_message_bytes: int,
    ) -> None:
        super().__init__(tx, rx, chooser.threshold)
        self.peer = peer
        self.transport = f"shm+{scheme}" if segment is not None else scheme
        self.number = 0  # the listener's, in the order of connecting
        self.on_close: Callable[[Channel], None] = lambda channel: None
        self._link, self._segment, self._bell = link, segment, Doorbell(spin_us, futex, wait)
        self._bell_options = (futex, wait)
        self._helper: aio.Helper | None = None
        self._helper_lock = threading.RLock()  # a signal handler may close the channel
        # They reach back through a weak reference: a cycle would keep a closed channel's segment mapped until the
        # garbage collector comes. The channel lives while it sends.
        me = weakref.proxy(self)
        self._sender = Sender(me, link, chooser)
        self._receiver = Receiver(me, link, max_message_bytes)
        for ring in (tx, rx):
            if ring is not None:
                ring.liveness = link.dead
        close_at_exit(self)

    # ---- send: where the short way of Port is not open ----

    def _send_slow(
        self,
        tensors: Sequence[Any],
        meta: bytes,
        fields: Fields,
        timeout: float | None,
        transfer: bool | None,
        wire: Any,
    ) -> int:
        self.check_not_reserved()
        deadline = deadline_ns(timeout)
        turn = Holder(self.send_gate)
        try:
            if not turn.take(max(0.0, seconds_until(deadline))):
                raise WaitTimeoutError(f"another thread is sending to {self.peer}; wait for it")
            if self._closed:
                raise ClosedError(f"the channel to {self.peer} is closed; connect again")
            if self._round_trips is None:
                return self._sender.send(tensors, meta, fields, deadline, transfer, wire)
            begin_ns, self._sender.waited_ns = time.monotonic_ns(), 0
            nbytes = self._sender.send(tensors, meta, fields, deadline, transfer, wire)
            waited_ns, way = self._sender.waited_ns, self._sender.way
            self._round_trips.note_sent(fields[_REQUEST_ID], begin_ns, waited_ns, nbytes, way)
            return nbytes
        finally:
            turn.give()

    def start_learning(self, measured: dict[str, Cost]) -> None:
        """Takes what carriers cost here; the ring is measured now."""
        assert self._tx is not None
        small, large = (self._encoder.copy_ns(self._tx, nbytes) for nbytes in (1 << 16, 1 << 20))
        if small is not None and large is not None and large[0] > small[0]:
            copies = cost_of(small, large)
            measured = {**measured, RING: copies, TILE: Cost(2 * copies.fixed_ns, copies.per_byte_ns)}
        self._sender.chooser.start(measured)
        self.threshold = self._sender.chooser.threshold

    def _clear_way(self, deadline: int) -> None:
        """Waits for a free slot that the next message may take. The caller holds the send gate."""
        self._sender.clear(deadline)

    def _make_room(self, deadline: int) -> None:
        """Waits for a free slot and meanwhile reads ahead: the peer may itself wait until we read."""
        receiver, tx, rx = self._receiver, self._tx, self._rx
        assert tx is not None
        assert rx is not None
        turn = Holder(self.receive_gate)
        while not tx.ready():
            # Another thread may be reading, and leave at any time: then it is on us.
            try:
                reads = receiver.ahead_bytes < MAX_READ_AHEAD_BYTES and turn.take()
                while reads and receiver.read_ahead():
                    pass
            except (ClosedError, PeerDiedError):
                return  # the wait for the slot will say so
            finally:
                turn.give()
            left = seconds_until(deadline)
            if left <= 0 or self._closed or self._link.dead():
                return
            incoming = receiver.wait_ring if reads else None
            waits = [tx] if incoming is None else [tx, incoming]
            self._bell.wait(waits, min(left, 0.01 if incoming is None else 0.1))

    # ---- receive: where the short way of Port is not open ----

    def _begin(self, note: Message) -> None:
        self._receiver.begin(note)

    def _recv_slow(self, deadline: int) -> Message:
        turn = Holder(self.receive_gate)
        try:
            self._begin_receive(turn, deadline)
            return self._receiver.receive(deadline)
        finally:
            turn.give()

    def _lease_slow(self, deadline: int) -> Lease | HeldMessage:
        turn = Holder(self.receive_gate)
        try:
            self._begin_receive(turn, deadline)
            return self._receiver.lease(deadline)
        finally:
            turn.give()

    def _take_slow(self, lease: bool) -> Lease | HeldMessage | None:
        turn = Holder(self.receive_gate)
        try:
            self._begin_receive(turn, NOW_NS)
            return self._receiver.take(lease)
        finally:
            turn.give()

    def _poll_slow(self) -> bool:
        if self.flush_due and self._tx is not None:
            return self._tx.ready() or bool(self._link.dead())
        return self._receiver.ready()

    async def arecv(self, timeout: float | None = None) -> Message:
        """:meth:`recv` for asyncio: the loop goes on while this waits. Cancelling it loses nothing."""
        return await aio.receive(self, timeout)

    async def asend(self, tensors: Sequence[Any], **options: Any) -> int:
        """:meth:`send` for asyncio, with the same options: a large message, or one the peer has no room for yet, is
        sent from a thread. Cancelling it does not recall what is being sent."""
        return await aio.send(self, tensors, options)

    def helper(self) -> aio.Helper:
        """The thread that waits for asyncio."""
        with self._helper_lock:  # loops of several threads may ask
            if self._closed:
                raise ClosedError(f"the channel to {self.peer} is closed; connect again")
            if self._helper is None:
                self._helper = aio.Helper(self, *self._bell_options)
            return self._helper

    def wait_link(self, deadline: float) -> bool:
        """Waits for a message over ZeroMQ until `deadline` (time.monotonic seconds); True if one is there."""
        return self._link.wait(deadline)

    @property
    def wait_ring(self) -> Ring | None:
        """The ring whose next change makes :meth:`poll` true; None while ZeroMQ is what it waits for."""
        return self._tx if self.flush_due else self._receiver.wait_ring

    def _begin_receive(self, turn: Holder, deadline: int) -> None:
        """Takes the receive lock where it was not to be had at once, or something has to be done before."""
        if self._closed:
            raise ClosedError(f"the channel to {self.peer} is closed; connect again")
        # The peer may wait for the rest before it says anything; a thread that sends now writes it itself.
        flushing = Holder(self.send_gate)
        try:
            while self.flush_due and flushing.take():
                if self._sender.flush(NOW_NS) or seconds_until(deadline) <= 0:
                    break
                flushing.give()
        finally:
            flushing.give()
        if not turn.take(max(0.0, seconds_until(deadline))):
            raise WaitTimeoutError(f"another thread is receiving from {self.peer}; wait for it")

    # ---- the rest ----

    def _can_send_slow(self, n: int) -> bool:
        if self._closed:
            return False
        if self._link.dead():
            return True
        if self._tx is None:
            return self._link.can_send()
        if self.flush_due:
            flushing = Holder(self.send_gate)
            try:
                if not (flushing.take() and self._sender.flush(NOW_NS)):
                    return False
            finally:
                flushing.give()
        if not (self._tx.ready() if n == 1 else self._tx.free_slots() >= n):
            return False
        return self._link.can_send()

    @property
    def sending(self) -> bool:
        """True while a part of a large message that was given away is still to be written."""
        return self.flush_due

    @property
    def reply_slots(self) -> int:
        """How many slots there are for what the peer sends; 0 where there is no shared memory."""
        return 0 if self._segment is None else self._segment.max_chunks

    @property
    def waiting(self) -> int:
        """How many messages have come and were not taken; one in tiles counts as the slots it fills. 0 once closed."""
        if self._closed:
            return 0
        ring = self._rx
        arrived = self._link.unread if ring is None else ring.unread_slots()
        return int(arrived) + self._receiver.ahead

    @property
    def mapping(self) -> tuple[int, int] | None:
        """Address and bytes of the channel's shared memory in this process, for page-locking; None without any."""
        return None if self._segment is None else (self._segment.address, self._segment.nbytes)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def stats(self) -> dict[str, Any]:
        """Counts of both directions: transfers and bytes by ring (shm) and by ZeroMQ, and by direction."""
        out, inn = self._sender, self._receiver
        return {
            "transport": self.transport,
            "shm_transfers": self._sent + self._received,
            "zmq_transfers": out.zmq_count + inn.zmq_count,
            "shm_bytes": self._sent_bytes + self._received_bytes,
            "zmq_bytes": out.zmq_bytes + inn.zmq_bytes,
            "sent_messages": self._sent + out.zmq_count,
            "received_messages": self._received + inn.zmq_count,
            "sent_bytes": self._sent_bytes + out.zmq_bytes,
            "received_bytes": self._received_bytes + inn.zmq_bytes,
        }

    def close(self) -> None:
        """Says goodbye and gives everything back. The peer reads what was sent, then gets ClosedError."""
        if self._closed:
            return
        self._closed = True
        if self._segment is not None:
            self._segment.close_end()
            self._segment.drop_name()  # who maps it keeps it
        for ring in (self._tx, self._rx):
            if ring is not None:
                ring.close()
        with self._helper_lock:
            if self._helper is not None:
                self._helper.stop()
        self._link.close()
        # The rings keep the mapping; leases the user still holds keep it too.
        self._segment = None
        self.on_close(self)
        _open.discard(self)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<tsqp.Channel to {self.peer} over {self.transport}{' (closed)' if self._closed else ''}>"
