"""What both ends cost while nothing is to be done, and how long the first message after that takes.

A message is delivered when its receiver has it: the receiver notes the time, by the clock that both processes share.
The round trip after an idle time wakes both ends, one after the other.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.table import Table

import tsqp
from tsqp.errors import WaitTimeoutError

from .peers import Peer, Running, WrongAnswerError, started, taking_turn
from .peers_tsqp import CONNECT_S, END, Tsqp
from .report import Samples, figure
from .rpc import RpcPeer
from .setting import Setting, median, random_tensor
from .usage import cpu_ns
from .words import Words, shared_page

#: Seconds of idling -> how often.
IDLES = {0.05: 20, 0.3: 7, 1.0: 3, 10.0: 1}
TRAFFIC_S = 0.3
NBYTES = 1024


class Stamp:
    """When the other process received the last message, in ns of the monotonic clock: a word in a shared file."""

    def __init__(self, path: str) -> None:
        self._map = shared_page(path)
        self._word = ctypes.c_uint64.from_buffer(self._map)

    def take(self) -> None:
        self._word.value = time.monotonic_ns()

    def taken(self) -> int:
        return self._word.value


class Stamped(Peer):
    """A peer whose server notes when a message was there for it."""

    stamp: Stamp

    def stamp_path(self) -> str:
        return str(self.folder / f"{self.key}.stamp")


class IdleChannel(Stamped, Tsqp):
    """A channel; the client waits in ``recv`` all the time, the server in ``lease``."""

    key = "channel"
    title = "channel, both ends waiting for a message"

    def address(self) -> Any:
        return *super().address(), self.stamp_path()

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        endpoint, options, path = address
        stamp = Stamp(path)
        with tsqp.listen(endpoint, **options) as listener:
            ready()
            channel = listener.accept(timeout=CONNECT_S)
            while True:
                with channel.lease() as message:
                    stamp.take()
                    if message.tag == END:
                        return
                    channel.send(message.tensors)

    def connect(self, address: Any) -> None:
        super().connect(address[:2])
        self.stamp = Stamp(address[2])
        self._tensor = random_tensor(NBYTES, seed=0)

    def call(self) -> torch.Tensor:
        return self.echo(self._tensor)

    def idle(self, seconds: float) -> None:
        try:
            self.channel.recv(timeout=seconds)
        except WaitTimeoutError:
            return
        raise RuntimeError("a message came that nobody sent")


class IdleRpc(Stamped, RpcPeer):
    """GPUServer's loop waits for requests, the client's thread does something else."""

    key = "rpc"
    title = "GPUServer's loop, a GPUClient that is not called"

    def address(self) -> Any:
        return *super().address(), self.stamp_path()

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        *others, path = address
        RpcPeer.serve(tuple(others), ready, Stamp(path).take)

    def connect(self, address: Any) -> None:
        super().connect(address)
        self.stamp = Stamp(address[-1])

    def idle(self, seconds: float) -> None:
        time.sleep(seconds)


class BareFutex(Stamped):
    """One process sleeps in the kernel, the other wakes it: what any blocking wait costs on this machine."""

    key = "futex"
    title = "a bare futex, its waker looking for the answer"
    END: ClassVar[int] = (1 << 32) - 1

    @classmethod
    def unavailable(cls) -> str | None:
        return None if platform.machine() in Words.SYS_FUTEX else "the number of its system call is not known here"

    def address(self) -> Any:
        return str(self.folder / "futex"), self.stamp_path()

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        words, stamp, seen = Words(address[0]), Stamp(address[1]), 0
        ready()
        while seen != BareFutex.END:
            while words.question.value == seen:
                words.sleep(words.question, seen)
            stamp.take()
            seen = words.question.value
            words.answer.value = seen

    def connect(self, address: Any) -> None:
        self._words, self._asked = Words(address[0]), 0
        self.stamp = Stamp(address[1])

    def ask(self, number: int) -> None:
        words = self._words
        words.question.value = number
        words.wake(words.question)
        while words.answer.value != number:
            pass

    def call(self) -> None:
        """One question and its answer."""
        self._asked += 1
        self.ask(self._asked)

    def idle(self, seconds: float) -> None:
        time.sleep(seconds)

    def send_end(self) -> None:
        self.ask(self.END)


CONTESTANTS: tuple[type[Peer], ...] = (IdleChannel, IdleRpc, BareFutex)


@dataclass(frozen=True)
class Awakening:
    """One idle time and its end: CPU shares in percent, ns until the first message was there, and its round trip."""

    client_percent: float
    server_percent: float
    delivered_ns: int
    round_trip_ns: int


def idle_once(running: Running, seconds: float) -> Awakening:
    peer: Any = running.peer
    assert running.pid is not None
    begin, mine, theirs = time.perf_counter(), cpu_ns(os.getpid()), cpu_ns(running.pid)
    peer.idle(seconds)
    spent = time.perf_counter() - begin
    shares = (cpu_ns(os.getpid()) - mine) / 1e7 / spent, (cpu_ns(running.pid) - theirs) / 1e7 / spent
    before = time.monotonic_ns()
    peer.call()
    after = time.monotonic_ns()
    delivered = peer.stamp.taken() - before
    if not 0 < delivered < after - before:
        raise WrongAnswerError(f"a message came after {delivered} ns, its answer after {after - before} ns")
    return Awakening(*shares, delivered, after - before)


def run(setting: Setting) -> dict[str, Any]:
    lengths = {setting.seconds(idle): times for idle, times in IDLES.items()}
    found: dict[str, dict[float, list[Awakening]]] = {}
    steps = len(lengths) * len(CONTESTANTS)
    with started(CONTESTANTS, setting.server_core) as peers, setting.pinned(), setting.part(steps):
        for seconds, times in lengths.items():
            for running in peers:
                setting.step(f"{running.peer.title}, {seconds:g} s")
                with taking_turn(running) as peer:
                    ends = found.setdefault(peer.key, {})
                    ends[seconds] = [after_traffic(running, setting, seconds) for _ in range(times)]
    return {
        "titles": {peer.key: peer.title for peer in CONTESTANTS},
        "idle": {key: {f"{idle:g}": as_json(runs) for idle, runs in ends.items()} for key, ends in found.items()},
    }


def after_traffic(running: Running, setting: Setting, seconds: float) -> Awakening:
    """One idling after traffic that makes waits spin."""
    peer: Any = running.peer
    end = time.perf_counter() + min(setting.seconds(TRAFFIC_S), seconds)
    while time.perf_counter() < end:
        peer.call()
    return idle_once(running, seconds)


def as_json(runs: list[Awakening]) -> dict[str, Any]:
    return {
        "client_cpu_percent": median([run.client_percent for run in runs]),
        "server_cpu_percent": median([run.server_percent for run in runs]),
        "first_message": Samples([run.delivered_ns for run in runs]).as_json(),
        "first_round_trip": Samples([run.round_trip_ns for run in runs]).as_json(),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    table = Table(title="Idle after traffic", title_justify="left")
    names = ("", "idle s", "client CPU %", "server CPU %", "first message µs", "slowest", "its round trip µs", "times")
    for column in names:
        table.add_column(column, justify="left" if not column else "right")
    for key, ends in result["idle"].items():
        for seconds, cell in ends.items():
            first, trip = cell["first_message"], cell["first_round_trip"]
            shares = (f"{cell[side]:.2f}" for side in ("client_cpu_percent", "server_cpu_percent"))
            times = (figure(first["median_us"]), figure(first["max_us"]), figure(trip["median_us"]))
            table.add_row(result["titles"][key], seconds, *shares, *times, str(first["count"]))
    return [table]
