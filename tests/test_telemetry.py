"""Counters and the tables that show them."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from tsqp.telemetry import (
    OPERATORS,
    TRANSFER_COUNTERS,
    Telemetry,
    format_bytes,
    format_seconds,
    format_stats,
    plain_stats,
    print_stats,
    sum_transfers,
    throughput_mb_s,
)

STATS = {
    "side": "runner",
    "endpoint": "ipc:///tmp/a.sock",
    "protection": "none",
    "transport": "shm+ipc",
    "round_trips": 100,
    "errors": 2,
    "stale_replies": 1,
    "seconds": 4.0,
    "busy_seconds": 2.0,
    "shm_transfers": 150,
    "zmq_transfers": 50,
    "shm_bytes": 1_000_000,
    "zmq_bytes": 3_000_000,
    "calls": {"BatchLinear": 80, "LMHead": 20},
    "operators": {
        "gpu_linear": {"calls": 80, "seconds": 1.5, "server_seconds": 1.2},
        "tee_rmsnorm": {"calls": 50, "seconds": 0.5, "server_seconds": 0.0},
    },
}


def rendered(stats, **options) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    print_stats(stats, console=console, **options)
    return console.file.getvalue()


def row(text: str, label: str) -> list[str]:
    """The cells of the one table row that starts with ``label``."""
    lines = [line for line in text.splitlines() if line.strip("│┃ ").startswith(label)]
    assert len(lines) == 1, (label, text)
    return [cell.strip() for cell in lines[0].strip("│┃ ").replace("┃", "│").split("│")]


def test_operators_are_those_the_users_know():
    assert OPERATORS == (
        "gpu_embedding",
        "gpu_linear",
        "gpu_matmul",
        "gpu_lm_head",
        "gpu_fused_attention",
        "gpu_fused_mlp",
        "gpu_fused_layer",
        "tee_rmsnorm",
        "tee_rotary",
        "tee_softmax",
        "tee_silu",
        "tee_other",
    )


def test_counters_add_up():
    telemetry = Telemetry()
    telemetry.add("gpu_linear", 2_000_000, 1_500_000, 250_000)
    telemetry.add("gpu_linear", 1_000_000)
    telemetry.add("tee_silu", 10)
    telemetry.count("BatchLinear")
    telemetry.count("BatchLinear")
    snapshot = telemetry.snapshot()
    assert snapshot["calls"] == {"BatchLinear": 2}
    assert snapshot["operators"]["gpu_linear"] == {
        "calls": 2,
        "seconds": 3e-3,
        "server_seconds": 1.5e-3,
        "queue_seconds": 0.25e-3,
    }
    assert snapshot["operators"]["tee_silu"]["calls"] == 1
    assert "tee_rotary" not in snapshot["operators"]
    assert snapshot["seconds"] > 0


def test_unknown_operators_are_refused():
    with pytest.raises(KeyError):
        Telemetry().add("gpu_magic", 1)


def test_measure_times_its_block_and_faults_too():
    telemetry = Telemetry()
    measure = telemetry.measure("tee_softmax")
    with measure:
        time.sleep(0.002)
    with pytest.raises(ValueError, match="inside"), measure:
        raise ValueError("inside")
    row = telemetry.snapshot()["operators"]["tee_softmax"]
    assert row["calls"] == 2
    assert row["seconds"] >= 0.002


def test_reset_keeps_measures_and_rows_valid():
    telemetry = Telemetry()
    measure = telemetry.measure("tee_silu")
    telemetry.count("Init")
    calls, times = telemetry.counter("Init"), telemetry.row("tee_rotary")
    assert calls[0] == 1
    with measure:
        pass
    telemetry.reset()
    assert telemetry.snapshot()["operators"] == {}
    assert telemetry.snapshot()["calls"] == {}
    with measure:
        pass
    calls[0] += 1
    times[0] += 1
    snapshot = telemetry.snapshot()
    assert snapshot["operators"]["tee_silu"]["calls"] == 1
    assert snapshot["operators"]["tee_rotary"]["calls"] == 1
    assert snapshot["calls"] == {"Init": 1}


def test_a_snapshot_is_a_copy():
    telemetry = Telemetry()
    telemetry.count("Init")
    snapshot = telemetry.snapshot()
    telemetry.count("Init")
    assert snapshot["calls"] == {"Init": 1}


def test_snapshots_may_be_taken_while_another_thread_counts():
    telemetry, stop = Telemetry(), threading.Event()

    def work():
        number = 0
        while not stop.is_set():
            telemetry.count(f"method {number % 50}")
            telemetry.add("gpu_linear", 1)
            number += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(300):
            telemetry.snapshot()
    finally:
        stop.set()
        thread.join()


def test_sum_transfers():
    one = {"transport": "shm+ipc", **dict.fromkeys(TRANSFER_COUNTERS, 2)}
    two = {"transport": "tcp", **dict.fromkeys(TRANSFER_COUNTERS, 3)}
    total = sum_transfers([one, two, one])
    assert all(total[key] == 7 for key in TRANSFER_COUNTERS)
    assert total["transport"] == "shm+ipc, tcp"
    assert sum_transfers([]) == {"transport": "none", **dict.fromkeys(TRANSFER_COUNTERS, 0)}
    assert sum_transfers([sum_transfers([]), total, two])["transport"] == "shm+ipc, tcp"


def test_throughput_is_bytes_over_time_in_calls():
    assert throughput_mb_s(STATS) == pytest.approx(2.0)
    assert throughput_mb_s({}) == 0.0


def test_tables_hold_every_figure():
    text = rendered(STATS, title="a title")
    assert "a title" in text
    for label, value in (
        ("transport", "shm+ipc"),
        ("protection", "none"),
        ("round trips", "100"),
        ("error replies", "2"),
        ("late replies dropped", "1"),
        ("RPC calls  ", "100"),
        ("throughput", "2.0 MB/s"),
    ):
        assert row(text, label)[1] == value
    assert row(text, "shared memory")[1:] == ["150", "75.0%", "1.0 MB", "25.0%"]
    assert row(text, "ZeroMQ")[1:] == ["50", "25.0%", "3.0 MB", "75.0%"]
    assert row(text, "total")[1:] == ["200", "100.0%", "4.0 MB", "100.0%"]
    assert row(text, "BatchLinear")[1] == "80"
    assert row(text, "gpu_linear")[1:] == ["80", "1.50 s", "75.0%", "18.8 ms", "1.20 s"]
    assert row(text, "tee_rmsnorm")[1:] == ["50", "500.0 ms", "25.0%", "10.0 ms", "-"]


def test_tables_of_nothing():
    text = rendered({**sum_transfers([]), "calls": {}, "operators": {}})
    assert row(text, "transport")[1] == "none"
    assert row(text, "ZeroMQ")[1:] == ["0", "-", "0 B", "-"]
    assert "time per operator" not in text


def test_the_time_in_the_queue_has_a_column_where_there_was_any():
    operators = {"gpu_linear": {"calls": 4, "seconds": 2.0, "server_seconds": 1.0, "queue_seconds": 0.5}}
    text = rendered({**STATS, "operators": operators})
    assert "queued on the server" in text
    assert row(text, "gpu_linear")[1:] == ["4", "2.00 s", "100.0%", "500.0 ms", "1.00 s", "500.0 ms"]
    assert "queued on the server" not in rendered(STATS)


def test_a_servers_table_has_no_column_for_the_servers_part():
    operators = {"gpu_linear": {"calls": 1, "seconds": 1.0, "server_seconds": 0.0}}
    assert "of it on the server" not in rendered({**STATS, "operators": operators})


def test_format_stats_can_be_printed_by_any_console():
    console = Console(file=io.StringIO(), width=100)
    console.print(format_stats(STATS))
    assert "gpu_linear" in console.file.getvalue()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (12_000_000, "12.0 MB"), (3e9, "3.0 GB"), (5e13, "50.0 TB")],
)
def test_format_bytes(nbytes, text):
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(1.23e-5, "12.3 us"), (4.5e-3, "4.5 ms"), (6.78, "6.78 s")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_plain_text_has_the_same_figures():
    text = plain_stats(STATS, "runner")
    assert text.startswith("runner\n")
    lines = [line.split("  ") for line in text.splitlines()]
    cells = {line[1]: [cell.strip() for cell in line[2:] if cell.strip()] for line in lines if len(line) > 2}
    assert cells["endpoint"] == ["ipc:///tmp/a.sock"]
    assert cells["ZeroMQ"] == row(rendered(STATS), "ZeroMQ")[1:]
    assert cells["BatchLinear"] == ["80"]
    assert cells["gpu_linear"] == row(rendered(STATS), "gpu_linear")[1:]


def test_counting_loads_no_terminal_library():
    code = "import sys, tsqp.telemetry as t; print(t.plain_stats({})); print('rich' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"
    assert "transfers per carrier" in out
