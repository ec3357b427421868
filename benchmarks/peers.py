"""Ways to get a tensor to another process and back: what they have in common, and their server processes.

A peer is a class with two halves. Its server half (:meth:`Peer.serve`) runs in a process of its own and sends every
tensor back; an empty tensor ends it. Its client half (:meth:`Peer.connect`, :meth:`Peer.echo`) runs in the
benchmark's process. What ``echo`` returns lies in private memory of the caller.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch

from . import machine

START_S = 60.0
STOP_S = 10.0
SIGNALS_STOP = hasattr(signal, "SIGSTOP")
#: Servers and clients are forked from a process that has these loaded: one costs milliseconds, not seconds.
_PRELOADED = [f"{__package__}.fork_server", "numpy", "torch", "tsqp.server", "tsqp.client", "tsqp.cli"]
_PRELOADED += [f"{__package__}.{name}" for name in ("bars", "echo", "idle", "large", "plots", "slots", "stream")]
_MODELS = "transformers.models.llama.modeling_llama"

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(_PRELOADED)


def preload_models() -> None:
    """Servers of the processes to come need transformers, which takes seconds to load."""
    processes.set_forkserver_preload([*_PRELOADED, _MODELS])


@dataclass(frozen=True)
class Copies:
    """How often an echo copies its bytes: the request on its way in and out, then the reply. Counted in the code of
    who moves them, the kernel's copies of a socket or pipe among them; ``why`` says which they are."""

    request_in: int
    request_out: int
    reply_in: int
    reply_out: int
    why: str

    @property
    def per_byte_delivered(self) -> float:
        """An echo delivers each byte twice: to the server and back."""
        return (self.request_in + self.request_out + self.reply_in + self.reply_out) / 2


class Peer:
    """One way to move a tensor. ``folder`` is the run's own, for sockets and names."""

    key: ClassVar[str] = ""
    title: ClassVar[str] = ""
    #: False: everything happens in the client's process.
    has_server: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = contextlib.ExitStack()  # what :meth:`address` and :meth:`connect` took

    @classmethod
    def unavailable(cls) -> str | None:
        """Why this peer can't run here, or None."""
        return None

    @classmethod
    def copies(cls, nbytes: int) -> Copies | None:
        """The copies of an echo of `nbytes`; None: not known."""
        return None

    def address(self) -> Any:
        """What both halves need to find each other; picklable."""
        return f"ipc://{self.folder / self.key}.sock"

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        """Calls `ready`, then echoes until an empty tensor comes."""
        raise NotImplementedError

    def started(self) -> None:
        """The server process has its copy of the address now."""

    def connect(self, address: Any) -> None:
        """Reaches the server, which is ready."""

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sends `tensor` and returns what came back."""
        raise NotImplementedError

    def send_end(self) -> None:
        """Sends the empty tensor; nothing comes back."""
        raise NotImplementedError

    def disconnect(self) -> None:
        """Gives back what was taken, however far it came."""
        self.stack.close()


def _server_process(peer: type[Peer], address: Any, core: int | None, report: Connection) -> None:
    machine.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the client's business
    torch.set_num_threads(1)

    def ready() -> None:
        machine.pin(core)  # threads the server started before (a ZeroMQ I/O thread) stay free
        report.send("ready")

    try:
        peer.serve(address, ready)
        report.send("ended")
    except Exception:
        report.send(traceback.format_exc())
        raise


class WrongAnswerError(RuntimeError):
    """A peer did not return what it should have."""


class PeerFailedError(RuntimeError):
    """A peer's server ended when it should not have."""


