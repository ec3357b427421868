"""What a runner's process is made of: modules, memory, threads, files and code, for three ways to start one.

    python -m benchmarks.footprint                          # 5 fresh processes of each, in turn
    python -m benchmarks.footprint --runs 15 --threads 2 --placement fused --json footprint.json

`imports` is a bare `import torch` with transformers' model, tokenizer and streamer classes; `generate` and `run` are
those commands, on the embedded model, against a server that this starts. `run` has loaded torch when it comes to the
model, `generate` has not. All figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tsqp.demo import PROMPT, model_path
from tsqp.demo.server_process import ServerProcess
from tsqp.exits import termination_raises
from tsqp.placement import PLACEMENTS

from . import machine
from .arguments import plain_parser
from .command import save
from .setting import median

LIMIT_S = 120.0
WAYS = ("imports", "generate", "run")
STAGES = {"begun": "before the model", "loaded": "loaded and connected", "answered": "after the first text"}
#: Key of a stage -> title of its row, divisor, decimals.
FIGURES = {
    "seconds": ("seconds since the start", 1.0, 2),
    "modules": ("modules", 1, 0),
    "tsqp_modules": ("of them tsqp's", 1, 0),
    "opened_files": ("files opened", 1, 0),
    "rss_bytes": ("RSS, MB", 1e6, 0),
    "pss_bytes": ("PSS, MB", 1e6, 0),
    "threads": ("threads", 1, 0),
    "mapped_files": ("mapped files", 1, 0),
    "code_bytes": ("executable mappings, MB", 1e6, 0),
    "children": ("processes started", 1, 0),
}


def probe(way: str, options: argparse.Namespace, endpoint: str) -> dict[str, dict[str, float]]:
    """One fresh process; what it was at each stage."""
    arguments = []
    if way != "imports":
        arguments = ["--prompt", PROMPT, "--max-new-tokens", str(options.tokens), "--endpoint", endpoint]
        arguments += ["--placement", options.placement, "--threads", str(options.threads)]
    with tempfile.TemporaryDirectory(prefix="footprint-") as folder:
        path = Path(folder) / "stages.json"
        script = str(Path(__file__).with_name("footprint_probe.py"))
        command = [sys.executable, script, str(path), way, *arguments]
        env = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        # The same number of threads for the bare import, which has no option to say so.
        env = {**env, "OMP_NUM_THREADS": str(options.threads)} if way == "imports" else env
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{way} ended with status {done.returncode}: {done.stderr.strip() or done.stdout}")
        found: dict[str, dict[str, float]] = json.loads(path.read_text())
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All ways in turn, so many times; the median of each figure at each stage."""
    runs: dict[str, list[dict[str, dict[str, float]]]] = {way: [] for way in WAYS}
    with ServerProcess(model_path()) as server:
        server.connect().close()
        for way in WAYS if options.warm_up else ():  # fills the file system's cache
            probe(way, options, server.endpoint)
        for number in range(options.runs):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                runs[way].append(probe(way, options, server.endpoint))
    return {
        way: {stage: {key: median([run[stage][key] for run in found]) for key in found[0][stage]} for stage in found[0]}
        for way, found in runs.items()
    }


def show(result: dict[str, Any], console: Console) -> None:
    """A table for each stage."""
    for stage, title in STAGES.items():
        table = Table(title=title, title_justify="left")
        table.add_column("")
        ways = [way for way in WAYS if stage in result["ways"][way]]
        for way in ways:
            table.add_column({"imports": "torch, transformers"}.get(way, f"tsqp {way}"), justify="right")
        for key, (label, divisor, decimals) in FIGURES.items():
            cells = [result["ways"][way][stage][key] / divisor for way in ways]
            table.add_row(label, *(f"{cell:.{decimals}f}" for cell in cells))
        console.print(table)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Measures and prints; the exit status."""
    parser = plain_parser("footprint", __doc__, prog)
    add = parser.add_argument
    add("--runs", type=int, default=5, metavar="N", help="fresh processes of each way (5)")
    add("--threads", type=int, default=1, metavar="N", help="torch's threads (1)")
    add("--tokens", type=int, default=8, metavar="N", help="tokens to generate (8)")
    add("--placement", default="ops", choices=[one for one in PLACEMENTS if one != "local"], help="(ops)")
    add("--no-warm-up", dest="warm_up", action="store_false", help="count the first processes too")
    add("--json", type=Path, metavar="FILE", help="keep the figures there")
    options = parser.parse_args(argv)
    if min(options.runs, options.threads, options.tokens) < 1:
        parser.error("--runs, --threads and --tokens are 1 or more")
    with termination_raises():
        ways = measure(options)
    told = {"runs": options.runs, "threads": options.threads, "placement": options.placement, "tokens": options.tokens}
    result = {"benchmark": "footprint", "machine": machine.describe(), "options": told, "ways": ways}
    show(result, Console())
    if options.json is not None:
        save(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
