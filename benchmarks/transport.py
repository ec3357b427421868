"""Echo round trip of one float32 tensor, private memory to private memory, for tsqp and its alternatives.

    python -m benchmarks.transport

All peers run in one go, in turn at every size and over several rounds, so that noise hits all alike. Each peer's server
is a process of its own; both ends are pinned to different cores where there are two.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .peers import PEERS, CopyLimit, Echo, Peer

SIZES = (64, 1 << 10, 100_000, 1 << 20, 5 << 20, 15 << 20, 64 << 20)
COPY_LIMIT = "copy limit"
BASE = "tsqp"


def cores() -> list[int]:
    """The cores this process may use; empty where they can't be told."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(core: int | None) -> None:
    """Keeps this process on one core."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def serve(peer: Peer, address: str, core: int | None) -> None:
    """The server process of one peer."""
    pin(core)
    torch.set_num_threads(1)
    peer.serve(address)


@contextmanager
def running(peer: Peer, core: int | None) -> Iterator[Echo]:
    """A connected client; its server process ends with the block, whatever happens in it."""
    with tempfile.TemporaryDirectory(prefix="tsqp-bench-") as address:
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(peer, address, core), daemon=True)
        process.start()
        try:
            client = peer.connect(address)
            try:
                yield client
            finally:
                client.close()
        finally:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def measure(client: Echo, tensor: torch.Tensor, seconds: float) -> list[float]:
    """Round-trip times in µs for about `seconds`, at least five."""
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        client.echo(tensor)
        times.append((time.perf_counter() - begin) * 1e6)
    return times


def check(client: Echo, name: str, tensor: torch.Tensor) -> None:
    """One echo whose result is compared; also warms this size up."""
    for _ in range(3):
        result = client.echo(tensor)
    if not torch.equal(result, tensor):
        raise SystemExit(f"{name} returned other bytes than it was sent ({tensor.nbytes} bytes)")


def run(
    args: argparse.Namespace, peers: list[Peer], server_core: int | None, console: Console
) -> dict[str, dict[int, list[float]]]:
    """Times by peer and size: rounds over all peers at each size. The peers of one size run one after the other; an
    idle server that spins would disturb the others, so each is started for its turn."""
    times: dict[str, dict[int, list[float]]] = {}
    tensors = {size: torch.randn(size // 4) for size in args.sizes}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("echo", total=args.rounds * (len(peers) + 1) * len(args.sizes))
        for _ in range(args.rounds):
            for peer in [None, *peers]:
                with ExitStack() as stack:
                    client: Echo = stack.enter_context(running(peer, server_core)) if peer else CopyLimit()
                    name = peer.name if peer else COPY_LIMIT
                    for size, tensor in tensors.items():
                        check(client, name, tensor)
                        cell = times.setdefault(name, {}).setdefault(size, [])
                        cell.extend(measure(client, tensor, args.seconds))
                        progress.advance(task)
    return times


def size_label(nbytes: int) -> str:
    """64 B, 1 KB, 1 MB."""
    for unit, factor in (("MB", 1 << 20), ("KB", 1000)):
        if nbytes >= factor:
            return f"{nbytes / factor:.0f} {unit}"
    return f"{nbytes} B"


def microseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def table(title: str, medians: dict[str, dict[int, float]], sizes: list[int], base: str | None) -> Table:
    """Medians in µs, or as ratios to the row `base`."""
    result = Table(title=title)
    result.add_column("")
    for size in sizes:
        result.add_column(size_label(size), justify="right", no_wrap=True)
    for name, row in medians.items():
        cells = [row[size] if base is None else row[size] / medians[base][size] for size in sizes]
        result.add_row(name, *[microseconds(c) if base is None else f"{c:.2f}" for c in cells])
    return result


def report(times: dict[str, dict[int, list[float]]], args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Prints the tables; returns medians and 99th percentiles."""
    medians = {name: {size: statistics.median(cell) for size, cell in row.items()} for name, row in times.items()}
    tails = {
        name: {size: sorted(cell)[int(len(cell) * 0.99)] for size, cell in row.items()} for name, row in times.items()
    }
    sizes = list(args.sizes)
    console.print(table("echo round trip, median µs", medians, sizes, None))
    console.print(table("echo round trip, 99th percentile µs", tails, sizes, None))
    console.print(table("median as a ratio to the copy limit", medians, sizes, COPY_LIMIT))
    if BASE in medians:
        console.print(table("median as a ratio to tsqp (over 1: tsqp is faster)", medians, sizes, BASE))
    return {"median_us": medians, "p99_us": tails}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="bytes")
    parser.add_argument("--seconds", type=float, default=0.4, help="per peer, size and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", help="names, or parts of them; default: all")
    parser.add_argument("--json", type=Path, default=Path("results/transport.json"))
    return parser.parse_args(argv)


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark, prints the tables, saves the JSON."""
    args = parse(argv)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    torch.set_num_threads(1)
    chosen = [peer for peer in PEERS if not args.peers or any(part in peer.name for part in args.peers)]
    for peer in chosen:
        if peer.available:
            console.print(f"SKIPPED {peer.name}: {peer.available}")
    available = cores()
    server_core = available[1] if len(available) > 1 else None
    pin(available[0] if server_core is not None else None)
    times = run(args, [peer for peer in chosen if not peer.available], server_core, console)
    result = report(times, args, console)
    versions = {name: package_version(name) for name in ("tsqp", "torch", "pyzmq", "iceoryx2", "msgpack", "numpy")}
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**machine, "versions": versions, **result}, indent=1))
    console.print(f"saved {args.json}")


if __name__ == "__main__":
    main()
