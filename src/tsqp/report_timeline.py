"""Calls of a log as spans on one clock: the runner's work, what is under way, and the server's computations.

The runner's spans follow each other in a call: serialize, send, then (once the reply is there) deserialize. Where the
server's lie is worked out by :func:`tsqp.server_times.place_computations`. Times in ns from the log's start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .perf_read import Row
from .report_calls import Forward, plain
from .server_times import Flight, place_computations

#: Calls of a timeline in a picture; more can't be told apart.
MAX_DRAWN_CALLS = 1500
#: Calls shown of a log that does not number forwards.
LOOSE_CALLS = 60
_NS_PER_MS = 1_000_000


class Span(NamedTuple):
    """Something that lasts from ``begin`` to ``end``, in ns."""

    begin: int
    end: int


@dataclass(frozen=True)
class CallSpans:
    """A call's spans: serialize, send, deserialize (runner), flight (wire), compute (server; None: not known)."""

    row: Row
    serialize: Span
    send: Span
    flight: Span
    deserialize: Span
    compute: Span | None

    @property
    def begin(self) -> int:
        """When it began."""
        return self.serialize.begin

    @property
    def end(self) -> int:
        """When its reply had been read."""
        return self.deserialize.end


def call_spans(rows: Iterable[Row]) -> list[CallSpans]:
    """The spans of the calls of one log, in the order in which they began; without calls that have no Start."""
    known = sorted((row for row in rows if row.start_ms is not None), key=lambda row: row.start_ms or 0.0)
    cuts = [_cuts(row) for row in known]
    timed = [number for number, row in enumerate(known) if row.compute_ms is not None]
    timed.sort(key=lambda number: cuts[number][2])
    flights = [
        Flight(cuts[number][2], cuts[number][3], _ns(known[number].compute_ms), _ns(known[number].queue_ms))
        for number in timed
    ]
    computed = dict(zip(timed, place_computations(flights), strict=True))
    spans = []
    for number, (row, (begin, written, sent, received, end)) in enumerate(zip(known, cuts, strict=True)):
        compute = computed.get(number)
        spans.append(
            CallSpans(
                row,
                Span(begin, written),
                Span(written, sent),
                Span(sent, received),
                Span(received, end),
                None if compute is None else Span(round(compute[0]), round(compute[1])),
            )
        )
    return spans


def _ns(ms: float | None) -> int:
    return round((ms or 0.0) * _NS_PER_MS)


def _cuts(row: Row) -> tuple[int, int, int, int, int]:
    """Where the stages of a call meet."""
    begin = _ns(row.start_ms)
    written = begin + _ns(row.serialize_ms)
    sent = written + _ns(row.send_ms)
    received = sent + _ns(row.recv_ms)
    return begin, written, sent, received, received + _ns(row.deserialize_ms)


# --- one forward, drawn -------------------------------------------------------------------------------------


@dataclass
class Timeline:
    """Spans of one forward (or of some calls) by lane and kind, in ns from its begin.

    ``runner``: serialize, send, deserialize, own (the time between calls, in which the runner's own operators run).
    ``wire``: wait, or recv where the log does not say what is in it. ``server``: queue and compute.
    ``sections``: which layer, or method of no layer, the calls belong to, one after the other.
    """

    title: str
    calls: int
    left_out: int
    end_ns: int
    runner: dict[str, list[Span]] = field(default_factory=dict)
    wire: dict[str, list[Span]] = field(default_factory=dict)
    server: dict[str, list[Span]] = field(default_factory=dict)
    sections: list[tuple[str, Span]] = field(default_factory=list)


def timeline_of(phase: str, forward: Forward) -> Timeline | None:
    """A forward's timeline; None where its calls have no Start."""
    many = "" if phase == "all" else f"{phase} "
    return _timeline(f"{many}forward {forward.number}", forward.rows)


def timeline_of_calls(rows: Sequence[Row]) -> Timeline | None:
    """The first calls of a log that does not number forwards; None where it has no Start either."""
    known = [row for row in rows if row.start_ms is not None][:LOOSE_CALLS]
    return _timeline(f"first {len(known)} calls", known)


def _timeline(title: str, rows: Sequence[Row]) -> Timeline | None:
    spans = call_spans(rows)
    if not spans:
        return None
    drawn, origin = spans[:MAX_DRAWN_CALLS], spans[0].begin
    end = max(call.end for call in drawn)
    line = Timeline(title, len(drawn), len(spans) - len(drawn), end - origin)

    def add(lane: dict[str, list[Span]], kind: str, begin: int, end: int) -> None:
        if end > begin:
            lane.setdefault(kind, []).append(Span(begin - origin, end - origin))

    busy_until = origin
    for call in drawn:
        add(line.runner, "own", busy_until, call.begin)
        busy_until = max(busy_until, call.end)
        for kind in ("serialize", "send", "deserialize"):
            add(line.runner, kind, *getattr(call, kind))
        if call.compute is None:
            add(line.wire, "recv", *call.flight)
            continue
        queue = min(_ns(call.row.queue_ms), call.compute.begin - call.flight.begin)
        add(line.wire, "wait", call.flight.begin, call.compute.begin - queue)
        add(line.wire, "wait", call.compute.end, call.flight.end)
        add(line.server, "queue", call.compute.begin - queue, call.compute.begin)
        add(line.server, "compute", *call.compute)
    line.sections = _sections(drawn, origin)
    return line


def _sections(calls: Sequence[CallSpans], origin: int) -> list[tuple[str, Span]]:
    """Runs of calls of one layer, or of one method of no layer."""
    found: list[tuple[str, Span]] = []
    for call in calls:
        name = plain(call.row.method if call.row.layer is None else call.row.layer)
        begin, end = call.begin - origin, call.end - origin
        if found and found[-1][0] == name:
            begin, end = found[-1][1].begin, max(end, found[-1][1].end)
            found.pop()
        found.append((name, Span(begin, end)))
    return found
