"""Channels: one tensor message at a time between two processes, by ring below the threshold, else by ZeroMQ.

A large message is announced by a note in the ring, so that messages arrive in the order they were sent whatever
carries them, and a reader waits in one place.
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
from . import handshake as hs
from ._channel import Port
from ._message import Lease, Message
from ._ring import Doorbell, Ring, Segment
from .choosing import RING, TILE, ZMQ, Chooser, Cost, cost_of
from .config import parse_endpoint
from .errors import (
    ClosedError,
    ConfigError,
    ConnectError,
    EndpointError,
    PeerDiedError,
    ProtocolError,
    WaitTimeoutError,
)
from .links import MAX_FRAME_BYTES, ClientLink, Link
from .receiving import NOW_NS, HeldMessage, Receiver
from .sending import Fields, Sender, seconds_until

#: A server can't make a client map more than this.
MAX_SEGMENT_BYTES = 64 << 30
#: What a sender that waits for a slot reads ahead at most, so that two full rings can't block each other.
MAX_READ_AHEAD_BYTES = 1 << 30
#: No declared length of a peer makes this end allocate more for one message, unless it was told so.
MAX_MESSAGE_BYTES = MAX_FRAME_BYTES
_FOREVER_S = 1e9

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
        self._helper_lock = threading.Lock()
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
        transfer: bool,
        wire: Any,
    ) -> int:
        self.check_not_reserved()
        with self.send_gate:
            if self._closed:
                raise ClosedError(f"the channel to {self.peer} is closed; connect again")
            return self._sender.send(tensors, meta, fields, timeout, transfer, wire)

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
        while not tx.ready():
            # Another thread may be reading, and leave at any time: then it is on us.
            reads = receiver.ahead_bytes < MAX_READ_AHEAD_BYTES and self.receive_gate.acquire(blocking=False)
            if reads:
                try:
                    while receiver.read_ahead():
                        pass
                except (ClosedError, PeerDiedError):
                    return  # the wait for the slot will say so
                finally:
                    self.receive_gate.release()
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
        self._begin_receive(deadline)
        try:
            return self._receiver.receive(deadline)
        finally:
            self.receive_gate.release()

    def _lease_slow(self, deadline: int) -> Lease | HeldMessage:
        self._begin_receive(deadline)
        try:
            return self._receiver.lease(deadline)
        finally:
            self.receive_gate.release()

    def _take_slow(self, lease: bool) -> Lease | HeldMessage | None:
        self._begin_receive(NOW_NS)
        try:
            return self._receiver.take(lease)
        finally:
            self.receive_gate.release()

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

    def _begin_receive(self, deadline: int) -> None:
        """Takes the receive lock where it was not to be had at once, or something has to be done before."""
        if self._closed:
            raise ClosedError(f"the channel to {self.peer} is closed; connect again")
        # The peer may wait for the rest before it says anything; a thread that sends now writes it itself.
        while self.flush_due and self.send_gate.acquire(blocking=False):
            try:
                if self._sender.flush(NOW_NS) or seconds_until(deadline) <= 0:
                    break
            finally:
                self.send_gate.release()
        left = min(max(0.0, seconds_until(deadline)), threading.TIMEOUT_MAX)
        if not self.receive_gate.acquire(timeout=left):
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
            if not self.send_gate.acquire(blocking=False):
                return False
            try:
                if not self._sender.flush(NOW_NS):
                    return False
            finally:
                self.send_gate.release()
        if not (self._tx.ready() if n == 1 else self._tx.free_slots() >= n):
            return False
        return self._link.can_send()

    @property
    def sending(self) -> bool:
        """True while a part of a large message that was given away is still to be written."""
        return self.flush_due

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
        for ring in (self._tx, self._rx):
            if ring is not None:
                ring.close()
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


def check_carriers(threshold: int | str | None, large: str) -> None:
    """Raises :class:`ConfigError` where `threshold` or `large` is no known way."""
    if large not in ("zmq", "tile", "auto"):
        raise ConfigError(f"large={large!r} is none of 'zmq', 'tile' and 'auto'; choose one")
    whole = isinstance(threshold, int) and not isinstance(threshold, bool) and threshold > 0
    if threshold not in (None, "auto") and not whole:
        raise ConfigError(
            f"threshold={threshold!r} is neither a positive number of bytes nor 'auto'; give one, or None"
        )


def check_limit(max_message_bytes: int) -> None:
    """Raises :class:`ConfigError` where it is no positive number of bytes."""
    whole = isinstance(max_message_bytes, int) and not isinstance(max_message_bytes, bool)
    if not whole or not 0 < max_message_bytes < 1 << 63:
        raise ConfigError(f"max_message_bytes={max_message_bytes!r} is not a positive whole number of bytes; give one")


def make_channel(
    link: Link,
    segment: Segment | None,
    *,
    server: bool,
    scheme: str,
    peer: str,
    threshold: int | str,
    large: str,
    wait: str,
    spin_us: float,
    futex: bool,
    max_message_bytes: int,
) -> Channel:
    """A channel over `link` and the two rings of `segment`: ring 0 carries requests, ring 1 replies."""
    tx = rx = None
    if segment is not None:
        tx = Ring(segment, 1 if server else 0, True, wait, spin_us, futex)
        rx = Ring(segment, 0 if server else 1, False, wait, spin_us, futex)
    chooser = Chooser(threshold, large, segment.max_chunk_bytes if segment is not None else 0)
    return Channel(
        link,
        segment,
        tx,
        rx,
        scheme=scheme,
        chooser=chooser,
        peer=peer,
        spin_us=spin_us,
        futex=futex,
        wait=wait,
        max_message_bytes=max_message_bytes,
    )


def connect(
    endpoint: str,
    timeout: float | None = 10.0,
    *,
    shm: bool = True,
    threshold: int | str | None = None,
    large: str = "zmq",
    wait: str = "auto",
    spin_us: float = 400.0,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> Channel:
    """Connects to a :func:`tsqp.listen` endpoint.

    Args:
        endpoint: ``ipc:///path`` or ``tcp://address:port``, numeric.
        timeout: seconds to wait for the server, which may start later; None waits for ever.
        shm: False keeps everything on ZeroMQ. Shared memory is used where both ends see the same host.
        threshold: bytes from which a message of this end is large: None is the size of a slot (10 MiB unless the
            server says otherwise), ``auto`` measures both carriers now and goes on learning.
        large: how this end sends messages of the threshold's size and more: ``zmq``, ``tile`` (cut into
            tiles that follow each other through the ring), or ``auto``, whichever is faster here.
        wait: ``auto``, ``spin``, ``block`` or ``poll`` (no futex; chosen by itself inside Gramine).
        spin_us: the longest spin before blocking, in microseconds.
        max_message_bytes: a message of the server that claims more, on the wire or decoded, is dropped and
            MessageTooLargeError raised before anything is allocated for it.

    Raises:
        ConfigError: an argument has a value that can't work.
        EndpointError: the endpoint is malformed, or can't work here; its socket may not be opened by this user.
        ConnectError: nobody answered in time, or the server refused: its reason is in the text.
        PeerDiedError: the server died during the handshake.
        ProtocolError: what answered speaks something else, or another version of tsqp.
        SegmentError: the server's segment can't be mapped; its subclasses say why (SegmentPermissionError,
            SegmentVersionError, SegmentGeometryError, SegmentTruncatedError, ...).
        RingUsageError: somebody else is attached to the segment that the server offers.
        DescriptorsExhaustedError: this process has too few file descriptors left.
    """
    parsed = parse_endpoint(endpoint)
    check_carriers(threshold, large)
    check_limit(max_message_bytes)
    if parsed.scheme == "ipc" and hs.in_gramine():
        raise EndpointError("ipc:// never reaches the host from inside Gramine; use tcp://127.0.0.1:PORT")
    if hs.in_gramine() and wait == "block":
        raise EndpointError("wait='block' needs a futex, which never crosses the enclave's border; use auto or poll")
    link = ClientLink(endpoint, max_message_bytes)
    try:
        options = {"scheme": parsed.scheme, "large": large, "wait": wait, "spin_us": spin_us}
        options["max_message_bytes"] = max_message_bytes
        options["threshold"] = "slot" if threshold is None else threshold
        return _shake_hands(link, endpoint, parsed.is_loopback and shm, timeout, options)
    except BaseException:
        link.close()
        raise


def _shake_hands(link: ClientLink, endpoint: str, shm: bool, timeout: float | None, options: dict[str, Any]) -> Channel:
    futex = hs.futex_works() and options["wait"] != "poll"
    link.say(hs.HELLO, hs.pack(hs.Hello(hs.PROTOCOL, shm, futex)))
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
    learns = segment is not None and "auto" in (options["threshold"], options["large"])
    measured = measure_link(link, timeout) if learns else {}
    link.say(hs.READY, hs.pack(hs.Ready(segment is not None, not hs.in_gramine())))
    channel = make_channel(
        link, segment, server=False, peer=f"server {endpoint}", futex=welcome.futex and futex, **options
    )
    if learns:
        channel.start_learning(measured)
    return channel


def measure_link(link: ClientLink, timeout: float | None) -> dict[str, Cost]:
    """What a message over this connection's ZeroMQ costs, from messages that the server only acknowledges."""
    deadline = time.monotonic() + (_FOREVER_S if timeout is None else timeout)
    best: dict[int, float] = {}
    for nbytes in (1 << 10, 1 << 21) * 3:
        begin = time.perf_counter_ns()
        link.say(hs.PROBE, bytes(nbytes))
        answer = link.hear(deadline)
        if answer is None or answer[0] != hs.PROBE:
            raise ProtocolError("the server did not acknowledge a measurement; use one version of tsqp at both ends")
        spent = time.perf_counter_ns() - begin
        best[nbytes] = min(best.get(nbytes, spent), spent)
    small, large = sorted(best.items())
    return {ZMQ: cost_of((small[0], small[1] / 2), (large[0], large[1] - small[1] / 2))}


def _attach(welcome: hs.Welcome) -> Segment | None:
    """Maps the server's segment. None where this process does not see the server's shared memory."""
    slots, nbytes = welcome.max_chunks, welcome.max_chunk_bytes
    if min(slots, nbytes) <= 0 or 2 * slots * nbytes > MAX_SEGMENT_BYTES:
        raise ProtocolError(
            f"the server offers a segment of {slots} x 2 slots of {nbytes} bytes; together they may have 1 to "
            f"{MAX_SEGMENT_BYTES} bytes"
        )
    try:
        return Segment.attach(welcome.max_chunk_bytes, welcome.max_chunks, 2, welcome.name, welcome.session)
    except FileNotFoundError:
        return None  # another mount of /dev/shm, as in a container of its own: ZeroMQ carries everything


__all__ = ["Channel", "HeldMessage", "connect", "make_channel"]
