"""What pictures and traces are made of: the calls of logs by forward, in phases, and their stages.

Times in ms, sizes in KB of 1024 bytes, as in :class:`~tsqp.perf_read.Row`.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .errors import ConfigError
from .perf_read import Log, Row

#: Parts of a call's Total, in order. ``recv`` stands for queue, compute and wait where a log does not tell them apart.
STAGES = ("serialize", "send", "queue", "compute", "wait", "recv", "deserialize")
#: A forward whose embedding gives this many times the bytes of the smallest one's reads a prompt.
PROMPT_RATIO = 1.5
#: Layers get one bar each up to here; then neighbours share one.
MAX_LAYER_BARS = 100
MAX_METHOD_BARS = 16
#: Eleven days in ms, a terabyte in KB; beyond, microseconds of a trace are not exact either.
MAX_FIGURE = 1e9
MAX_NAME_CHARS = 24
_FIRST, _LAST = "Embedding", "LMHead"
_KINDS = {"prefill": 0, "decode": 1, "all": 2}


def plain(text: object, limit: int = MAX_NAME_CHARS) -> str:
    """A log's word as it may stand in a picture: printable ASCII, not longer than ``limit``."""
    word = "".join(char if char.isascii() and char.isprintable() else "?" for char in str(text)[: limit + 1])
    return word if len(word) <= limit else word[: limit - 3] + "..."


def believable(logs: Sequence[Log]) -> tuple[list[Log], int]:
    """The logs without calls of more than :data:`MAX_FIGURE` ms or KB, which no call has, and how many those were.

    Raises :class:`ConfigError` where nothing is left.
    """
    kept = [replace(log, rows=[row for row in log.rows if _is_believable(row)]) for log in logs]
    left = sum(len(log.rows) for log in kept)
    if not left:
        raise ConfigError(f"{logs[0].path} holds no call whose figures can be true; give a log that --perf-log wrote")
    return kept, sum(len(log.rows) for log in logs) - left


def _is_believable(row: Row) -> bool:
    figures = (row.serialize_ms, row.send_ms, row.recv_ms, row.deserialize_ms, row.total_ms, row.sent_kb, row.recv_kb)
    more = (row.compute_ms, row.queue_ms, row.wait_ms, row.start_ms)
    return max(figures) <= MAX_FIGURE and all(figure is None or figure <= MAX_FIGURE for figure in more)


@dataclass
class Forward:
    """The calls of one forward of a model. ``log`` is the number of its log, ``number`` the log's own."""

    log: int
    number: int
    rows: list[Row] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """From the first call's begin to the last one's end; the sum of their times where begins are not known."""
        begins = [row.start_ms for row in self.rows if row.start_ms is not None]
        if len(begins) < len(self.rows):
            return sum(row.total_ms for row in self.rows)
        return max(begin + row.total_ms for begin, row in zip(begins, self.rows, strict=True)) - min(begins)

    @property
    def size_kb(self) -> float:
        """What grows with its tokens: KB of the embedding, or of all its calls where it has none."""
        embedded = [row.recv_kb for row in self.rows if row.method == _FIRST]
        return sum(embedded) if embedded else sum(row.kb for row in self.rows)


def forwards_of(logs: Sequence[Log]) -> list[Forward]:
    """The forwards of all logs, in their order; none where the logs do not number them."""
    found: dict[tuple[int, int], Forward] = {}
    for number, log in enumerate(logs):
        for row in log.rows:
            if row.forward is not None:
                key = (number, row.forward)
                if key not in found:
                    found[key] = Forward(number, row.forward)
                found[key].rows.append(row)
    return list(found.values())


def by_phase(forwards: Sequence[Forward]) -> dict[str, list[Forward]]:
    """``prefill`` and ``decode`` by their sizes; ``all`` where all have about one size, of which it could be either."""
    if not forwards:
        return {}
    sizes = [forward.size_kb for forward in forwards]
    limit = min(sizes) * PROMPT_RATIO
    phases: dict[str, list[Forward]] = defaultdict(list)
    for forward, size in zip(forwards, sizes, strict=True):
        phases["prefill" if size > limit else "decode"].append(forward)
    if "prefill" not in phases:
        return {"all": list(forwards)}
    return dict(sorted(phases.items(), key=lambda item: _KINDS[item[0]]))


