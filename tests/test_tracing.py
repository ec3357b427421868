"""The timeline: what is recorded, and the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import logits, make_model, serving, token_ids
from trace_format import check_trace

from tsqp.protocol import Method
from tsqp.split import from_pretrained
from tsqp.tracing import LANES, RUNNER, SERVER, WIRE, Recorder


def spans(events: list[dict[str, Any]], lane: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == "X" and event["tid"] == LANES[lane]]


def check_lanes(content: dict[str, Any]) -> None:
    check_trace(content)
    named = {event["tid"]: event["args"]["name"] for event in content["traceEvents"] if event["ph"] == "M"}
    assert named == {number: lane for lane, number in LANES.items()}


@pytest.mark.parametrize("placement", ["linear", "ops"])
def test_a_forwards_trace(placement: str, tmp_path: Path) -> None:
    recorder = Recorder()
    with serving(make_model("llama")) as server:
        split = from_pretrained(endpoint=server.endpoint, placement=placement, tile_bytes=4096)
        client = split.tsqp_client
        before = client.round_trips
        logits(split, input_ids=token_ids(1, 50))
        assert len(recorder) == 0
        client.trace(recorder)
        begin = client.round_trips
        logits(split, input_ids=token_ids(1, 50))
        calls = client.round_trips - begin
        client.trace(None)
        kept = len(recorder)
        logits(split, input_ids=token_ids(1, 50))
        assert len(recorder) == kept
        assert client.round_trips - before == 3 * calls
        split.close()
    recorder.save(tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())
    check_lanes(content)
    events = content["traceEvents"]
    assert len(spans(events, SERVER)) == calls
    assert sum(event["ph"] == "b" and event["tid"] == LANES[WIRE] for event in events) == calls
    names = [event["name"] for event in spans(events, RUNNER)]
    assert names.count("forward") == 1
    assert {"tee_rmsnorm", "tee_silu", "remote"} <= set(names)
    assert ("tee_softmax" in names) == (placement == "ops")
    forward = next(event for event in spans(events, RUNNER) if event["name"] == "forward")
    for event in spans(events, RUNNER):
        assert forward["ts"] <= event["ts"] + 1e-3
        assert event["ts"] + event["dur"] <= forward["ts"] + forward["dur"] + 1e-3


def test_computations_do_not_overlap_and_stay_in_their_calls() -> None:
    recorder = Recorder()
    scores = int(Method.ATTENTION_SCORES)
    recorder.call(scores, 1000, 6000, 2000, 500)  # 1250 there, 500 in the queue, 1250 back
    recorder.call(scores, 1500, 7000, 2000, 0)  # waits for the first
    recorder.call(scores, 9000, 9500, 500, 400)  # claims more than there was
    server = spans(recorder.events(), SERVER)
    assert [(event["ts"], event["dur"]) for event in server] == [(1.75, 2.0), (3.75, 2.0), (8.0, 0.5)]
    assert {event["name"] for event in server} == {"AttentionScores"}


def test_what_is_too_much_is_counted() -> None:
    recorder = Recorder(limit=3)
    for number in range(5):
        recorder.span("a", number, number + 1)
    recorder.call(1, 0, 1, 0, 0)
    assert (len(recorder), recorder.dropped) == (3, 3)


def test_nothing_recorded_is_a_valid_file(tmp_path: Path) -> None:
    Recorder().save(tmp_path / "empty.json")
    check_lanes(json.loads((tmp_path / "empty.json").read_text()))
