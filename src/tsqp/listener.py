"""The server's end of an endpoint, as its users see it: accept clients, wait for what they send, close."""

from __future__ import annotations

import os
import threading
import time

from . import curve, descriptors, segments
from . import handshake as hs
from ._channel import Watcher
from ._ring import Doorbell, Segment
from .binding import check_endpoint
from .config import parse_endpoint
from .enclave import check_listening
from .errors import ClosedError, ConfigError, RingUsageError, WaitTimeoutError
from .hub import Hub, HubOptions
from .limits import MAX_HANDSHAKES, MAX_INBOX_MESSAGES, check_count
from .transport import MAX_MESSAGE_BYTES, Channel, check_carriers, check_limit, close_at_exit
from .turns import Turns


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
        threshold: int | str | None = None,
        large: str = "zmq",
        wait: str = "auto",
        spin_us: float = 400.0,
        max_inbox_bytes: int = 4 << 30,
        max_inbox_messages: int = MAX_INBOX_MESSAGES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_handshakes: int = MAX_HANDSHAKES,
        reap: bool = True,
        keys: curve.ServerKeys | None = None,
    ) -> None:
        parsed = parse_endpoint(endpoint)
        check_listening(endpoint)
        curve.check_reach(parsed, keys)
        for label, value in (("max_chunk_bytes", max_chunk_bytes), ("max_chunks", max_chunks)):
            if not isinstance(value, int) or not 0 < value < 1 << 63:
                raise ConfigError(f"{label}={value!r} is not a positive whole number; give the slots' size and number")
        check_carriers(threshold, large)
        check_limit(max_message_bytes)
        check_limit(max_inbox_bytes, "max_inbox_bytes")
        check_count(max_inbox_messages, "max_inbox_messages")
        check_count(max_handshakes, "max_handshakes")
        options = HubOptions(
            max_chunk_bytes=max_chunk_bytes,
            max_chunks=max_chunks,
            max_clients=max_clients,
            shm=shm and parsed.is_loopback,
            shm_name=(os.environ.get("TSQP_SHM_NAME") if shm_name is None else shm_name) or None,
            threshold="slot" if threshold is None else threshold,
            large=large,
            wait=wait,
            spin_us=spin_us,
            max_inbox_bytes=max_inbox_bytes,
            max_inbox_messages=max_inbox_messages,
            max_message_bytes=max_message_bytes,
            max_handshakes=max_handshakes,
            keys=keys,
        )
        self.max_chunk_bytes, self.max_chunks, self.max_clients = max_chunk_bytes, max_chunks, max_clients
        self._bell = Doorbell(spin_us, hs.futex_works(), wait)
        self._watcher = Watcher(self._bell)
        self._turns = Turns()
        self._interrupted = False
        self._closed = self._gone = False
        self._pid = os.getpid()
        self._lock = threading.Lock()
        descriptors.require(descriptors.LISTENING, f"listen on {endpoint}")
        if reap:  # not where somebody only looks
            segments.reap(segments.leftovers())
        if options.shm:
            # Fails here, with the fix, rather than at the first client.
            segments.check_directory()
            if options.shm_name is None:  # else the hub makes that one now
                Segment.create(max_chunk_bytes, max_chunks, 2)
        self._hub = Hub(parsed, options, self._bell)
        self._hub.owner = self
        self.endpoint = self._hub.endpoint
        close_at_exit(self)

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
        return self._hub.accepted.popleft() if self._hub.accepted else None

    def wait(self, timeout: float | None = None) -> list[Channel]:
        """Waits for work over all accepted channels, in one thread.

        Returns the channels that have a message, or whose peer is gone, each at most once and in an order that
        rotates from call to call; an empty list after `timeout` seconds or when a new client wants to be accepted. A
        channel that was closed here because its client's key was removed is returned once, too.
        """
        deadline = time.monotonic() + (timeout if timeout is not None else 1e9)
        while True:
            self._check_open()
            channels = self._hub.channels.copy()  # the I/O thread may change it
            ready = self._watcher.ready(channels)
            if self._hub.outcasts:
                ready += self._take_outcasts(ready)
            if ready:
                return self._rotate(ready)
            left = deadline - time.monotonic()
            if self._hub.accepted or self._take_interrupt() or left <= 0:
                return ready
            self._watcher.wait(channels, min(left, 0.5))

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise RingUsageError("this listener was inherited by fork; listen anew in the child, at another endpoint")
        if self._closed:
            raise ClosedError(f"the listener on {self.endpoint} is closed")
        if self._hub.failure is not None:
            raise ClosedError(f"the listener on {self.endpoint} failed: {self._hub.failure!r}; start it again")

    def _take_outcasts(self, ready: list[Channel]) -> list[Channel]:
        outcasts = (self._hub.outcasts.popleft()() for _ in range(len(self._hub.outcasts)))
        return [channel for channel in outcasts if channel is not None and channel not in ready]

    def _rotate(self, ready: list[Channel]) -> list[Channel]:
        if len(ready) == 1:
            return ready
        start = self._turns.start([channel.number for channel in ready])
        return ready[start:] + ready[:start]

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
        if self._gone or os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
        for channel in [*self._hub.channels, *self._hub.accepted]:
            channel.close()
        self._hub.close()
        self._gone = True  # last: a close that was interrupted can be called again

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def listen(
    endpoint: str,
    max_chunk_bytes: int | None = None,
    max_chunks: int | None = None,
    *,
    shm: bool = True,
    max_clients: int = 16,
    shm_name: str | None = None,
    threshold: int | str | None = None,
    large: str = "zmq",
    wait: str = "auto",
    spin_us: float = 400.0,
    max_inbox_bytes: int = 4 << 30,
    max_inbox_messages: int = MAX_INBOX_MESSAGES,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_handshakes: int = MAX_HANDSHAKES,
    curve_key: curve.PathLike | None = None,
    curve_clients: curve.PathLike | None = None,
) -> Listener:
    """Listens for tensor channels on ``ipc:///path`` or ``tcp://address:port`` (port 0: any free one).

    Args:
        endpoint: where clients connect. ``Listener.endpoint`` has the port that was chosen.
        max_chunk_bytes: slot size in bytes; what does not fit one is large.
            Default: ``TSQP_MAX_SHM_CHUNK_BYTES`` or 10 MiB.
        max_chunks: slots per direction and client. Default: ``TSQP_SHM_MAX_CHUNKS`` or 10.
        shm: False keeps everything on ZeroMQ; so does an endpoint beyond this host.
        max_clients: connections served at once; each takes 2 * max_chunks * max_chunk_bytes of shared memory.
        shm_name: a fixed name, starting with ``tsqp``, for one segment (``TSQP_SHM_NAME``), for an enclave's manifest.
            The file exists from now on. While an enclave uses it, other clients' segments have random names, which
            they all have with an empty string.
        threshold: bytes from which a message of this end is large: None is the size of a slot, ``auto`` goes by
            what each carrier was seen to cost.
        large: how this end sends large messages: ``zmq``, ``tile`` (in tiles through the ring), or ``auto``, whichever
            is faster here.
        wait: ``auto``, ``spin``, ``block`` or ``poll``; spin_us: the longest spin before blocking.
        max_inbox_bytes: a client with more unread bytes of messages over ZeroMQ than this is cut off, and told why.
        max_inbox_messages: the same for their number.
        max_message_bytes: a client's message that claims more, on the wire or decoded, is dropped and
            MessageTooLargeError raised before anything is allocated for it.
        max_handshakes: connections that are being made at the same time; each has its segment already. Further ones
            wait, and one that was begun and not gone on with gives way to them.
        curve_key, curve_clients: this server's secret-key file and the directory of the public keys (``*.key``) of the
            clients that may come in (``tsqp keygen``). The directory is read again when it changes; a client whose key
            is removed is cut off. What goes over ZeroMQ is encrypted, what goes through the ring is not. Needed for an
            endpoint beyond this host. Default: ``TSQP_CURVE_KEY``, ``TSQP_CURVE_CLIENTS``.

    On ``ipc`` clients of this user and of root are let in, and of no other.

    Raises:
        EndpointError, InsecureEndpointError, EndpointBusyError, SharedMemoryFullError, SegmentError, ConfigError,
        KeyFileError, DescriptorsExhaustedError.
    """
    from . import config

    return Listener(
        endpoint,
        config.max_chunk_bytes() if max_chunk_bytes is None else max_chunk_bytes,
        config.max_chunks() if max_chunks is None else max_chunks,
        shm=shm,
        max_clients=max_clients,
        shm_name=shm_name,
        threshold=threshold,
        large=large,
        wait=wait,
        spin_us=spin_us,
        max_inbox_bytes=max_inbox_bytes,
        max_inbox_messages=max_inbox_messages,
        max_message_bytes=max_message_bytes,
        max_handshakes=max_handshakes,
        keys=curve.server_keys(curve_key, curve_clients),
    )


__all__ = ["Listener", "check_endpoint", "listen"]
