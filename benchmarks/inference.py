"""A split model beside stock transformers in one process: prefill and decode, in turn in one run.

    python -m benchmarks.inference                                   # every placement, both dtypes, the baselines
    python -m benchmarks.inference --dtype float32 --placement ops --no-baselines
    python -m benchmarks.inference --growth --no-baselines           # and how time grows with tokens and layers
    python -m benchmarks.inference --device cuda:0                   # 16 layers, bfloat16

Three processes compute a random model of LLaMA-3.2-1B's dimensions, equal by its seed: stock transformers (with the
attention it chooses by itself), the server, and this one, the runner. Each has the same number of threads. For every
placement stock and split take turns, and the ratio is the median over rounds of split / stock. Two baselines, the
systems tsqp replaces, are measured the same way (see benchmarks/baselines).

floor      FLOPs and bytes (weights, K and V once) over the best matmul and memory bandwidth of this run
server     the server's computing, as its replies say
wire       time in which a call was under way, but for that: both ways and waiting, and what the runner did meanwhile
           that took longer than the server
runner     the rest: no call under way; its own operators and transformers' Python
overhead   time of a forward minus the server's computing, per round trip: the runner's own operators are in it, "in
           calls" leaves them out

Tables are printed, and the figures and plots kept in results/.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads: see the tuning notes in README

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tsqp.cpu_latency import cores_awake
from tsqp.linear_backends import BACKENDS
from tsqp.placement import PLACEMENTS

from . import bars, baselines, command, inference_growth, inference_plots, inference_report, machine
from .arguments import check_awake
from .inference_ends import running
from .inference_limits import Peaks, work
from .inference_measure import Job, contestants, run
from .inference_model import SIZES, Spec, random_ids
from .peers import preload_models
from .report import show
from .setting import Setting

#: What `--quick` changes: about a minute.
QUICK = {"layers": 1, "tokens": 256, "dtype": ["float32"], "no_baselines": True, "rounds": 2, "decode": 4}
QUICK |= {"growth_tokens": [64, 128, 256], "growth_layers": [1, 2]}
DTYPES = ("float32", "bfloat16")
SERVED = tuple(name for name, placement in PLACEMENTS.items() if placement.needs_server)


def parse_arguments(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = command.make_parser("inference", __doc__, prog)
    add = parser.add_argument
    add("--layers", type=_positive, help="4 on a CPU, 16 on CUDA")
    add("--tokens", type=_positive, default=1024, help="prompt length, and the context of decode (1024)")
    add("--dtype", action="append", choices=DTYPES, help="may be repeated; both on a CPU, bfloat16 on CUDA")
    add("--placement", action="append", choices=SERVED, help="may be repeated; all")
    add("--baseline", action="append", choices=list(baselines.TITLES), help="may be repeated; all")
    add("--no-baselines", action="store_true", help="none of them")
    add("--threads", type=_positive, help="torch's, a side; 2 on a CPU, up to 8 on CUDA")
    add("--linear-backend", choices=BACKENDS, default="auto", help="of the server, see GPUServer (auto)")
    add("--rounds", type=_positive, default=5, help="of stock and split in turn (5)")
    add("--decode", type=_positive, default=8, metavar="N", help="decode steps a round (8)")
    add("--device", default="cpu", help="the server's and stock's: cpu or cuda:0")
    add(
        "--cpu-latency-us",
        type=int,
        metavar="N",
        help="keep cores from idle states that take longer to leave: all ends",
    )
    add("--growth", action="store_true", help="prefill over tokens and layers, with the first dtype")
    add("--growth-tokens", nargs="+", type=_positive, default=list(inference_growth.TOKENS))
    add("--growth-layers", nargs="+", type=_positive, default=list(inference_growth.LAYERS))
    add("--trace", type=Path, metavar="FILE", help="timelines: FILE with dtype and placement in its name, for Perfetto")
    add("--model", choices=list(SIZES), default="llama-1b", help="dimensions; tiny is for trying the benchmark")
    options = command.parse(parser, argv, QUICK, "inference")
    on_cuda = options.device.startswith("cuda")
    if options.device != "cpu" and not on_cuda:
        parser.error(f"--device {options.device} is unknown; give cpu or cuda:0")
    if on_cuda and not torch.cuda.is_available():
        parser.error(f"--device {options.device} needs a CUDA device, and torch sees none")
    if options.no_baselines and options.baseline and not options.quick:
        parser.error("--baseline and --no-baselines contradict each other; give one of them")
    check_awake(parser, options.cpu_latency_us)
    options.layers = options.layers or (16 if on_cuda else 4)
    options.threads = options.threads or min(8 if on_cuda else 2, len(machine.available_cores()))
    options.dtype = options.dtype or (["bfloat16"] if on_cuda else list(DTYPES))
    options.placement = options.placement or list(SERVED)
    options.baseline = options.baseline or ([] if options.no_baselines else list(baselines.TITLES))
    return options


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def measure(options: argparse.Namespace, setting: Setting, dtype: str, found: dict[str, Any]) -> None:
    """Adds one dtype to ``found``: the peaks of the device, and every contestant in turn with stock."""
    spec = Spec(options.model, options.layers, dtype, options.device, options.threads, options.linear_backend)
    skipped: dict[str, str] = {}
    most = len(options.placement) + len(options.baseline)
    with setting.part(1 + most * options.rounds):
        setting.step("building the model in both processes")
        with running(spec, options.baseline, skipped) as ends:
            peaks: Peaks = ends.stock.call("peaks")
            wanted = contestants(options.placement, list(ends.addresses))
            trace_of = None if options.trace is None else partial(trace_path, options.trace, dtype)
            job = Job(random_ids(spec, options.tokens), options.decode, options.rounds, setting.step, trace_of)
            run(ends, wanted, job, found.setdefault("splits", {}))
            peaks = peaks.better(ends.stock.call("peaks"))
    works = {"prefill": work(spec, options.tokens, 0), "decode": work(spec, 1, options.tokens)}
    found |= {
        "stock_attention": ends.attention,
        "peaks": peaks.as_json(),
        "floor_ms": {phase: 1e3 * one.floor_s(peaks) for phase, one in works.items()},
        "skipped": skipped,
    }


def trace_path(path: Path, dtype: str, key: str) -> Path:
    """``a/b.json`` to ``a/b-float32-ops.json``."""
    return path.with_name(f"{path.stem}-{dtype}-{key}{path.suffix or '.json'}")


def grow(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """The growth of the first dtype's prefill, without baselines."""
    spec = Spec(
        options.model, options.layers, options.dtype[0], options.device, options.threads, options.linear_backend
    )
    wanted = contestants(options.placement, ())
    sizes = len(options.growth_tokens) + len(options.growth_layers)
    with setting.part(sizes * (1 + len(wanted))):
        plan = inference_growth.Plan(
            sorted(options.growth_tokens), sorted(options.growth_layers), options.tokens, setting.step
        )
        return inference_growth.run(spec, wanted, plan)


