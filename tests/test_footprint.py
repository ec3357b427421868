"""The benchmark of what a runner's process is made of, one process of each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import LIMIT_S, environment

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.watchdog(2 * LIMIT_S + 20)


def test_every_stage_of_every_way_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "footprint.json"
    command = [sys.executable, "-m", "benchmarks.footprint", "--runs", "1", "--no-warm-up", "--tokens", "2"]
    command += ["--placement", "layer", "--json", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=2 * LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "after the first text" in done.stdout
    ways = json.loads(path.read_text())["ways"]
    assert {way: list(stages) for way, stages in ways.items()} == {
        "imports": ["loaded"],
        "generate": ["begun", "loaded", "answered"],
        "run": ["begun", "loaded", "answered"],
    }
    small, usual = ways["run"]["answered"], ways["generate"]["answered"]
    for key in ("modules", "tsqp_modules", "rss_bytes", "threads", "mapped_files", "code_bytes", "opened_files"):
        assert 0 < small[key] <= usual[key], key
    assert small["modules"] < ways["imports"]["loaded"]["modules"]
    assert small["children"] == 0
