"""The benchmark of what a round trip costs beside compute, at a fraction of its pace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")

ROOT = Path(__file__).parent.parent
LIMIT_S = 100.0
pytestmark = pytest.mark.watchdog(LIMIT_S + 20)


def test_both_ways_of_waiting_are_measured_and_kept(tmp_path):
    path = tmp_path / "overhead.json"
    command = [sys.executable, "-m", "benchmarks.overhead", "--ms", "1", "2", "--threads", "1"]
    command += ["--rounds", "2", "--seconds", "0.02", "--out", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 0, run.stderr
    assert "Beside the server's compute" in run.stdout
    result = json.loads(path.read_text())
    assert result["machine"]["versions"]["torch"]
    assert [(cell["threads"], cell["ms"]) for cell in result["cells"]] == [(1, 1.0), (1, 2.0)]
    for cell in result["cells"]:
        assert cell["alone_ms"] > 0
        assert 1 <= cell["rounds"] <= 2
        assert cell["compute_ratio"] > 0
        assert isinstance(cell["others"], float)
        for way in ("plain", "predicting", "bare, looking", "bare, sleeping"):
            found = cell[way]
            assert 0 < found["overhead"]["median_us"] <= found["overhead"]["max_us"]
            assert found["compute"]["median_us"] > 0
            assert found["runner_cpu_us_per_call"] > 0
