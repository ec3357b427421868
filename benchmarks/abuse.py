"""What a runner notices of somebody who attacks its server: round trips a second, with the attack and without.

    python -m benchmarks.abuse                            # every attack, at the rates in the table
    python -m benchmarks.abuse --attacks half-open flood --rate 2    # twice the rate

One client asks for a linear module without pause. Its turns are alternately left alone, under an attack, and beside an
innocent process that takes as much of a core as the attacker took: on a machine of few cores that is what any busy
process costs. Figures are medians over rounds; ratios are taken within each round. The last column says what the attack
makes the server spend, in cores, beyond its client's round trips: that is measured on a busy machine, too.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads, here and in the other processes

import argparse
import contextlib
import json
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

from . import machine
from .arguments import plain_parser
from .attackers import ATTACKERS, attack
from .clients import Worker
from .peers import preload_models
from .setting import Setting, median

HIDDEN, INTERMEDIATE, ROWS = 1024, 2816, 4
NAMES = ["gate_proj", "up_proj"]
#: Blows a second. A blow of the floods is a message of 64 bytes, or of 4 MiB; of most others a connection.
RATES = {"flood": 1000.0, "large flood": 20.0, "stranger": 1000.0, "hello again": 1000.0, "slow greeting": 500.0}
RATE = 200.0
#: At least this much of the throughput has to be left.
BAR = 0.9
PATIENCE_S = 60.0
SETTLE_S = 0.2


def serve(wire: Connection, endpoint: str) -> None:
    """A server of one layer, with the geometry that users get: 200 MB of shared memory a client."""
    machine.die_with_parent()
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_hidden_layers=1,
        vocab_size=1024,
    )
    # One thread: server and client are to have a core each, or they are in each other's way already.
    with tsqp.GPUServer(LlamaForCausalLM(config).eval(), endpoint, device="cpu", threads=1):
        wire.send("ready")
        while wire.recv() is not None:
            wire.send(time.process_time())


def ask(wire: Connection, endpoint: str) -> None:
    """The client: for each number of seconds it hears it says how many round trips a second there were."""
    machine.die_with_parent()
    torch.set_num_threads(1)
    h = torch.randn(ROWS, HIDDEN)
    with tsqp.GPUClient(endpoint, timeout=PATIENCE_S) as client:
        expected = client.batch_linear(0, NAMES, h)
        wire.send("ready")
        while (seconds := wire.recv()) is not None:
            count, begin = 0, time.monotonic()
            while (now := time.monotonic()) < begin + seconds:
                found = client.batch_linear(0, NAMES, h)
                count += 1
            right = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            wire.send((count / (now - begin), right))


def harm(wire: Connection, name: str, endpoint: str, rate: float) -> None:
    machine.die_with_parent()
    attack(wire, name, endpoint, rate)


def burn(wire: Connection) -> None:
    """An innocent process: burns the share of a core that it hears, in slices of milliseconds, until it hears more."""
    machine.die_with_parent()
    while (share := wire.recv()) is not None:
        while share and not wire.poll(max(0.0, 0.002 * (1 - share))):
            end = time.perf_counter() + 0.002 * share
            while time.perf_counter() < end:
                pass


@contextlib.contextmanager
def ends() -> Iterator[tuple[str, Worker, Worker, Worker]]:
    """Endpoint, server, client, and the innocent process."""
    with tempfile.TemporaryDirectory(prefix="abuse-") as folder, contextlib.ExitStack() as stack:
        endpoint = f"ipc://{Path(folder) / 's'}"
        started = []
        for target, arguments in ((serve, (endpoint,)), (ask, (endpoint,)), (burn, ())):
            started.append(Worker(target, *arguments))
            stack.callback(started[-1].end)
            if target is not burn:
                started[-1].hear()
        yield endpoint, *started


def turn(client: Worker, server: Worker, seconds: float) -> tuple[float, float]:
    """Round trips a second, and the seconds of CPU time the server took of each second."""
    before, begin = cpu_s(server), time.monotonic()
    client.say(seconds)
    rate, right = client.hear()
    if not right:
        raise AssertionError("the client got a wrong result")
    return float(rate), (cpu_s(server) - before) / (time.monotonic() - begin)


def cpu_s(server: Worker) -> float:
    server.say("cpu")
    return float(server.hear())


def measure(name: str, rate: float, options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Rates of the client: alone, attacked, and beside an innocent process, in each round."""
    rows: dict[str, list[Any]] = {key: [] for key in ("alone", "attacked", "busy", "share", "blows")}
    with ends() as (endpoint, server, client, innocent):
        attacker = Worker(harm, name, endpoint, rate)
        try:
            attacker.hear()
            turn(client, server, SETTLE_S)
            for number in range(options.rounds):
                setting.step(f"{name}, round {number + 1}")
                rows["alone"].append(turn(client, server, options.seconds))
                begin = time.monotonic()
                attacker.say("begin")
                time.sleep(SETTLE_S)
                rows["attacked"].append(turn(client, server, options.seconds))
                attacker.say("enough")
                blows, _, burnt_s = attacker.hear()
                spent = time.monotonic() - begin
                rows["share"].append(min(0.95, burnt_s / spent))
                rows["blows"].append(blows / spent)
                time.sleep(SETTLE_S)
                innocent.say(rows["share"][-1])
                rows["busy"].append(turn(client, server, options.seconds))
                innocent.say(0.0)  # ends the burning
        finally:
            attacker.end()
    return summary(rows)


