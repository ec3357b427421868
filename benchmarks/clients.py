"""Many clients on one server of one thread: total throughput, and how evenly they share it."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import tsqp
from tsqp.errors import ClosedError, PeerDiedError

from . import machine
from .peers import PeerFailedError, WrongAnswerError, processes
from .report import figure, size_text
from .setting import Setting, median, random_tensor

COUNTS = (1, 2, 4, 8, 16)
SIZES = (1 << 10, 1 << 20)
ROUNDS = 3
#: Clients that share a core run in slices of milliseconds that end early at random: a share is only known after many.
SECONDS_PER_TURN = 1.0
SECONDS_PER_CLIENT = 0.4
WARMUP_S = 0.15
GEOMETRY = {"max_chunk_bytes": 2 << 20, "max_chunks": 4}
PATIENCE_S = 60.0


def serve(wire: Connection, endpoint: str, core: int | None) -> None:
    """Echoes what any client sends, in the one thread of this process, until `wire` says something."""
    _begin()
    with tsqp.listen(endpoint, max_clients=max(COUNTS), **GEOMETRY) as listener:
        wire.send("ready")
        ended = threading.Event()  # looking at the wire in the loop would cost more than an echo
        threading.Thread(target=_end_when_told, args=(wire, ended, listener), daemon=True).start()
        machine.pin(core)  # the threads started before stay free
        while not ended.is_set():
            for channel in listener.wait():
                _answer(channel)
            while listener.accept_nowait() is not None:
                pass


def _end_when_told(wire: Connection, ended: threading.Event, listener: tsqp.Listener) -> None:
    wire.poll(None)
    ended.set()
    listener.interrupt()


def _answer(channel: Any) -> None:
    """One message of one client: each gets its turn."""
    try:
        lease = channel.recv_nowait()
        if lease is not None:
            with lease as message:
                channel.send(message.tensors, timeout=5.0)
    except (ClosedError, PeerDiedError):
        channel.close()


def call(wire: Connection, endpoint: str, core: int | None) -> None:
    """A client: connects with a tensor of the size it hears, echoes it in the span it hears, and says how often."""
    _begin()
    machine.pin(core)
    while (nbytes := wire.recv()) is not None:
        tensor = random_tensor(nbytes, seed=0)
        with tsqp.connect(endpoint, timeout=PATIENCE_S) as channel:
            channel.send([tensor])
            wire.send(bool(torch.equal(channel.recv(PATIENCE_S).tensors[0], tensor)))
            begin, end = wire.recv()
            wire.send(_count(channel, tensor, begin, end))


def _count(channel: Any, tensor: torch.Tensor, begin: float, end: float) -> int:
    """Echoes that begin and end in the span; those before it warm up."""
    count, payload = 0, [tensor]
    while (before := time.monotonic()) < end:
        channel.send(payload)
        channel.recv()
        if before >= begin and time.monotonic() <= end:
            count += 1
    return count


def _begin() -> None:
    machine.die_with_parent()
    torch.set_num_threads(1)


class Worker:
    """A process that runs ``target(wire, *arguments)`` until it hears None."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._wire, theirs = processes.Pipe()
        self._process = processes.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def say(self, value: Any) -> None:
        self._wire.send(value)

    def hear(self) -> Any:
        if not self._wire.poll(PATIENCE_S):
            raise PeerFailedError(f"process {self._process.pid} said nothing for {PATIENCE_S:g} s")
        try:
            return self._wire.recv()
        except EOFError:
            raise PeerFailedError(f"process {self._process.pid} died") from None

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.say(None)
        self._process.join(5.0)
        self._process.kill()
        self._process.join()
        self._wire.close()


@contextlib.contextmanager
def workers(count: int, setting: Setting) -> Iterator[list[Worker]]:
    """That many clients, and the server they can connect to: it on one core, they share the other."""
    with tempfile.TemporaryDirectory(prefix="clients-") as folder, contextlib.ExitStack() as stack:
        endpoint = f"ipc://{Path(folder) / 'server.sock'}"
        server = Worker(serve, endpoint, setting.server_core)
        stack.callback(server.end)
        server.hear()
        clients = []
        for _ in range(count):
            clients.append(Worker(call, endpoint, setting.client_core))
            stack.callback(clients[-1].end)
        yield clients


