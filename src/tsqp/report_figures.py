"""Draws a :class:`~tsqp.report_data.Report`: four panels in one figure, with matplotlib.

Colours are told apart by colour-blind readers: stages in the palette of Okabe and Ito (2008), methods and carriers in
those of Paul Tol (2021, "Colour schemes"). A stage has one colour in all panels.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from textwrap import wrap
from typing import Any

from .errors import ConfigError
from .report_calls import Bars
from .report_data import Report
from .report_spread import Carrier, Histogram, Throughput
from .report_timeline import Span, Timeline

INCHES = (16.0, 13.0)
DPI = 110
#: Stage -> its label and colour.
STAGES = {
    "serialize": ("serialize (runner)", "#56B4E9"),
    "send": ("send (runner)", "#F0E442"),
    "queue": ("queue (server)", "#CC79A7"),
    "compute": ("compute (server)", "#0072B2"),
    "wait": ("wire and waking up", "#E69F00"),
    "recv": ("waiting for the reply", "#D55E00"),
    "deserialize": ("deserialize (runner)", "#009E73"),
    "own": ("runner between calls", "#D0D0D0"),
}
_METHOD_COLOURS = ("#332288", "#88CCEE", "#CC6677", "#DDCC77", "#117733", "#AA4499", "#999933", "#BBBBBB")
_CARRIERS = (("#4477AA", "o"), ("#EE6677", "s"), ("#228833", "^"), ("#CCBB44", "D"), ("#AA3377", "v"), ("#444444", "x"))
#: Sections of a timeline that all get a line; of more, only those that have room for a label.
_MANY_SECTIONS = 40
_MAX_SECTIONS = 400
_MAX_BAR_LABELS = 16
_NOTE_CHARS = 190
#: Characters of labels that stand side by side over the figure's width.
_LINE_CHARS = 170
_STYLE = {
    "font.size": 11.0,
    "axes.titlesize": 13.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10.0,
    "text.parse_math": False,  # a name in a log is no formula
    "svg.fonttype": "path",
    "svg.hashsalt": "tsqp",
}
_DOCTYPE = re.compile(rb"<!DOCTYPE[^>]*>\s*")


def need_matplotlib() -> None:
    """Raises :class:`ConfigError` where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'tsqp[plot]'") from error


def draw(report: Report, kind: str) -> bytes:
    """The report's picture as a file: ``png`` or ``svg``. Call :func:`need_matplotlib` first."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=INCHES, layout="constrained")
        _panels(figure, report)
        out = io.BytesIO()
        if kind == "svg":
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
            return _DOCTYPE.sub(b"", out.getvalue())  # it names a file on the web
        figure.savefig(out, format=kind, dpi=DPI)
        return out.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever the user's settings are."""
    from matplotlib import style

    with style.context(["default", _STYLE]):
        yield


def _panels(figure: Any, report: Report) -> None:
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    heights = (0.6, 4.2, 0.8 if report.timeline is None else 2.9, 4.2, 0.6)
    figure.set_figheight(sum(heights) + 0.55)
    head, stages, timeline, spread, foot = figure.subfigures(5, 1, height_ratios=heights)
    head.text(0.01, 0.8, report.title, fontsize=17, fontweight="bold", va="top")
    head.text(0.01, 0.0, report.subtitle, fontsize=11.5, color="0.3", va="bottom")
    _draw_bars(stages, report.bars)
    shown = _shown_stages(report)
    stages.legend(handles=_patches(shown), loc="outside lower center", ncols=len(shown))
    _draw_timeline(timeline.subplots(), report.timeline)
    left, right = spread.subplots(1, 2)
    _draw_throughput(left, report.throughput)
    _draw_histogram(right, report.histogram)
    notes = wrap(" ".join(report.notes), _NOTE_CHARS)
    foot.text(0.01, 0.95, "\n".join(notes), fontsize=10, color="0.3", va="top")


# --- stages -------------------------------------------------------------------------------------------------


