"""The trusted operators against stock torch eager and against what memory allows, in one run.

    python -m benchmarks.kernels --threads 1 --threads 2

Each operator, the formula as transformers' eager code runs it, and a plain copy in C of the same streams (as many
arrays read and written, of the same size, with the same threads; the faster of ordinary stores and stores past the
caches) take turns, so that noise hits all alike. Both operators make new results, as eager code does; "reused" writes
into a tensor that is there, as the copies do, and the faster of both is held against them. Two shares count the bytes
that must move (the causal softmax reads only the scores it may see): "of memory", of the bandwidth of memory, which is
that of a copy too large for any cache, and "of its copy", of a copy of the operator's own size, which may lie in a
cache and is then the faster one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads: see the tuning notes in README

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tsqp import _kernels, ops

from . import bar_plots, command, machine
from .bars import Bar
from .bars import table as bar_table
from .report import Samples, figure, number_of, show
from .setting import Setting, in_turn, no_garbage_collection, random_tensor, timed_calls

DTYPES = (torch.float32, torch.bfloat16)
TIMES_TORCH, OF_BANDWIDTH = 2.0, 0.7
_MEMORY_BYTES = 256 << 20
#: What `--quick` changes: some ten seconds.
QUICK = {"threads": [1], "seconds": 0.05, "rounds": 5}
Call = Callable[[], Any]


@dataclass
class Case:
    """One operator at one shape: ways to run it, the bytes that must move, and the streams of a copy like it."""

    name: str
    shape: str
    dtype: torch.dtype
    ours: Call
    reused: Call
    torch: Call
    read_bytes: int
    write_bytes: int
    sources: int
    array_bytes: int


def _values(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    count = torch.Size(shape).numel()
    return random_tensor(4 * count, seed).view(shape).to(dtype)


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def rms_norm(dtype: torch.dtype, rows: int = 1024, cols: int = 2048) -> Case:
    x, norm = _values(dtype, rows, cols), LlamaRMSNorm(cols).to(dtype)
    out, size = torch.empty_like(x), _size(x)
    return Case(
        "RMSNorm",
        f"{rows}x{cols}",
        dtype,
        lambda: ops.rms_norm(x, norm.weight, norm.variance_epsilon),
        lambda: ops.rms_norm(x, norm.weight, norm.variance_epsilon, out=out),
        lambda: norm(x),
        size,
        size,
        1,
        size,
    )


def residual_norm(dtype: torch.dtype, rows: int = 1024, cols: int = 2048) -> Case:
    x, residual, norm = _values(dtype, rows, cols), _values(dtype, rows, cols, seed=1), LlamaRMSNorm(cols).to(dtype)
    out, total, size = torch.empty_like(x), torch.empty_like(x), _size(x)
    return Case(
        "residual + RMSNorm",
        f"{rows}x{cols}",
        dtype,
        lambda: ops.rms_norm(x, norm.weight, norm.variance_epsilon, residual),
        lambda: ops.rms_norm(x, norm.weight, norm.variance_epsilon, residual=residual, out=out, total=total),
        lambda: norm(x + residual),
        2 * size,
        2 * size,
        1,
        2 * size,
    )


def silu_mul(dtype: torch.dtype, rows: int = 1024, cols: int = 8192) -> Case:
    gate, up = _values(dtype, rows, cols), _values(dtype, rows, cols, seed=1)
    out, size, silu = torch.empty_like(gate), _size(gate), torch.nn.SiLU()
    return Case(
        "SiLU·gate",
        f"{rows}x{cols}",
        dtype,
        lambda: ops.silu_mul(gate, up),
        lambda: ops.silu_mul(gate, up, out=out),
        lambda: silu(gate) * up,
        2 * size,
        size,
        2,
        size,
    )


def rotary(dtype: torch.dtype, positions: int = 1024, heads: int = 32, dim: int = 64) -> Case:
    q, k = (_values(dtype, 1, positions, count, dim).transpose(1, 2) for count in (heads, heads // 4))
    cos, sin = (_values(dtype, 1, positions, dim, seed=seed).clamp(-1, 1) for seed in (1, 2))
    out, size = (torch.empty_like(q), torch.empty_like(k)), _size(q, k)
    return Case(
        "rotary",
        f"{heads}+{heads // 4} heads x{positions}x{dim}",
        dtype,
        lambda: ops.apply_rotary(q, k, cos, sin),
        lambda: ops.apply_rotary(q, k, cos, sin, out=out),
        lambda: apply_rotary_pos_emb(q, k, cos, sin),
        size,
        size,
        1,
        size,
    )


def softmax(dtype: torch.dtype, causal: bool, heads: int = 32, queries: int = 1024, keys: int = 1024) -> Case:
    """`causal`: no mask, by position; else with the mask that transformers makes."""
    scores, out, scale = (
        _values(dtype, 1, heads, queries, keys),
        torch.empty(1, heads, queries, keys, dtype=dtype),
        0.125,
    )
    mask = torch.full((1, 1, queries, keys), torch.finfo(dtype).min, dtype=dtype).triu(keys - queries + 1)
    given, size = (None if causal else mask), _size(scores)
    visible = (keys - queries + (queries + 1) / 2) / keys if causal else 1.0
    return Case(
        "causal softmax" if causal else "masked softmax",
        f"{heads}x{queries}x{keys}",
        dtype,
        lambda: ops.causal_softmax(scores, given, scale),
        lambda: ops.causal_softmax(scores, given, scale, out=out),
        lambda: torch.nn.functional.softmax(scores * scale + mask, dim=-1, dtype=torch.float32).to(dtype),
        int(size * visible),
        size,
        1,
        size,
    )


@cache
def _too_large_for_a_cache() -> tuple[Tensor, Tensor]:
    return torch.ones(_MEMORY_BYTES // 4), torch.ones(_MEMORY_BYTES // 4)


def _copies(case: Case) -> dict[str, Call]:
    count = case.array_bytes // 4
    sources, target = [torch.ones(count) for _ in range(case.sources)], torch.ones(count)
    source, memory = _too_large_for_a_cache()
    return {
        "copy of memory": lambda: _kernels.move([source], memory, True),
        "copy": lambda: _kernels.move(sources, target, False),
        "copy past the caches": lambda: _kernels.move(sources, target, True),
    }


def measure(case: Case, seconds: float, rounds: int) -> dict[str, Any]:
    """The fastest and the median µs of each way. What is shared with other processes only ever adds time."""
    ways = {"ours": case.ours, "reused": case.reused, "torch": case.torch, **_copies(case)}
    samples: dict[str, Samples] = {name: Samples() for name in ways}
    for call in ways.values():
        call()
    turns: dict[str, list[float]] = {name: [] for name in ways}
    with no_garbage_collection(), torch.inference_mode():
        for name in in_turn(list(ways), rounds):
            count = len(samples[name].ns)
            timed_calls(ways[name], seconds / rounds, samples[name].ns)
            turns[name].append(min(samples[name].ns[count:]) / 1000)
    best = {name: min(found) for name, found in turns.items()}
    each = [shares(case, dict(zip(turns, found, strict=True))) for found in zip(*turns.values(), strict=True)]
    return {
        "operator": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype)[6:],
        "best_us": {name: round(value, 3) for name, value in best.items()},
        "median_us": {name: round(found.median_us, 3) for name, found in samples.items()},
        **shares(case, best),
        "rounds": {
            "best_us": turns,
            **{name: [one[name] for one in each] for name in ("times_torch", "of_memory", "of_bandwidth")},
        },
    }


def shares(case: Case, best: dict[str, float]) -> dict[str, float]:
    """What follows from the fastest µs of each way."""
    copy_us = min(best["copy"], best["copy past the caches"])
    copied = case.array_bytes * (case.sources + 1)
    limit_us = copy_us * (case.read_bytes + case.write_bytes) / copied
    memory_us = best["copy of memory"] * (case.read_bytes + case.write_bytes) / (2 * _MEMORY_BYTES)
    ours_us = min(best["ours"], best["reused"])
    return {
        "memory_us": round(memory_us, 3),
        "of_memory": memory_us / ours_us,
        "limit_us": round(limit_us, 3),
        "gb_per_s": round(copied / copy_us / 1000, 2),
        "times_torch": best["torch"] / best["ours"],
        "of_bandwidth": limit_us / ours_us,
    }


def decode_cases(dtype: torch.dtype) -> list[Case]:
    return [
        rms_norm(dtype, 1),
        residual_norm(dtype, 1),
        silu_mul(dtype, 1),
        rotary(dtype, 1),
        softmax(dtype, True, queries=1),
    ]


def prefill_cases(dtype: torch.dtype) -> list[Callable[[], Case]]:
    return [
        lambda: rms_norm(dtype),
        lambda: residual_norm(dtype),
        lambda: silu_mul(dtype),
        lambda: rotary(dtype),
        lambda: softmax(dtype, True),
        lambda: softmax(dtype, False),
    ]


def bars(cells: Sequence[dict[str, Any]], threads: int) -> list[Bar]:
    found = []
    for cell in cells:
        text = f"{cell['operator']} {cell['shape']} {cell['dtype']}, {number_of(threads, 'thread')}"
        found.append(Bar(f"{text}: times torch eager", TIMES_TORCH, cell["times_torch"], at_most=False))
        found.append(Bar(f"{text}: of the memory bandwidth", OF_BANDWIDTH, cell["of_memory"], at_most=False))
    return found


def cell_table(cells: Sequence[dict[str, Any]], title: str, bandwidth: bool) -> Table:
    shown = Table(title=title, title_justify="left")
    columns = ["operator", "shape", "dtype", "ours µs", "reused µs", "torch µs", "times"]
    for column in columns + (["memory µs", "of memory", "copy µs", "of its copy"] if bandwidth else []):
        shown.add_column(column, justify="left" if column in columns[:3] else "right")
    for cell in cells:
        best = cell["best_us"]
        values = [best["ours"], best["reused"], best["torch"], cell["times_torch"]]
        if bandwidth:
            values += [cell["memory_us"], cell["of_memory"], cell["limit_us"], cell["of_bandwidth"]]
        shown.add_row(cell["operator"], cell["shape"], cell["dtype"], *map(figure, values))
    return shown


def run(threads: int, options: argparse.Namespace, setting: Setting, found: dict[str, Any]) -> None:
    """Adds what is measured with that many threads to ``found``; printed at the end."""
    torch.set_num_threads(threads)
    ops.set_threads(threads)
    found |= {"threads": threads, "prefill": [], "decode": []}
    cases = {dtype: (prefill_cases(dtype), decode_cases(dtype)) for dtype in DTYPES}
    with setting.part(sum(len(prefill) + len(decode) for prefill, decode in cases.values())):

        def one(phase: str, case: Case, seconds: float) -> None:
            setting.step(f"{number_of(threads, 'thread')}, {case.name} {case.shape} {str(case.dtype)[6:]}")
            found[phase].append(measure(case, seconds, options.rounds))

        for prefill, decode in cases.values():
            for make in prefill:
                one("prefill", make(), options.seconds)
            for case in decode:
                one("decode", case, options.seconds / 4)
    console = setting.console
    show(
        cell_table(found["prefill"], f"Prefill, {number_of(threads, 'thread')}: fastest calls", bandwidth=True), console
    )
    show(
        cell_table(found["decode"], f"Decode, {number_of(threads, 'thread')}: fastest calls", bandwidth=False), console
    )
    promised = bars(found["prefill"], threads)
    show(bar_table(promised), console)
    found["bars"] = [bar.as_json() for bar in promised]


def parse_arguments(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = command.make_parser("kernels", __doc__, prog)
    parser.add_argument("--threads", type=int, action="append", help="threads of both sides (default: 1, then 2)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each way of each operator (default 0.5)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (default 5)")
    options = command.parse(parser, argv, QUICK, "kernels")
    options.threads = options.threads or [1, 2]
    if min(options.threads) < 1 or options.rounds < 1 or not options.seconds > 0:
        parser.error("--threads and --rounds are 1 or more, --seconds more than 0")
    return options


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = parse_arguments(argv, prog)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(f"{machine.cpu_model()}, kernels for {_kernels.instruction_set()}, torch {torch.__version__}")
    setting = Setting(None, 1.0, console)
    result: dict[str, Any] = {
        "benchmark": "kernels",
        "machine": machine.describe(),
        "options": command.told(options),
        "instruction_set": _kernels.instruction_set(),
        "runs": [],
    }

    def measure_all() -> None:
        for threads in options.threads:
            result["runs"].append({})
            run(threads, options, setting, result["runs"][-1])

    draw = partial(bar_plots.save_kernels, (TIMES_TORCH, OF_BANDWIDTH))
    return command.run(result, options, console, measure_all, draw)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
