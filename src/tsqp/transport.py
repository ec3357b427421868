"""Channels: one tensor message at a time between two processes, by ring below the threshold, else by ZeroMQ.

A large message is announced by a note in the ring, so that messages arrive in the order they were sent whatever
carries them, and a reader waits in one place.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import handshake as hs
from ._message import FLAG_VIA_ZMQ, Codec, Lease, Message, deadline_ns, pack_meta
from ._ring import Doorbell, Ring, Segment
from .config import parse_endpoint
from .errors import ClosedError, ConnectError, EndpointError, ProtocolError, WaitTimeoutError
from .links import ClientLink, Link

#: A server can't make a client map more than this.
MAX_SEGMENT_BYTES = 64 << 30
#: What a sender that waits for a slot reads ahead at most, so that two full rings can't block each other.
MAX_READ_AHEAD_BYTES = 1 << 30
_FOREVER_S = 1e9

_open: weakref.WeakSet[Any] = weakref.WeakSet()


def close_at_exit(closable: Any) -> None:
    """Registers an object whose ``close()`` is called if the interpreter ends before its user did."""
    _open.add(closable)


@atexit.register
def _close_open() -> None:
    for closable in list(_open):
        closable.close()


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


class Channel:
    """One end of a connection. Threads may share it: sends are one at a time, and so are receives.

    Attributes: ``threshold`` (bytes at which a message takes ZeroMQ), ``peer`` (text), ``transport`` (``shm+ipc``,
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
        threshold: int,
        peer: str,
        bell: Doorbell,
    ) -> None:
        self.peer, self.threshold = peer, threshold
        self.transport = f"shm+{scheme}" if segment is not None else scheme
        self.on_close: Callable[[Channel], None] = lambda channel: None
        self._link, self._segment, self._tx, self._rx, self._bell = link, segment, tx, rx, bell
        self._encoder, self._decoder = Codec(), Codec()
        self._send_lock, self._recv_lock = threading.Lock(), threading.Lock()
        self._read_ahead: deque[Message] = deque()
        self._read_ahead_bytes = 0
        self._sequence = 0  # of our large messages
        self._awaited: int | None = None  # an announced large message that has not arrived yet
        self._closed = False
        self._counts = [0] * 8  # transfers and bytes: ring out, ring in, ZeroMQ out, ZeroMQ in
        for ring in (tx, rx):
            if ring is not None:
                ring.liveness = link.dead
        close_at_exit(self)

    # ---- send ----

    def send(
        self,
        tensors: Sequence[Any],
        *,
        tag: int = 0,
        meta: Mapping[str, Any] | bytes | None = None,
        request_id: int = 0,
        status: int = 0,
        flags: int = 0,
        site: int = 0,
        index: int = 0,
        compute_ns: int = 0,
        queue_ns: int = 0,
        timeout: float | None = None,
        transfer: bool = False,
    ) -> int:
        """Sends one message; when it returns, the tensors may be changed.

        Args:
            tensors: at most 64 torch CPU tensors or NumPy arrays, of any rank up to 8, contiguous or not.
            tag: the method, or what the user likes (32 bits); request_id: ties replies to requests (64 bits).
            meta: a small mapping (packed at most 64 KiB), or bytes that are msgpack already.
            flags: 24 bits for the user; status, site, index, compute_ns, queue_ns: header fields of RPC.
            timeout: seconds; None waits for ever, but notices a dead peer.
            transfer: the caller gives the tensors away and never changes them: a large message need not be
                waited for.

        Returns:
            the message's bytes on the wire.

        Raises:
            MessageError (and its subclasses), WaitTimeoutError, ClosedError, PeerDiedError.
        """
        packed = pack_meta(meta)
        with self._send_lock:
            if self._closed:
                raise ClosedError(f"the channel to {self.peer} is closed; connect again")
            total = self._encoder.plan(
                tensors, packed, tag, flags, request_id, status, site, index, compute_ns, queue_ns
            )
            counts = self._counts
            if self._tx is not None and total < self.threshold:
                if not self._tx.ready():
                    self._make_room(timeout)
                self._encoder.write(self._tx, packed, deadline_ns(timeout))
                counts[0] += 1
                counts[1] += total
            else:
                self._send_large(tensors, packed, timeout, transfer)
                counts[4] += 1
                counts[5] += total
            return total

    def _send_large(self, tensors: Sequence[Any], meta: bytes, timeout: float | None, transfer: bool) -> None:
        deadline = time.monotonic() + (_FOREVER_S if timeout is None else timeout)
        head = self._encoder.head_bytes(meta)
        frames = self._encoder.payload(tensors)
        sequence = self._sequence
        self._sequence += 1
        if self._tx is None:
            self._link.send(head, frames, sequence, deadline, transfer)
            return
        if not self._tx.ready():
            self._make_room(timeout)
        note = self._encoder.announce(self._tx, deadline_ns(timeout))
        note.publish(sequence)
        self._link.send(head, frames, sequence, deadline, transfer)

    def _make_room(self, timeout: float | None) -> None:
        """Waits for a free slot and meanwhile reads ahead: the peer may itself wait until we read."""
        assert self._tx is not None
        assert self._rx is not None
        deadline = time.monotonic() + (_FOREVER_S if timeout is None else timeout)
        while not self._tx.ready():
            if self._read_ahead_bytes >= MAX_READ_AHEAD_BYTES or not self._recv_lock.acquire(blocking=False):
                return  # another thread reads; the plain wait for a slot does
            try:
                if self._awaited is None and self._rx.ready():
                    message = self._receive(0.0)
                    if message is not None:
                        self._read_ahead.append(message)
                        self._read_ahead_bytes += message.nbytes
                    continue
            except (ClosedError, WaitTimeoutError):
                return  # the wait for the slot will say so, or go on
            finally:
                self._recv_lock.release()
            left = deadline - time.monotonic()
            if left <= 0 or self._link.dead():
                return
            self._bell.wait([self._tx, self._rx], min(left, 0.1))

    # ---- receive ----

    def recv(self, timeout: float | None = None) -> Message:
        """The next message, its tensors in private memory.

        Raises WaitTimeoutError after `timeout` seconds (nothing is lost: a later call gets the message), ClosedError
        when the peer closed and all is read, PeerDiedError, MessageError where the peer sent rubbish, ProtocolError.
        """
        with self._receiving(timeout):
            if self._read_ahead:
                return self._take_read_ahead()
            message = self._receive(timeout)
            if message is None:
                raise WaitTimeoutError(f"no message from {self.peer} within {timeout} s; it is connected: wait longer")
            return message

    def lease(self, timeout: float | None = None) -> Lease | HeldMessage:
        """A ``with`` block over the next message; tensors of a ring message are views into its slot, valid inside
        the block only. Raises like :meth:`recv`."""
        with self._receiving(timeout):
            if self._read_ahead:
                return HeldMessage(self._take_read_ahead())
            lease = None
            if self._rx is not None and self._awaited is None:
                lease = self._decoder.lease(self._rx, deadline_ns(timeout))
            return self._unwrap(lease, timeout)

    def recv_nowait(self, lease: bool = True) -> Lease | HeldMessage | None:
        """Like :meth:`lease` (``lease=False``: a private copy in the same wrapper) but None where no whole message
        is there yet."""
        with self._receiving(None):
            if self._read_ahead:
                return HeldMessage(self._take_read_ahead())
            if self._rx is None or self._awaited is not None:
                return self._held(self._receive(0.0))
            if not lease:
                return self._held(self._receive(0.0)) if self._rx.ready() else None
            leased = self._decoder.lease(self._rx, 0)
            return None if leased is None else self._held_or_lease(leased)

    def poll(self) -> bool:
        """True if :meth:`recv_nowait` would return a message or raise because the peer is gone."""
        if self._read_ahead or self._link.dead():
            return True
        if self._rx is None or self._awaited is not None:
            return self._link.pending()
        return self._rx.ready()

    @property
    def wait_ring(self) -> Ring | None:
        """The ring whose next message ends a wait on this channel; None while ZeroMQ is what it waits for."""
        return self._rx if self._awaited is None else None

    def _receiving(self, timeout: float | None) -> _Receiving:
        if self._closed:
            raise ClosedError(f"the channel to {self.peer} is closed; connect again")
        if not self._recv_lock.acquire(blocking=False) and not self._recv_lock.acquire(
            timeout=-1 if timeout is None else timeout
        ):
            raise WaitTimeoutError(f"another thread is receiving from {self.peer}; wait for it")
        return _Receiving(self._recv_lock)

    def _take_read_ahead(self) -> Message:
        message = self._read_ahead.popleft()
        self._read_ahead_bytes -= message.nbytes
        return message

    def _receive(self, timeout: float | None) -> Message | None:
        """The next message copied to private memory; None only where a large one is still on its way."""
        if self._rx is not None and self._awaited is None:
            message = self._decoder.read(self._rx, deadline_ns(timeout))
            if not message.flags & FLAG_VIA_ZMQ:
                self._counts[2] += 1
                self._counts[3] += message.nbytes
                return message
            self._awaited = message.index
        return self._receive_large(timeout)

    def _receive_large(self, timeout: float | None) -> Message | None:
        deadline = time.monotonic() + (_FOREVER_S if timeout is None else timeout)
        arrived = self._link.recv(deadline)
        if arrived is None:
            return None
        sequence, head, frames = arrived
        awaited, self._awaited = self._awaited, None
        if awaited is not None and sequence != awaited:
            raise ProtocolError(f"{self.peer} announced large message {awaited} and sent {sequence}; close the channel")
        message = self._decoder.decode_frames(head, frames)
        self._counts[6] += 1
        self._counts[7] += message.nbytes
        return message

    def _held(self, message: Message | None) -> HeldMessage | None:
        return None if message is None else HeldMessage(message)

    def _held_or_lease(self, lease: Lease) -> Lease | HeldMessage | None:
        message = lease.message
        if not message.flags & FLAG_VIA_ZMQ:
            self._counts[2] += 1
            self._counts[3] += message.nbytes
            return lease
        self._awaited = message.index
        lease.release()
        return self._held(self._receive_large(0.0))

    def _unwrap(self, lease: Lease | None, timeout: float | None) -> Lease | HeldMessage:
        if lease is not None and not lease.message.flags & FLAG_VIA_ZMQ:
            self._counts[2] += 1
            self._counts[3] += lease.message.nbytes
            return lease
        if lease is not None:
            self._awaited = lease.message.index
            lease.release()
        message = self._receive_large(timeout)
        if message is None:
            raise WaitTimeoutError(f"no message from {self.peer} within {timeout} s; it is connected: wait longer")
        return HeldMessage(message)

    # ---- the rest ----

    def can_send(self, n: int = 1) -> bool:
        """True if `n` messages could be sent now without waiting for the peer to read."""
        if self._closed:
            return False
        if self._tx is not None and self._tx.free_slots() < n:
            return False
        return self._link.can_send()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def stats(self) -> dict[str, Any]:
        """Counts of both directions: transfers and bytes by ring (shm) and by ZeroMQ, and by direction."""
        ring_out, ring_out_bytes, ring_in, ring_in_bytes, zmq_out, zmq_out_bytes, zmq_in, zmq_in_bytes = self._counts
        return {
            "transport": self.transport,
            "shm_transfers": ring_out + ring_in,
            "zmq_transfers": zmq_out + zmq_in,
            "shm_bytes": ring_out_bytes + ring_in_bytes,
            "zmq_bytes": zmq_out_bytes + zmq_in_bytes,
            "sent_messages": ring_out + zmq_out,
            "received_messages": ring_in + zmq_in,
            "sent_bytes": ring_out_bytes + zmq_out_bytes,
            "received_bytes": ring_in_bytes + zmq_in_bytes,
        }

    def close(self) -> None:
        """Says goodbye and gives everything back. The peer reads what was sent, then gets ClosedError."""
        if self._closed:
            return
        self._closed = True
        if self._segment is not None:
            self._segment.close_end()
        for ring in (self._tx, self._rx):
            if ring is not None:
                ring.close()
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


