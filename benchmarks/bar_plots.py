"""Plots of the kernels' and the batching benchmark: bars beside what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .plots import INCHES, keep
from .report import number_of

_COLOURS = {"float32": "tab:blue", "bfloat16": "tab:orange"}
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_GOAL = {"color": "black", "linestyle": "--", "linewidth": 1}


def save_kernels(goals: tuple[float, float], result: dict[str, Any], json_path: Path) -> list[Path]:
    """A picture for each number of threads and each phase; ``goals`` are the promises, in the order of the axes."""
    return keep(partial(_kernels, goals, result), json_path)


def save_batching(result: dict[str, Any], json_path: Path) -> list[Path]:
    """Throughput over clients, and what computing requests together gains."""
    return keep(partial(_batching, result), json_path)


def _kernels(goals: tuple[float, float], result: dict[str, Any], pyplot: Any) -> Iterator[tuple[str, Any]]:
    for run in result["runs"]:
        for phase in ("prefill", "decode"):
            count = run["threads"]
            figure, axes = pyplot.subplots(1, 2, figsize=(13.0, 5.5), layout="constrained", sharey=True)
            _bars(axes[0], run[phase], "times_torch", "{:.1f}", starts_at=1.0)
            _times_axis(axes[0], [cell["times_torch"] for cell in run[phase]])
            _bars(axes[1], run[phase], "of_memory", "{:.2f}", starts_at=0.0)
            axes[1].set(xlabel="share of the bandwidth of memory (1: a copy too large for any cache)")
            axes[1].margins(x=0.15)
            if phase == "prefill":  # what is promised holds for these sizes
                for one, goal in zip(axes, goals, strict=True):
                    one.axvline(goal, label="promised", **_GOAL)
            axes[0].invert_yaxis()  # the first operator on top, in both
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
            figure.suptitle(
                f"The runner's operators, {phase} sizes, {number_of(count, 'thread')}, {result['instruction_set']}"
            )
            yield f"{phase}-{count}", figure


def _times_axis(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic: bars go to the right of torch's own speed, or to the left of it."""
    ticks = [one for one in _TICKS if 0.7 * min(1.0, *values) <= one <= 1.3 * max(2.0, *values)]
    axes.set(xscale="log", xlabel="times as fast as torch eager (log scale)")
    axes.set_xticks(ticks, [f"{one:g}" for one in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.85 * min(1.0, *values), 1.5 * max(2.0, *values))
    axes.axvline(1.0, color="0.4", linewidth=0.8)


def _bars(axes: Any, cells: Sequence[dict[str, Any]], name: str, form: str, starts_at: float) -> None:
    """A group for each operator, a bar for each dtype."""
    operators = list(dict.fromkeys((cell["operator"], cell["shape"]) for cell in cells))
    dtypes = list(dict.fromkeys(cell["dtype"] for cell in cells))
    height = 0.8 / len(dtypes)
    for number, dtype in enumerate(dtypes):
        values = {(cell["operator"], cell["shape"]): cell[name] for cell in cells if cell["dtype"] == dtype}
        places = [place + (number - (len(dtypes) - 1) / 2) * height for place in range(len(operators))]
        found = [values[one] for one in operators]
        lengths = [value - starts_at for value in found]
        axes.barh(places, lengths, height * 0.92, starts_at, label=dtype, color=_COLOURS.get(dtype))
        for place, value in zip(places, found, strict=True):
            spot = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # a line may pass there
            axes.annotate(form.format(value), (max(value, starts_at), place), bbox=behind, **spot)
    axes.set_yticks(range(len(operators)), [f"{operator}\n{shape}" for operator, shape in operators], fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def _batching(result: dict[str, Any], pyplot: Any) -> Iterator[tuple[str, Any]]:
    counts = [int(count) for count in result["clients"]]
    cells = list(result["clients"].values())
    figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
    ways = (("off_per_s", "requests one by one", "0.6"), ("on_per_s", "requests computed together", "tab:blue"))
    for number, (name, label, colour) in enumerate(ways):
        places = [place + (number - 0.5) * 0.4 for place in range(len(counts))]
        middles = [cell[name] for cell in cells]
        rounds = [cell["rounds"][name] for cell in cells]
        ends = [
            [middle - min(found) for middle, found in zip(middles, rounds, strict=True)],
            [max(found) - middle for middle, found in zip(middles, rounds, strict=True)],
        ]
        axes.bar(places, middles, 0.38, yerr=ends, color=colour, label=label, capsize=3, ecolor="0.3")
    for place, cell in enumerate(cells):
        if cell["gain"] is not None:
            top = max(max(cell["rounds"][name]) for name, _, _ in ways)
            spot = {"textcoords": "offset points", "xytext": (0, 4), "ha": "center", "fontsize": 9}
            axes.annotate(f"{cell['gain']:.2f}x", (place, top), **spot)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.margins(y=0.12)
    rows = result["options"]["rows"]
    what = f"{number_of(rows, 'row')} a request, {result['options']['dtype']}"
    axes.set(xlabel="clients of one server", ylabel="requests per second, all clients together")
    axes.set_title(f"Batching: {what} (whiskers: fastest and slowest round)")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    yield "clients", figure
