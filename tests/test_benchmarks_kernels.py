"""The operators' benchmark, at a fraction of its pace: what it keeps is whole and makes sense."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

LIMIT_S = 200.0
WAYS = {"ours", "reused", "torch", "copy", "copy past the caches", "copy of memory"}

pytestmark = pytest.mark.watchdog(LIMIT_S + 20)

#: Bytes that must move in float32.
NBYTES = {
    "RMSNorm": 2 * 1024 * 2048 * 4,
    "residual + RMSNorm": 4 * 1024 * 2048 * 4,
    "SiLU·gate": 3 * 1024 * 8192 * 4,
    "rotary": 2 * 40 * 1024 * 64 * 4,
    "causal softmax": 32 * 1024 * (1024 + 1025 // 2) * 4 + 32 * 512 * 4,
    "masked softmax": 2 * 32 * 1024 * 1024 * 4,
}


def kept_by_a_run(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tsqp", "bench", "kernels", "--threads", "1", "--seconds", "0.002"]
    run = subprocess.run(
        [*command, "--rounds", "2", "--json", str(path)], capture_output=True, text=True, timeout=LIMIT_S, check=False
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
    for cell in run["prefill"]:
        check_shares(cell)
    if importlib.util.find_spec("matplotlib") is not None:
        for phase in ("prefill", "decode"):
            assert (tmp_path / "new" / f"kernels-{phase}-1.png").read_bytes().startswith(b"\x89PNG")


def check_shares(cell: dict[str, Any]) -> None:
    """What is said beside the times follows from them."""
    best = cell["best_us"]
    assert best == {way: pytest.approx(min(turns), abs=0.001) for way, turns in cell["rounds"]["best_us"].items()}
    assert cell["times_torch"] == pytest.approx(best["torch"] / best["ours"], rel=0.01)
    # Every operator moves as many bytes as its copy, but for the causal softmax, which reads only half of them.
    moved = (1 + (1024 + 1) / 2 / 1024) / 2 if cell["operator"] == "causal softmax" else 1.0
    limit = min(best["copy"], best["copy past the caches"]) * moved
    nbytes = NBYTES[cell["operator"]] // (1 if cell["dtype"] == "float32" else 2)
    memory = best["copy of memory"] * nbytes / (2 * (256 << 20))
    assert cell["of_memory"] == pytest.approx(memory / min(best["ours"], best["reused"]), rel=0.01)
    assert cell["of_bandwidth"] == pytest.approx(limit / min(best["ours"], best["reused"]), rel=0.01)