class Running:
    """A peer with its server process, which is stopped while others are measured: it may wait by spinning.

    The process starts with the object; :meth:`attach` waits for it and connects.
    """

    def __init__(self, peer: Peer, server_core: int | None) -> None:
        self.peer = peer
        self._process: Any = None
        self._address: Any = None
        self.expects_end = False
        try:
            if peer.has_server:
                self._start(server_core)
        except BaseException:
            self.kill()
            raise

    def _start(self, core: int | None) -> None:
        self._report, theirs = processes.Pipe(duplex=False)
        self._address = self.peer.address()
        self._process = processes.Process(
            target=_server_process, args=(type(self.peer), self._address, core, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        self.peer.started()

    def attach(self) -> None:
        """Connects to the server as soon as it is ready, and pauses it."""
        if self._process is not None:
            self._await_ready()
        self.peer.connect(self._address)
        self.pause()

    def _await_ready(self) -> None:
        if not self._report.poll(START_S):
            raise PeerFailedError(f"the server of {self.peer.title} was not ready after {START_S:.0f} s")
        try:
            answer = self._report.recv()
        except EOFError:
            raise PeerFailedError(f"the server of {self.peer.title} died at its start") from None
        if answer != "ready":
            raise PeerFailedError(f"the server of {self.peer.title} failed:\n{answer}")

    @property
    def pid(self) -> int | None:
        """The server's process; None where everything happens in this one."""
        return None if self._process is None else self._process.pid

    @property
    def sentinel(self) -> int:
        """Readable once the process has ended."""
        return int(self._process.sentinel)

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def check(self) -> None:
        """Raises PeerFailedError if the server died."""
        if not self.expects_end and self._process is not None and not self._process.is_alive():
            raise PeerFailedError(f"the server of {self.peer.title} died (exit code {self._process.exitcode})")

    def pause(self) -> None:
        if SIGNALS_STOP:
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        if SIGNALS_STOP:
            self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ends the server in an orderly way and gives everything back."""
        try:
            self.resume()
            self.expects_end = True
            if self._process is not None:
                self.peer.send_end()
                self._process.join(STOP_S)
                if self._process.exitcode != 0:
                    raise PeerFailedError(f"the server of {self.peer.title} did not end, or not well")
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends the server at once, whatever it does."""
        self.expects_end = True
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.join()
            self._report.close()
        self.peer.disconnect()


@contextlib.contextmanager
def watched(running: Sequence[Running]) -> Iterator[None]:
    """While inside, the death of a server ends whatever this thread waits for."""

    def on_death(number: int, frame: Any) -> None:
        for one in running:
            one.check()

    def watch() -> None:
        if told not in connection.wait([told, *(one.sentinel for one in running if one.pid is not None)]):
            signal.pthread_kill(main, signal.SIGUSR1)

    main = threading.get_ident()
    told, tell = os.pipe()
    watcher = threading.Thread(target=watch, name="bench-watch", daemon=True)
    before = signal.signal(signal.SIGUSR1, on_death)
    watcher.start()
    try:
        yield
    finally:
        os.write(tell, b"x")
        watcher.join()
        signal.signal(signal.SIGUSR1, before)
        os.close(told)
        os.close(tell)


@contextlib.contextmanager
def started(
    wanted: Sequence[type[Peer] | Callable[[Path], Peer]], core: int | None, skipped: dict[str, str] | None = None
) -> Iterator[list[Running]]:
    """The peers with their servers; all are ended, whatever happens. Classes that can't start are in `skipped`."""
    running: list[Running] = []
    with tempfile.TemporaryDirectory(prefix="echo-") as folder:
        try:
            for peer in wanted:
                reason = peer.unavailable() if isinstance(peer, type) else None
                if reason is None:
                    running.append(Running(peer(Path(folder)), core))
                elif skipped is not None and isinstance(peer, type):
                    skipped[peer.title] = reason
            for one in running:  # their processes load torch side by side meanwhile
                one.attach()
            with watched(running):
                yield running
            while running:
                running.pop().stop()
        finally:
            for left in running:
                left.kill()


@contextlib.contextmanager
def taking_turn(running: Running) -> Iterator[Peer]:
    """The server runs while inside, and is stopped outside."""
    running.resume()
    try:
        yield running.peer
    finally:
        running.pause()


def shm_shortage(nbytes: int) -> str | None:
    """Why `nbytes` of shared memory can't be had, or None."""
    try:
        info = os.statvfs("/dev/shm")
    except OSError:
        return "there is no /dev/shm"
    free = info.f_bavail * info.f_frsize
    return None if free >= nbytes else f"/dev/shm has {free >> 20} MiB free and this needs {nbytes >> 20} MiB"


def registry() -> dict[str, type[Peer]]:
    """All peers by key, in the order of the table."""
    from . import peers_shm, peers_tsqp, peers_vllm, peers_zmq

    order: Sequence[type[Peer]] = (
        peers_tsqp.Tsqp,
        peers_tsqp.TsqpTiled,
        peers_tsqp.TsqpAuto,
        peers_tsqp.TsqpLarge,
        peers_zmq.MsgpackRequest,
        peers_zmq.Multipart,
        peers_zmq.FlagRing,
        peers_shm.Pipe,
        peers_vllm.VllmMessageQueue,
        peers_shm.Iceoryx2,
        peers_shm.CopyLimit,
    )
    return {peer.key: peer for peer in order}
