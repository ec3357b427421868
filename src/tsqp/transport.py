"""Channels: one tensor message at a time between two processes, by ring below the threshold, else by ZeroMQ.

A large message is announced by a note in the ring, so that messages arrive in the order they were sent whatever
carries them, and a reader waits in one place. Here an end is made: by :func:`connect`, or by the listener.
"""

from __future__ import annotations

import time
from typing import Any

from . import curve
from . import handshake as hs
from ._ring import Ring, Segment
from .channel import Channel, close_at_exit
from .choosing import ZMQ, Chooser, Cost, cost_of
from .config import parse_endpoint
from .enclave import check_connecting
from .errors import ConfigError, ConnectError, PeerDiedError, ProtocolError, SegmentPermissionError
from .links import MAX_FRAME_BYTES, ClientLink, Link
from .receiving import HeldMessage

#: A server can't make a client map more than this.
MAX_SEGMENT_BYTES = 64 << 30
#: No declared length of a peer makes this end allocate more for one message, unless it was told so.
MAX_MESSAGE_BYTES = MAX_FRAME_BYTES
#: What a client takes of large messages before somebody reads them.
MAX_INBOX_BYTES = 1 << 30
_FOREVER_S = 1e9


def check_carriers(threshold: int | str | None, large: str) -> None:
    """Raises :class:`ConfigError` where `threshold` or `large` is no known way."""
    if large not in ("zmq", "tile", "auto"):
        raise ConfigError(f"large={large!r} is none of 'zmq', 'tile' and 'auto'; choose one")
    whole = isinstance(threshold, int) and not isinstance(threshold, bool) and threshold > 0
    if threshold not in (None, "auto") and not whole:
        raise ConfigError(
            f"threshold={threshold!r} is neither a positive number of bytes nor 'auto'; give one, or None"
        )


def check_limit(nbytes: int, name: str = "max_message_bytes") -> None:
    """Raises :class:`ConfigError` where it is no positive number of bytes."""
    whole = isinstance(nbytes, int) and not isinstance(nbytes, bool)
    if not whole or not 0 < nbytes < 1 << 63:
        raise ConfigError(f"{name}={nbytes!r} is not a positive whole number of bytes; give one")


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
    max_inbox_bytes: int = MAX_INBOX_BYTES,
    curve_key: curve.PathLike | None = None,
    curve_server: curve.PathLike | None = None,
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
        max_inbox_bytes: with more bytes of unread messages over ZeroMQ than this no more are taken, and the server
            has to wait; libzmq itself takes up to 64 messages more.
        curve_key, curve_server: this client's secret-key file and its server's public-key file (``tsqp keygen``). All
            that goes over ZeroMQ is encrypted then, and the server is the one with that key, or there is no connection.
            What goes through the ring, between ends on one host, is in shared memory and not encrypted.
            Needed beyond this host. Default: ``TSQP_CURVE_KEY``, ``TSQP_CURVE_SERVER``.

    Raises:
        ConfigError: an argument has a value that can't work; KeyFileError for a file of keys.
        EndpointError: the endpoint is malformed, or can't work here; InsecureEndpointError: it is beyond this host and
            there are no keys.
        ConnectError: nobody answered in time, the server refused (its reason is in the text), or its socket may not be
            opened by this user; AuthenticationError: the keys do not fit, only one end has some, or the server of an
            ipc socket runs as another user (other than root).
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
    check_limit(max_inbox_bytes, "max_inbox_bytes")
    check_connecting(parsed, wait)
    keys = curve.client_keys(curve_key, curve_server)
    curve.check_reach(parsed, keys)
    link = ClientLink(endpoint, max_message_bytes, max_inbox_bytes, keys)
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
    deadline = time.monotonic() + (_FOREVER_S if timeout is None else timeout)
    trouble = link.meet(deadline)
    answer = None
    if trouble is None:
        link.say(hs.HELLO, hs.pack(hs.Hello(hs.PROTOCOL, shm, futex)))
        answer = link.hear(deadline)
        while answer is not None and answer[0] == hs.PROBE:  # the server asks whether there is still somebody
            answer = link.hear(deadline)
    if answer is None:
        advice = trouble or "start one (tsqp serve) or correct the endpoint"
        raise ConnectError(f"no tsqp server answered at {endpoint} within {timeout} s; {advice}")
    kind, body = answer
    if kind == hs.REFUSE:
        raise ConnectError(f"the server at {endpoint} refused: {hs.unpack(hs.Refuse, body).reason}")
    if kind != hs.WELCOME:
        raise ProtocolError(f"the server at {endpoint} did not answer the handshake with a welcome")
    welcome = hs.unpack(hs.Welcome, body)
    if welcome.protocol != hs.PROTOCOL:
        raise ProtocolError(f"the server speaks protocol {welcome.protocol}, not {hs.PROTOCOL}; use one version")
    reason = link.dead()
    if reason:  # libzmq has another by now, perhaps
        raise PeerDiedError(f"the server died during the handshake: {reason}; connect again")
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
    except SegmentPermissionError:
        if hs.in_gramine():
            return None  # not the file that the manifest allows
        raise


__all__ = ["Channel", "HeldMessage", "close_at_exit", "connect", "make_channel"]
