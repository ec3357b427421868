"""Processes for the tests to talk to: the other end of a ring or a channel, to be killed, stopped or forgotten.

They come from a fork server that has torch loaded, so that one costs milliseconds. Parent and peer tell each
other what they did over a pipe: ``Peer.say``/``Peer.hear`` here, ``wire.send``/``wire.recv`` there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from random import Random
from typing import Any

from patience import PATIENCE_S

#: A peer whose parent forgot it ends by itself.
LIFE_S = 200.0

_context = multiprocessing.get_context("forkserver")


def set_preload() -> None:
    """What the fork server loads when it starts. There is one for all of a process, and importing the benchmarks sets
    what theirs wants: to be called once everything is imported."""
    _context.set_forkserver_preload(["pytest", "torch", "numpy", "tsqp.listener", "tsqp.transport"])


def fork_server_pid() -> int | None:
    """The process that peers are forked from, once there is one."""
    return multiprocessing.forkserver._forkserver._forkserver_pid


class Peer:
    """A process that runs ``target(wire, *arguments)``, for `life_s` seconds at most."""

    def __init__(
        self,
        target: Callable[..., object],
        *arguments: object,
        env: Mapping[str, str] | None = None,
        life_s: float = LIFE_S,
    ) -> None:
        self._wire, theirs = _context.Pipe()
        run = (theirs, dict(env or {}), life_s, target, arguments)
        self.process = _context.Process(target=_run, args=run, daemon=True)
        self.process.start()
        theirs.close()
        self.pid: int = self.process.pid

    def say(self, value: Any) -> None:
        self._wire.send(value)

    def hear(self) -> Any:
        """What the peer says next; an exception there is raised here."""
        if not self._wire.poll(PATIENCE_S):
            raise AssertionError(f"the peer process {self.pid} says nothing")
        value = self._wire.recv()
        _raise_if_error(value)
        return value

    def ask(self, name: str, *arguments: Any) -> Any:
        """Calls a method of the object that :func:`obey` runs there, and returns its result."""
        self.say((name, *arguments))
        return self.hear()

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL, and waits until it is gone. It may have ended just now."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.join(PATIENCE_S)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def join(self) -> int | None:
        """Waits for its end and returns the exit code."""
        self.process.join(PATIENCE_S)
        return self.process.exitcode

    def check_last_words(self) -> None:
        """Raises what went wrong in a peer that was killed before anybody heard it."""
        try:
            while self._wire.poll():
                _raise_if_error(self._wire.recv())
        except (EOFError, ConnectionResetError):
            return

    def end(self) -> None:
        """Kills it if it still runs, and gives everything back."""
        if self.process.is_alive():
            self.kill()
        self.process.join(PATIENCE_S)
        self.process.close()
        self._wire.close()


def _raise_if_error(value: Any) -> None:
    if isinstance(value, Exception):
        raise value
    if isinstance(value, BaseException):  # a KeyboardInterrupt there is not meant for whoever runs the tests
        raise AssertionError(f"the peer process ended with {value!r}")


def _run(
    wire: Connection, env: Mapping[str, str], life_s: float, target: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    faulthandler.dump_traceback_later(life_s, exit=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the fork server does with it
    os.environ.update(env)
    try:
        target(wire, *arguments)
    except BaseException as error:  # noqa: BLE001 (the parent raises it)
        wire.send(error)
    wire.close()


def obey(wire: Connection, make: Callable[..., Any], *arguments: Any) -> None:
    """Makes an object and calls its methods as the parent asks; exceptions go back to the parent."""
    servant = make(*arguments)
    wire.send("made")
    while True:
        name, *rest = wire.recv()
        try:
            wire.send(getattr(servant, name)(*rest))
        except BaseException as error:  # noqa: BLE001 (the parent raises it)
            wire.send(error)


class RingEnd:
    """One end of a :class:`tsqp.ShmRingBuffer`: attached by its handle, or made here."""

    def __init__(self, handle: Any = None, geometry: tuple[int, int] = (4096, 4), **options: Any) -> None:
        from tsqp import ShmRingBuffer

        self.ring = ShmRingBuffer(*(handle or geometry), **options)

    def handle(self) -> Any:
        return self.ring.handle()

    def write(self, *messages: bytes) -> int:
        for data in messages:
            with self.ring.acquire_write(PATIENCE_S, len(data)) as view:
                view[:] = data
        return len(messages)

    def read(self, timeout: float | None = PATIENCE_S) -> bytes:
        with self.ring.acquire_read(timeout) as view:
            return bytes(view)

    def open_write(self, data: bytes) -> None:
        """Fills a slot and leaves it unpublished."""
        self.acquired = self.ring.acquire_write(PATIENCE_S)
        self.acquired.__enter__()[: len(data)] = data

    def close(self) -> None:
        self.ring.close()

    def fork_and_sleep(self) -> int:
        """A child that inherits everything and does nothing."""
        pid = os.fork()
        if pid == 0:
            signal.pause()
        return pid

    def leave(self) -> None:
        """Ends the process without closing anything."""
        os._exit(3)


def ring_end(wire: Connection, *arguments: Any) -> None:
    obey(wire, RingEnd, *arguments)


def stream_to_ring(wire: Connection, handle: Any, seed: int, count: int) -> None:
    """Writes `count` messages of random length, each filled with one value, as fast as the ring takes them."""
    from tsqp import ShmRingBuffer

    random = Random(seed)
    with ShmRingBuffer(*handle) as ring:
        for number in range(count):
            nbytes = random.randrange(8, ring.max_chunk_bytes)
            with ring.acquire_write(PATIENCE_S, nbytes) as view:
                view[:] = bytes([number % 251]) * nbytes


def wait_for_ever(wire: Connection, handle: Any, role: str, wait: str) -> None:
    """Waits without a deadline, the writer with every slot full; says how that ended, then goes on."""
    from tsqp import ShmRingBuffer

    ring = ShmRingBuffer(*handle, wait=wait)
    for _ in range(ring.max_chunks if role == "writer" else 0):
        with ring.acquire_write(0, 0):
            pass

    def acquire(timeout: float | None = None) -> str:
        with ring.acquire_read(timeout) if role == "reader" else ring.acquire_write(timeout, 0):
            return "acquired"

    try:
        wire.send("waiting")
        wire.send(acquire())
    except KeyboardInterrupt:
        wire.send("interrupted")
    wire.send(acquire(PATIENCE_S))


def fork_uses_ring(wire: Connection, handle: Any) -> None:
    """Forks while a write and a read are open; the child tries everything with what it inherited, then exits."""
    from tsqp import ShmRingBuffer
    from tsqp.errors import RingUsageError

    made = ShmRingBuffer(4096, 4)
    attached = ShmRingBuffer(*handle)
    loop = ShmRingBuffer(*made.handle())
    for data in (b"one", b"two"):
        with made.acquire_write(0, 3) as view:
            view[:] = data
    outcomes: list[str] = []

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
            outcomes.append(f"{name}: done")
        except RingUsageError as error:
            outcomes.append(f"{name}: {'fork' if 'fork' in str(error) else error}")

    pid = -1
    writing, reading = attached.acquire_write(0, 6), loop.acquire_read(0)
    view = writing.__enter__()
    reading.__enter__()
    pid = os.fork()
    if pid == 0:
        attempt("end write", lambda: writing.__exit__(None, None, None))
        attempt("end read", lambda: reading.__exit__(None, None, None))
        attempt("write", lambda: made.acquire_write(0).__enter__())
        attempt("read", lambda: loop.acquire_read(0).__enter__())
        attempt("handle", made.handle)
        attempt("unlink", made.unlink)
        made.close()
        attached.close()
        del made, attached, loop, writing, reading
        wire.send(outcomes)
        os._exit(0)
    os.waitpid(pid, 0)
    # The parent goes on as if nothing had been.
    view[:] = b"parent"
    writing.__exit__(None, None, None)
    reading.__exit__(None, None, None)
    with loop.acquire_read(0) as second:
        wire.send((bytes(second), os.path.exists(f"{os.environ['TSQP_SHM_DIR']}/{made.name}")))
    wire.recv()
    for ring in (made, attached, loop):
        ring.close()


class Attacher:
    """Attaches to a ring at a given moment, and lets go again."""

    def __init__(self) -> None:
        self._ring: Any = None

    def attach(self, handle: Any, when: float) -> str:
        from tsqp import ShmRingBuffer

        while time.monotonic() < when:
            pass
        try:
            self._ring = ShmRingBuffer(*handle)
        except Exception as error:  # noqa: BLE001 (its name is the answer)
            return type(error).__name__
        return "attached"

    def write(self, data: bytes) -> None:
        with self._ring.acquire_write(PATIENCE_S, len(data)) as view:
            view[:] = data

    def detach(self) -> None:
        if self._ring is not None:
            self._ring.close()
        self._ring = None


def attacher(wire: Connection) -> None:
    obey(wire, Attacher)


def become_nobody_and_attach(wire: Connection, handle: Any) -> None:
    os.setuid(65534)
    RingEnd(handle)
    wire.send("attached")


def spawned_writer(handle: Any, data: bytes) -> None:
    """For `multiprocessing` with its spawn method: the handle travels by pickle."""
    end = RingEnd(handle)
    end.write(data)
    end.close()


def hold_segment(wire: Connection, name: str | None = None) -> None:
    """Makes a segment and sleeps."""
    end = RingEnd(None, name=name, create=True)
    wire.send(end.ring.name)
    signal.pause()


def create_segments_for_ever(wire: Connection) -> None:
    """Each is large enough for its creation to take a while."""
    from tsqp import ShmRingBuffer

    wire.send("ready")
    while True:
        ShmRingBuffer(1 << 20, 4).close()


class ChannelEnd:
    """One end of a channel: connected to a listener of the parent, or listening itself for one client."""

    def __init__(self, role: str, endpoint: str, options: dict[str, Any]) -> None:
        import tsqp

        self.listener = tsqp.listen(endpoint, **options) if role == "server" else None
        self.channel = tsqp.connect(endpoint, **options) if role == "client" else None

    def endpoint(self) -> str:
        return self.listener.endpoint

    def accept(self) -> str:
        self.channel = self.listener.accept(PATIENCE_S)
        return self.channel.transport

    def send(self, sizes: list[int], first: int = 0) -> int:
        """Sends a numbered message of each size."""
        from wire_bytes import numbered

        for number, nbytes in enumerate(sizes, first):
            self.channel.send([numbered(number, nbytes)], request_id=number, timeout=PATIENCE_S)
        return len(sizes)

    def check(self, sizes: list[int], first: int = 0) -> int:
        """Receives what :meth:`send` sent and looks at every byte."""
        from wire_bytes import check_numbered

        for number, nbytes in enumerate(sizes, first):
            check_numbered(self.channel.recv(PATIENCE_S), number, nbytes)
        return len(sizes)

    def check_until_asked(self, nbytes: int, first: int) -> int:
        """Checks numbered messages until one without a tensor comes; returns its number."""
        from wire_bytes import check_numbered

        while True:
            message = self.channel.recv(PATIENCE_S)
            if not message.tensors:
                assert message.request_id == first
                return first
            check_numbered(message, first, nbytes)
            first += 1

    def recv(self, timeout: float | None = PATIENCE_S) -> int:
        return self.channel.recv(timeout).request_id

    def echo(self, count: int, lease: bool = True) -> int:
        """Answers `count` messages with themselves."""
        for _ in range(count):
            with self.channel.lease(PATIENCE_S) as message:
                self.channel.send(message.tensors, request_id=message.request_id, timeout=PATIENCE_S)
        return count

    def send_hole(self, nbytes: int) -> None:
        """Sends a message over the threshold without waiting until it was taken."""
        from wire_bytes import numbered

        self.channel.send([numbered(0, nbytes)], timeout=PATIENCE_S, transfer=True)

    def stats(self) -> dict[str, Any]:
        return self.channel.stats

    def fork_and_sleep(self) -> int:
        """A child that inherits everything and does nothing."""
        pid = os.fork()
        if pid == 0:
            signal.pause()
        return pid

    def close(self) -> None:
        for closable in (self.channel, self.listener):
            if closable is not None:
                closable.close()

    def leave(self) -> None:
        """Ends the process without closing anything."""
        os._exit(3)


def channel_end(wire: Connection, *arguments: Any) -> None:
    obey(wire, ChannelEnd, *arguments)


def receive_for_ever(wire: Connection, endpoint: str, options: dict[str, Any]) -> None:
    """A client that waits without a deadline; says how the wait ended, then waits again."""
    import tsqp

    with tsqp.connect(endpoint, **options) as channel:
        try:
            wire.send("waiting")
            wire.send(channel.recv().request_id)
        except KeyboardInterrupt:
            wire.send("interrupted")
        wire.send(channel.recv(PATIENCE_S).request_id)
