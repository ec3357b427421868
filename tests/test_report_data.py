"""The data of a report's panels, against numbers worked out from the raw rows."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from models import LAYERS
from report_logs import DECODES, made_log, made_row, old_log, raw_rows, real_log

from tsqp.errors import ConfigError
from tsqp.perf_read import read_log
from tsqp.report_calls import MAX_LAYER_BARS
from tsqp.report_data import Report, report_of
from tsqp.report_spread import MAX_POINTS
from tsqp.report_timeline import MAX_DRAWN_CALLS, Span

STAGES = ("serialize", "send", "queue", "compute", "wait", "deserialize")


@pytest.fixture(scope="module", params=["ops", "fused"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logs") / f"{request.param}.jsonl"
    real_log(path, request.param)
    return path


def made(tmp_path: Path, *rows: dict[str, Any], forward: int | None = None) -> Report:
    return report_of([read_log(made_log(tmp_path / "made.jsonl", list(rows)))], forward)


def test_stages_by_layer_of_prefill_and_decode(log: Path) -> None:
    rows, report = raw_rows(log), report_of([read_log(log)])
    first = min(row["forward"] for row in rows if row["forward"] is not None)
    prefill, decode = report.bars
    assert (prefill.phase, prefill.count) == ("prefill", 1)
    assert (decode.phase, decode.count) == ("decode", DECODES)
    for bars, mine in ((prefill, lambda number: number == first), (decode, lambda number: number > first)):
        assert bars.labels == ["Embedding", *map(str, range(LAYERS)), "LMHead"]
        for index, label in enumerate(bars.labels):
            of_bar = [
                row
                for row in rows
                if row["forward"] is not None
                and mine(row["forward"])
                and (row["method"] if row["layer"] is None else str(row["layer"])) == label
            ]
            assert of_bar
            for stage in STAGES:
                expected = math.fsum(row[f"{stage}_ms"] for row in of_bar) / bars.count
                assert bars.stages[stage][index] == pytest.approx(expected, rel=1e-9)
        assert "recv" not in bars.stages


def test_the_timeline_is_the_median_decode_steps(log: Path) -> None:
    rows, line = raw_rows(log), report_of([read_log(log)]).timeline
    forwards: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["forward"] is not None:
            forwards.setdefault(row["forward"], []).append(row)
    times = {
        number: max(row["start_ms"] + row["total_ms"] for row in some) - min(row["start_ms"] for row in some)
        for number, some in forwards.items()
    }
    decodes = {number: ms for number, ms in times.items() if number != min(times)}
    median = next(number for number, ms in decodes.items() if ms == statistics.median_low(decodes.values()))
    assert line is not None
    assert line.title == f"decode forward {median}"
    assert line.calls == len(forwards[median])
    assert line.end_ns == pytest.approx(times[median] * 1e6, abs=10)
    for lane, kind in ((line.runner, "serialize"), (line.runner, "deserialize"), (line.server, "compute")):
        expected = math.fsum(row[f"{kind}_ms"] for row in forwards[median])
        assert sum(span.end - span.begin for span in lane[kind]) == pytest.approx(expected * 1e6, abs=1000)
    spans = [span for lane in (line.runner, line.wire, line.server) for some in lane.values() for span in some]
    assert all(0 <= span.begin < span.end <= line.end_ns + 2 for span in spans)
    names = [name for name, _ in line.sections]
    assert names == ["Embedding", *map(str, range(LAYERS)), "LMHead"]


def test_throughput_and_round_trip_times(log: Path) -> None:
    rows, report = raw_rows(log), report_of([read_log(log)])
    assert report.throughput.moving_only
    (carrier,) = report.throughput.carriers
    assert (carrier.name, carrier.calls) == ("shm", len(rows))
    expected = []
    for row in rows:
        kb = row["sent_kb"] + row["recv_kb"]
        expected.append((kb, kb / 1024 / (row["total_ms"] - row["compute_ms"] - row["queue_ms"]) * 1e3))
    for axis in (0, 1):
        found = sorted(point[axis] for point in carrier.points)
        assert found == pytest.approx(sorted(point[axis] for point in expected))
    for kb, rate in carrier.medians:
        power = math.floor(math.log2(kb))
        near = [point for point in expected if 2**power <= point[0] < 2 ** (power + 1)]
        assert kb == pytest.approx(statistics.median(point[0] for point in near))
        assert rate == pytest.approx(statistics.median(point[1] for point in near))
    edges = report.histogram.edges_ms
    assert sum(times.calls for times in report.histogram.methods) == len(rows)
    for times in report.histogram.methods:
        mine = [row["total_ms"] for row in rows if row["method"] == times.name]
        assert times.calls == len(mine) == sum(times.counts)
        assert times.p50_ms == pytest.approx(statistics.median(mine))
        for index, count in enumerate(times.counts):
            inside = sum(edges[index] * (1 + 1e-9) <= ms < edges[index + 1] * (1 - 1e-9) for ms in mine)
            around = sum(edges[index] * (1 - 1e-9) <= ms <= edges[index + 1] * (1 + 1e-9) for ms in mine)
            assert inside <= count <= around


def test_what_the_old_log_lacks_is_said(tmp_path: Path) -> None:
    log = read_log(old_log(tmp_path / "old.log"))
    report = report_of([log])
    (bars,) = report.bars
    assert (bars.by, bars.per, bars.calls) == ("method", "log", 50)
    assert set(bars.stages) == {"serialize", "send", "recv", "deserialize"}
    assert bars.total_ms == pytest.approx(sum(row.total_ms for row in log.rows), abs=0.2)
    assert report.timeline is None
    assert not report.throughput.moving_only
    text = " ".join(report.notes)
    for word in ("Forward", "Layer", "Compute", "Start", "Carrier"):
        assert f"No {word}" in text


def test_a_chosen_forward(tmp_path: Path) -> None:
    rows = [made_row(number, forward=number) for number in (3, 4, 5)]
    line = made(tmp_path, *rows, forward=4).timeline
    assert line is not None
    assert line.title == "forward 4"  # all have one size: it could be a prefill or a decode step
    with pytest.raises(ConfigError, match=r"--forward 9 is not in the log: it has 3 to 5"):
        made(tmp_path, *rows, forward=9)
    with pytest.raises(ConfigError, match="does not number its forwards"):
        made(tmp_path, made_row(1, forward=None), forward=1)


def test_the_spans_of_a_call(tmp_path: Path) -> None:
    line = made(tmp_path, made_row(0), made_row(1)).timeline
    assert line is not None
    us = 1000
    for lane, kind, first in (
        (line.runner, "serialize", (0, 100)),
        (line.runner, "send", (100, 200)),
        (line.wire, "wait", (200, 350)),
        (line.server, "queue", (350, 450)),
        (line.server, "compute", (450, 750)),
        (line.runner, "deserialize", (900, 1000)),
        (line.runner, "own", (1000, 2000)),
    ):
        assert lane[kind][0] == Span(first[0] * us, first[1] * us)
    assert line.wire["wait"][1] == Span(750 * us, 900 * us)


def test_calls_outside_of_forwards(tmp_path: Path) -> None:
    report = made(tmp_path, made_row(0, forward=None, method="Init", total_ms=900.0), made_row(1))
    assert report.bars[0].calls == 1
    assert any("Not in a forward" in note and "1 call." in note for note in report.notes)
    alone = made(tmp_path, *(made_row(number, forward=None) for number in range(100)))
    assert alone.timeline is not None
    assert alone.timeline.title == "first 60 calls"


def test_a_large_log_is_drawn_in_part_and_counted_in_whole(tmp_path: Path) -> None:
    count = MAX_DRAWN_CALLS + 10
    rows = [made_row(number, layer=number % 250, sent_kb=1.0 + number) for number in range(count)]
    report = made(tmp_path, *rows)
    (bars,) = report.bars
    assert len(bars.labels) <= MAX_LAYER_BARS
    assert bars.total_ms == pytest.approx(count * 1.0)
    assert report.timeline is not None
    assert (report.timeline.calls, report.timeline.left_out) == (MAX_DRAWN_CALLS, 10)
    (carrier,) = report.throughput.carriers
    assert (carrier.calls, len(carrier.points)) == (count, MAX_POINTS)
    assert {min(carrier.points)[0], max(carrier.points)[0]} == {5.0, 4.0 + count}
    assert sum(sum(times.counts) for times in report.histogram.methods) == count


def test_figures_that_cannot_be_true_are_left_out(tmp_path: Path) -> None:
    report = made(tmp_path, made_row(0), made_row(1, total_ms=1e11), made_row(2, start_ms=1e11))
    assert report.bars[0].calls == 1
    assert any("can't be true: 2 calls." in note for note in report.notes)
    with pytest.raises(ConfigError, match="no call whose figures can be true"):
        made(tmp_path, made_row(0, sent_kb=1e11))


def test_carriers_are_told_apart(tmp_path: Path) -> None:
    rows = [made_row(number, carrier="shm" if number % 3 else "shm>zmq") for number in range(9)]
    assert [(one.name, one.calls) for one in made(tmp_path, *rows).throughput.carriers] == [("shm", 6), ("shm>zmq", 3)]
