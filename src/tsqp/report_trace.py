"""Performance logs as a timeline for Perfetto (ui.perfetto.dev) or chrome://tracing: ``tsqp analyze --trace``.

Each log is a process of three lanes: the runner's forwards with what it does for its calls in them, the calls under
way, and the server's computations, all on the runner's clock: :data:`tsqp.server_times.ASSUMPTION`.

The file is the JSON object format of the Trace Event Format (Google, "Trace Event Format", 2016). Times in it are
microseconds from the start of its log, for each log its own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from heapq import nsmallest
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .perf_read import Log
from .report_calls import believable, plain
from .report_files import write_report
from .report_timeline import CallSpans, Span, call_spans
from .server_times import ASSUMPTION

#: Calls in a file; more than that no viewer opens.
MAX_CALLS = 200_000
_RUNNER, _WIRE, _SERVER = 1, 20, 30
#: Lanes of the runner: its threads that call at the same time.
_RUNNER_LANES = 16
_MAX_PATH_CHARS = 200
#: What begins up to this long before the end of the one before it does so because the log rounds.
ROUNDING_NS = 2000


def save_trace(logs: Sequence[Log], path: str) -> tuple[int, int]:
    """Writes the file, and returns how many calls are in it and how many are left out.

    Raises :class:`ConfigError` where the logs do not say when calls began, or ``path`` can't be written.
    """
    logs, unbelievable = believable(logs)
    calls: list[list[CallSpans]] = []
    room = MAX_CALLS
    for log in logs:
        known = [row for row in log.rows if row.start_ms is not None]
        calls.append(call_spans(nsmallest(room, known, key=lambda row: row.start_ms or 0.0)))
        room -= len(calls[-1])
    count = sum(map(len, calls))
    left_out = sum(len(log.rows) for log in logs) + unbelievable - count
    if not count:
        raise ConfigError(f"--trace needs the column Start, which {logs[0].path} does not have; log with --perf-log")
    other = {
        "made by": "tsqp analyze",
        "clock": "the runner's, from the start of its log",
        "server's computations": ASSUMPTION,
        "one way (us, median)": _one_way_us(calls),
        "calls": count,
        "calls left out": left_out,
    }
    write_report("--trace", path, _content(logs, calls, other))
    return count, left_out


def _one_way_us(calls: Iterable[Iterable[CallSpans]]) -> float | None:
    """The way there or back, half of what a call waits for neither queue nor computation."""
    ways = [call.row.wait_ms * 500 for some in calls for call in some if call.row.wait_ms is not None]
    return round(statistics.median(ways), 3) if ways else None


def _content(logs: Sequence[Log], calls: Sequence[Sequence[CallSpans]], other: dict[str, Any]) -> Iterator[bytes]:
    """The file, an event a line."""
    yield b'{"displayTimeUnit":"ms","otherData":' + json.dumps(other).encode() + b',"traceEvents":['
    comma = b"\n"
    for number, (log, some) in enumerate(zip(logs, calls, strict=True), start=1):
        for event in _events(number, log, some):
            yield comma + json.dumps({**event, "pid": number}, separators=(",", ":")).encode()
            comma = b",\n"
    yield b"\n]}\n"


def _events(number: int, log: Log, calls: Sequence[CallSpans]) -> Iterator[dict[str, Any]]:
    yield _named("process_name", 0, f"{number}: {plain(Path(log.path).name, _MAX_PATH_CHARS)}")
    lanes = 1
    for lane, event in _runner(calls):
        lanes = max(lanes, lane + 1)
        yield event
    names = {_RUNNER + lane: "runner" if lane == 0 else f"runner, also ({lane + 1})" for lane in range(lanes)}
    for tid, name in {**names, _WIRE: "wire", _SERVER: "server"}.items():
        yield _named("thread_name", tid, name)
        yield {"name": "thread_sort_index", "ph": "M", "tid": tid, "args": {"sort_index": tid}}
    for index, call in enumerate(calls):
        yield from _wire(f"{number}.{index}", call)
    for call in calls:
        if call.compute is not None:
            args = {"compute_us": _us_of_ms(call.row.compute_ms), "queue_us": _us_of_ms(call.row.queue_ms)}
            yield _complete(_SERVER, "server", call.row.method, call.compute, {**args, "request": call.row.id})


def _runner(calls: Sequence[CallSpans]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The runner's events with their lanes: forwards, and in them what is done for each call."""
    spans: list[tuple[Span, str, dict[str, Any]]]
    spans = [(span, f"forward {number}", {}) for number, span in _forwards(calls).items()]
    for call in calls:
        args = {"request": call.row.id, "method": call.row.method}
        for kind in ("serialize", "send", "deserialize"):
            span = getattr(call, kind)
            if span.end > span.begin:
                spans.append((span, kind, args))
    spans.sort(key=lambda entry: (entry[0].begin, -entry[0].end))
    lanes = Lanes(_RUNNER_LANES)
    for span, name, args in spans:
        lane, fitting = lanes.place(span)
        yield lane, _complete(_RUNNER + lane, "runner", name, fitting, args)