def turn(clients: Sequence[Worker], nbytes: int, setting: Setting) -> list[int]:
    """Echoes of each client in one span of time, the same for all."""
    for client in clients:
        client.say(nbytes)
    if not all(client.hear() for client in clients):
        raise WrongAnswerError("a client was returned something else than it sent")
    begin = time.monotonic() + setting.seconds(WARMUP_S)
    seconds = turn_seconds(len(clients), setting)
    for client in clients:
        client.say((begin, begin + seconds))
    return [client.hear() for client in clients]


def turn_seconds(count: int, setting: Setting) -> float:
    """How long a turn of `count` clients takes."""
    return setting.seconds(max(SECONDS_PER_TURN, SECONDS_PER_CLIENT * count))


def copies_alone(count: int, nbytes: int, seconds: float) -> float:
    """Echoes a second that the copies of `count` clients' echoes allow, made in turn by one core and nothing else:
    what they have in memory together may be more than a cache holds."""
    rows = [[torch.zeros(nbytes, dtype=torch.uint8) for _ in range(4)] for _ in range(count)]
    done, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds or done < 2 * count:
        for source, request, reply, result in rows:
            request.copy_(source)
            reply.copy_(request)
            result.copy_(reply)
        done += count
    return done / spent


def run(setting: Setting, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    echoes: dict[int, dict[int, list[list[int]]]] = {nbytes: {count: [] for count in counts} for nbytes in SIZES}
    with workers(max(counts), setting) as clients, setting.part(ROUNDS * len(SIZES) * len(counts)):
        for number in range(ROUNDS):
            for nbytes in SIZES:
                for count in counts if number % 2 == 0 else reversed(counts):
                    setting.step(f"{count} clients, {size_text(nbytes)}")
                    echoes[nbytes][count].append(turn(clients[:count], nbytes, setting))
    sizes = {str(nbytes): summary(cells, setting) for nbytes, cells in echoes.items()}
    with setting.pinned():
        for nbytes in SIZES:
            alone = {str(count): copies_alone(count, nbytes, setting.seconds(0.25)) for count in counts}
            sizes[str(nbytes)]["copies_alone_per_s"] = alone
    return {"counts": list(counts), "sizes": sizes}


def summary(cells: dict[int, list[list[int]]], setting: Setting) -> dict[str, Any]:
    """Medians over the rounds."""
    total = {
        count: median([sum(one) / turn_seconds(count, setting) for one in rounds]) for count, rounds in cells.items()
    }
    peak = max(total.values())
    spread = {count: median([max(one) / max(min(one), 1e-9) for one in rounds]) for count, rounds in cells.items()}
    return {
        "echoes_per_s": {str(count): value for count, value in total.items()},
        "of_peak": {str(count): value / peak if peak else 0.0 for count, value in total.items()},
        "max_over_min": {str(count): value for count, value in spread.items()},
    }


def after_peak(of_peak: dict[str, float]) -> float:
    """The smallest share of the peak from the peak on: with more clients it may never fall off."""
    shares = list(of_peak.values())
    return min(shares[shares.index(max(shares)) :])


def tables(result: dict[str, Any]) -> list[Table]:
    found = []
    for nbytes, cells in result["sizes"].items():
        title = f"Clients on one server of one thread, echo of {size_text(int(nbytes))}"
        table = Table(title=title, title_justify="left")
        for column in (
            "clients",
            "echoes/s",
            "of peak",
            "max/min share",
            "their copies alone, one core, /s",
            "of peak",
        ):
            table.add_column(column, justify="right")
        alone = cells["copies_alone_per_s"]
        for count, rate in cells["echoes_per_s"].items():
            limits = figure(alone[count]), f"{alone[count] / max(alone.values()):.2f}"
            share = f"{cells['max_over_min'][count]:.2f}"
            table.add_row(count, figure(rate), f"{cells['of_peak'][count]:.2f}", share, *limits)
        found.append(table)
    return found
