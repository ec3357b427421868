"""tsqp's transport beside other ways to move a tensor to another process, all in one run.

    python -m benchmarks.transport                          # every part: the bars at the end need all of them
    python -m benchmarks.transport echo stream              # these parts only
    python -m benchmarks.transport echo --sizes 1KB 1MB --peers tsqp pipe copies --seconds-per-cell 5

In every part the contestants take turns in one run, and figures are medians over all turns. Tables are printed, and
the figures and plots kept in results/.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads, here and in the servers

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from . import bars, clients, command, echo, idle, large, machine, plots, rpc, slots, stream
from .peers import preload_models, registry
from .report import show
from .setting import Setting

DEFAULT_SIZES = ("64B", "1KB", "100KB", "1MB", "5MB", "15MB", "64MB")
#: Below the threshold these do what tsqp does, and above it the part `large` measures them.
LARGE_ONLY = ("tsqp-tile", "tsqp-auto", "tsqp-slots")
#: What `--quick` changes: all parts in less than half a minute.
QUICK = {
    "pace": 0.1,
    "sizes": [64, 100 << 10, 1 << 20],
    "peers": ["tsqp", "msgpack", "multipart", "pipe", "copies"],
    "clients": [1, 2, 4],
    "slots": [1, 4, 16],
    "large_sizes": [15 << 20, 64 << 20],
}
UNITS = {"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


class Part(NamedTuple):
    about: str
    run: Callable[[Setting, argparse.Namespace], dict[str, Any]]
    tables: Callable[[dict[str, Any]], list[Table]]


def _echo(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    wanted = [peer for key, peer in registry().items() if key in options.peers]
    return echo.run(setting, wanted, options.sizes, setting.seconds(options.seconds_per_cell))


PARTS = {
    "echo": Part("round trips of one tensor over sizes, all peers", _echo, echo.tables),
    "stream": Part("1 MB messages one way, beside memcpy", lambda s, o: stream.run(s), stream.tables),
    "rpc": Part("GPUClient.batch_linear, server computing nothing", lambda s, o: rpc.run(s), rpc.tables),
    "idle": Part("CPU while idle, first message after it", lambda s, o: idle.run(s), idle.tables),
    "clients": Part("1 to 16 clients on one server", lambda s, o: clients.run(s, o.clients), clients.tables),
    "large": Part("messages that fit no slot, by carrier", lambda s, o: large.run(s, o.large_sizes), large.tables),
    "slots": Part("echo and stream over the number of slots", lambda s, o: slots.run(s, o.slots), slots.tables),
}


def parse_size(text: str) -> int:
    """'64B', '100KB', '5MB' (or bytes) as a multiple of 4 bytes."""
    match = re.fullmatch(r"(\d+)\s*(B|KB|MB|GB)?", text.upper())
    nbytes = int(match[1]) * UNITS[match[2] or "B"] if match else 0
    if nbytes <= 0 or nbytes % 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give a multiple of 4 bytes such as 64B, 100KB or 5MB")
    return nbytes


def parse_arguments(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    about = "\n".join(f"  {name:8} {part.about}" for name, part in PARTS.items())
    parser = command.make_parser("transport", __doc__, prog, f"\nparts:\n{about}")
    known = list(registry())
    usual = [key for key in known if key not in LARGE_ONLY]
    parser.add_argument("parts", nargs="*", metavar="PART", help="which parts to run (all)")
    parser.add_argument("--part", action="append", default=[], metavar="PART", help="the same; may be repeated")
    parser.add_argument("--parts", action="store_true", dest="list_parts", help="say which parts there are, and end")
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[parse_size(s) for s in DEFAULT_SIZES])
    parser.add_argument("--seconds-per-cell", type=float, default=0.6, help="echo: for each peer and size (0.6)")
    parser.add_argument("--peers", nargs="+", choices=known, default=usual, metavar="PEER", help=", ".join(known))
    parser.add_argument("--clients", nargs="+", type=int, default=list(clients.COUNTS), help="how many clients")
    parser.add_argument("--slots", nargs="+", type=int, default=list(slots.COUNTS), help="how many slots")
    parser.add_argument("--large-sizes", nargs="+", type=parse_size, default=list(large.SIZES))
    parser.add_argument("--pace", type=float, default=1.0, help="multiplies the time of every measurement (1)")
    options = command.parse(parser, argv, QUICK, "transport")
    options.parts += options.part
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"{name!r} is no part; there are {', '.join(PARTS)}")
    if max(options.clients) > max(clients.COUNTS) or min(options.clients) < 1:
        parser.error(f"--clients are 1 to {max(clients.COUNTS)}")
    return options


def run(names: Sequence[str], setting: Setting, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Adds the parts' results to ``found``, by name; each is printed when it is there."""
    for name in names:
        begin = time.perf_counter()
        one = PARTS[name].run(setting, options)
        found[name] = one
        for table in PARTS[name].tables(one):
            show(table, setting.console)
        for title, reason in one.get("skipped", {}).items():
            setting.console.print(f"[yellow]SKIPPED {title}: {reason}[/yellow]")
        one["seconds"] = round(time.perf_counter() - begin, 1)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = parse_arguments(argv, prog)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    if options.list_parts:
        console.print("\n".join(f"{name:8} {part.about}" for name, part in PARTS.items()), highlight=False)
        return 0
    torch.set_num_threads(1)
    names = [name for name in PARTS if name in options.parts or not options.parts]
    if {"rpc", "idle"} & set(names):
        preload_models()
    setting = Setting(machine.two_cores(), options.pace, console)
    result: dict[str, Any] = {
        "benchmark": "transport",
        "machine": machine.describe(),
        "options": {**command.told(options), "parts": names},
        "pinned": setting.cores is not None,
        "pace": options.pace,
        "parts": {},
    }

    def measure() -> None:
        run(names, setting, options, result["parts"])
        promises = bars.bars(result["parts"])
        show(bars.table(promises), console)
        result["bars"] = [bar.as_json() for bar in promises]

    return command.run(result, options, console, measure, lambda kept, path: plots.save(kept["parts"], path))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