def choose_forward(phases: Mapping[str, Sequence[Forward]], number: int | None) -> tuple[str, Forward] | None:
    """A forward and its phase: the given one of the first log, or the median decode step; None where there is none.

    Raises :class:`ConfigError` where the number given is not in the log.
    """
    if number is not None:
        for phase, forwards in phases.items():
            for forward in forwards:
                if forward.log == 0 and forward.number == number:
                    return phase, forward
        known = sorted(forward.number for forwards in phases.values() for forward in forwards if forward.log == 0)
        what = f"it has {known[0]} to {known[-1]}" if known else "it does not number its forwards"
        raise ConfigError(f"--forward {number} is not in the log: {what}; give one it has, or leave it out")
    if not phases:
        return None
    phase = max(phases, key=lambda name: _KINDS[name])
    times = [forward.ms for forward in phases[phase]]
    return phase, phases[phase][times.index(statistics.median_low(times))]


# --- stages -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bars:
    """Stacked bars: ``stages[stage][i]`` is the ms of the bar ``labels[i]``, a mean over ``count`` forwards.

    ``by`` says what a bar is, ``per`` what it is a mean of; ``calls`` is how many calls are in all of them.
    """

    phase: str
    by: str
    per: str
    count: int
    calls: int
    labels: list[str]
    stages: dict[str, list[float]]

    @property
    def total_ms(self) -> float:
        """All bars together."""
        return sum(map(sum, self.stages.values()))


def stages_of(row: Row) -> dict[str, float]:
    """A call's ms by stage; together its Total."""
    parts = {"serialize": row.serialize_ms, "send": row.send_ms, "deserialize": row.deserialize_ms}
    if row.compute_ms is None:
        return {**parts, "recv": row.recv_ms}
    queue = row.queue_ms or 0.0
    wait = row.wait_ms if row.wait_ms is not None else max(0.0, row.recv_ms - row.compute_ms - queue)
    return {**parts, "queue": queue, "compute": row.compute_ms, "wait": wait}


def stage_bars(logs: Sequence[Log], phases: Mapping[str, Sequence[Forward]]) -> list[Bars]:
    """One set of bars for each phase; over all calls where the logs do not number forwards."""
    if phases:
        return [
            _bars(phase, "forward", len(forwards), [row for forward in forwards for row in forward.rows])
            for phase, forwards in phases.items()
        ]
    return [_bars("all", "log", len(logs), [row for log in logs for row in log.rows])]


def _bars(phase: str, per: str, count: int, rows: Sequence[Row]) -> Bars:
    layered = any(row.layer is not None for row in rows)
    names: dict[int | str, str] = _layer_labels(rows) if layered else _method_labels(rows)
    order = list(dict.fromkeys(names.values()))
    sums: dict[str, dict[str, float]] = {stage: dict.fromkeys(order, 0.0) for stage in STAGES}
    for row in rows:
        label = names[_bar_key(row) if layered else row.method]
        for stage, ms in stages_of(row).items():
            sums[stage][label] += ms
    known = {stage: [ms / count for ms in by.values()] for stage, by in sums.items() if any(by.values())}
    return Bars(phase, "layer" if layered else "method", per, count, len(rows), order, known)


def _bar_key(row: Row) -> int | str:
    """A layer's number; a call of no layer goes by its method."""
    return row.method if row.layer is None else row.layer


def _layer_labels(rows: Iterable[Row]) -> dict[int | str, str]:
    """Keys in the order of the bars, and the label of each: embedding, layers, LM head, and the rest as one."""
    keys = {_bar_key(row) for row in rows}
    layers = sorted(key for key in keys if isinstance(key, int))
    labels: dict[int | str, str] = {_FIRST: _FIRST} if _FIRST in keys else {}
    width = -(-len(layers) // MAX_LAYER_BARS)
    for first in range(0, len(layers), width):
        group = layers[first : first + width]
        label = plain(group[0] if len(group) == 1 else f"{group[0]}-{group[-1]}")
        labels |= dict.fromkeys(group, label)
    if _LAST in keys:
        labels[_LAST] = _LAST
    return labels | dict.fromkeys(keys - set(labels), "other")


def _method_labels(rows: Iterable[Row]) -> dict[int | str, str]:
    """Methods by their time, the largest first; those of little time share a bar."""
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        sums[row.method] += row.total_ms
    ordered = sorted(sums, key=lambda method: -sums[method])
    labels: dict[int | str, str] = {method: plain(method) for method in ordered[:MAX_METHOD_BARS]}
    return labels | dict.fromkeys(ordered[MAX_METHOD_BARS:], "other")
