"""Echo times of tsqp beside other ways to move a tensor to another process and back, all in one run.

    python -m benchmarks.transport
    python -m benchmarks.transport --sizes 1KB 1MB --peers tsqp pipe copies --seconds-per-cell 5

A round trip sends one float32 tensor from private memory and ends when the echo lies in private memory again. The
peers take turns in short slices, several rounds for each size, so that noise hits all alike; a server is stopped
while it is not its turn. The figures are medians over all rounds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads, here and in the servers

import argparse
import contextlib
import gc
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import machine, report
from .peers import Peer, Running, registry, watched

DEFAULT_SIZES = ("64B", "1KB", "100KB", "1MB", "5MB", "15MB", "64MB")
ROUNDS = 4
WARMUP_S = 0.02
WARMUP_TRIPS = 20
UNITS = {"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


class WrongEchoError(RuntimeError):
    """A peer did not return what it was sent."""


def parse_size(text: str) -> int:
    """'64B', '100KB', '5MB' (or bytes) as a multiple of 4 bytes."""
    match = re.fullmatch(r"(\d+)\s*(B|KB|MB|GB)?", text.upper())
    nbytes = int(match[1]) * UNITS[match[2] or "B"] if match else 0
    if nbytes <= 0 or nbytes % 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give a multiple of 4 bytes such as 64B, 100KB or 5MB")
    return nbytes


def random_tensor(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randn(nbytes // 4, generator=torch.Generator().manual_seed(seed))


def verify(peer: Peer, nbytes: int, seed: int) -> None:
    """One echo of data this peer has not seen; raises WrongEchoError unless it comes back as it was."""
    tensor = random_tensor(nbytes, seed)
    result = peer.echo(tensor)
    if result.shape != tensor.shape or not torch.equal(result, tensor):
        raise WrongEchoError(f"{peer.title} returned something else than the {report.size_text(nbytes)} it was sent")


def warm_up(peer: Peer, tensor: torch.Tensor) -> None:
    """The first trips after a pause find cold caches and waits that have unlearnt to spin."""
    end = time.perf_counter() + WARMUP_S
    for _ in range(WARMUP_TRIPS):
        peer.echo(tensor)
        if time.perf_counter() > end:
            return


def measure(peer: Peer, tensor: torch.Tensor, seconds: float, samples_ns: list[int]) -> None:
    """Adds the round trips of `seconds`, at least two, to `samples_ns`."""
    clock, echo, add = time.perf_counter_ns, peer.echo, samples_ns.append
    end = clock() + int(seconds * 1e9)
    count = 0
    before = clock()
    while before < end or count < 2:
        before = clock()
        echo(tensor)
        after = clock()
        add(after - before)
        count += 1
        before = after


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def take_turn(running: Running, tensor: torch.Tensor, seconds: float, cell: report.Cell) -> None:
    running.resume()
    try:
        warm_up(running.peer, tensor)
        with no_garbage_collection():
            measure(running.peer, tensor, seconds, cell.samples_ns)
    finally:
        running.pause()


def run_all(
    peers: Sequence[Running], sizes: Sequence[int], seconds: float, progress: Progress
) -> dict[str, dict[int, report.Cell]]:
    """All cells; within a size the peers take turns, each round in another order."""
    cells = {running.peer.key: {nbytes: report.Cell() for nbytes in sizes} for running in peers}
    task = progress.add_task("", total=len(sizes) * ROUNDS * len(peers))
    for nbytes in sizes:
        tensor = random_tensor(nbytes, seed=0)
        for number, running in enumerate(peers):
            running.resume()
            verify(running.peer, nbytes, seed=number + 1)
            running.pause()
        for turn in range(ROUNDS):
            shift = turn * len(peers) // ROUNDS
            for running in [*peers[shift:], *peers[:shift]]:
                progress.update(task, description=f"{report.size_text(nbytes):>6}  {running.peer.title}")
                progress.refresh()  # here only: a thread that draws would take part in what is measured
                take_turn(running, tensor, seconds / ROUNDS, cells[running.peer.key][nbytes])
                progress.advance(task)
    return cells


@contextlib.contextmanager
def started(wanted: Sequence[type[Peer]], core: int | None, skipped: dict[str, str]) -> Iterator[list[Running]]:
    """The peers with their servers; all are ended, whatever happens. Those that can't start are in `skipped`."""
    running: list[Running] = []
    with tempfile.TemporaryDirectory(prefix="echo-") as folder:
        try:
            for peer in wanted:
                reason = peer.unavailable()
                if reason is None:
                    running.append(Running(peer(Path(folder)), core))
                else:
                    skipped[peer.title] = reason
            with watched(running):
                yield running
            while running:
                running.pop().stop()
        finally:
            for left in running:
                left.kill()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transport",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = list(registry())
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[parse_size(s) for s in DEFAULT_SIZES])
    parser.add_argument("--seconds-per-cell", type=float, default=1.2, help="time for each peer and size (1.2)")
    parser.add_argument("--peers", nargs="+", choices=known, default=known, metavar="PEER", help=", ".join(known))
    parser.add_argument("--json", type=Path, default=Path("results/transport.json"), help="where the result is kept")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    torch.set_num_threads(1)
    cores = machine.two_cores()
    where = machine.describe()
    wanted = [peer for key, peer in registry().items() if key in options.peers]
    skipped: dict[str, str] = {}
    columns = (TextColumn("{task.description:42}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with started(wanted, cores[1] if cores else None, skipped) as running:
        machine.pin(cores[0] if cores else None)  # after the connections: their helper threads stay free
        with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
            cells = run_all(running, options.sizes, options.seconds_per_cell, progress)
    titles = {peer.key: peer.title for peer in wanted}
    result = report.Result(titles, options.sizes, cells, skipped, cores is not None, options.seconds_per_cell, where)
    report.print_result(result, console, bases=("tsqp", "copies"))
    report.save(result, options.json)
    console.print(f"saved in {options.json}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
