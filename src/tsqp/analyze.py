"""What performance logs say: statistics over all calls, by stage, method and layer, and two logs compared.

Percentiles are interpolated linearly between the two nearest calls (NumPy's default). Shares are of the sum of Total,
in which calls that were in flight together each count in full.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .perf_read import Log, Row

#: The stages of a call, in order; together they are Total.
STAGES = ("serialize", "send", "recv", "deserialize")
#: What Recv is made of, where the log says so.
RECV_PARTS = ("compute", "queue", "wait")
NO_LAYER = "-"
#: One of these is called once per forward by every model that has it.
_ONCE_A_FORWARD = ("LMHead", "Embedding")
#: Calls that belong to no token.
_NO_TOKENS = frozenset(("Init", "Ping", "Stats", "DropCache"))
_KB_PER_MB = 1024


@dataclass(frozen=True)
class Stats:
    """Times of some calls in ms; ``share`` of all calls' time."""

    count: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    total_ms: float
    share: float


@dataclass(frozen=True)
class Tokens:
    """Calls per token: ``round_trips`` and their ``ms``, medians over ``count`` forwards of a model.

    ``estimated``: the log does not say what belongs to a forward; these are means over the calls of a module that is
    called once in each.
    """

    count: int
    round_trips: float
    ms: float
    estimated: bool


@dataclass(frozen=True)
class Analysis:
    """All figures of one or more logs together. ``slowest`` and ``largest`` are the first of their kind."""

    logs: Sequence[Log]
    rows: Sequence[Row]
    total: Stats
    elapsed_ms: float | None
    sent_kb: float
    recv_kb: float
    errors: int
    stages: dict[str, Stats]
    recv_parts: dict[str, Stats]
    methods: dict[str, Stats]
    layers: dict[str, Stats]
    carried_kb: dict[str, float]
    tokens: Tokens | None
    slowest: Sequence[Row]
    largest: Sequence[Row]
    placements: tuple[str, ...] = field(default=())

    @property
    def bad(self) -> int:
        """Lines that should be rows and are none."""
        return sum(log.bad for log in self.logs)

    @property
    def kb(self) -> float:
        """KB of all requests and replies."""
        return self.sent_kb + self.recv_kb

    @property
    def throughput_mb_s(self) -> float:
        """MB moved per second of calls."""
        return self.kb / _KB_PER_MB / (self.total.total_ms / 1e3) if self.total.total_ms else 0.0

    def share(self, *names: str) -> float:
        """The share of these stages, or parts of Recv, of all time; 0 where the log does not know them."""
        known = {**self.stages, **self.recv_parts}
        return sum(known[name].share for name in names if name in known)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of ``ordered`` lies."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def stats_of(times_ms: Iterable[float], whole_ms: float) -> Stats:
    """:class:`Stats` of at least one time; ``whole_ms`` is what they are a share of."""
    ordered = sorted(times_ms)
    total = sum(ordered)
    return Stats(
        count=len(ordered),
        mean_ms=total / len(ordered),
        p50_ms=percentile(ordered, 0.5),
        p99_ms=percentile(ordered, 0.99),
        total_ms=total,
        share=total / whole_ms if whole_ms else 0.0,
    )


def analyze(logs: Sequence[Log], top: int = 10) -> Analysis:
    """The figures of ``logs``, each of which has a row at least; of the ``top`` slowest and largest calls."""
    rows = [row for log in logs for row in log.rows]
    whole = sum(row.total_ms for row in rows)
    return Analysis(
        logs=logs,
        rows=rows,
        total=stats_of((row.total_ms for row in rows), whole),
        elapsed_ms=_elapsed_ms(logs),
        sent_kb=sum(row.sent_kb for row in rows),
        recv_kb=sum(row.recv_kb for row in rows),
        errors=sum(bool(row.status) for row in rows),
        stages=_parts(rows, STAGES, whole),
        recv_parts=_parts([row for row in rows if row.compute_ms is not None], RECV_PARTS, whole),
        methods=_grouped(rows, lambda row: row.method, whole),
        layers=_by_layer(rows, whole),
        carried_kb=_carried_kb(logs),
        tokens=_tokens(logs),
        slowest=sorted(rows, key=lambda row: -row.total_ms)[:top],
        largest=sorted(rows, key=lambda row: -row.kb)[:top],
        placements=tuple(sorted({row.placement for row in rows if row.placement is not None})),
    )


def _parts(rows: Sequence[Row], names: Sequence[str], whole_ms: float) -> dict[str, Stats]:
    if not rows:
        return {}
    return {name: stats_of((getattr(row, f"{name}_ms") or 0.0 for row in rows), whole_ms) for name in names}


