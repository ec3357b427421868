"""Plots of a transport run: cost over size, clients and slots, as PNG files beside the JSON."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .report import size_text

DPI = 130
INCHES = (9.0, 5.5)
#: Ours stand out; the limit is drawn as what it is, a floor.
OURS, FLOOR = "tsqp", "copies"


def keep(draw: Callable[[Any], Iterable[tuple[str, Any]]], json_path: Path) -> list[Path]:
    """Saves the figures that ``draw(pyplot)`` makes, by the end of their names, beside the JSON; returns the files.

    None without matplotlib, which is said.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install 'tsqp[bench]')")
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for name, figure in draw(pyplot):
        path = json_path.with_name(f"{json_path.stem}-{name}.png")
        figure.savefig(path, dpi=DPI)
        pyplot.close(figure)
        drawn.append(path)
    return drawn


def save(parts: dict[str, Any], json_path: Path) -> list[Path]:
    """Draws what the parts that ran have, and returns the files; none without matplotlib."""

    def figures(pyplot: Any) -> Iterator[tuple[str, Any]]:
        for name, draw in _plots(parts):
            figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
            draw(axes)
            yield name, figure

    return keep(figures, json_path)


def _plots(parts: dict[str, Any]) -> Iterator[tuple[str, Callable[[Any], None]]]:
    if "echo" in parts:
        yield "size", lambda axes: _over_size(axes, parts["echo"], "Echo of one float32 tensor")
    if "large" in parts:
        yield "large", lambda axes: _over_size(axes, parts["large"], "Echo of what fits no slot, by carrier")
    if "clients" in parts:
        yield "clients", lambda axes: _over_clients(axes, parts["clients"])
    if "slots" in parts:
        yield "slots", lambda axes: _over_slots(axes, parts["slots"])


def below(axes: Any, handles: Sequence[Any] | None = None, columns: int = 3) -> None:
    """The legend under the plot, where it hides nothing."""
    shown = axes.get_legend_handles_labels()[0] if handles is None else handles
    columns = min(columns, max(1, len(shown)))
    axes.figure.legend(handles=shown, loc="outside lower center", ncols=columns, fontsize=8)


def plain_log(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with numbers as one reads them, two at least, however little the values differ."""
    least, most = min(values), max(values)
    low, high = (least * 0.8, most * 1.25) if most > 3 * least else (least / 2, most * 2)
    steps = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [step * 10.0**power for power in range(-3, 12) for step in steps if low <= step * 10.0**power <= high]
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(ticks, [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})


def _over_size(axes: Any, result: dict[str, Any], title: str) -> None:
    sizes = result["sizes_bytes"]
    for key, cells in result["cells"].items():
        medians = [cells[str(nbytes)]["median_us"] for nbytes in sizes]
        if key == FLOOR:
            style = {"color": "black", "linestyle": ":", "linewidth": 1.5, "marker": ".", "zorder": 1}
        elif key.startswith(OURS):
            style = {"linewidth": 2.5 if key == OURS else 1.8, "marker": "o", "markersize": 4, "zorder": 3}
        else:
            style = {"linewidth": 1.2, "linestyle": "--", "marker": "s", "markersize": 3, "zorder": 2}
        axes.plot(sizes, medians, label=result["titles"][key], **style)
    axes.set(xscale="log", xlabel="size of the tensor (log scale)", title=title)
    axes.set_ylabel("echo round trip, median (µs, log scale)")
    plain_log(axes.yaxis, [cell["median_us"] for cells in result["cells"].values() for cell in cells.values()])
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
    axes.set_xticks(sizes, [size_text(nbytes) for nbytes in sizes])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    below(axes)


def _over_clients(axes: Any, result: dict[str, Any]) -> None:
    counts = result["counts"]
    for nbytes, cells in result["sizes"].items():
        label = f"{size_text(int(nbytes))}, peak {max(cells['echoes_per_s'].values()):,.0f} echoes/s"
        (line,) = axes.plot(counts, [cells["of_peak"][str(count)] for count in counts], marker="o", label=label)
        for count in counts:
            share, spread = cells["of_peak"][str(count)], cells["max_over_min"][str(count)]
            spot = {"textcoords": "offset points", "xytext": (4, 6), "fontsize": 7, "color": line.get_color()}
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}  # a line may pass there
            axes.annotate(f"{spread:.2g}", (count, share), bbox=behind, **spot)
    axes.axhline(0.9, color="gray", linestyle=":", label="90% of the peak")
    axes.set(xscale="log", ylim=(0, 1.15), xlabel="clients on one server of one thread (log scale)")
    axes.set_ylabel("total throughput, share of its peak")
    axes.set_title("Many clients (beside the points: the largest share of a client over the smallest)")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    below(axes)


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
    below(axes, [left, right])
