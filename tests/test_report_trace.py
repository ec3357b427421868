"""``tsqp analyze --trace``: the file's format, and what is in it, against the raw rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome, tsqp_here
from report_logs import made_log, made_row, old_log, raw_rows, real_log
from trace_format import check_trace

from tsqp import report_trace
from tsqp.report_timeline import Span
from tsqp.report_trace import Lanes

#: What rounding of the log and of the trace to ns can make of a time in us.
NEAR_US = 0.01


@pytest.fixture(scope="module", params=["ops", "fused"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logs") / f"{request.param}.jsonl"
    real_log(path, request.param)
    return path


def traced(capsys: pytest.CaptureFixture[str], out: Path, *logs: str) -> tuple[dict[str, Any], Outcome]:
    """The checked trace of ``logs``."""
    done = tsqp_here(capsys, "analyze", *logs, "--trace", str(out))
    assert done.code == 0, done.err
    content = json.loads(out.read_text())
    check_trace(content)
    return content, done


def lane(content: dict[str, Any], name: str, pid: int = 1) -> list[dict[str, Any]]:
    (tid,) = (
        event["tid"]
        for event in content["traceEvents"]
        if event["name"] == "thread_name" and event["pid"] == pid and event["args"]["name"] == name
    )
    return [event for event in content["traceEvents"] if (event["pid"], event["tid"]) == (pid, tid)]


def test_the_lanes_of_a_real_log(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, _ = traced(capsys, tmp_path / "trace.json", str(log))
    rows = {row["id"]: row for row in raw_rows(log)}
    begun = [event for event in lane(content, "wire") if event["ph"] == "b"]
    assert sorted(event["args"]["request"] for event in begun) == sorted(rows)
    ends = {event["id"]: event["ts"] for event in lane(content, "wire") if event["ph"] == "e"}
    flights = {}
    for event in begun:
        row = rows[event["args"]["request"]]
        sent_us = (row["start_ms"] + row["serialize_ms"] + row["send_ms"]) * 1e3
        assert event["name"] == row["method"]
        assert event["ts"] == pytest.approx(sent_us, abs=NEAR_US)
        assert ends[event["id"]] - event["ts"] == pytest.approx(row["recv_ms"] * 1e3, abs=NEAR_US)
        flights[row["id"]] = event["ts"], ends[event["id"]]
    computed = [event for event in lane(content, "server") if event["ph"] == "X"]
    assert len(computed) == len(rows)
    for event in computed:
        row = rows[event["args"]["request"]]
        assert event["dur"] == pytest.approx(row["compute_ms"] * 1e3, abs=NEAR_US)
        sent, received = flights[row["id"]]
        # One call at a time: nothing but the queue makes the way there longer than the way back.
        there, back = event["ts"] - sent - row["queue_ms"] * 1e3, received - event["ts"] - event["dur"]
        assert there == pytest.approx(back, abs=2 * NEAR_US)
    runner = Counter(event["name"].split()[0] for event in lane(content, "runner") if event["ph"] == "X")
    assert runner["forward"] == len({row["forward"] for row in rows.values()} - {None})
    assert runner["deserialize"] == sum(row["deserialize_ms"] > 0 for row in rows.values())
    other = content["otherData"]
    assert "way back" in other["server's computations"]
    assert other["calls"] == len(rows)
    assert other["calls left out"] == 0


def test_calls_in_flight_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three calls sent at once, computed after each other; two threads of the runner write at the same time."""
    rows = [
        made_row(number, start_ms=0.05 * number, recv_ms=2.0, compute_ms=0.6, queue_ms=0.6 * number, total_ms=2.3)
        for number in range(3)
    ]
    content, _ = traced(capsys, tmp_path / "trace.json", made_log(tmp_path / "a.jsonl", rows))
    server = [event for event in lane(content, "server") if event["ph"] == "X"]
    assert [event["args"]["request"] for event in server] == [0, 1, 2]
    assert all(event["dur"] == pytest.approx(600) for event in server)
    assert any(event["ph"] == "X" for event in lane(content, "runner, also (2)"))


def test_one_process_for_each_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [made_log(tmp_path / f"{name}.jsonl", [made_row(0)]) for name in "ab"]
    content, _ = traced(capsys, tmp_path / "trace.json", *logs)
    names = [event["args"]["name"] for event in content["traceEvents"] if event["name"] == "process_name"]
    assert names == ["1: a.jsonl", "2: b.jsonl"]
    for pid in (1, 2):
        assert lane(content, "server", pid)


def test_whatever_a_log_claims_the_file_is_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        made_row(
            number,
            method='"},{<script>',
            layer=-(10**18),
            start_ms=float(number % 5),
            serialize_ms=0.3 * (number % 7),
            compute_ms=[0.0, 1e8, 0.4][number % 3],
            queue_ms=[1e9, 0.0][number % 2],
            deserialize_ms=[1e9, 0.1, 1e11][number % 3],
            forward=number % 4,
            status=-5,
        )
        for number in range(300)
    ]
    content, done = traced(capsys, tmp_path / "trace.json", made_log(tmp_path / "a.jsonl", rows))
    assert content["otherData"]["calls left out"] == 100
    assert "without 100" in done.err


def test_more_calls_than_a_viewer_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_trace, "MAX_CALLS", 7)
    made = made_log(tmp_path / "a.jsonl", [made_row(number) for number in range(10)])
    content, done = traced(capsys, tmp_path / "trace.json", made)
    assert (content["otherData"]["calls"], content["otherData"]["calls left out"]) == (7, 3)
    assert "7 calls, without 3" in done.err


def test_what_cannot_be_traced_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, made = old_log(tmp_path / "old.log"), made_log(tmp_path / "a.jsonl", [made_row(0)])
    for arguments, words in (
        ((old, "--trace", str(tmp_path / "t.json")), "needs the column Start"),
        ((made, "--trace", str(tmp_path / "no" / "t.json")), "can't be written: No such file"),
        ((made, "--trace", "/dev/full"), "can't be written: No space left"),
        ((made, "--trace", made), "is a log that is read"),
        ((made, made, "--compare", "--trace", str(tmp_path / "t.json")), "--compare"),
    ):
        done = tsqp_here(capsys, "analyze", *arguments)
        assert done.code == 1
        assert words in done.err
        assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "t.json").exists()


def test_spans_nest_or_follow_or_get_a_lane() -> None:
    lanes = Lanes(2)
    assert lanes.place(Span(0, 10_000)) == (0, Span(0, 10_000))
    assert lanes.place(Span(1_000, 5_000)) == (0, Span(1_000, 5_000))
    assert lanes.place(Span(4_000, 6_000)) == (0, Span(5_000, 6_000))  # within what the log rounds
    assert lanes.place(Span(5_000, 90_000)) == (1, Span(5_000, 90_000))
    assert lanes.place(Span(5_500, 95_000)) == (1, Span(5_500, 90_000))  # there is no third lane
    assert lanes.place(Span(90_000, 99_000)) == (0, Span(90_000, 99_000))