def tell(console: Console, dtype: str, result: dict[str, Any], options: dict[str, Any]) -> None:
    for table in inference_report.tables(dtype, result, options):
        show(table, console)
    console.print(inference_report.peaks_text(result), highlight=False)
    for title, reason in result["skipped"].items():
        console.print(f"[yellow]SKIPPED {title}: {reason}[/yellow]")


def measure_all(options: argparse.Namespace, setting: Setting, result: dict[str, Any]) -> None:
    """Adds every dtype's run, the growth and the promises to ``result``; each is printed when it is there."""
    console = setting.console
    for dtype in options.dtype:
        measure(options, setting, dtype, result["runs"].setdefault(dtype, {}))
        tell(console, dtype, result["runs"][dtype], result["options"])
    if options.growth:
        result["growth"] = grow(options, setting)
        for table in inference_report.growth_tables(result["growth"]):
            show(table, console)
        for title, reason in result["growth"]["skipped"].items():
            console.print(f"[yellow]SKIPPED {title}: {reason}[/yellow]")
    promises = inference_report.bars(result)
    show(bars.table(promises), console)
    differing = inference_report.differing(result)
    if differing:
        console.print(f"The bars are promised for another setting; this run has {differing}.", highlight=False)
    unsteady = inference_report.unsteady(result)
    if unsteady:
        said = f"Stock itself was not steady: {', '.join(unsteady)}; these ratios say little, measure again."
        console.print(f"[yellow]{said}[/yellow]", highlight=False)
    result["unsteady"] = unsteady
    result["bars"] = [bar.as_json() for bar in promises]


def draw(options: argparse.Namespace, result: dict[str, Any], path: Path) -> list[Path]:
    """The plots, and the timelines that were asked for."""
    kept = inference_plots.save(result, path)
    if options.trace is not None:
        kept += [trace_path(options.trace, dtype, key) for dtype in options.dtype for key in options.placement]
    return kept


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = parse_arguments(argv, prog)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    torch.set_num_threads(options.threads)
    preload_models()
    setting = Setting(None, 1.0, console)
    result: dict[str, Any] = {
        "benchmark": "inference",
        "machine": machine.describe(),
        "options": command.told(options),
        "runs": {},
    }
    with cores_awake(options.cpu_latency_us):
        return command.run(
            result, options, console, lambda: measure_all(options, setting, result), partial(draw, options)
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