class _Receiving:
    """Releases the receive lock that was taken with a deadline."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


def make_channel(
    link: Link,
    segment: Segment | None,
    *,
    server: bool,
    scheme: str,
    peer: str,
    threshold: int,
    wait: str,
    spin_us: float,
    futex: bool,
) -> Channel:
    """A channel over `link` and the two rings of `segment`: ring 0 carries requests, ring 1 replies."""
    tx = rx = None
    if segment is not None:
        tx = Ring(segment, 1 if server else 0, True, wait, spin_us, futex)
        rx = Ring(segment, 0 if server else 1, False, wait, spin_us, futex)
    bell = Doorbell(spin_us, futex, wait)
    return Channel(link, segment, tx, rx, scheme=scheme, threshold=threshold, peer=peer, bell=bell)


def connect(
    endpoint: str, timeout: float | None = 10.0, *, shm: bool = True, wait: str = "auto", spin_us: float = 50.0
) -> Channel:
    """Connects to a :func:`tsqp.listen` endpoint.

    Args:
        endpoint: ``ipc:///path`` or ``tcp://address:port``, numeric.
        timeout: seconds to wait for the server, which may start later; None waits for ever.
        shm: False keeps everything on ZeroMQ. Shared memory is used where both ends see the same host.
        wait: ``auto``, ``spin``, ``block`` or ``poll`` (no futex; chosen by itself inside Gramine).
        spin_us: the longest spin before blocking, in microseconds.

    Raises:
        EndpointError, ConnectError (nobody answers, or the server refuses), ProtocolError, SegmentError.
    """
    parsed = parse_endpoint(endpoint)
    if parsed.scheme == "ipc" and hs.in_gramine():
        raise EndpointError("ipc:// never reaches the host from inside Gramine; use tcp://127.0.0.1:PORT")
    if hs.in_gramine() and wait == "block":
        raise EndpointError("wait='block' needs a futex, which never crosses the enclave's border; use auto or poll")
    link = ClientLink(endpoint)
    try:
        return _shake_hands(link, endpoint, parsed.scheme, parsed.is_loopback and shm, timeout, wait, spin_us)
    except BaseException:
        link.close()
        raise


def _shake_hands(
    link: ClientLink, endpoint: str, scheme: str, shm: bool, timeout: float | None, wait: str, spin_us: float
) -> Channel:
    link.say(hs.HELLO, hs.pack(hs.Hello(hs.PROTOCOL, shm, hs.futex_works() and wait != "poll")))
    answer = link.hear(time.monotonic() + (_FOREVER_S if timeout is None else timeout))
    if answer is None:
        raise ConnectError(
            f"no tsqp server answered at {endpoint} within {timeout} s; start one (tsqp serve) or correct the endpoint"
        )
    kind, body = answer
    if kind == hs.REFUSE:
        raise ConnectError(f"the server at {endpoint} refused: {hs.unpack(hs.Refuse, body).reason}")
    if kind != hs.WELCOME:
        raise ProtocolError(f"the server at {endpoint} did not answer the handshake with a welcome")
    welcome = hs.unpack(hs.Welcome, body)
    if welcome.protocol != hs.PROTOCOL:
        raise ProtocolError(f"the server speaks protocol {welcome.protocol}, not {hs.PROTOCOL}; use one version")
    segment = _attach(welcome) if welcome.shm else None
    link.say(hs.READY, hs.pack(hs.Ready(segment is not None, not hs.in_gramine())))
    return make_channel(
        link,
        segment,
        server=False,
        scheme=scheme,
        peer=f"server {endpoint}",
        threshold=segment.max_chunk_bytes if segment is not None else 0,
        wait=wait,
        spin_us=spin_us,
        futex=welcome.futex and hs.futex_works() and wait != "poll",
    )


def _attach(welcome: hs.Welcome) -> Segment | None:
    """Maps the server's segment. None where this process does not see the server's shared memory."""
    if 2 * welcome.max_chunks * welcome.max_chunk_bytes > MAX_SEGMENT_BYTES:
        raise ProtocolError(
            f"the server offers a segment of {welcome.max_chunks} x 2 slots of {welcome.max_chunk_bytes} bytes, over "
            f"the limit of {MAX_SEGMENT_BYTES} bytes"
        )
    try:
        return Segment.attach(welcome.max_chunk_bytes, welcome.max_chunks, 2, welcome.name, welcome.session)
    except FileNotFoundError:
        return None  # another mount of /dev/shm, as in a container of its own: ZeroMQ carries everything


__all__ = ["Channel", "HeldMessage", "connect", "make_channel"]
