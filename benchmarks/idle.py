"""What both ends cost while nothing is to be done, and how long the first message after that takes."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from rich.table import Table

from tsqp.errors import WaitTimeoutError

from .peers import Peer, Running, started, taking_turn
from .peers_tsqp import Tsqp
from .report import Samples, figure
from .rpc import RpcPeer
from .setting import Setting, random_tensor
from .usage import cpu_ns

#: Seconds of idling -> how often.
IDLES = {0.05: 20, 0.3: 7, 1.0: 3, 10.0: 1}
TRAFFIC_S = 0.3
NBYTES = 1024


class IdleChannel(Tsqp):
    """A channel; the client waits in ``recv`` all the time, the server in ``lease``."""

    key = "channel"
    title = "channel, both ends waiting for a message"

    def connect(self, address: Any) -> None:
        super().connect(address)
        self._tensor = random_tensor(NBYTES, seed=0)

    def call(self) -> torch.Tensor:
        return self.echo(self._tensor)

    def idle(self, seconds: float) -> None:
        try:
            self.channel.recv(timeout=seconds)
        except WaitTimeoutError:
            return
        raise RuntimeError("a message came that nobody sent")


class IdleRpc(RpcPeer):
    """GPUServer's loop waits for requests, the client's thread does something else."""

    key = "rpc"
    title = "GPUServer's loop, a GPUClient that is not called"

    def idle(self, seconds: float) -> None:
        time.sleep(seconds)


class Words:
    """Two words in a shared file: a question and its answer. The first can be slept on."""

    SYS_FUTEX: ClassVar[dict[str, int]] = {"x86_64": 202, "aarch64": 98}
    WAIT, WAKE = 0, 1

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, mmap.PAGESIZE)
        self._map = mmap.mmap(fd, mmap.PAGESIZE)
        os.close(fd)
        self.question = ctypes.c_uint32.from_buffer(self._map, 0)
        self.answer = ctypes.c_uint32.from_buffer(self._map, 1024)
        self._call = ctypes.CDLL(None).syscall

    def futex(self, operation: int, value: int) -> None:
        number = self.SYS_FUTEX[platform.machine()]
        self._call(number, ctypes.byref(self.question), operation, value, None, None, 0)


class BareFutex(Peer):
    """One process sleeps in the kernel, the other wakes it: what any blocking wait costs on this machine."""

    key = "futex"
    title = "a bare futex, its waker looking for the answer"
    END: ClassVar[int] = (1 << 32) - 1

    @classmethod
    def unavailable(cls) -> str | None:
        return None if platform.machine() in Words.SYS_FUTEX else "the number of its system call is not known here"

    def address(self) -> Any:
        return str(self.folder / "futex")

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        words, seen = Words(address), 0
        ready()
        while seen != BareFutex.END:
            while words.question.value == seen:
                words.futex(Words.WAIT, seen)
            seen = words.question.value
            words.answer.value = seen

    def connect(self, address: Any) -> None:
        self._words, self._asked = Words(address), 0

    def ask(self, number: int) -> None:
        words = self._words
        words.question.value = number
        words.futex(Words.WAKE, 1)
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


def idle_once(running: Running, seconds: float) -> tuple[float, float, int]:
    """CPU shares in percent of client and server while idle, and the first round trip after it in ns."""
    peer: Any = running.peer
    assert running.pid is not None
    begin, mine, theirs = time.perf_counter(), cpu_ns(os.getpid()), cpu_ns(running.pid)
    peer.idle(seconds)
    spent = time.perf_counter() - begin
    shares = (cpu_ns(os.getpid()) - mine) / 1e7 / spent, (cpu_ns(running.pid) - theirs) / 1e7 / spent
    before = time.perf_counter_ns()
    peer.call()
    return *shares, time.perf_counter_ns() - before


def run(setting: Setting) -> dict[str, Any]:
    lengths = {setting.seconds(idle): times for idle, times in IDLES.items()}
    found: dict[str, dict[float, list[tuple[float, float, int]]]] = {}
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


def after_traffic(running: Running, setting: Setting, seconds: float) -> tuple[float, float, int]:
    """One idling after traffic that makes waits spin."""
    peer: Any = running.peer
    end = time.perf_counter() + min(setting.seconds(TRAFFIC_S), seconds)
    while time.perf_counter() < end:
        peer.call()
    return idle_once(running, seconds)


def as_json(runs: list[tuple[float, float, int]]) -> dict[str, Any]:
    first = Samples([run[2] for run in runs])
    mine, theirs = (sorted(run[side] for run in runs)[len(runs) // 2] for side in (0, 1))
    return {"client_cpu_percent": mine, "server_cpu_percent": theirs, "first_message": first.as_json()}


def tables(result: dict[str, Any]) -> list[Table]:
    table = Table(title="Idle after traffic", title_justify="left")
    for column in ("", "idle s", "client CPU %", "server CPU %", "first message µs", "slowest", "times"):
        table.add_column(column, justify="left" if not column else "right")
    for key, ends in result["idle"].items():
        for seconds, cell in ends.items():
            first = cell["first_message"]
            shares = (f"{cell[side]:.2f}" for side in ("client_cpu_percent", "server_cpu_percent"))
            times = (figure(first["median_us"]), figure(first["max_us"]), str(first["count"]))
            table.add_row(result["titles"][key], seconds, *shares, *times)
    return [table]
