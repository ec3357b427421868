"""What a round trip costs beside the server's compute, where that takes milliseconds; and what the waiting costs.

    python -m benchmarks.overhead                          # 1, 3 and 10 ms, computed by 1 and by 2 threads
    python -m benchmarks.overhead --ms 2 --threads 2 --rounds 40 --out overhead.json
    python -m benchmarks.overhead --cpu-latency-us 0       # and the same with cores that do not halt

One server and one client. The client waits in two ways in turn, A B A B: it predicts when the reply comes from those
before, or it does not. A call's overhead is what the client saw it take less what the server says it computed. Beside
them the barest calls there can be, two words of shared memory around the same work: what this machine takes at least.
With a limit of how long a core may take to wake (tsqp.CpuLatency) there are two ways more, predicting and bare.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads, here and in the server

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tsqp
from tsqp._channel import Forecast
from tsqp.cpu_latency import cores_awake

from . import machine
from .arguments import check_awake
from .bare import Bare, bare
from .clients import Worker
from .quiet import QUIET, Others, wait_for_quiet
from .report import Samples, figure
from .rpc import HIDDEN, compute_nothing, stub_model
from .setting import median, no_garbage_collection
from .work import Work

PATIENCE_S = 60.0
MODULE = "model.layers.0.self_attn.q_proj"
#: What the runner does between two calls, as a split model's norms do.
PAUSE_US = 60.0
#: Calls of a turn that are not counted: the way of waiting has just changed.
WARMUP = 4
WAYS = {False: "plain", True: "predicting"}
#: The barest calls there can be, whose asker looks at its word without pause, or sleeps.
FLOORS = {False: "bare, looking", True: "bare, sleeping"}
#: The same where cores wake within the limit that was asked for.
AWAKE, FLOOR_AWAKE = "predicting, awake", "bare, sleeping, awake"


def serve(wire: Connection, endpoint: str) -> None:
    """A server whose linear modules take as long as it is told."""
    machine.die_with_parent()
    work = Work()
    server = tsqp.GPUServer(stub_model(torch.float32), endpoint, device="cpu")
    compute_nothing(server, torch.float32, work)
    with server.start():
        wire.send("ready")
        while (order := wire.recv()) is not None:
            work.order = order
            wire.send(None)
            wire.send(work.alone_s.get())


@dataclass
class Way:
    """What the calls of one way of waiting took."""

    overhead: Samples = field(default_factory=Samples)
    compute: Samples = field(default_factory=Samples)
    cpu_ns: int = 0
    calls: int = 0

    def __add__(self, other: Way) -> Way:
        return Way(
            Samples(self.overhead.ns + other.overhead.ns),
            Samples(self.compute.ns + other.compute.ns),
            self.cpu_ns + other.cpu_ns,
            self.calls + other.calls,
        )

    @property
    def compute_us(self) -> float:
        return self.compute.median_us

    def as_json(self) -> dict[str, Any]:
        return {
            "overhead": self.overhead.as_json(),
            "compute": self.compute.as_json(),
            "runner_cpu_us_per_call": round(self.cpu_ns / self.calls / 1000, 3),
        }


def pause() -> None:
    """Some work of the runner's."""
    end = time.perf_counter_ns() + int(PAUSE_US * 1000)
    while time.perf_counter_ns() < end:
        pass


Call = Callable[[], tuple[int, int]]


def turn(call: Call, count: int, way: Way) -> None:
    """`count` calls, added to `way`; `call` says what it took and what its computing took, in ns."""
    for number in range(WARMUP + count):
        cpu = time.process_time_ns()
        spent, compute = call()
        cpu = time.process_time_ns() - cpu
        pause()
        if number >= WARMUP:
            way.overhead.ns.append(spent - compute)
            way.compute.ns.append(compute)
            way.cpu_ns += cpu
            way.calls += 1


def asking(client: tsqp.GPUClient, h: torch.Tensor) -> Call:
    """A call of the server's module."""
    times = client.telemetry.row("gpu_linear")  # calls, ns of round trips, of compute, of waiting at the server

    def call() -> tuple[int, int]:
        before = tuple(times)
        client.linear(MODULE, h)
        _, spent, compute, _ = (now - then for now, then in zip(times, before, strict=True))
        return spent, compute

    return call


