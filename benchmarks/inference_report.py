"""Tables and promises of an inference run."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from rich.table import Table

from .bars import Bar
from .report import NOTHING, figure, number_of

#: The settings the promises are for.
CPU_SETTING = {"model": "llama-1b", "layers": 4, "tokens": 1024, "threads": 2}
CUDA_SETTING = {"model": "llama-1b", "layers": 16, "tokens": 1024}
#: Of stock's time in the same run, by phase and dtype.
RATIOS = {
    "prefill": {
        "float32": {"linear": 1.02, "ops": 1.10, "fused": 1.02, "layer": 1.02},
        "bfloat16": {"linear": 1.05, "ops": 1.15, "fused": 1.02, "layer": 1.02},
    },
    "decode": {
        "float32": {"linear": 1.05, "ops": 1.15, "fused": 1.05, "layer": 1.05},
        "bfloat16": {"linear": 1.05, "ops": 1.15, "fused": 1.05, "layer": 1.05},
    },
}
#: Milliseconds on an H200, bfloat16.
CUDA_MS = {"prefill": {"fused": 10.0, "layer": 7.0, "ops": 60.0}, "decode": {"fused": 4.0}}
OVERHEAD_US = 10.0
RING_SHARE = 0.95
#: Stock in one process scatters by a few hundredths on a machine that has nothing else to do.
STEADY = 0.15
PHASES = ("prefill", "decode")


def setting_of(result: dict[str, Any]) -> dict[str, Any]:
    """The setting the promises of this run's device are for."""
    return CUDA_SETTING if result["options"]["device"].startswith("cuda") else CPU_SETTING


def differing(result: dict[str, Any]) -> str:
    """How this run's setting differs from the promises', empty where it does not."""
    options = result["options"]
    return ", ".join(
        f"{name} {options[name]} instead of {value}"
        for name, value in setting_of(result).items()
        if options[name] != value
    )


def bars(result: dict[str, Any]) -> list[Bar]:
    """The promises for what was measured."""
    found: list[Bar] = []
    for dtype, run in result["runs"].items():
        judge = _cuda if setting_of(result) is CUDA_SETTING else _cpu
        found += judge(dtype, run, result["options"]["tokens"])
    return found


def unsteady(result: dict[str, Any]) -> list[str]:
    """Where stock itself varied from round to round by more than :data:`STEADY`: a ratio to it says little there, and
    may call a promise kept only because stock was disturbed."""
    found = []
    for dtype, run in result["runs"].items():
        for key, split in run["splits"].items():
            for phase in PHASES:
                spread = _spread(split[phase]["stock_s"])
                if spread > STEADY:
                    found.append(f"{dtype} {key} {phase} (by {100 * spread:.0f}%)")
    return found


def _spread(seconds: list[float]) -> float:
    """From the fastest round to the median one, as a share of the median: what disturbs only makes slower."""
    return 1 - min(seconds) / median(seconds)


def _phase_text(phase: str, tokens: int) -> str:
    return f"prefill {tokens}" if phase == "prefill" else f"decode at {tokens}"


def _cpu(dtype: str, run: dict[str, Any], tokens: int) -> Iterator[Bar]:
    for phase, limits in RATIOS.items():
        for key, limit in limits[dtype].items():
            if key in run["splits"]:
                text = f"{dtype}, {_phase_text(phase, tokens)}, {key}: split / in-process"
                yield Bar(text, limit, run["splits"][key][phase]["ratio"])
    yield from _transport(dtype, run, tokens)


def _cuda(dtype: str, run: dict[str, Any], tokens: int) -> Iterator[Bar]:
    for phase, limits in CUDA_MS.items() if dtype == "bfloat16" else ():
        for key, limit in limits.items():
            if key in run["splits"]:
                text = f"{dtype}, {_phase_text(phase, tokens)}, {key}, ms (floor {figure(run['floor_ms'][phase])})"
                yield Bar(text, limit, run["splits"][key][phase]["split_ms"])
    yield from _transport(dtype, run, tokens)


