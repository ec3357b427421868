"""Checks a file against the Trace Event Format (Google, "Trace Event Format", 2016), JSON object format.

Written from that document, knowing nothing of what tsqp writes: phases and their keys, units, metadata, balanced
asynchronous pairs, and complete events of one thread that nest or follow each other.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

#: Phase -> keys its events must have besides ph, pid and tid.
_NEEDED = {
    "X": ("name", "ts", "dur"),
    "B": ("name", "ts"),
    "E": ("ts",),
    "i": ("name", "ts"),
    "C": ("name", "ts", "args"),
    "b": ("name", "cat", "id", "ts"),
    "n": ("name", "cat", "id", "ts"),
    "e": ("name", "cat", "id", "ts"),
    "s": ("name", "cat", "id", "ts"),
    "t": ("name", "cat", "id", "ts"),
    "f": ("name", "cat", "id", "ts"),
    "M": ("name", "args"),
}
#: Metadata -> the key of its argument and what that is.
_METADATA = {
    "process_name": ("name", str),
    "process_labels": ("labels", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}
#: Times are written in us as decimal fractions of ns.
_ROUNDING_US = 1e-3


def check_trace(content: Any) -> None:
    """Raises AssertionError where ``content``, as ``json.load`` gives it, is no trace."""
    assert isinstance(content, dict)
    assert isinstance(content["traceEvents"], list)
    assert content.get("displayTimeUnit", "ms") in ("ms", "ns")
    json.dumps(content, allow_nan=False)
    for event in content["traceEvents"]:
        _check_event(event)
    _check_pairs(content["traceEvents"])
    _check_nesting(content["traceEvents"])
    _check_names(content["traceEvents"])


def _check_event(event: Any) -> None:
    assert isinstance(event, dict)
    assert event["ph"] in _NEEDED, event
    for key in _NEEDED[event["ph"]]:
        assert key in event, (key, event)
    for key in ("pid", "tid"):
        assert isinstance(event[key], int), event
    for key in ("name", "cat"):
        assert isinstance(event.get(key, ""), str), event
    for key in ("ts", "dur"):
        value = event.get(key, 0)
        assert isinstance(value, (int, float)), event
        assert not isinstance(value, bool), event
        assert math.isfinite(value), event
        assert value >= 0, event
    assert isinstance(event.get("args", {}), dict), event
    assert isinstance(event.get("id", ""), (str, int)), event
    if event["ph"] == "M":
        key, kind = _METADATA[event["name"]]
        assert isinstance(event["args"][key], kind), event


def _check_pairs(events: list[dict[str, Any]]) -> None:
    """Each asynchronous begin has its end, with the same category, id and name, not before it."""
    under_way: dict[tuple[Any, ...], dict[str, Any]] = {}
    for event in sorted((event for event in events if event["ph"] in "be"), key=lambda event: event["ts"]):
        key = (event["pid"], event["cat"], event["id"])
        if event["ph"] == "b":
            assert key not in under_way, event
            under_way[key] = event
        else:
            begin = under_way.pop(key)
            assert begin["name"] == event["name"]
    assert not under_way


def _check_nesting(events: list[dict[str, Any]]) -> None:
    threads: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in threads.values():
        around: list[float] = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while around and around[-1] <= begin + _ROUNDING_US:
                around.pop()
            assert not around or end <= around[-1] + _ROUNDING_US, (begin, end, around)
            around.append(end)


def _check_names(events: list[dict[str, Any]]) -> None:
    """Every thread with events has one name, given once."""
    named = [(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name" and event["ph"] == "M"]
    assert len(named) == len(set(named))
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] != "M"} <= set(named)