def measure(
    client: tsqp.GPUClient, floor: Bare | None, pids: Sequence[int], options: argparse.Namespace, count: int
) -> dict[str, Any]:
    """Rounds of both ways in turn, each first in every second one, and of the bare ones. Those in which others took
    more of the machine than :data:`~benchmarks.quiet.QUIET` are left out, but never more than half."""
    rounds = []
    h = torch.randn(1, 1, HIDDEN)
    site, call = client._requests.linear(MODULE, h).site, asking(client, h)
    forecast = Forecast()
    names = named(floor is not None, options.cpu_latency_us is not None)
    awake = partial(cores_awake, options.cpu_latency_us)
    with no_garbage_collection():
        for number in range(options.rounds):
            wait_for_quiet(options.patience)
            others, ways = Others(pids), {name: Way() for name in names}
            for predicts in (False, True) if number % 2 == 0 else (True, False):
                site.forecast = forecast if predicts else None
                turn(call, count, ways[WAYS[predicts]])
            if AWAKE in ways:
                site.forecast = forecast
                with awake():
                    turn(call, count, ways[AWAKE])
            if floor is not None:
                with floor.awake():
                    for sleeps, name in FLOORS.items():
                        turn(partial(floor.call, sleeps), count, ways[name])
                    if FLOOR_AWAKE in ways:
                        with awake():
                            turn(partial(floor.call, True), count, ways[FLOOR_AWAKE])
            rounds.append((others.share(), ways))
    limit = max(QUIET, median([share for share, _ in rounds]))
    kept = [(share, ways) for share, ways in rounds if share <= limit]
    return {
        "rounds": len(kept),
        "others": median([share for share, _ in kept]),
        "compute_ratio": median(
            [ways["predicting"].compute.median_us / ways["plain"].compute.median_us for _, ways in kept]
        ),
        **{name: sum((ways[name] for _, ways in kept), Way()).as_json() for name in names},
    }


def named(floors: bool, awake: bool) -> list[str]:
    """What is measured, in the order of the table."""
    ways = [*WAYS.values(), *([AWAKE] if awake else ())]
    bare_ones = [*FLOORS.values(), *([FLOOR_AWAKE] if awake else ())]
    return ways + bare_ones if floors else ways


@contextlib.contextmanager
def connected() -> Iterator[tuple[Worker, tsqp.GPUClient]]:
    """A server process and a client of it."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder, contextlib.ExitStack() as stack:
        endpoint = f"ipc://{Path(folder) / 's'}"
        server = Worker(serve, endpoint)
        stack.callback(server.end)
        server.hear()
        client = stack.enter_context(tsqp.GPUClient(endpoint, timeout=PATIENCE_S, connect_timeout=PATIENCE_S))
        client.init()
        yield server, client


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    cells = []
    with connected() as (server, client), bare() as floor:
        pids = [os.getpid(), server.pid, *([] if floor is None else [floor.pid])]
        for threads in options.threads:
            for ms in options.ms:
                wait_for_quiet(options.patience)
                server.say((threads, ms / 1000))
                server.hear()
                client.linear(MODULE, torch.randn(1, 1, HIDDEN))
                alone = server.hear()
                if floor is not None:
                    floor.fit(threads, ms / 1000)
                count = max(2, int(options.seconds * 1000 / ms))
                found = measure(client, floor, pids, options, count)
                cells.append({"threads": threads, "ms": ms, "alone_ms": round(alone * 1000, 4), **found})
    return cells


def table(cells: Sequence[dict[str, Any]]) -> Table:
    title = (
        "Beside the server's compute, median µs a call, and of a bare call (its compute over plain's); compute, "
        "predicting over plain; CPU of the runner, share of a core; what other processes took of one"
    )
    shown = Table(title=title, title_justify="left")
    known = [name for name in named(floors=True, awake=True) if cells and name in cells[0]]
    floors = [name for name in known if name.startswith("bare")]
    names = [name for name in known if name not in floors]
    overheads, cpus = ([f"{part}, {name}" for name in names] for part in ("overhead", "CPU"))
    for column in ("threads", "compute", *overheads, *floors, "compute ratio", *cpus, "others"):
        shown.add_column(column, justify="right")
    for cell in cells:
        ways = [cell[name] for name in names]
        shown.add_row(
            str(cell["threads"]),
            f"{cell['ms']:g} ms",
            *(figure(way["overhead"]["median_us"]) for way in ways),
            *(floor_text(cell, name) for name in floors),
            f"{cell['compute_ratio']:.3f}",
            *(f"{100 * cpu_share(way):.1f} %" for way in ways),
            f"{100 * cell['others']:.0f} %",
        )
    return shown


def floor_text(cell: dict[str, Any], name: str) -> str:
    """A floor, and how long the work took there: whoever looks without pause may have taken a core from it."""
    ratio = cell[name]["compute"]["median_us"] / cell["plain"]["compute"]["median_us"]
    return f"{figure(cell[name]['overhead']['median_us'])} (x{ratio:.2f})"


def cpu_share(way: dict[str, Any]) -> float:
    """CPU time of the runner in its calls, as a share of their median duration."""
    us = way["overhead"]["median_us"] + way["compute"]["median_us"]
    return float(way["runner_cpu_us_per_call"] / us)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--ms", type=float, nargs="+", default=[1.0, 3.0, 10.0], help="what the server computes for")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the server")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine each round")
    parser.add_argument("--cpu-latency-us", type=int, metavar="N", help="with cores that wake in so many µs, too")
    parser.add_argument("--out", type=Path, help="where the result is kept as JSON")
    options = parser.parse_args(argv)
    check_awake(parser, options.cpu_latency_us)
    torch.set_num_threads(1)
    cells = run(options)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    console.print(table(cells))
    if options.out is not None:
        options.out.write_text(json.dumps({"machine": machine.describe(), "cells": cells}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
