"""The server's end of an endpoint: one ROUTER, one I/O thread, any number of clients.

The I/O thread owns the ROUTER: it answers handshakes, creates each client's segment, moves large messages, and
learns from libzmq's monitor at once when a connection ends. Messages below the threshold never pass through it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from . import handshake as hs
from . import segments
from ._ring import Doorbell, Segment
from .config import Endpoint, parse_endpoint
from .errors import (
    ClosedError,
    ConfigError,
    EndpointBusyError,
    EndpointError,
    ProtocolError,
    SegmentError,
    WaitTimeoutError,
)
from .links import MAX_FRAME_BYTES, ServerLink
from .transport import Channel, check_large, close_at_exit, make_channel

HANDSHAKE_TIMEOUT_S = 5.0
_RETRY_MS = 10
_FAREWELL_S = 0.5
#: What libzmq has received and a client sent before it went is delivered; this many messages a client at most.
_RECEIVED_MAX = 2000
_DEALER_FRAMES_MIN = 2


def _refuse_busy(endpoint: Endpoint) -> None:
    """libzmq silently takes over an ipc path in use, so look first; a socket nobody serves is removed."""
    try:
        if not stat.S_ISSOCK(os.stat(endpoint.path).st_mode):
            raise EndpointError(f"{endpoint.path} exists and is no socket; choose another path or remove it")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(endpoint.path)
        except ConnectionRefusedError:
            os.unlink(endpoint.path)
            return
        except OSError as error:
            raise EndpointBusyError(error.errno, f"{endpoint.text} can't be probed: {error.strerror}") from None
    raise _busy(endpoint)


def _busy(endpoint: Endpoint) -> EndpointBusyError:
    text = f"another process listens on {endpoint.text}; stop it or choose another endpoint"
    return EndpointBusyError(errno.EADDRINUSE, text)


def _bind_error(endpoint: Endpoint, error: OSError | zmq.ZMQError) -> EndpointError | EndpointBusyError:
    if error.errno == errno.EADDRINUSE:
        return _busy(endpoint)
    return EndpointError(f"can't listen on {endpoint.text}: {error.strerror}; choose another endpoint")


def check_endpoint(text: str) -> None:
    """Raises :class:`EndpointError` or :class:`EndpointBusyError` where :func:`listen` would: before a long start-up,
    not after it. Binds nothing."""
    endpoint = parse_endpoint(text)
    if endpoint.scheme == "ipc":
        _refuse_busy(endpoint)
    elif endpoint.port:
        family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((endpoint.host.strip("[]"), endpoint.port))
            except OSError as error:
                raise _bind_error(endpoint, error) from None


def _bind(router: zmq.Socket, endpoint: Endpoint) -> str:
    """Binds and returns the endpoint with the port that was chosen."""
    if endpoint.scheme == "ipc":
        if hs.in_gramine():
            raise EndpointError("ipc:// never reaches the host from inside Gramine; use tcp://127.0.0.1:PORT")
        directory = os.path.dirname(endpoint.path)
        if not os.path.isdir(directory):
            raise EndpointError(f"the directory {directory} of {endpoint.text} does not exist; create it (mode 0700)")
        _refuse_busy(endpoint)
    text = endpoint.text if endpoint.port or endpoint.scheme == "ipc" else f"tcp://{endpoint.host}:*"
    try:
        router.bind(text)
    except zmq.ZMQError as error:
        raise _bind_error(endpoint, error) from None
    if endpoint.scheme == "ipc":
        os.chmod(endpoint.path, 0o600)
        return endpoint.text
    return router.get_string(zmq.LAST_ENDPOINT).rstrip("\0")


@dataclass
class _Client:
    """One connection as the I/O thread sees it."""

    identity: bytes
    fd: int
    deadline: float
    futex: bool
    segment: Segment | None
    link: ServerLink | None = None
    channel: Channel | None = None


class Listener:
    """Accepts clients on an endpoint. Made by :func:`tsqp.listen`; see there for the arguments."""

    def __init__(
        self,
        endpoint: str,
        max_chunk_bytes: int,
        max_chunks: int,
        *,
        shm: bool = True,
        max_clients: int = 16,
        shm_name: str | None = None,
        large: str = "zmq",
        wait: str = "auto",
        spin_us: float = 400.0,
        max_inbox_bytes: int = 4 << 30,
    ) -> None:
        parsed = parse_endpoint(endpoint)
        self.max_chunk_bytes, self.max_chunks, self.max_clients = max_chunk_bytes, max_chunks, max_clients
        self._shm = shm and parsed.is_loopback
        self._shm_name = shm_name or os.environ.get("TSQP_SHM_NAME") or None
        for label, value in (("max_chunk_bytes", max_chunk_bytes), ("max_chunks", max_chunks)):
            if not isinstance(value, int) or not 0 < value < 1 << 63:
                raise ConfigError(f"{label}={value!r} is not a positive whole number; give the slots' size and number")
        check_large(large)
        self._large = large
        self._wait, self._spin_us, self._max_inbox_bytes = wait, spin_us, max_inbox_bytes
        self._scheme = parsed.scheme
        self._bell = Doorbell(spin_us, hs.futex_works(), wait)
        self._clients: dict[bytes, _Client] = {}
        self._accepted: deque[Channel] = deque()
        self._channels: list[Channel] = []
        self._outbox: deque[tuple[ServerLink, list[Any]]] = deque()
        self._turn = 0
        self._interrupted = False
        self._stop = False
        self._stop_by = 0.0  # a client that takes nothing does not hold up the close for ever
        self._closed = False
        self._failure: BaseException | None = None  # what ended the I/O thread
        self._lock = threading.Lock()
        segments.reap(segments.leftovers())
        if self._shm:
            # Fails here, with the fix, rather than at the first client.
            Segment.create(max_chunk_bytes, max_chunks, 2, self._shm_name)
        self._pipe_lock = threading.RLock()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._context = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        self._monitor: Any = None
        self._socket_path = ""  # ours to remove, once it is bound
        try:
            self._open(parsed)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._run, name="tsqp-listener", daemon=True)
        self._thread.start()
        close_at_exit(self)

    def _open(self, parsed: Endpoint) -> None:
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._monitor = self._router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.endpoint = _bind(self._router, parsed)
        self._socket_path = parsed.path

    # ---- for users ----

    def accept(self, timeout: float | None = None) -> Channel:
        """The next client's :class:`Channel`. Raises WaitTimeoutError after `timeout` seconds, ClosedError."""
        deadline = time.monotonic() + (timeout if timeout is not None else 1e9)
        while True:
            channel = self.accept_nowait()
            if channel is not None:
                return channel
            left = deadline - time.monotonic()
            if self._take_interrupt() or left <= 0:
                raise WaitTimeoutError(f"no client connected to {self.endpoint} within {timeout} s")
            self._bell.wait([], min(left, 0.5))  # another thread's wait may have taken the bell's ring

    def accept_nowait(self) -> Channel | None:
        """A client that waits to be accepted, or None."""
        self._check_open()
        return self._accepted.popleft() if self._accepted else None

    def wait(self, timeout: float | None = None) -> list[Channel]:
        """Waits for work over all accepted channels, in one thread.

        Returns the channels that have a message, or whose peer is gone, each at most once and in an order that
        rotates from call to call; an empty list after `timeout` seconds or when a new client wants to be accepted.
        """
        deadline = time.monotonic() + (timeout if timeout is not None else 1e9)
        while True:
            self._check_open()
            channels = [c for c in self._channels if not c.closed]
            ready = [c for c in channels if c.poll()]
            left = deadline - time.monotonic()
            if ready or self._accepted or self._take_interrupt() or left <= 0:
                return self._rotate(ready)
            rings = [c.wait_ring for c in channels if c.wait_ring is not None]
            self._bell.wait(rings, min(left, 0.5))

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the listener on {self.endpoint} is closed")
        if self._failure is not None:
            raise ClosedError(f"the listener on {self.endpoint} failed: {self._failure!r}; start it again")

    def _rotate(self, ready: list[Channel]) -> list[Channel]:
        if not ready:
            return ready
        self._turn = (self._turn + 1) % len(ready)
        return ready[self._turn :] + ready[: self._turn]

    def interrupt(self) -> None:
        """Ends a :meth:`wait` (with what is ready, perhaps nothing) or an :meth:`accept` (WaitTimeoutError) in another
        thread early, or the next one; safe in a signal handler."""
        self._interrupted = True
        self._bell.ring()

    def _take_interrupt(self) -> bool:
        interrupted, self._interrupted = self._interrupted, False
        return interrupted

    def close(self) -> None:
        """Closes all channels, removes the socket and every segment. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for channel in [*self._channels, *self._accepted]:
            channel.close()
        self._stop_by = time.monotonic() + _FAREWELL_S
        self._stop = True
        self._wake()
        self._bell.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- I/O thread ----

    def _wake(self) -> None:
        with self._pipe_lock, contextlib.suppress(BlockingIOError):
            if self._wake_w >= 0:  # else the I/O thread has ended, and the descriptor may be somebody else's
                os.write(self._wake_w, b"x")

    def _post(self, link: ServerLink, parts: list[Any]) -> None:
        self._outbox.append((link, parts))
        self._wake()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._wake_r, zmq.POLLIN)
        try:
            while not self._stop or (self._outbox and time.monotonic() < self._stop_by):
                poller.poll(_RETRY_MS if self._outbox else self._next_timeout_ms())
                self._drain_wake()
                self._take_messages()
                self._take_events()
                self._flush_outbox()
                self._expire_handshakes()
                if self._stop:
                    self._outbox = deque(item for item in self._outbox if not self._is_dead(item[0]))
        except BaseException as error:
            self._failure = error
            raise
        finally:
            for client in list(self._clients.values()):
                self._drop(client.identity, "the listener's I/O thread ended")
            self._release()
            self._bell.ring()

    def _is_dead(self, link: ServerLink) -> bool:
        return bool(link.reason) or link.said_bye or link.identity not in self._clients

    def _release(self) -> None:
        if self._monitor is not None:
            self._router.disable_monitor()
            self._monitor.close(0)
        if self._socket_path:  # libzmq leaves it; before the close, while nobody else can have bound it
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._socket_path)
        self._outbox.clear()  # gives back memory a sender still waits for
        # Goodbyes are with libzmq by now; give them a moment to leave.
        self._router.close(200)
        self._context.term()
        with self._pipe_lock:
            os.close(self._wake_r)
            os.close(self._wake_w)
            self._wake_r = self._wake_w = -1
        self._clients.clear()

    def _next_timeout_ms(self) -> int:
        waiting = [c.deadline for c in self._clients.values() if c.channel is None]
        return max(1, int((min(waiting) - time.monotonic()) * 1000)) if waiting else 1000

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_r, 4096):
                pass

    def _take_messages(self, limit: int = 64) -> None:
        """Then events and the outbox are looked at again, however busy one client is."""
        for _ in range(limit):
            try:
                parts = self._router.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._take(parts)
            except ProtocolError:
                self._drop(parts[0].bytes, "it broke the protocol")
                self._say(parts[0].bytes, hs.BYE)

    def _take(self, parts: list[zmq.Frame]) -> None:
        identity = parts[0].bytes
        if len(parts) < _DEALER_FRAMES_MIN:
            raise ProtocolError("a message without an envelope")
        kind, sequence = hs.open_envelope(parts[1].buffer)
        client = self._clients.get(identity)
        if kind == hs.HELLO and client is None and len(parts) == 3:
            # Ends of older connections that used this descriptor were reported before this message came.
            self._take_events()
            self._hello(identity, int(parts[1].get(zmq.SRCFD)), parts[2].bytes)
        elif client is None:
            raise ProtocolError("a message before the handshake")
        elif kind == hs.READY and client.channel is None and len(parts) == 3:
            self._ready(client, parts[2].bytes)
        elif kind == hs.MESSAGE and client.link is not None and len(parts) >= 3:
            client.link.deliver((sequence, parts[2], parts[3:]))
            if client.link.reason:
                self._forget(client)
        elif kind == hs.BYE:
            self._drop(identity, None)
        else:
            raise ProtocolError("a message out of order")

    def _say(self, identity: bytes, kind: int, *body: hs.Welcome | hs.Refuse) -> None:
        with contextlib.suppress(zmq.ZMQError):  # gone already, or not reading: it will time out
            self._router.send_multipart([identity, hs.envelope(kind), *map(hs.pack, body)], flags=zmq.NOBLOCK)

    def _hello(self, identity: bytes, fd: int, data: bytes) -> None:
        hello = hs.unpack(hs.Hello, data)
        if hello.protocol != hs.PROTOCOL:
            reason = f"the server speaks protocol {hs.PROTOCOL}, the client {hello.protocol}: use one version of tsqp"
            self._say(identity, hs.REFUSE, hs.Refuse(reason))
            return
        if len(self._clients) >= self.max_clients:
            reason = f"the server has its limit of {self.max_clients} clients (max_clients)"
            self._say(identity, hs.REFUSE, hs.Refuse(reason))
            return
        futex = hello.futex and hs.futex_works()
        client = _Client(identity, fd, time.monotonic() + HANDSHAKE_TIMEOUT_S, futex, None)
        welcome = hs.Welcome(hs.PROTOCOL, False, futex)
        if hello.shm and self._shm:
            try:
                client.segment = Segment.create(self.max_chunk_bytes, self.max_chunks, 2, self._free_name())
            except (SegmentError, MemoryError) as error:
                self._say(identity, hs.REFUSE, hs.Refuse(f"the server could not make a segment: {error}"[:2000]))
                return
            segment = client.segment
            welcome = hs.Welcome(
                hs.PROTOCOL, True, futex, segment.name, segment.session, self.max_chunk_bytes, self.max_chunks
            )
        self._clients[identity] = client
        self._say(identity, hs.WELCOME, welcome)

    def _free_name(self) -> str | None:
        """The fixed name, while no client uses it (an enclave's manifest lists it)."""
        names = [c.segment.name for c in self._clients.values() if c.segment is not None]
        return self._shm_name if self._shm_name not in names else None

    def _ready(self, client: _Client, data: bytes) -> None:
        ready = hs.unpack(hs.Ready, data)
        segment = client.segment if ready.shm else None
        if segment is not None and ready.native:
            segment.unlink()  # both ends have it mapped: from now on a kill leaves nothing behind
        if not client.futex:
            self._bell.set_futex(False)
        link = ServerLink(client.identity, self._post, self._max_inbox_bytes)
        channel = make_channel(
            link,
            segment,
            server=True,
            scheme=self._scheme,
            peer=f"client {client.identity.hex()[-8:]} of {self.endpoint}",
            threshold=self.max_chunk_bytes,
            large=self._large,
            wait=self._wait,
            spin_us=self._spin_us,
            futex=client.futex,
        )
        link.on_event = self._bell.ring
        channel.on_close = self._closed_channel
        client.link, client.channel, client.segment = link, channel, None if segment is None else segment
        self._channels.append(channel)
        self._accepted.append(channel)
        self._bell.ring()

    def _closed_channel(self, channel: Channel) -> None:
        with contextlib.suppress(ValueError):
            self._channels.remove(channel)
        with contextlib.suppress(ValueError):
            self._accepted.remove(channel)

    def _drop(self, identity: bytes, reason: str | None) -> None:
        client = self._clients.get(identity)
        if client is None:
            return
        self._forget(client)
        if client.link is not None:
            client.link.end(reason)

    def _forget(self, client: _Client) -> None:
        """The segment's memory goes with the last reference: the channel's, once its user closed it."""
        self._clients.pop(client.identity, None)
        client.segment = None

    def _take_events(self) -> None:
        while self._monitor.poll(0):
            fd = recv_monitor_message(self._monitor)["value"]
            gone = [client for client in self._clients.values() if client.fd == fd]
            if gone:
                self._take_messages(_RECEIVED_MAX * len(self._clients))
            for client in gone:
                self._drop(client.identity, "its end of the control connection was closed")

    def _flush_outbox(self) -> None:
        held: list[tuple[ServerLink, list[Any]]] = []  # what its client has no room for, in the order it was posted
        full: set[bytes] = set()
        for _ in range(len(self._outbox)):
            link, parts = self._outbox.popleft()
            if link.identity in full or not self._send(link, parts):
                full.add(link.identity)
                held.append((link, parts))
        self._outbox.extendleft(reversed(held))

    def _send(self, link: ServerLink, parts: list[Any]) -> bool:
        """False: the client has no room for it now."""
        try:
            self._router.send_multipart(parts, flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self._drop(link.identity, "it can't be reached any more")
            return True
        goodbye = len(parts) == _DEALER_FRAMES_MIN
        link.sent(parts)
        parts.clear()  # a frame object of ours would itself keep the sender's memory in use
        if goodbye:
            self._forget_identity(link.identity)
        return True

    def _forget_identity(self, identity: bytes) -> None:
        client = self._clients.get(identity)
        if client is not None:
            self._forget(client)

    def _expire_handshakes(self) -> None:
        now = time.monotonic()
        for client in [c for c in self._clients.values() if c.channel is None and c.deadline < now]:
            self._drop(client.identity, "it did not finish the handshake in time")


def listen(
    endpoint: str,
    max_chunk_bytes: int | None = None,
    max_chunks: int | None = None,
    *,
    shm: bool = True,
    max_clients: int = 16,
    shm_name: str | None = None,
    large: str = "zmq",
    wait: str = "auto",
    spin_us: float = 400.0,
    max_inbox_bytes: int = 4 << 30,
) -> Listener:
    """Listens for tensor channels on ``ipc:///path`` or ``tcp://address:port`` (port 0: any free one).

    Args:
        endpoint: where clients connect. ``Listener.endpoint`` has the port that was chosen.
        max_chunk_bytes: slot size in bytes, and the threshold: a message of this size or more takes ZeroMQ.
            Default: ``TSQP_MAX_SHM_CHUNK_BYTES`` or 10 MiB.
        max_chunks: slots per direction and client. Default: ``TSQP_SHM_MAX_CHUNKS`` or 10.
        shm: False keeps everything on ZeroMQ; so does an endpoint beyond this host.
        max_clients: connections served at once; each takes 2 * max_chunks * max_chunk_bytes of shared memory.
        shm_name: a fixed name for the first client's segment (``TSQP_SHM_NAME``), for an enclave's manifest.
        large: how this end sends messages of that size: ``zmq``, or ``tile`` (in tiles through the ring).
        wait: ``auto``, ``spin``, ``block`` or ``poll``; spin_us: the longest spin before blocking.
        max_inbox_bytes: a client with more unread bytes of large messages than this is cut off.

    Raises:
        EndpointError, EndpointBusyError, SharedMemoryFullError, SegmentError, ConfigError.
    """
    from . import config

    return Listener(
        endpoint,
        config.max_chunk_bytes() if max_chunk_bytes is None else max_chunk_bytes,
        config.max_chunks() if max_chunks is None else max_chunks,
        shm=shm,
        max_clients=max_clients,
        shm_name=shm_name,
        large=large,
        wait=wait,
        spin_us=spin_us,
        max_inbox_bytes=max_inbox_bytes,
    )


__all__ = ["Listener", "listen"]
