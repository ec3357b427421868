"""The performance log: a row per round trip that adds up, whatever carried it, however the process ends."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import environment, serving, short_directory, tsqp, tsqp_here, wait_for
from models import LAYERS, logits, make_model, token_ids
from models import serving as serving_model
from rpc_support import HIDDEN, LyingServer, client_of, endpoint_in, run_all, tiny_model
from rpc_support import serving as serving_tiny

from tsqp import GPUClient, GPUServer, from_pretrained, perf_log
from tsqp._perf import COLUMN_COUNT
from tsqp.errors import ConfigError, RemoteError
from tsqp.perf_log import PerfLog
from tsqp.perf_read import Log, Row, read_log
from tsqp.protocol import PROTECTION_LINE

ENDINGS = ("log", "csv", "jsonl")
#: A table rounds ms to four decimals.
ROUNDED_MS = 0.5e-4 * 4 + 1e-9


@pytest.fixture(scope="module")
def server() -> Iterator[GPUServer]:
    with short_directory() as directory, serving_tiny(tiny_model(), directory) as served:
        with client_of(served) as client:
            client.ping()  # now every thread of the server is up
        yield served


def check_sums(log: Log, within_ms: float = ROUNDED_MS) -> None:
    for row in log.rows:
        stages = row.serialize_ms + row.send_ms + row.recv_ms + row.deserialize_ms
        assert row.total_ms == pytest.approx(stages, abs=within_ms)
        assert row.compute_ms is not None
        assert row.queue_ms is not None
        assert row.wait_ms is not None
        assert row.recv_ms == pytest.approx(row.compute_ms + row.queue_ms + row.wait_ms, abs=within_ms)
        if row.total_ms > 0.01:
            rate = row.kb / 1024 / (row.total_ms / 1e3)
            assert row.throughput_mb_s == pytest.approx(rate, rel=0.02, abs=1e-3)


def check_against(log: Log, stats: dict[str, Any]) -> None:
    """The rows are the client's round trips, as it counted them itself."""
    assert len(log.rows) == stats["round_trips"]
    counts: dict[str, int] = {}
    for row in log.rows:
        counts[row.method] = counts.get(row.method, 0) + 1
    assert counts == stats["calls"]
    assert sum(row.sent_kb for row in log.rows) * 1024 == stats["sent_bytes"]
    assert sum(row.recv_kb for row in log.rows) * 1024 == stats["received_bytes"]
    assert float(log.summary["round trips"]) == len(log.rows)
    assert float(log.summary["Total (ms)"]) == pytest.approx(sum(row.total_ms for row in log.rows), rel=0.01)
    assert float(log.summary["rows lost"]) == 0
    assert log.complete
    assert log.bad == 0


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_split_models_calls(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"zmq_performance.{ending}"
    with serving_model(make_model("llama")) as server:
        model = from_pretrained(endpoint=server.endpoint, placement="ops", perf_log=path)
        for _ in range(3):
            logits(model, input_ids=token_ids(1, 5))
        begin = time.perf_counter()
        logits(model, input_ids=token_ids(1, 5))
        last_s = time.perf_counter() - begin
        client = model.tsqp_client
        stats = client.stats
        model.close()
    log = read_log(path)
    check_against(log, stats)
    check_sums(log, 3e-6 if ending != "log" else ROUNDED_MS)
    assert [row.id for row in log.rows] == sorted(row.id for row in log.rows)
    inside = [row for row in log.rows if row.forward is not None]
    assert {row.forward for row in inside} == {1, 2, 3, 4}
    assert {row.placement for row in inside} == {"ops"}
    assert {row.placement for row in log.rows if row.forward is None} <= {None}
    for forward in range(1, 5):
        methods = [row.method for row in inside if row.forward == forward]
        assert methods.count("LMHead") == methods.count("Embedding") == 1
        assert methods.count("AttentionScores") == LAYERS
    for row in inside:
        assert row.layer in ((None,) if row.method in ("LMHead", "Embedding") else range(LAYERS))
        assert row.carrier == "shm"
        assert row.status == 0
    # The calls of a forward lie inside of it.
    assert sum(row.total_ms for row in inside if row.forward == 4) < last_s * 1e3
    assert log.header["transport"].startswith("SHM")
    assert "tsqp" in log.header["versions"]
    assert "2 layers" in log.header["model"]
    assert log.header["placement"] == "ops"
    assert "1024" in log.header["units"]


def test_the_ten_known_columns_come_first(server: GPUServer, tmp_path: Path) -> None:
    with client_of(server, perf_log=tmp_path / "a.log") as client:
        client.ping()
    lines = [line for line in (tmp_path / "a.log").read_text().splitlines() if not line.startswith("#")]
    known = "ID Method Serialize(ms) Send(ms) Recv(ms) Deserialize(ms) Total(ms) Sent(KB) Recv(KB) Throughput(MB/s)"
    assert lines[0].split()[:10] == known.split()
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[2].split()[:2] == ["1", "Ping"]
    assert len(lines[2].split()) == len(lines[0].split()) == COLUMN_COUNT == len(perf_log.COLUMNS)
    assert [column.key for column in perf_log.COLUMNS] == list(Row._fields)


@pytest.mark.parametrize("large", ["zmq", "tile"])
def test_large_messages(server: GPUServer, large: str, tmp_path: Path) -> None:
    side = 400  # 640 kB each way, over the slot of 256 KiB
    a = torch.randn(side, side)
    with client_of(server, large=large, perf_log=tmp_path / "a.jsonl") as client:
        for _ in range(3):
            assert torch.allclose(client.matmul(a, a), a @ a, rtol=1e-3, atol=1e-3)
        stats = client.stats
    log = read_log(tmp_path / "a.jsonl")
    check_against(log, stats)
    check_sums(log, 3e-6)
    rows = [row for row in log.rows if row.method == "Matmul"]
    assert {row.carriers[0] for row in rows if row.carriers} == {large}
    assert all(row.serialize_ms > 0 and row.deserialize_ms > 0 and row.send_ms >= 0 for row in rows)
    assert sum(row.sent_kb for row in rows) >= 3 * 2 * side * side * 4 / 1024


@pytest.mark.parametrize("shm", [True, False])
def test_many_in_flight_and_threads(server: GPUServer, shm: bool, tmp_path: Path) -> None:
    h = torch.randn(1, 3, HIDDEN)
    with client_of(server, shm=shm, perf_log=tmp_path / "a.csv") as client:
        calls = [client.submit.batch_linear(0, ["q_proj"], h) for _ in range(150)]
        for call in calls:
            call.result()
        run_all(*[lambda: [client.batch_linear(1, ["k_proj"], h) for _ in range(40)] for _ in range(3)])
        with pytest.raises(RemoteError):
            client.attention_values(0, torch.randn(1, 4, 1, 7))
        stats = client.stats
    log = read_log(tmp_path / "a.csv")
    check_against(log, stats)
    check_sums(log, 3e-6)
    assert sorted(row.id for row in log.rows) == list(range(1, len(log.rows) + 1))
    assert {row.carrier for row in log.rows} == {"shm" if shm else "zmq"}
    assert log.header["transport"].startswith("SHM" if shm else "IPC")
    assert [row.layer for row in log.rows if row.method == "BatchLinear"].count(1) == 120
    refused = [row for row in log.rows if row.status]
    assert [row.method for row in refused] == ["AttentionValues"]
    assert float(log.summary["errors"]) == 1


def test_tiled_attention_whose_tensors_lie_in_slots(tmp_path: Path) -> None:
    with serving_model(make_model("llama")) as server:
        model = from_pretrained(
            endpoint=server.endpoint, placement="ops", tile_bytes=4096, mlp_tile_bytes=4096, perf_log=tmp_path / "a.csv"
        )
        for _ in range(3):
            logits(model, input_ids=token_ids(1, 120))
        stats = model.tsqp_client.stats
        model.close()
    log = read_log(tmp_path / "a.csv")
    check_against(log, stats)
    check_sums(log, 3e-6)
    assert [row.method for row in log.rows].count("AttentionScores") > 3 * LAYERS


def test_what_the_server_claims_is_cut_to_what_was_waited(tmp_path: Path) -> None:
    with short_directory() as directory:
        huge = {"compute_ns": (1 << 64) - 1, "queue_ns": 1 << 63}
        with (
            LyingServer(endpoint_in(directory), lambda msg: huge) as server,
            GPUClient(server.endpoint, perf_log=tmp_path / "a.jsonl") as client,
        ):
            client.ping()
    log = read_log(tmp_path / "a.jsonl")
    check_sums(log, 3e-6)
    (row,) = log.rows
    assert row.compute_ms == row.recv_ms
    assert row.queue_ms == row.wait_ms == 0


def test_no_value_is_in_the_log(tmp_path: Path) -> None:
    """Neither prompt nor numbers: only what columns and header are made of."""
    secret = 13579.02468
    with (
        serving_model(make_model("llama")) as server,
        GPUClient(server.endpoint, perf_log=tmp_path / "a.log") as client,
    ):
        client.matmul(torch.full((3, 3), secret), torch.full((3, 3), secret))
        client.embedding(torch.tensor([[77, 78, 79]]))
    text = (tmp_path / "a.log").read_text()
    assert "13579" not in text
    assert PROTECTION_LINE not in text
    for row in read_log(tmp_path / "a.log").rows:
        assert row.method in ("Init", "Matmul", "Embedding")


def test_a_dropped_client_ends_its_log(server: GPUServer, tmp_path: Path) -> None:
    client = client_of(server, perf_log=tmp_path / "a.log")
    client.ping()
    del client
    gc.collect()
    assert read_log(tmp_path / "a.log").complete
    assert "tsqp-perf-log" not in {thread.name for thread in threading.enumerate()}


def test_rows_that_are_too_many_are_counted(server: GPUServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_log, "CAPACITY", 10)
    monkeypatch.setattr(perf_log, "INTERVAL_S", 60.0)
    with client_of(server, perf_log=tmp_path / "a.log") as client:
        for _ in range(25):
            client.ping()
    log = read_log(tmp_path / "a.log")
    assert len(log.rows) == 10
    assert log.summary["rows lost"] == "15"


# --- the file -----------------------------------------------------------------------------------------------


def test_a_log_that_cannot_be_written_is_an_error_at_once(server: GPUServer, tmp_path: Path) -> None:
    for path, word in (
        (tmp_path / "none" / "a.log", "No such file"),
        (tmp_path, "directory"),
        ("/dev/full", "No space"),
    ):
        with pytest.raises(ConfigError, match=word):
            client_of(server, perf_log=path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError):
        client_of(server, perf_log=tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(ConfigError, match="no regular file"):
            client_of(server, perf_log=tmp_path / "fifo")
    finally:
        os.close(reader)


def test_two_clients_do_not_write_one_log(server: GPUServer, tmp_path: Path) -> None:
    with client_of(server, perf_log=tmp_path / "a.log") as client:
        client.ping()
        with pytest.raises(ConfigError, match="another client"):
            client_of(server, perf_log=tmp_path / "a.log")
    assert len(read_log(tmp_path / "a.log").rows) == 1
    with client_of(server, perf_log=tmp_path / "a.log") as client:  # afterwards it is free, and begins anew
        client.ping()
        client.ping()
    assert [row.id for row in read_log(tmp_path / "a.log").rows] == [1, 2]


def test_a_full_disk_ends_the_log_not_the_calls(
    server: GPUServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, full = os.write, set[int]()

    def write(file: int, data: Any) -> int:
        if file in full:
            raise OSError(28, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    with client_of(server, perf_log=tmp_path / "a.log") as client:
        client.ping()
        log = client.perf_log
        assert log is not None
        full.add(log._file)
        wait_for(lambda: client.ping() > 0 and log.failure, "the failure")
        client.ping()
        assert not log.round_trips.enabled
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "No space left" in warnings[0].getMessage()


_CALLS = """
import os, sys, time, tsqp
client = tsqp.GPUClient(sys.argv[1], perf_log=sys.argv[2])
print("ready", flush=True)
while True:
    client.ping()
    print(client.round_trips, time.monotonic(), flush=True)
    time.sleep(0.002)
"""


#: How long a busy machine may keep the thread that writes the log from its core.
STALL_S = 2.0


def test_a_killed_process_loses_the_last_second_at_most(server: GPUServer, tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    child = subprocess.Popen(
        [sys.executable, "-c", _CALLS, server.endpoint, str(path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    told: list[tuple[int, float]] = []
    try:
        assert child.stdout.readline() == "ready\n"
        while not told or told[-1][1] - told[0][1] < 1.0 + 2 * STALL_S:
            count, moment = child.stdout.readline().split()
            told.append((int(count), float(moment)))
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.communicate()
    log = read_log(path)
    assert not log.complete
    before = [count for count, moment in told if moment < told[-1][1] - 1.0 - STALL_S]
    assert len(log.rows) >= before[-1]
    assert [row.id for row in log.rows] == list(range(1, len(log.rows) + 1))


def test_rows_noted_just_before_the_close_are_written(server: GPUServer, tmp_path: Path, monkeypatch) -> None:
    """As the log's thread is about to look whether it is to end."""
    path = tmp_path / "a.log"
    flush, connected, done = PerfLog._flush, [], []

    def flush_then_close(log: PerfLog) -> None:
        flush(log)
        if connected and not done:
            done.append(True)
            client.ping()
            log._closing = True

    monkeypatch.setattr(PerfLog, "_flush", flush_then_close)
    with client_of(server, perf_log=str(path)) as client:
        connected.append(client)
        wait_for(lambda: done and not client.perf_log._thread.is_alive(), "the end of the log")
        count = client.round_trips
    assert count > 0
    assert len(read_log(path).rows) == count


_FORKS = """
import os, sys, tsqp
client = tsqp.GPUClient(sys.argv[1], perf_log=sys.argv[2])
client.ping()
child = os.fork()
if child == 0:
    sys.exit(0)  # runs every exit handler
assert os.waitpid(child, 0)[1] == 0
client.ping()
"""


def test_a_forked_child_leaves_the_log_alone(server: GPUServer, tmp_path: Path) -> None:
    """And a client that nobody closed ends its log with the interpreter."""
    path = tmp_path / "a.log"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORKS, server.endpoint, str(path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    log = read_log(path)
    assert [row.id for row in log.rows] == [1, 2]
    assert log.complete
    assert path.read_text().count("SUMMARY") == 1


@pytest.mark.watchdog(120)
def test_the_cost_is_measured(tmp_path: Path) -> None:
    kept = tmp_path / "cost.json"
    options = ("--rounds", "2", "--sizes", "tiny", "--json", str(kept))
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.perf_log_cost", *options],
        cwd=Path(__file__).parent.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(kept.read_text())
    assert set(found["parts"]) == {"decode step, tiny", "round trip"}
    assert found["parts"]["decode step, tiny"]["round_trips"] == 6 * 2 + 2
    for part in found["parts"].values():
        low, high = part["on"]["ratio_95"]
        assert 0 < low <= part["on"]["ratio"] <= high
    assert found["row_ns"]["note"] > 0
    assert found["row_ns"]["line"] > 0


# --- as a user --------------------------------------------------------------------------------------------------


@pytest.mark.watchdog(180)
def test_generate_and_prefill_write_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with short_directory() as directory, serving(directory) as served:
        place = ("--endpoint", served.endpoint)
        path = directory / "a.jsonl"
        done = tsqp("generate", "--prompt", "And", "--max-new-tokens", "5", "--perf-log", str(path), *place)
        assert done.code == 0, done.err
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert sum(row.get("method") == "LMHead" for row in rows) == 5
        assert {row.get("placement") for row in rows if row.get("forward")} == {"ops"}
        prefill = ("prefill", "--tokens", "8", "--repeat", "1", *place)
        done = tsqp_here(capsys, *prefill, "--perf-log", str(directory / "b.log"))
        assert done.code == 0, done.err
        assert {row.forward for row in read_log(directory / "b.log").rows} == {None, 1, 2}
        bad = tsqp_here(capsys, *prefill, "--perf-log", str(directory / "no" / "a.log"))
        assert bad.code == 1
        assert "can't be written: No such file or directory" in bad.err
    local = tsqp_here(capsys, "generate", "--prompt", "And", "--placement", "local", "--perf-log", "x.log")
    assert local.code == 1
    assert "--perf-log has nothing to log" in local.err