def _draw_bars(place: Any, bars: Sequence[Bars]) -> None:
    axes = place.subplots(1, len(bars), squeeze=False)[0]
    for one, found in zip(axes, bars, strict=True):
        _stack(one, found, _LINE_CHARS // len(bars))


def _stack(axes: Any, bars: Bars, room_chars: int) -> None:
    below = [0.0] * len(bars.labels)
    for stage, (_, colour) in STAGES.items():
        heights = bars.stages.get(stage)
        if heights is not None:
            axes.bar(range(len(below)), heights, 0.75, bottom=below, color=colour, linewidth=0)
            below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_title(_bars_title(bars))
    axes.set_ylabel("time in calls (ms)" if bars.per == "log" else f"time in calls per {bars.per} (ms)")
    axes.set_xlabel(f"{bars.by} of the call")
    axes.set_ylim(0, max(below) * 1.08 or 1)
    _bar_labels(axes, bars.labels, room_chars)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _bars_title(bars: Bars) -> str:
    if bars.per == "log":
        return f"Stages of {bars.calls:,} calls by {bars.by}: {_ms(bars.total_ms)}"
    whose = "forwards" if bars.phase == "all" else f"{bars.phase} forwards"
    what = f"mean of {bars.count:,} {whose}" if bars.count > 1 else f"one {whose[:-1]}"
    return f"Stages by {bars.by}, {what}: {_ms(bars.total_ms)} in {bars.calls / bars.count:.0f} calls"


def _bar_labels(axes: Any, labels: Sequence[str], room_chars: int) -> None:
    """Each bar's name, or of many bars some; turned where they would touch."""
    step = -(-len(labels) // _MAX_BAR_LABELS)
    named = [place for place, name in enumerate(labels) if not name[:1].isdigit()]
    places = sorted({*named, *(place for place in range(0, len(labels), step) if _is_apart(place, named, step))})
    shown = [labels[place] for place in places]
    turned = sum(len(name) + 2 for name in shown) > room_chars
    axes.set_xticks(places, shown, rotation=35 if turned else 0, ha="right" if turned else "center")
    if turned:
        axes.tick_params(axis="x", pad=1)


def _is_apart(place: int, others: Sequence[int], step: int) -> bool:
    return all(abs(place - other) >= step + step // 2 for other in others)


def _shown_stages(report: Report) -> list[str]:
    """The stages that are in the bars or the timeline, in order."""
    shown = {stage for bars in report.bars for stage in bars.stages}
    if report.timeline is not None:
        shown |= {*report.timeline.runner, *report.timeline.wire, *report.timeline.server}
    return [stage for stage in STAGES if stage in shown]


def _patches(stages: Sequence[str]) -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=STAGES[stage][1], label=STAGES[stage][0], linewidth=0) for stage in stages]


# --- timeline -----------------------------------------------------------------------------------------------

_LANES = (("runner", 2.0), ("wire", 1.0), ("server", 0.0))
_LANE_HEIGHT = 0.72


def _draw_timeline(axes: Any, line: Timeline | None) -> None:
    if line is None:
        axes.set_title("Timeline of one forward")
        _say(axes, "no timeline: the log does not say when calls began (column Start)")
        return
    unit, scale = ("ms", 1e6) if line.end_ns >= 1e6 else ("µs", 1e3)
    for lane, low in _LANES:
        _draw_lane(axes, getattr(line, lane), low - _LANE_HEIGHT / 2, scale)
    axes.set_title(f"Timeline of one forward: {line.title}, {line.calls:,} calls, {_ms(line.end_ns / 1e6)}", pad=24)
    axes.set_yticks([low for _, low in _LANES], [lane for lane, _ in _LANES])
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, max(line.end_ns, 1) / scale), ylim=(-0.5, 2.5), xlabel=f"time from its first call ({unit})")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _draw_sections(axes, line, scale)


def _draw_lane(axes: Any, kinds: Mapping[str, Sequence[Span]], bottom: float, scale: float) -> None:
    for kind in STAGES:
        if kind in kinds:
            spans = [(span.begin / scale, (span.end - span.begin) / scale) for span in kinds[kind]]
            axes.broken_barh(spans, (bottom, _LANE_HEIGHT), color=STAGES[kind][1], linewidth=0.5)


def _draw_sections(axes: Any, line: Timeline, scale: float) -> None:
    """Above the lanes, which layer it is."""
    high = {"transform": axes.get_xaxis_transform(), "fontsize": 9, "color": "0.25", "ha": "center", "va": "bottom"}
    free_from = 0.0
    for name, span in line.sections[:_MAX_SECTIONS]:
        text = f"layer {name}" if name.lstrip("-").isdigit() else name[:24]
        width, middle = (len(text) + 2) * 0.0052 * line.end_ns, (span.begin + span.end) / 2
        fits = middle - width / 2 >= free_from and middle + width / 2 <= line.end_ns * 1.04
        if fits:
            axes.text(middle / scale, 1.01, text, **high)
            free_from = middle + width / 2
        if fits or len(line.sections) <= _MANY_SECTIONS:
            axes.axvline(span.begin / scale, ymax=1.09, color="0.45", linewidth=0.8, linestyle=":", clip_on=False)


