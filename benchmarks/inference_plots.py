"""Plots of an inference run, as PNG files beside the JSON: where the time goes, and how it grows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .plots import INCHES, below, keep, plain_log
from .report import number_of

#: Key of a part in the result -> its label and colour.
PARTS = {
    "server_ms": ("server computing", "tab:blue"),
    "wire_ms": ("calls but for that", "tab:orange"),
    "runner_ms": ("the runner alone", "tab:green"),
}
_STOCK_COLOUR = "0.6"
_MARKERS = "osD^vP*X"


def save(result: dict[str, Any], json_path: Path) -> list[Path]:
    """Draws what the run has, and returns the files; none without matplotlib."""
    return keep(partial(_figures, result), json_path)


def _figures(result: dict[str, Any], pyplot: Any) -> Iterator[tuple[str, Any]]:
    options = result["options"]
    for dtype, run in result["runs"].items():
        figure, axes = pyplot.subplots(1, 2, figsize=(13.0, 5.5), layout="constrained")
        for phase, one in zip(("prefill", "decode"), axes, strict=True):
            _parts(one, run, phase, options["tokens"])
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
        figure.suptitle(f"Where the time goes: {dtype}, {number_of(options['layers'], 'layer')}, {options['device']}")
        yield f"parts-{dtype}", figure
    growth = result.get("growth")
    if growth is None:
        return
    for over in ("tokens", "layers"):
        figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
        _growth(axes, growth, over)
        yield over, figure
        figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
        _grown_parts(axes, growth, over)
        yield f"{over}-parts", figure


def _stack(axes: Any, places: list[float], cells: list[dict[str, float]], width: float, labelled: bool) -> None:
    """Bars of the parts on top of each other."""
    below = [0.0] * len(cells)
    for key, (label, colour) in PARTS.items():
        heights = [cell[key] for cell in cells]
        axes.bar(places, heights, width, bottom=below, color=colour, label=label if labelled else None)
        below = [low + height for low, height in zip(below, heights, strict=True)]


def _parts(axes: Any, run: dict[str, Any], phase: str, tokens: int) -> None:
    splits = run["splits"]
    cells = [split[phase] for split in splits.values()]
    places = [float(place) for place in range(len(cells))]
    stock_ms = [cell["stock_ms"] for cell in cells]
    axes.bar([place - 0.2 for place in places], stock_ms, 0.38, color=_STOCK_COLOUR, label="stock, in one process")
    _stack(axes, [place + 0.2 for place in places], cells, 0.38, labelled=True)
    axes.axhline(run["floor_ms"][phase], color="black", linestyle="--", linewidth=1, label="floor")
    for place, cell in zip(places, cells, strict=True):
        top = max(cell["stock_ms"], sum(cell[key] for key in PARTS))
        axes.annotate(
            f"{cell['ratio']:.2f}x", (place, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xticks(places, list(splits))
    axes.set(ylabel="time of one forward (ms)", title=f"{phase} {'of' if phase == 'prefill' else 'at'} {tokens} tokens")
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.3)


def _about(growth: dict[str, Any], over: str) -> str:
    count, unit = (growth["layers_of_tokens"], "layer") if over == "tokens" else (growth["tokens_of_layers"], "token")
    return f"{growth['dtype']}, {number_of(count, unit)}"


def _growth(axes: Any, growth: dict[str, Any], over: str) -> None:
    floors = growth["floor_ms"][over]
    sizes = [int(size) for size in floors]
    for marker, (key, by_size) in zip(_MARKERS, growth[over].items(), strict=False):
        colour = {"color": _STOCK_COLOUR, "linewidth": 3} if key == "stock" else {}
        times = [cell["ms"] for cell in by_size.values()]
        axes.plot([int(size) for size in by_size], times, marker=marker, label=key, **colour)
    axes.plot(sizes, list(floors.values()), color="black", linestyle="--", linewidth=1, label="floor")
    logs = over == "tokens"
    said = " (log scale)" if logs else ""
    axes.set(xlabel=f"{over}{said}", ylabel=f"prefill, median (ms{', log scale' if logs else ''})")
    if logs:
        axes.set_xscale("log")
        plain_log(
            axes.yaxis, [*floors.values(), *(cell["ms"] for cells in growth[over].values() for cell in cells.values())]
        )
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(f"Prefill over {over}: {_about(growth, over)}")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(alpha=0.3)
    below(axes, columns=6)


def _grown_parts(axes: Any, growth: dict[str, Any], over: str) -> None:
    """Parts per token or per layer, so that small sizes can be read beside large ones."""
    splits = {key: by_size for key, by_size in growth[over].items() if key != "stock"}
    sizes = list(growth["floor_ms"][over])
    width = 0.8 / max(1, len(splits))
    for number, by_size in enumerate(splits.values()):
        there = [place for place, size in enumerate(sizes) if size in by_size]
        offset = (number - (len(splits) - 1) / 2) * width
        cells = [{key: by_size[sizes[place]][key] / int(sizes[place]) for key in PARTS} for place in there]
        _stack(axes, [place + offset for place in there], cells, width * 0.92, labelled=number == 0)
        for place in set(range(len(sizes))) - set(there):
            axes.text(place + offset, 0, " left out", rotation=90, ha="center", va="bottom", fontsize=7, color="0.4")
    for place, size in enumerate(sizes):
        stock_ms = growth[over]["stock"][size]["ms"] / int(size)
        label = "stock, in one process" if place == 0 else None
        axes.hlines(stock_ms, place - 0.42, place + 0.42, color="black", linewidth=1.2, label=label)
    unit = over.removesuffix("s")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set(xlabel=f"{over}; bars from left to right: {', '.join(splits)}", ylabel=f"prefill, ms per {unit}")
    axes.set_title(f"Where the time goes over {over}: {_about(growth, over)}")
    axes.grid(axis="y", alpha=0.3)
    below(axes, columns=4)
