"""A timeline of what runner, wire and server do at the same time, for Perfetto (ui.perfetto.dev) or chrome://tracing.

    recorder = tsqp.tracing.Recorder()
    client.trace(recorder)
    model(**inputs)
    client.trace(None)
    recorder.save("trace.json")

All times are the runner's own clock. What the server does is known from the durations in its replies, which it may
choose as it likes: :func:`tsqp.server_times.place_computations` says where a computation is drawn, which is never
outside its call. The file says so too. ``tsqp analyze --trace`` makes such a file from a performance log.

The file is the JSON object format of the Trace Event Format (Google, "Trace Event Format", 2016).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .protocol import METHOD_NAMES
from .server_times import ASSUMPTION, Flight, place_computations

#: The lanes, from top to bottom, and their thread ids in the file.
RUNNER, WIRE, SERVER = "runner", "wire", "server"
LANES = {RUNNER: 1, WIRE: 2, SERVER: 3}
#: Spans kept; what comes later is only counted.
MAX_SPANS = 1_000_000

_PID = 1
_NAMES = {int(method): name for method, name in METHOD_NAMES.items()}


class Recorder:
    """Collects spans; attached by ``client.trace(recorder)``. Threads may share it."""

    __slots__ = ("_calls", "_limit", "_spans", "dropped")

    def __init__(self, limit: int = MAX_SPANS) -> None:
        self._limit = limit
        self._spans: list[tuple[str, int, int]] = []
        self._calls: list[tuple[int, int, int, int, int]] = []
        #: Spans that were not kept because there were too many.
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._spans) + len(self._calls)

    def span(self, name: str, begin_ns: int, end_ns: int) -> None:
        """Something the runner did, on ``perf_counter_ns``."""
        if len(self) < self._limit:
            self._spans.append((name, begin_ns, end_ns))
        else:
            self.dropped += 1

    def call(self, method: int, begin_ns: int, end_ns: int, compute_ns: int, queue_ns: int) -> None:
        """A remote call from its sending until its reply was read, and what the server said of its time in it."""
        if len(self) < self._limit:
            self._calls.append((method, begin_ns, end_ns, compute_ns, queue_ns))
        else:
            self.dropped += 1

    def events(self) -> list[dict[str, Any]]:
        """The events of the file, times in microseconds since the first."""
        calls = sorted(self._calls, key=lambda call: call[1])
        begins = [begin for _, begin, _ in self._spans] + [call[1] for call in calls]
        origin = min(begins, default=0)
        events = [_lane_name(lane, number) for lane, number in LANES.items()]
        events += [_complete(RUNNER, name, begin - origin, end - origin) for name, begin, end in self._spans]
        placed = place_computations([Flight(begin, end, compute, queue) for _, begin, end, compute, queue in calls])
        for number, ((method, begin, end, _, queue), (start, stop)) in enumerate(zip(calls, placed, strict=True)):
            name = _NAMES.get(method, str(method))
            events += _flight(name, number, begin - origin, end - origin)
            events.append(_complete(SERVER, name, start - origin, stop - origin, {"queue_us": queue / 1e3}))
        return events

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file."""
        content = {
            "traceEvents": self.events(),
            "displayTimeUnit": "ms",
            "otherData": {"made by": "tsqp", "dropped": self.dropped, "server's computations": ASSUMPTION},
        }
        Path(path).write_text(json.dumps(content))


def _lane_name(lane: str, number: int) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": _PID, "tid": number, "args": {"name": lane}}


def _complete(
    lane: str, name: str, begin_ns: float, end_ns: float, args: dict[str, Any] | None = None
) -> dict[str, Any]:
    event = {
        "name": name,
        "cat": lane,
        "ph": "X",
        "ts": begin_ns / 1e3,
        "dur": (end_ns - begin_ns) / 1e3,
        "pid": _PID,
        "tid": LANES[lane],
    }
    return event if args is None else {**event, "args": args}


def _flight(name: str, number: int, begin_ns: int, end_ns: int) -> list[dict[str, Any]]:
    """A call under way: an asynchronous pair, for calls overlap."""
    common = {"name": name, "cat": WIRE, "id": number, "pid": _PID, "tid": LANES[WIRE]}
    return [{**common, "ph": "b", "ts": begin_ns / 1e3}, {**common, "ph": "e", "ts": end_ns / 1e3}]
