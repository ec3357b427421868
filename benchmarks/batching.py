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
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import tsqp

from . import bar_plots, command, machine
from .clients import Worker
from .peers import preload_models
from .report import NOTHING, figure, number_of, show
from .setting import Setting, median

HIDDEN, INTERMEDIATE = 2048, 8192
NAMES = ["gate_proj", "up_proj"]
PATIENCE_S = 120.0
WARMUP_S = 0.3
#: What `--quick` changes: some ten seconds.
QUICK = {"clients": [1, 2, 4], "seconds": 0.2, "rounds": 3}


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


def measure(count: int, endpoints: list[str], options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Requests per second of ``count`` clients at each server, and what batching gains within a round: medians."""
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
                setting.step(f"{number_of(count, 'client')}, batching {'on' if number else 'off'}")
                begin = time.monotonic() + WARMUP_S
                for client in clients:
                    client.say((number, begin, begin + options.seconds))
                rates[number].append(sum(client.hear() for client in clients) / options.seconds)
    off, on = rates
    gains = [with_it / without for without, with_it in zip(off, on, strict=True) if without]
    return {
        "off_per_s": median(off),
        "on_per_s": median(on),
        "gain": median(gains) if gains else None,
        "rounds": {"off_per_s": off, "on_per_s": on, "gain": gains},
    }


def table(result: dict[str, Any]) -> Table:
    options = result["options"]
    what = f"{number_of(options['rows'], 'row')} a request, {options['dtype']}"
    title = f"Requests per second, {what}, medians of {number_of(options['rounds'], 'round')}"
    shown = Table(title=title, title_justify="left")
    for column in ("clients", "batching off", "batching on", "on / off"):
        shown.add_column(column, justify="right")
    for count, cell in result["clients"].items():
        gain = NOTHING if cell["gain"] is None else figure(cell["gain"])
        shown.add_row(count, figure(cell["off_per_s"]), figure(cell["on_per_s"]), gain)
    return shown


def measure_all(options: argparse.Namespace, setting: Setting, result: dict[str, Any]) -> None:
    """Adds what is measured to ``result``, and prints it."""
    preload_models()
    with servers(options) as (endpoints, started), setting.part(2 * options.rounds * len(options.clients)):
        for count in options.clients:
            result["clients"][str(count)] = measure(count, endpoints, options, setting)
        started[1].say("joined_requests")
        result["joined_requests"] = started[1].hear()
    show(table(result), setting.console)
    setting.console.print(f"{result['joined_requests']} requests were computed together with others")


def parse_arguments(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = command.make_parser("batching", __doc__, prog)
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=[1, 2, 4, 8], help="how many clients (1 2 4 8)")
    add("--rows", type=int, default=1, help="of a request (1)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (float32)")
    add("--threads", type=int, default=1, help="of each server (1)")
    add("--seconds", type=float, default=1.0, help="of a turn (1)")
    add("--rounds", type=int, default=5, help="turns of each server (5)")
    options = command.parse(parser, argv, QUICK, "batching")
    if min(*options.clients, options.rows, options.threads, options.rounds, 1) < 1 or not options.seconds > 0:
        parser.error("--clients, --rows, --threads and --rounds are 1 or more, --seconds more than 0")
    return options


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = parse_arguments(argv, prog)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    setting = Setting(None, 1.0, console)
    result: dict[str, Any] = {
        "benchmark": "batching",
        "machine": machine.describe(),
        "options": command.told(options),
        "clients": {},
    }
    return command.run(result, options, console, lambda: measure_all(options, setting, result), bar_plots.save_batching)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
