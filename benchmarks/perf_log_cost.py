"""What the performance log costs: decode steps and bare round trips with and without it, in turn.

    python -m benchmarks.perf_log_cost --rounds 60

Three clients of one server take short turns: one with a log, two without. A turn's figure is its fastest step, which
another process on the machine disturbs least. The ratio is taken within each round; the interval is the bootstrap's of
its median. The two without are the same program twice: how far their ratio is from 1 is what this machine can't tell
apart.

The last line is the work itself, without a server: what noting a row costs the thread that computes, and what making
it a line costs the log's own thread, which holds no GIL meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tsqp
from tsqp import perf_log
from tsqp.calls import Site
from tsqp.protocol import Method
from tsqp.telemetry import Telemetry

from . import machine
from .inference_ends import End
from .paired import interval
from .setting import in_turn, median, no_garbage_collection, timed_calls

#: Random LLaMAs; decode steps of a turn and of the prompt before it.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 512},
    "medium": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "vocab_size": 8192},
}
STEPS = {"tiny": 24, "medium": 6}
PROMPT_TOKENS = 16
RPC_TURN_S = 0.03
PEERS = ("off", "off again", "on")


def _model(size: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES[size], num_attention_heads=8, num_key_value_heads=4)).eval()


def _serve(pipe: Connection, size: str, endpoint: str) -> None:
    machine.die_with_parent()
    torch.set_num_threads(1)
    with tsqp.GPUServer(_model(size), endpoint, device="cpu"), contextlib.suppress(EOFError):
        pipe.send((True, endpoint))
        pipe.recv()


@contextlib.contextmanager
def served(size: str) -> Iterator[tuple[str, Path]]:
    """A server in a process of its own: its endpoint, and a directory for logs."""
    with tempfile.TemporaryDirectory(prefix="tsqp-bench-") as name:
        folder = Path(name)
        end = End("server", _serve, size, f"ipc://{folder}/server.sock")
        try:
            yield end.result(), folder
        finally:
            end.stop()


@torch.inference_mode()
def decode_turn_us(model: Any, steps: int) -> float:
    """The fastest step of a short decode after a short prompt, in us."""
    ids = torch.arange(PROMPT_TOKENS).view(1, -1)
    cache = model(ids, use_cache=True).past_key_values
    samples = []
    for step in range(steps):
        begin = time.perf_counter_ns()
        cache = model(torch.tensor([[step]]), past_key_values=cache, use_cache=True).past_key_values
        samples.append(time.perf_counter_ns() - begin)
    return min(samples[1:]) / 1000


def rpc_turn_us(client: tsqp.GPUClient, h: torch.Tensor) -> float:
    """The fastest round trip of a small linear module, in us."""
    samples: list[int] = []
    timed_calls(lambda: client.batch_linear(0, ["q_proj"], h), RPC_TURN_S, samples, at_least=4)
    return min(samples[1:]) / 1000


def alternate(turns: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Each peer's time of every round, and the ratios to the first within a round."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn()
    with no_garbage_collection():
        for name in in_turn(list(turns), rounds):
            times[name].append(turns[name]())
    first = times[PEERS[0]]
    found: dict[str, Any] = {"median_us": {name: median(all_us) for name, all_us in times.items()}}
    for name in PEERS[1:]:
        ratios = [one / other for one, other in zip(times[name], first, strict=True)]
        found[name] = {"ratio": median(ratios), "ratio_95": list(interval(ratios))}
    return found


def measure(rounds: int, sizes: Sequence[str]) -> dict[str, Any]:
    """Decode steps of each size with placement ``ops``, and bare round trips."""
    found = {}
    for size in sizes:
        steps = STEPS[size]
        with served(size) as (endpoint, folder), contextlib.ExitStack() as stack:
            models = {}
            for name in ("off", "on", "off again"):  # the one with a log neither connects first nor last
                options = {"perf_log": folder / "cost.log"} if name == "on" else {}
                models[name] = tsqp.from_pretrained(endpoint=endpoint, placement="ops", **options)
                stack.callback(models[name].close)
            before = models["on"].tsqp_client.round_trips
            decode_turn_us(models["on"], 2)
            trips = (models["on"].tsqp_client.round_trips - before) // 3
            turns = {name: partial(decode_turn_us, model, steps) for name, model in models.items()}
            found[f"decode step, {size}"] = {**alternate(turns, rounds), "round_trips": trips}
            if size == "tiny":
                h = torch.randn(1, 1, SIZES[size]["hidden_size"])
                calls = {name: partial(rpc_turn_us, model.tsqp_client, h) for name, model in models.items()}
                found["round trip"] = {**alternate(calls, rounds), "round_trips": 1}
    return found


def row_ns(rows: int = 50_000, turns: int = 9) -> dict[str, float]:
    """Nanoseconds to note a row, and to make it a line of a table; the fastest of several turns."""
    times: dict[str, list[float]] = {"note": [], "line": []}
    round_trips = perf_log.in_style("table", 64)
    with (
        tempfile.TemporaryDirectory(prefix="tsqp-bench-") as name,
        tsqp.listen(f"ipc://{name}/a.sock") as listener,
        tsqp.connect(listener.endpoint) as near,
        listener.accept(timeout=10.0) as far,
    ):
        near.measure(round_trips)
        far.send((), request_id=1)
        reply = near.recv(timeout=10.0)
    site = Site(1, Method.PING, None, (), Telemetry())
    for _ in range(turns):
        begin = time.perf_counter_ns()
        for _ in range(rows):
            round_trips.note_sent(1, 1, 0, 64, 0)
            round_trips.note(site, reply)
        noted = time.perf_counter_ns()
        while round_trips.drain():
            pass
        done = time.perf_counter_ns()
        times["note"].append((noted - begin) / rows)
        times["line"].append((done - noted) / rows)
    return {what: min(all_ns) for what, all_ns in times.items()}


def table(found: dict[str, Any]) -> Table:
    shown = Table(title="The performance log's cost", title_justify="left")
    for column in ("", "round trips", "off µs", "on µs", "on / off", "95% interval", "off / off", "95% interval"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, row in found.items():
        cells = [name, str(row["round_trips"]), *(f"{row['median_us'][peer]:.1f}" for peer in ("off", "on"))]
        for peer in ("on", "off again"):
            low, high = row[peer]["ratio_95"]
            cells += [f"{row[peer]['ratio']:.4f}", f"{low:.4f}-{high:.4f}"]
        shown.add_row(*cells)
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perf_log_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--json", type=Path, help="where the result is kept")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(options.rounds, options.sizes)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table(found))
    row = row_ns()
    console.print(f"a row: {row['note']:.0f} ns where the reply is settled, {row['line']:.0f} ns in the log's thread")
    if options.json is not None:
        options.json.write_text(
            json.dumps({"machine": machine.describe(), "parts": found, "row_ns": row}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
