"""Plots of a transport run: cost over size, clients and slots, as PNG files beside the JSON."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .report import size_text

DPI = 130
INCHES = (9.0, 5.5)
#: Ours stand out; the limit is drawn as what it is, a floor.
OURS, FLOOR = "tsqp", "copies"


def save(parts: dict[str, Any], json_path: Path) -> list[Path]:
    """Draws what the parts that ran have, and returns the files; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install 'tsqp[bench]')")
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for name, draw in _plots(parts):
        figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
        draw(axes)
        path = json_path.with_name(f"{json_path.stem}-{name}.png")
        figure.savefig(path, dpi=DPI)
        pyplot.close(figure)
        drawn.append(path)
    return drawn


def _plots(parts: dict[str, Any]) -> Iterator[tuple[str, Callable[[Any], None]]]:
    if "echo" in parts:
        yield "size", lambda axes: _over_size(axes, parts["echo"])
    if "large" in parts:
        yield "large", lambda axes: _over_size(axes, parts["large"])
    if "clients" in parts:
        yield "clients", lambda axes: _over_clients(axes, parts["clients"])
    if "slots" in parts:
        yield "slots", lambda axes: _over_slots(axes, parts["slots"])


def _over_size(axes: Any, result: dict[str, Any]) -> None:
    sizes = result["sizes_bytes"]
    for key, cells in result["cells"].items():
        medians = [cells[str(nbytes)]["median_us"] for nbytes in sizes]
        if key == FLOOR:
            style = {"color": "black", "linestyle": ":", "linewidth": 1.5, "zorder": 1}
        elif key.startswith(OURS):
            style = {"linewidth": 2.5 if key == OURS else 1.8, "marker": "o", "markersize": 4, "zorder": 3}
        else:
            style = {"linewidth": 1.2, "linestyle": "--", "marker": "s", "markersize": 3, "zorder": 2}
        axes.plot(sizes, medians, label=result["titles"][key], **style)
    axes.set(xscale="log", yscale="log", xlabel="size of the tensor (bytes, log scale)")
    axes.set(ylabel="echo round trip, median (µs, log scale)", title="Echo of one float32 tensor")
    axes.set_xticks(sizes, [size_text(nbytes) for nbytes in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _over_clients(axes: Any, result: dict[str, Any]) -> None:
    counts = result["counts"]
    for nbytes, cells in result["sizes"].items():
        label = f"{size_text(int(nbytes))}, peak {max(cells['echoes_per_s'].values()):,.0f} echoes/s"
        (line,) = axes.plot(counts, [cells["of_peak"][str(count)] for count in counts], marker="o", label=label)
        for count in counts:
            share, spread = cells["of_peak"][str(count)], cells["max_over_min"][str(count)]
            spot = {"textcoords": "offset points", "xytext": (4, 6), "fontsize": 7, "color": line.get_color()}
            axes.annotate(f"{spread:.2g}", (count, share), **spot)
    axes.axhline(0.9, color="gray", linestyle=":", label="90% of the peak")
    axes.set(xscale="log", ylim=(0, 1.15), xlabel="clients on one server of one thread (log scale)")
    axes.set(ylabel="total throughput, share of its peak", title="Many clients (beside the points: max/min share)")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")


def _over_slots(axes: Any, result: dict[str, Any]) -> None:
    counts = result["counts"]
    echoes = [result["echo"][str(count)]["median_us"] for count in counts]
    rates = [result["stream_gb_per_s"][str(count)] for count in counts]
    size = size_text(result["nbytes"])
    (left,) = axes.plot(counts, echoes, marker="o", color="tab:blue", label="echo (left axis)")
    axes.set(xscale="log", xlabel="slots in each direction (log scale)", title=f"Number of slots, {size} messages")
    axes.set_ylabel("echo round trip, median (µs)", color="tab:blue")
    axes.set_ylim(0, max(echoes) * 1.2)
    other = axes.twinx()
    (right,) = other.plot(counts, rates, marker="s", color="tab:orange", label="stream (right axis)")
    other.set_ylabel("one-way stream (GB/s)", color="tab:orange")
    other.set_ylim(0, max(rates) * 1.2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(handles=[left, right], fontsize=8, loc="lower right")