def summary(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Medians; ``taken`` is what the server spent beyond what its client's round trips take, in cores."""

    def ratio(key: str) -> float:
        return median([one[0] / alone[0] for one, alone in zip(rows[key], rows["alone"], strict=True)])

    each = median([cpu / rate for rate, cpu in rows["alone"]])
    return {
        "alone_per_s": median([rate for rate, _ in rows["alone"]]),
        "attacked_per_s": median([rate for rate, _ in rows["attacked"]]),
        "attacked": ratio("attacked"),
        "busy": ratio("busy"),
        "taken": median([cpu - rate * each for rate, cpu in rows["attacked"]]),
        "blows_per_s": median(rows["blows"]),
        "attacker_core": median(rows["share"]),
    }


def table(found: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="Round trips of a client while its server is attacked", title_justify="left")
    for column in (
        "attack",
        "blows/s",
        "attacker, cores",
        "alone/s",
        "attacked/s",
        "attacked",
        "beside as busy",
        "server, cores",
    ):
        shown.add_column(column, justify="left" if column == "attack" else "right")
    for name, cell in found.items():
        mark = "" if cell["attacked"] >= BAR else " !"
        shown.add_row(
            name,
            f"{cell['blows_per_s']:.0f}",
            f"{cell['attacker_core']:.2f}",
            f"{cell['alone_per_s']:.0f}",
            f"{cell['attacked_per_s']:.0f}",
            f"{cell['attacked']:.3f}{mark}",
            f"{cell['busy']:.3f}",
            f"{cell['taken']:.3f}",
        )
    return shown


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = plain_parser("abuse", __doc__, prog)
    add = parser.add_argument
    add("--attacks", nargs="+", choices=list(ATTACKERS), default=list(ATTACKERS), metavar="NAME", help="which (all)")
    add("--rate", type=float, default=1.0, help="blows a second, as a multiple of the usual ones (1)")
    add("--seconds", type=float, default=0.5, help="of a turn (0.5)")
    add("--rounds", type=int, default=11, help="of each attack (11)")
    add("--json", type=Path, help="where the result is kept")
    options = parser.parse_args(argv)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    setting = Setting(None, 1.0, console)
    preload_models()
    found = {}
    with setting.part(len(options.attacks) * options.rounds):
        for name in options.attacks:
            found[name] = measure(name, options.rate * RATES.get(name, RATE), options, setting)
    console.print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine.describe(), "attacks": found}, indent=1) + "\n")
    return 0 if all(cell["attacked"] >= BAR for cell in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