def _forwards(calls: Iterable[CallSpans]) -> dict[int, Span]:
    found: dict[int, Span] = {}
    for call in calls:
        number = call.row.forward
        if number is not None:
            before = found.get(number, Span(call.begin, call.end))
            found[number] = Span(min(before.begin, call.begin), max(before.end, call.end))
    return found


def _wire(number: str, call: CallSpans) -> Iterator[dict[str, Any]]:
    """A call under way: an asynchronous pair, for calls overlap."""
    row = call.row
    common = {"name": row.method, "cat": "wire", "id": number, "tid": _WIRE}
    args = {
        "request": row.id,
        "sent_kb": row.sent_kb,
        "received_kb": row.recv_kb,
        "carrier": row.carrier,
        "layer": row.layer,
        "placement": row.placement,
        "forward": row.forward,
        "status": row.status,
    }
    known = {name: value for name, value in args.items() if value is not None}
    yield {**common, "ph": "b", "ts": call.flight.begin / 1e3, "args": known}
    yield {**common, "ph": "e", "ts": call.flight.end / 1e3}


def _complete(tid: int, category: str, name: str, span: Span, args: dict[str, Any]) -> dict[str, Any]:
    times = {"ts": span.begin / 1e3, "dur": (span.end - span.begin) / 1e3}
    return {"name": name, "cat": category, "ph": "X", **times, "tid": tid, "args": args}


def _named(kind: str, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "tid": tid, "args": {"name": name}}


def _us_of_ms(ms: float | None) -> float:
    return round((ms or 0.0) * 1e3, 3)


# --- lanes without overlap ----------------------------------------------------------------------------------


class Lanes:
    """Puts spans, in the order of their begins, on lanes where each nests in the ones around it or follows them.

    Viewers need that of the complete events of one thread. What overlaps goes to the next lane: threads of the runner
    that call at the same time. Behind the last lane there is none, and what overlaps there is cut.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: list[list[int]] = [[]]

    def place(self, span: Span) -> tuple[int, Span]:
        """The lane's number, and the span as it fits there."""
        for number, ends in enumerate(self._open):
            while ends and ends[-1] <= span.begin:
                ends.pop()
            fitting = self._fit(ends, span, last=number == self._most - 1)
            if fitting is not None:
                ends.append(fitting.end)
                return number, fitting
        self._open.append([span.end])
        return len(self._open) - 1, span

    @staticmethod
    def _fit(ends: list[int], span: Span, last: bool) -> Span | None:
        if not ends or span.end <= ends[-1]:
            return span
        if ends[-1] - span.begin <= ROUNDING_NS and (len(ends) == 1 or span.end <= ends[-2]):
            return Span(ends.pop(), span.end)
        return Span(span.begin, ends[-1]) if last else None
