"""What computing requests of several clients together gains: decode-sized calls to one server, batching on and off.

    python -m benchmarks.batching                          # 1, 2, 4, 8 clients, one row each, 2048 -> 2 x 8192
    python -m benchmarks.batching --clients 4 --rows 8 --dtype bfloat16

Each client process asks for gate_proj and up_proj of one layer without pause. Both servers run all the time and take
turns: A B A B. Figures are medians over turns.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads, here and in the other processes

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import tsqp

from . import machine
from .clients import Worker
from .report import figure

HIDDEN, INTERMEDIATE = 2048, 8192
NAMES = ["gate_proj", "up_proj"]
PATIENCE_S = 120.0
WARMUP_S = 0.3


def serve(wire: Connection, endpoint: str, dtype: str, threads: int, batching: bool) -> None:
    machine.die_with_parent()
    torch.set_num_threads(threads)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=1,
        vocab_size=1024,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    with tsqp.GPUServer(model, endpoint, device="cpu", batching=batching) as server:
        wire.send("ready")
        while (order := wire.recv()) is not None:
            wire.send(server.stats[order])


def call(wire: Connection, endpoints: list[str], rows: int) -> None:
    """A client of both servers: asks the one it is told of in the span it is told, and says how often."""
    machine.die_with_parent()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(tsqp.GPUClient(endpoint, timeout=PATIENCE_S)) for endpoint in endpoints]
        h = torch.randn(rows, HIDDEN, dtype=clients[0].init().torch_dtype)
        wire.send("ready")
        while (order := wire.recv()) is not None:
            number, begin, end = order
            count = 0
            while (before := time.monotonic()) < end:
                clients[number].batch_linear(0, NAMES, h)
                count += before >= begin and time.monotonic() <= end
            wire.send(count)


@contextlib.contextmanager
def servers(options: argparse.Namespace) -> Iterator[tuple[list[str], list[Worker]]]:
    """Two servers, without and with batching."""
    with tempfile.TemporaryDirectory(prefix="batching-") as folder, contextlib.ExitStack() as stack:
        endpoints = [f"ipc://{Path(folder) / name}" for name in ("off", "on")]
        started = []
        for batching, endpoint in enumerate(endpoints):
            started.append(Worker(serve, endpoint, options.dtype, options.threads, bool(batching)))
            stack.callback(started[-1].end)
            started[-1].hear()
        yield endpoints, started


def measure(count: int, endpoints: list[str], options: argparse.Namespace) -> list[float]:
    """Medians of the requests per second of ``count`` clients at each server."""
    rates: list[list[float]] = [[], []]
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(Worker(call, endpoints, options.rows))
            stack.callback(clients[-1].end)
        for client in clients:
            client.hear()
        for _ in range(options.rounds):
            for number in (0, 1):
                begin = time.monotonic() + WARMUP_S
                for client in clients:
                    client.say((number, begin, begin + options.seconds))
                rates[number].append(sum(client.hear() for client in clients) / options.seconds)
    return [statistics.median(found) for found in rates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("results/batching.json"))
    options = parser.parse_args()
    table = Table(title=f"{options.rows} row(s), {options.dtype}, requests per second", title_justify="left")
    for column in ("clients", "batching off", "batching on", "on / off"):
        table.add_column(column, justify="right")
    found = {}
    with servers(options) as (endpoints, started):
        for count in options.clients:
            off, on = measure(count, endpoints, options)
            found[str(count)] = {"off_per_s": off, "on_per_s": on}
            table.add_row(str(count), figure(off), figure(on), figure(on / off if off else 0.0))
        started[1].say("joined_requests")
        joined = started[1].hear()
    Console().print(table, f"{joined} requests were computed together with others")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine.describe(), "rows": options.rows, "dtype": options.dtype, "clients": found}
    options.json.write_text(json.dumps({**result, "joined_requests": joined}, indent=1))


if __name__ == "__main__":
    main()
