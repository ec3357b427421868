"""``tsqp analyze`` as a user runs it, its figures checked against NumPy on the raw rows, and its rules one by one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import serving, short_directory, tsqp, tsqp_here
from test_cli import assert_only_sentence

from tsqp import from_pretrained
from tsqp.analyze import analyze
from tsqp.analyze_rules import recommend
from tsqp.errors import ConfigError
from tsqp.perf_read import Log, Row, read_log

pytestmark = pytest.mark.watchdog(180)

OLD = """\
ZMQ Performance Log
Transport: IPC
================================================================================
ID | Method | Serialize(ms) | Send(ms) | Recv(ms) | Deserialize(ms) | Total(ms) | Sent(KB) | Recv(KB) | Throughput(MB/s)
--------------------------------------------------------------------------------
1    | Init        | 0.10          | 0.05     | 3.000    | 0.350           | 3.50      | 0.10     | 120.00   | 33.50
2    | Embedding   | 1.00          | 0.50     | 2.000    | 0.500           | 4.00      | 8.00     | 32.00    | 9.77
3    | BatchLinear | 2.00          | 0.50     | 3.000    | 0.500           | 6.00      | 16.00    | 48.00    | 10.42
4    | BatchLinear | 4.00          | 0.50     | 3.000    | 0.500           | 8.00      | 16.00    | 48.00    | 7.81
5    | LMHead      | 0.50          | 0.50     | 3.000    | 0.500           | 4.50      | 8.00     | 256.00   | 57.29
================================================================================
SUMMARY
Total RPC calls: 5
Average: 5.2 ms
"""


@pytest.fixture(scope="module")
def logs() -> Iterator[dict[str, Path]]:
    """Logs of the embedded model and a real server: a table of ``tsqp generate``, CSV and JSON Lines of the library."""
    with short_directory() as directory, serving(directory) as served:
        made = {name: directory / name for name in ("table.log", "rows.csv", "rows.jsonl")}
        options = ("--max-new-tokens", "4", "--perf-log", str(made["table.log"]))
        done = tsqp("generate", "--prompt", "And the king", "--endpoint", served.endpoint, *options)
        assert done.code == 0, done.err
        for name, placement in (("rows.csv", "linear"), ("rows.jsonl", "fused")):
            model = from_pretrained(endpoint=served.endpoint, placement=placement, perf_log=made[name])
            model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
            model.close()
        yield made


def raw_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, read with nothing of tsqp."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    if path.suffix == ".jsonl":
        return [entry for entry in map(json.loads, lines) if "id" in entry]
    if path.suffix == ".csv":
        found = [dict(row) for row in csv.DictReader(lines)]
    else:
        titles = lines[0].split()
        found = [dict(zip(titles, line.split(), strict=True)) for line in lines[2:]]
    names = {"ID": "id", "Method": "method", "Layer": "layer", "Forward": "forward", "Total(ms)": "total_ms"}
    names |= {"Serialize(ms)": "serialize_ms", "Wait(ms)": "wait_ms", "Sent(KB)": "sent_kb", "Recv(KB)": "recv_kb"}
    rows: list[dict[str, Any]] = []
    for row in found:
        kept: dict[str, Any] = {new: row[old] for old, new in names.items()}
        kept |= {name: float(kept[name]) for name in kept if name.endswith(("_ms", "_kb"))}
        kept |= {name: None if kept[name] in ("-", "") else int(kept[name]) for name in ("layer", "forward")}
        rows.append({**kept, "id": int(kept["id"])})
    return rows


def check_stats(found: dict[str, float], times: list[float], whole: float) -> None:
    assert found["count"] == len(times)
    assert found["mean_ms"] == pytest.approx(np.mean(times))
    assert found["p50_ms"] == pytest.approx(np.percentile(times, 50))
    assert found["p99_ms"] == pytest.approx(np.percentile(times, 99))
    assert found["total_ms"] == pytest.approx(np.sum(times))
    assert found["share"] == pytest.approx(np.sum(times) / whole)


@pytest.mark.parametrize("name", ["table.log", "rows.csv", "rows.jsonl"])
def test_figures_are_those_of_the_raw_rows(
    logs: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = raw_rows(logs[name])
    done = tsqp_here(capsys, "analyze", str(logs[name]), "--json", "--top", "3")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    totals = [row["total_ms"] for row in rows]
    overall = found["overall"]
    assert overall["round trips"] == len(rows) > 40
    assert overall["sent (KB)"] == pytest.approx(sum(row["sent_kb"] for row in rows))
    kb = sum(row["sent_kb"] + row["recv_kb"] for row in rows)
    assert overall["throughput (MB/s)"] == pytest.approx(kb / 1024 / (sum(totals) / 1000))
    assert overall["carried by shm (KB)"] == pytest.approx(kb)
    for key, group in (("methods", "method"), ("layers", "layer")):
        values = {row[group] for row in rows}
        assert set(found[key]) == {"-" if value is None else str(value) for value in values}
        for value in values:
            times = [row["total_ms"] for row in rows if row[group] == value]
            check_stats(found[key]["-" if value is None else str(value)], times, sum(totals))
    check_stats(found["stages"]["serialize"], [row["serialize_ms"] for row in rows], sum(totals))
    check_stats(found["recv_parts"]["wait"], [row["wait_ms"] for row in rows], sum(totals))
    assert [row["total_ms"] for row in found["slowest"]] == sorted(totals, reverse=True)[:3]
    sizes = sorted((row["sent_kb"] + row["recv_kb"] for row in rows), reverse=True)
    assert [row["sent_kb"] + row["recv_kb"] for row in found["largest"]] == pytest.approx(sizes[:3])
    forwards = [row["forward"] for row in rows if row["forward"] is not None]
    assert overall["tokens (forwards)"] == 4
    per_forward = [forwards.count(number) for number in range(1, 5)]
    assert overall["round trips per token"] == np.median(per_forward)
    assert found["logs"][0]["bad_lines"] == 0
    assert found["logs"][0]["complete"]


def test_tables_for_a_reader(logs: dict[str, Path]) -> None:
    done = tsqp("analyze", str(logs["table.log"]), str(logs["rows.csv"]))
    assert done.code == 0, done.err
    for title in ("overall", "time by stage", "what Recv is made of", "calls by method", "calls by layer"):
        assert title in done.out
    for title in ("slowest calls", "largest transfers", "recommendations", "AttentionScores", "SHM (shm+ipc)"):
        assert title in done.out
    rows = raw_rows(logs["table.log"]) + raw_rows(logs["rows.csv"])
    (line,) = [line for line in done.out.splitlines() if line.split()[:1] == ["LMHead"]]
    times = [row["total_ms"] for row in rows if row["method"] == "LMHead"]
    assert line.split()[1:3] == [str(len(times)), f"{np.mean(times):.3f}"]
    assert "round trips per token " in done.out


def test_compared(logs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    both = (str(logs["table.log"]), str(logs["rows.jsonl"]))
    one, other = ([row["total_ms"] for row in raw_rows(Path(path))] for path in both)
    printed = json.loads(tsqp_here(capsys, "analyze", "--compare", *both, "--json").out)
    changes = {change["name"]: change for change in printed["changes"]}
    assert changes["round trips"]["before"] == len(one)
    assert changes["round trips"]["ratio"] == pytest.approx(len(other) / len(one))
    assert changes["p99 per call"]["ratio"] == pytest.approx(np.percentile(other, 99) / np.percentile(one, 99))
    assert changes["method AttentionScores, mean"]["after"] is None
    assert changes["method FusedMLP, mean"]["before"] is None
    text = tsqp_here(capsys, "analyze", "--compare", *both).out
    assert f"{len(other) / len(one):.3f}" in text
    rows = list(csv.DictReader(io.StringIO(tsqp_here(capsys, "analyze", "--compare", *both, "--csv").out)))
    assert {row["name"] for row in rows} == set(changes)
    for arguments in (both[:1], (*both, both[0])):
        assert_only_sentence(tsqp_here(capsys, "analyze", "--compare", *arguments), "--compare takes two logs")


def test_csv(logs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    printed = list(csv.DictReader(io.StringIO(tsqp_here(capsys, "analyze", str(logs["rows.csv"]), "--csv").out)))
    times = [row["total_ms"] for row in raw_rows(logs["rows.csv"]) if row["method"] == "BatchLinear"]
    (found,) = [row for row in printed if (row["section"], row["name"]) == ("method", "BatchLinear")]
    assert float(found["p99_ms"]) == pytest.approx(np.percentile(times, 99))
    assert {"overall", "stage", "part of Recv", "method", "layer", "slowest", "largest"} <= {
        row["section"] for row in printed
    }
    assert_only_sentence(tsqp_here(capsys, "analyze", str(logs["rows.csv"]), "--csv", "--json"), "give one of them")


# --- files as they are -------------------------------------------------------------------------------------------


def test_the_old_systems_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "zmq_performance.log"
    path.write_text(OLD)
    found = json.loads(tsqp_here(capsys, "analyze", str(path), "--json").out)
    assert found["overall"]["round trips"] == 5
    assert found["overall"]["time in calls (ms)"] == 26.0
    check_stats(found["methods"]["BatchLinear"], [6.0, 8.0], 26.0)
    assert found["layers"] == found["recv_parts"] == {}
    assert found["logs"][0]["header"] == {"Transport": "IPC"}
    assert found["logs"][0]["bad_lines"] == 0
    assert found["logs"][0]["complete"]
    assert found["overall"]["round trips per token, estimated"] == 4
    rules = {one["rule"]: one for one in found["recommendations"]}
    assert set(rules) == {"copying", "zeromq", "opaque"}
    assert rules["opaque"]["figure"] == pytest.approx(14 / 26)
    assert rules["copying"]["figure"] == pytest.approx((7.6 + 2.35) / 26)
    text = tsqp_here(capsys, "analyze", str(path)).out
    assert "53.8% of the time" in text
    plain = [line.replace("|", " ") for line in OLD.splitlines() if line[:1].isdigit()]
    path.write_text("\n".join(plain))  # no titles, no rules, no summary
    assert read_log(path).rows == analyze([read_log(path)]).rows
    assert len(read_log(path).rows) == 5


@pytest.mark.parametrize("name", ["table.log", "rows.csv", "rows.jsonl"])
def test_a_damaged_log_gives_its_good_rows(
    logs: dict[str, Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = logs[name].read_bytes()
    good = read_log(logs[name])
    lines = whole.splitlines(keepends=True)
    first = next(
        number for number, line in enumerate(lines) if good.rows[0].method.encode() in line and b"#" not in line
    )
    lines[first + 3] = b"\x00\xff\x1b[31m garbage\n"
    lines[first + 5] = lines[first + 5][:20] + b"\n"
    lines[first + 7] = lines[first + 7].replace(b"0.", b"nan", 1)
    lines.insert(first + 9, b"x" * 200_000 + b"\n")
    path = tmp_path / name
    path.write_bytes(b"".join(lines))
    found = json.loads(tsqp_here(capsys, "analyze", str(path), "--json").out)
    assert found["logs"][0]["bad_lines"] == 4
    assert found["overall"]["round trips"] == len(good.rows) - 3
    read = read_log(path)
    assert read.bad_lines == [first + 4, first + 6, first + 8, first + 10]
    assert set(read.rows) <= set(good.rows)
    assert "4 left out, the first is line" in tsqp_here(capsys, "analyze", str(path)).out
    path.write_bytes(whole[: len(whole) // 2])  # as a killed process leaves it
    cut = read_log(path)
    assert cut.rows == good.rows[: len(cut.rows)]
    assert cut.bad <= 1
    assert not cut.complete
    assert "no summary" in tsqp_here(capsys, "analyze", str(path)).out


def test_a_figure_beyond_belief_is_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "zmq_performance.log"
    path.write_text(OLD.replace("| 8.00 ", "| 1e308 ", 1))
    assert [row.id for row in read_log(path).rows] != [1, 2, 3, 4, 5]
    found = json.loads(tsqp_here(capsys, "analyze", str(path), "--json").out)
    assert found["logs"][0]["bad_lines"] == 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"root:x:0:0:root:/root:/bin/bash\nbin:x:1:1:bin:/bin:/sbin\n", "is no performance log"),
        (b"\x7fELF\x02\x01" + bytes(range(256)) * 1000, "is no performance log"),
        (b'{"some": "json"}\n{"other": 1}\n', "is no performance log"),
        (b"a,b,c\n1,2,3\n", "is no performance log"),
        (b"[" * 100_000, "is no performance log"),
        (b'{"id": ' * 5000 + b"\n", "is no performance log"),
        (OLD[: OLD.index("1    |")].encode(), "without a round trip"),
        (b"# tsqp performance log\n# format: 1\n", "without a round trip"),
    ],
)
def test_what_is_no_log_is_said(content: bytes, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(content)
    assert_only_sentence(tsqp_here(capsys, "analyze", str(path)), why, str(path))


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_only_sentence(tsqp_here(capsys, "analyze", str(tmp_path / "none.log")), "No such file")
    assert_only_sentence(tsqp_here(capsys, "analyze", str(tmp_path)), "Is a directory")
    missing = tsqp_here(capsys, "analyze")
    assert missing.code == 2
    with pytest.raises(ConfigError):
        read_log(tmp_path)


def test_nothing_in_a_log_reaches_the_terminal_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.log"
    path.write_text(OLD.replace("Transport: IPC", "Transport: [bold]x[/bold]").replace("LMHead", "[red]LM[/red]"))
    text = tsqp_here(capsys, "analyze", str(path)).out
    assert "[red]LM[/red]" in text
    assert "[bold]x[/bold]" in text
    path.write_text(OLD.replace("LMHead", "LM\x1b]0;t\x07"))
    assert read_log(path).bad == 1


# --- rules ------------------------------------------------------------------------------------------------------


def log_of(*calls: dict[str, Any]) -> Log:
    """A log of calls of which only some figures matter."""
    rows = []
    for number, call in enumerate(calls):
        stages = {f"{name}_ms": call.pop(name, 0.0) for name in ("serialize", "send", "recv", "deserialize")}
        usual = {"sent_kb": 1.0, "recv_kb": 1.0, "throughput_mb_s": 1.0, "method": "BatchLinear", "carrier": "shm"}
        parts = {"compute_ms": 0.0, "queue_ms": 0.0, "wait_ms": 0.0}
        rows.append(Row(id=number + 1, total_ms=sum(stages.values()), **{**usual, **parts, **stages, **call}))
    return Log("made.log", rows=rows, titled=True, header={"transport": "SHM (shm+ipc)"})


def rules(*calls: dict[str, Any]) -> dict[str, float]:
    return {one.rule: one.figure for one in recommend(analyze([log_of(*calls)]))}


def test_each_rule_fires_on_its_figure_only() -> None:
    idle = {"recv": 6.0, "compute_ms": 3.0, "wait_ms": 2.0, "queue_ms": 1.0, "serialize": 2.0, "send": 1.0}
    assert rules(dict(idle)) == {}
    assert rules({**idle, "serialize": 6.0}) == {"copying": pytest.approx(6 / 13)}
    assert rules({**idle, "deserialize": 2.5}) == {"copying": pytest.approx(4.5 / 11.5)}
    assert rules({**idle, "send": 3.0}) == {"send": pytest.approx(3 / 11)}
    assert rules({**idle, "recv": 10.0, "wait_ms": 6.0}) == {"waiting": pytest.approx(6 / 13)}
    assert rules({**idle, "recv": 11.0, "compute_ms": 8.0}) == {"compute": pytest.approx(8 / 14)}
    assert rules({**idle, "recv": 9.0, "queue_ms": 4.0}) == {"queue": pytest.approx(4 / 12)}
    assert rules(dict(idle), {**idle, "status": 4}) == {"errors": 1}


def test_round_trips_per_token() -> None:
    idle = {"recv": 6.0, "compute_ms": 3.0, "wait_ms": 2.0, "serialize": 2.0, "send": 1.0, "placement": "ops"}
    step = [{**idle, "forward": number} for number in (1, 2, 3) for _ in range(41)]
    assert rules(*map(dict, step)) == {"round trips": 41}
    assert rules(*[dict(call) for call in step if call["forward"] == 1][:40]) == {}
    for placement, advice in (("ops", "--placement fused"), ("fused", "--placement layer")):
        (one,) = recommend(analyze([log_of(*[{**call, "placement": placement} for call in step])]))
        assert advice in one.advice
    assert rules(*[{**call, "placement": "layer"} for call in step]) == {}


@pytest.mark.parametrize(
    ("placement", "advice"), [("ops", "--placement fused"), ("fused", "--placement layer"), ("layer", None)]
)
def test_no_placement_is_advised_that_the_log_has_already(placement: str, advice: str | None) -> None:
    call = {"recv": 6.0, "wait_ms": 6.0, "serialize": 6.0, "placement": placement}
    found = recommend(analyze([log_of(call)]))
    assert [one.rule for one in found] == ["copying", "waiting"]
    for one in found:
        named = {word.strip("(),") for word in one.advice.split("--placement ")[1:] for word in word.split()[:1]}
        assert named == ({advice.partition(" ")[2]} if advice else set())


def test_zeromq() -> None:
    idle = {"recv": 6.0, "compute_ms": 3.0, "wait_ms": 2.0, "serialize": 2.0, "send": 1.0}
    assert rules({**idle, "carrier": "zmq>shm", "sent_kb": 10.0, "recv_kb": 10.0}) == {}
    (one,) = recommend(analyze([log_of({**idle, "carrier": "zmq>shm", "sent_kb": 12000.0, "recv_kb": 10.0})]))
    assert one.figure == pytest.approx(12000 / 12010)
    assert "--max-chunk-bytes 16777216" in one.advice
    assert 'large="tile"' in one.advice


def test_a_long_tail() -> None:
    idle = {"recv": 6.0, "compute_ms": 3.0, "wait_ms": 2.0, "serialize": 2.0, "send": 1.0}
    slow = {name: value * 30 for name, value in idle.items()}
    assert rules(*[dict(idle) for _ in range(196)], *[dict(slow) for _ in range(4)]) == {"tail": pytest.approx(30.0)}
    assert rules(*[dict(idle) for _ in range(150)], *[dict(slow) for _ in range(4)]) == {}