# --- throughput ---------------------------------------------------------------------------------------------


def _draw_throughput(axes: Any, rates: Throughput) -> None:
    axes.set_title("Throughput by message size")
    if not rates.carriers:
        _say(axes, "no call took time and moved bytes")
        return
    for carrier, (colour, marker) in zip(rates.carriers, _cycled(_CARRIERS), strict=False):
        _draw_carrier(axes, carrier, colour, marker)
    axes.set(xscale="log", yscale="log", xlabel="bytes of request and reply (log scale)")
    by = "time without compute and queue" if rates.moving_only else "Total time, computing included"
    axes.set_ylabel(f"throughput (MB/s, log scale)\nby {by}")
    points = [point for carrier in rates.carriers for point in carrier.points]
    _size_ticks(axes, [kb * 1024 for kb, _ in points])
    _number_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(y=0.08)
    axes.legend(loc="best", framealpha=0.9, frameon=True, edgecolor="none")


def _draw_carrier(axes: Any, carrier: Carrier, colour: str, marker: str) -> None:
    sizes, found = zip(*carrier.points, strict=True)
    dots = {"s": 14, "color": colour, "marker": marker, "alpha": 0.3, "linewidths": 0.6 if marker == "x" else 0}
    axes.scatter([kb * 1024 for kb in sizes], found, **dots)
    sizes, found = zip(*carrier.medians, strict=True)
    places = [kb * 1024 for kb in sizes]
    axes.plot(places, found, color="white", linewidth=5)  # so that the line stands out from its points
    label = f"{carrier.name}: {carrier.calls:,} calls, line: median"
    edge = {"markeredgecolor": "white"} if marker != "x" else {}
    axes.plot(places, found, color=colour, marker=marker, linewidth=2, markersize=8, label=label, **edge)


def _size_ticks(axes: Any, sizes: Sequence[float]) -> None:
    """Powers of two, as many as there is room for."""
    low, high = math.floor(math.log2(min(sizes)) - 0.2), math.ceil(math.log2(max(sizes)) + 0.2)
    axes.set_xlim(2.0**low, 2.0**high)
    powers = range(low, high + 1, max(1, -(-(high - low) // 9)))
    axes.set_xticks([2.0**power for power in powers], [_size(2**power) for power in powers])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def _size(nbytes: int) -> str:
    for unit, name in ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB")):
        if nbytes >= unit:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


# --- histogram ----------------------------------------------------------------------------------------------


def _draw_histogram(axes: Any, found: Histogram) -> None:
    edges = found.edges_ms
    widths = [high - low for low, high in pairwise(edges)]
    below = [0] * len(widths)
    for times, colour in zip(found.methods, _cycled(_METHOD_COLOURS), strict=False):
        label = f"{times.name}: {times.calls:,}, p50 {_ms(times.p50_ms)}"
        axes.bar(edges[:-1], times.counts, widths, align="edge", bottom=below, color=colour, label=label, linewidth=0)
        below = [low + count for low, count in zip(below, times.counts, strict=True)]
    axes.set_title("Round trip times by method")
    axes.set(xscale="log", xlim=(edges[0], edges[-1]), ylim=(0, max(below) * 1.08))
    axes.set(xlabel="Total of a call (ms, log scale)", ylabel="calls, stacked")
    _number_ticks(axes.xaxis)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="method: calls, median")


# --- all panels ---------------------------------------------------------------------------------------------


def _number_ticks(axis: Any) -> None:
    """Numbers as people write them, not powers; of a short axis, more than the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low) if low > 0 else 9.0
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())


def _cycled(found: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from found


def _say(axes: Any, text: str) -> None:
    """In place of a panel that has nothing to show."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color="0.35", fontsize=12, transform=axes.transAxes)


def _ms(ms: float) -> str:
    if ms >= 10_000:
        return f"{ms / 1e3:,.1f} s"
    return f"{ms:.1f} ms" if ms >= 10 else f"{ms:.2f} ms" if ms >= 0.1 else f"{ms * 1e3:.1f} µs"
