"""The benchmark of what a round trip costs beside compute, at a fraction of its pace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from waking import kernel_may_be_asked

pytest.importorskip("rich")

ROOT = Path(__file__).parent.parent
LIMIT_S = 100.0
pytestmark = pytest.mark.watchdog(LIMIT_S + 20)


def measured(path: Path, *options: str) -> list[dict[str, Any]]:
    """The cells of a short run."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--ms", "1", "2", "--threads", "1"]
    command += ["--rounds", "2", "--seconds", "0.02", "--out", str(path), *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 0, run.stderr
    assert "Beside the server's compute" in run.stdout
    result = json.loads(path.read_text())
    assert result["machine"]["versions"]["torch"]
    return result["cells"]


def test_both_ways_of_waiting_are_measured_and_kept(tmp_path: Path) -> None:
    cells = measured(tmp_path / "overhead.json")
    assert [(cell["threads"], cell["ms"]) for cell in cells] == [(1, 1.0), (1, 2.0)]
    for cell in cells:
        assert cell["alone_ms"] > 0
        assert 1 <= cell["rounds"] <= 2
        assert cell["compute_ratio"] > 0
        assert isinstance(cell["others"], float)
        for way in ("plain", "predicting", "bare, looking", "bare, sleeping"):
            found = cell[way]
            assert 0 < found["overhead"]["median_us"] <= found["overhead"]["max_us"]
            assert found["compute"]["median_us"] > 0
            assert found["runner_cpu_us_per_call"] > 0
        assert "predicting, awake" not in cell


def test_cores_that_do_not_halt_are_two_ways_more_or_an_error(tmp_path: Path) -> None:
    if kernel_may_be_asked():
        for cell in measured(tmp_path / "overhead.json", "--cpu-latency-us", "0"):
            for way in ("predicting", "predicting, awake", "bare, sleeping", "bare, sleeping, awake"):
                assert cell[way]["overhead"]["median_us"] > 0
        return
    command = [sys.executable, "-m", "benchmarks.overhead", "--cpu-latency-us", "0"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 2
    assert "--cpu-latency-us: a CPU latency of 0 us can't be asked for" in run.stderr
    assert "Traceback" not in run.stderr
