"""How calls spread: throughput over message size for each carrier, and round trip times for each method.

Sizes in KB of 1024 bytes, rates in MB of 1024 KB per second, times in ms.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .analyze import only_zmq
from .perf_read import Log, Row
from .report_calls import plain

#: Points of a carrier that are drawn; medians are of all.
MAX_POINTS = 1500
#: Methods with a colour of their own; the others share one.
MAX_METHODS = 7
HISTOGRAM_BINS = 60
_KB_PER_MB = 1024
#: What a table resolves; nothing that takes less says anything.
_SHORTEST_MS = 1e-4
_SMALLEST_KB = 1 / 1024


@dataclass(frozen=True)
class Carrier:
    """Calls of one carrier. ``points`` are (KB, MB/s) of some of them, evenly chosen; ``medians`` of all of them, for
    each power of two of KB: (median KB, median MB/s).
    """

    name: str
    calls: int
    points: list[tuple[float, float]]
    medians: list[tuple[float, float]]


@dataclass(frozen=True)
class Throughput:
    """``moving_only``: rates are by the time in which nothing is computed and no request queues; else by Total."""

    moving_only: bool
    carriers: list[Carrier]


def throughput(logs: Sequence[Log]) -> Throughput:
    """Bytes of request and reply by the time they took, for each carrier; the one with most calls first."""
    moving_only = all(row.compute_ms is not None for log in logs for row in log.rows)
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for log in logs:
        fallback = "zmq" if only_zmq(log) else "not in the log"
        for row in log.rows:
            ms = _moving_ms(row) if moving_only else row.total_ms
            if ms >= _SHORTEST_MS and row.kb >= _SMALLEST_KB:
                groups[row.carrier or fallback].append((row.kb, row.kb / _KB_PER_MB / (ms / 1e3)))
    carriers = [
        Carrier(plain(name), len(points), _some(points), _medians(points))
        for name, points in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    return Throughput(moving_only, carriers)


def _moving_ms(row: Row) -> float:
    return row.total_ms - (row.compute_ms or 0.0) - (row.queue_ms or 0.0)


def _some(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most :data:`MAX_POINTS`, evenly chosen by size so that rare sizes stay."""
    if len(points) <= MAX_POINTS:
        return points
    ordered = sorted(points)
    last = len(ordered) - 1
    return [ordered[number * last // (MAX_POINTS - 1)] for number in range(MAX_POINTS)]


def _medians(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for kb, rate in points:
        bins[math.frexp(kb)[1]].append((kb, rate))
    return [
        (statistics.median(kb for kb, _ in found), statistics.median(rate for _, rate in found))
        for _, found in sorted(bins.items())
    ]


# --- round trip times ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Calls of one method: how many of them are in each bin, and their median in ms."""

    name: str
    calls: int
    p50_ms: float
    counts: list[int]


@dataclass(frozen=True)
class Histogram:
    """Round trip times in bins of equal width on a log axis, from ``edges_ms[i]`` to ``edges_ms[i + 1]``."""

    edges_ms: list[float]
    methods: list[Times]


def histogram(logs: Sequence[Log]) -> Histogram:
    """Total of all calls by method, the most frequent first; those of few calls together."""
    groups: dict[str, list[float]] = defaultdict(list)
    for log in logs:
        for row in log.rows:
            groups[row.method].append(max(row.total_ms, _SHORTEST_MS))
    ordered = sorted(groups, key=lambda method: -len(groups[method]))
    named: dict[str, list[float]] = defaultdict(list)
    for number, method in enumerate(ordered):
        named[plain(method) if number < MAX_METHODS else f"{len(ordered) - MAX_METHODS} others"] += groups[method]
    edges = _edges([ms for times in named.values() for ms in times])
    return Histogram(
        edges,
        [Times(name, len(times), statistics.median(times), _counts(times, edges)) for name, times in named.items()],
    )


def _edges(times_ms: Sequence[float]) -> list[float]:
    """Around all times; a factor of 1.2 at least from first to last."""
    low, high = math.log10(min(times_ms)), math.log10(max(times_ms))
    spare = max(0.04, 0.005 * (high - low))
    low, high = low - spare, high + spare
    return [10 ** (low + (high - low) * number / HISTOGRAM_BINS) for number in range(HISTOGRAM_BINS + 1)]


def _counts(times_ms: Sequence[float], edges_ms: Sequence[float]) -> list[int]:
    low, high = math.log10(edges_ms[0]), math.log10(edges_ms[-1])
    counts = [0] * HISTOGRAM_BINS
    for ms in times_ms:
        place = int((math.log10(ms) - low) / (high - low) * HISTOGRAM_BINS)
        counts[min(max(place, 0), HISTOGRAM_BINS - 1)] += 1
    return counts
