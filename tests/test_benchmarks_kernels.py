"""The operators' benchmark, at a fraction of its pace: what it keeps is whole and makes sense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

ROOT = Path(__file__).parent.parent
LIMIT_S = 100.0
WAYS = {"ours", "reused", "torch", "copy", "copy past the caches"}

pytestmark = pytest.mark.watchdog(LIMIT_S + 20)


def kept_by_a_run(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.kernels", "--threads", "1", "--seconds", "0.002", "--rounds", "1"]
    run = subprocess.run(
        [*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert run.returncode == 0, run.stderr
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept


def test_every_operator_is_measured_in_both_dtypes(tmp_path: Path) -> None:
    kept = kept_by_a_run(tmp_path / "new" / "kernels.json")
    assert kept["instruction_set"]
    (run,) = kept["runs"]
    assert run["threads"] == 1
    assert len({(cell["operator"], cell["dtype"]) for cell in run["prefill"]}) == 12
    assert len({(cell["operator"], cell["dtype"]) for cell in run["decode"]}) == 10
    for cell in run["prefill"] + run["decode"]:
        assert set(cell["best_us"]) == WAYS
        assert all(0 < best <= cell["median_us"][way] for way, best in cell["best_us"].items())
        assert cell["limit_us"] > 0
    assert len(run["bars"]) == 2 * len(run["prefill"])