def _grouped(rows: Iterable[Row], key: Callable[[Row], str], whole_ms: float) -> dict[str, Stats]:
    """By ``key``, what took most in all first."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row.total_ms)
    found = {name: stats_of(times, whole_ms) for name, times in groups.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1].total_ms))


def _by_layer(rows: Iterable[Row], whole_ms: float) -> dict[str, Stats]:
    """By layer, in their order; empty where no call has one."""
    found = _grouped(rows, lambda row: NO_LAYER if row.layer is None else str(row.layer), whole_ms)
    if set(found) == {NO_LAYER}:
        return {}
    return dict(sorted(found.items(), key=lambda item: (item[0] == NO_LAYER, int(item[0]) if item[0] != "-" else 0)))


def _elapsed_ms(logs: Iterable[Log]) -> float | None:
    """From the first call's begin to the last one's end, summed over the logs that say when calls began."""
    found = None
    for log in logs:
        spans = [(row.start_ms, row.start_ms + row.total_ms) for row in log.rows if row.start_ms is not None]
        if spans:
            found = (found or 0.0) + max(end for _, end in spans) - min(begin for begin, _ in spans)
    return found


def only_zmq(log: Log) -> bool:
    """True where the header says that there is no shared memory."""
    words = [value for name, value in log.header.items() if name.strip().lower() == "transport"]
    return bool(words) and str(words[0]).upper().startswith(("IPC", "TCP", "ZMQ", "ZEROMQ"))


def _carried_kb(logs: Iterable[Log]) -> dict[str, float]:
    """KB by carrier, of the messages whose carrier is known."""
    carried: dict[str, float] = defaultdict(float)
    for log in logs:
        fallback = ("zmq", "zmq") if only_zmq(log) else None
        for row in log.rows:
            carriers = row.carriers or fallback
            if carriers is not None:
                carried[carriers[0]] += row.sent_kb
                carried[carriers[1]] += row.recv_kb
    return dict(carried)


def _tokens(logs: Sequence[Log]) -> Tokens | None:
    """Calls per forward of a model, each of which makes one token; None where the log has none."""
    forwards: dict[tuple[int, int], list[float]] = defaultdict(list)
    for number, log in enumerate(logs):
        for row in log.rows:
            if row.forward is not None:
                forwards[number, row.forward].append(row.total_ms)
    if forwards:
        calls = list(forwards.values())
        trips, ms = statistics.median(map(len, calls)), statistics.median(map(sum, calls))
        return Tokens(len(calls), float(trips), float(ms), estimated=False)
    rows = [row for log in logs for row in log.rows if row.method not in _NO_TOKENS]
    for method in _ONCE_A_FORWARD:
        count = sum(row.method == method for row in rows)
        if count:
            return Tokens(count, len(rows) / count, sum(row.total_ms for row in rows) / count, estimated=True)
    return None


# --- two logs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One figure before and after; None where a log does not have it."""

    name: str
    unit: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """After by before."""
        return self.after / self.before if self.before and self.after is not None else None


def compare(before: Analysis, after: Analysis) -> list[Change]:
    """The figures of both, overall, by stage (mean per call), and by method (mean per call)."""
    figures = [
        Change("round trips", "", before.total.count, after.total.count),
        Change("elapsed", "ms", before.elapsed_ms, after.elapsed_ms),
        Change("time in calls", "ms", before.total.total_ms, after.total.total_ms),
        *(
            Change(f"{label} per call", "ms", getattr(before.total, name), getattr(after.total, name))
            for label, name in (("mean", "mean_ms"), ("p50", "p50_ms"), ("p99", "p99_ms"))
        ),
        Change("sent", "KB", before.sent_kb, after.sent_kb),
        Change("received", "KB", before.recv_kb, after.recv_kb),
        Change("throughput", "MB/s", before.throughput_mb_s, after.throughput_mb_s),
        Change("round trips per token", "", *_of_tokens(before, after, "round_trips")),
        Change("time in calls per token", "ms", *_of_tokens(before, after, "ms")),
        Change("errors", "", before.errors, after.errors),
    ]
    for kind, group in (("", "stages"), ("", "recv_parts"), ("method ", "methods")):
        one, other = getattr(before, group), getattr(after, group)
        for name in dict.fromkeys([*one, *other]):
            values = [found[name].mean_ms if name in found else None for found in (one, other)]
            figures.append(Change(f"{kind}{name}, mean", "ms", *values))
    return figures


def _of_tokens(before: Analysis, after: Analysis, name: str) -> tuple[Any, Any]:
    one, other = (None if found.tokens is None else getattr(found.tokens, name) for found in (before, after))
    return one, other