def _transport(dtype: str, run: dict[str, Any], tokens: int) -> Iterator[Bar]:
    for key, split in run["splits"].items():
        if split["baseline"]:
            continue
        cell, text = split["decode"], f"{dtype}, {_phase_text('decode', tokens)}, {key}"
        yield Bar(f"{text}: time - server's compute, µs a round trip", OVERHEAD_US, cell["overhead_us_per_trip"])
        yield Bar(f"{text}: calls - server's compute, µs a round trip", OVERHEAD_US, cell["call_overhead_us_per_trip"])
    if "ops" in run["splits"]:
        share = run["splits"]["ops"]["prefill"]["ring_share"]
        yield Bar(f"{dtype}, prefill {tokens}, ops: share of bytes through the ring", RING_SHARE, share, at_most=False)


def tables(dtype: str, run: dict[str, Any], options: dict[str, Any]) -> list[Table]:
    """What one dtype's run measured."""
    setting = f"{dtype}, {number_of(options['layers'], 'layer')}, {options['tokens']} tokens, {options['device']}"
    title = f"{setting}, {options['threads']} threads a side, medians of {options['rounds']} rounds in turn"
    return [
        _times(run, title),
        _trips(run, f"Round trips of one forward: {dtype}"),
        _answers(run, f"Answers and peak memory: {dtype}"),
    ]


def _table(title: str, *columns: str, left: int = 2) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def _times(run: dict[str, Any], title: str) -> Table:
    columns = ("", "phase", "stock ms", "split ms", "ratio", "floor ms", "server ms", "wire ms", "runner ms")
    table = _table(title, *columns)
    for split in run["splits"].values():
        for phase in PHASES:
            cell = split[phase]
            parts = (figure(cell[name]) for name in ("server_ms", "wire_ms", "runner_ms"))
            times = (figure(cell["stock_ms"]), figure(cell["split_ms"]), f"{cell['ratio']:.3f}")
            table.add_row(split["title"], phase, *times, figure(run["floor_ms"][phase]), *parts)
    return table


def _trips(run: dict[str, Any], title: str) -> Table:
    columns = ("", "phase", "round trips", "ring MB", "ZeroMQ MB", "ring %", "overhead µs/trip", "in calls")
    table = _table(title, *columns)
    for split in run["splits"].values():
        for phase in PHASES:
            cell = split[phase]
            megabytes = (f"{cell[name] / 1e6:.2f}" for name in ("shm_bytes", "zmq_bytes"))
            overheads = (figure(cell[f"{name}_us_per_trip"]) for name in ("overhead", "call_overhead"))
            share = f"{100 * cell['ring_share']:.1f}"
            table.add_row(split["title"], phase, str(cell["round_trips"]), *megabytes, share, *overheads)
    return table


def _answers(run: dict[str, Any], title: str) -> Table:
    columns = ("", "Δ logits / largest", "tokens equal", "runner MB", "server MB", "stock MB")
    table = _table(title, *columns, left=1)
    for split in run["splits"].values():
        peaks = (
            f"{split['peak_bytes'][name] / 1e6:.0f}" if split["peak_bytes"][name] else NOTHING
            for name in ("runner", "server", "stock")
        )
        tokens = f"{split['tokens_equal']} of {split['tokens']}"
        table.add_row(split["title"], f"{split['logit_difference']:.1e}", tokens, *peaks)
    return table


def peaks_text(run: dict[str, Any]) -> str:
    """The measured peaks behind the floors, in one line."""
    peaks = run["peaks"]
    link = peaks["link_bytes_per_s"]
    return (
        f"floors: {figure(peaks['flops_per_s'] / 1e9)} GFLOP/s, {figure(peaks['bytes_per_s'] / 1e9)} GB/s"
        f"{'' if link is None else f', {figure(link / 1e9)} GB/s from host to device'}, measured in this run"
    )


def growth_tables(growth: dict[str, Any]) -> list[Table]:
    """Milliseconds of a prefill over tokens and layers."""
    found = []
    for over in ("tokens", "layers"):
        cells = growth[over]
        sizes = sorted({size for by_size in cells.values() for size in by_size}, key=int)
        table = _table(f"Prefill in ms over {over}, {growth['dtype']}", "", *sizes, left=1)
        for key, by_size in cells.items():
            shown = (figure(by_size[size]["ms"]) if size in by_size else NOTHING for size in sizes)
            table.add_row(key, *shown)
        found.append(table)
    return found
