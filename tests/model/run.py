"""Checks the ring's protocol (ring.pml) exhaustively with spin, and that spin finds what is wrong with broken ones.

    python tests/model/run.py            # well under a minute
    python tests/model/run.py --soak     # more slots and messages: minutes, and some 4 GB of memory

Needs spin 6.4 or later and a C compiler; without them it says SKIPPED and succeeds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).resolve().parent / "ring.pml"
WATCHDOG_S, SOAK_WATCHDOG_S = 120, 3600
#: More steps than any run here has; spin says so if one is longer, and that fails.
MAX_DEPTH = 5_000_000
MEMORY_MB, SOAK_MEMORY_MB = 2000, 12000
NOTHING, WRONG_BYTES, NO_END = "no error", "assertion violated", "invalid end state"


@dataclass(frozen=True)
class Check:
    """One run of the checker: the model's parameters, and what it must find."""

    what: str
    defines: str
    finds: str = NOTHING

    @property
    def liveness(self) -> bool:
        return "LIVENESS" in self.defines


RIGHT = (
    Check("one slot", "N=1 M=5 PARTS=3 CANCEL"),
    Check("two slots", "N=2 M=5 PARTS=3"),
    Check("two slots, a write given up, sleepers disturbed", "N=2 M=4 CANCEL SPURIOUS"),
    Check("three slots", "N=3 M=5"),
    Check("two slots, without sleep", "N=2 M=5 POLL CANCEL"),
    Check("two slots, either end closes", "N=2 M=4 CLOSE"),
    Check("two slots, either end closes, without sleep", "N=2 M=5 CLOSE POLL"),
    Check("one slot: each message arrives", "N=1 M=3 PARTS=3 LIVENESS"),
    Check("two slots: each message arrives", "N=2 M=3 LIVENESS"),
    Check("two slots, sleepers disturbed: each message arrives", "N=2 M=3 SPURIOUS LIVENESS"),
    Check("two slots, without sleep: each message arrives", "N=2 M=3 POLL LIVENESS"),
    Check("two slots, either end closes: both come to an end", "N=2 M=2 CLOSE LIVENESS"),
)
SOAK = (
    Check("one slot, many laps", "N=1 M=40 PARTS=4 CANCEL SPURIOUS"),
    Check("two slots, many laps", "N=2 M=12 PARTS=3 CANCEL SPURIOUS"),
    Check("three slots, two laps", "N=3 M=6 CANCEL"),
    Check("three slots, without sleep", "N=3 M=7 POLL"),
    Check("three slots, either end closes", "N=3 M=5 CLOSE SPURIOUS"),
    Check("three slots: each message arrives", "N=3 M=5 LIVENESS"),
    Check("two slots, many laps: each message arrives", "N=2 M=8 PARTS=3 SPURIOUS LIVENESS"),
)
BROKEN = (
    Check("seq is published with a relaxed store", "N=2 M=3 POLL BROKEN_PUBLISH_RELAXED", WRONG_BYTES),
    Check("filled is marked with a relaxed store", "N=2 M=3 POLL BROKEN_FILL_RELAXED", WRONG_BYTES),
    Check("seq is read without acquire", "N=2 M=3 BROKEN_READ_RELAXED", WRONG_BYTES),
    Check("filled is read without acquire", "N=2 M=3 BROKEN_FOLLOW_RELAXED", WRONG_BYTES),
    Check("a slot is released with a relaxed store", "N=2 M=3 BROKEN_RELEASE_RELAXED", WRONG_BYTES),
    Check("a slot is reclaimed before its release", "N=2 M=3 BROKEN_RECLAIM_BLIND", WRONG_BYTES),
    Check("filled keeps the value of the lap before", "N=2 M=3 BROKEN_FILLED_STALE", WRONG_BYTES),
    Check("a lease is handed out half filled", "N=2 M=3 BROKEN_LEASE_EARLY", WRONG_BYTES),
    Check("the publisher looks at waiting before it stores seq", "N=2 M=3 BROKEN_LOOK_FIRST", NO_END),
    Check("seq is published with release, not seq_cst", "N=2 M=3 BROKEN_PUBLISH_RELEASE", NO_END),
    Check("waiting is set too late", "N=2 M=3 BROKEN_WAITING_LATE", NO_END),
    Check("the sleeper does not compare", "N=2 M=3 BROKEN_NO_COMPARE", NO_END),
    Check("waiting is a flag that the publisher clears", "N=2 M=3 BROKEN_CLEARED_BY_PUBLISHER", NO_END),
    Check("the last part wakes nobody", "N=2 M=3 BROKEN_FILL_SILENT", NO_END),
    Check("a release wakes nobody", "N=2 M=3 BROKEN_RELEASE_SILENT", NO_END),
    Check("a closed ring is not looked at again", "N=2 M=2 CLOSE BROKEN_CLOSE_ONE_LOOK", WRONG_BYTES),
    Check("a close alone must end a sleep", "N=2 M=2 CLOSE BROKEN_CLOSE_UNSLICED", NO_END),
)


def find_compiler() -> str | None:
    named = os.environ.get("CC", "").split()
    return next((found for name in [*named[:1], "gcc", "cc", "clang"] if (found := shutil.which(name))), None)


def run(command: list[str], folder: Path, timeout_s: float) -> str:
    """The command's output; one that fails or takes too long ends the whole check."""
    try:
        done = subprocess.run(command, cwd=folder, timeout=timeout_s, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"FAILED: {' '.join(command)} took longer than {timeout_s:g} s") from None
    if done.returncode != 0:
        raise SystemExit(f"FAILED: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def explore(check: Check, compiler: str, memory_mb: int, timeout_s: float) -> str:
    """What the checker says about every state that `check` can reach."""
    flags = ["-DNFAIR=5"] if check.liveness else ["-DSAFETY"]
    options = ["-a", "-f"] if check.liveness else []
    with tempfile.TemporaryDirectory(prefix="tsqp-model-") as name:
        folder = Path(name)
        run(["spin", *(f"-D{define}" for define in check.defines.split()), "-a", str(MODEL)], folder, timeout_s)
        optimise = "-O1" if check.finds == NOTHING else "-O0"
        memory = f"-DMEMLIM={memory_mb}"
        run([compiler, optimise, "-w", "-DCOLLAPSE", memory, *flags, "-o", "pan", "pan.c"], folder, timeout_s)
        return run(["./pan", f"-m{MAX_DEPTH}", "-w22", *options], folder, timeout_s)


def verdict(output: str) -> tuple[str, int]:
    """What was found and in how many states; a search that was cut short is a finding of its own."""
    errors = re.search(r"errors: (\d+)", output)
    states = re.search(r"([\d.e+]+) states, stored", output)
    if errors is None or states is None:
        return f"no verdict: {output[-500:]}", 0
    for cut in ("max search depth too small", "memory limit", "MEMLIM bound", "out of memory"):
        if cut in output:
            return f"an incomplete search: {cut}", int(float(states[1]))
    if errors[1] == "0":
        return NOTHING, int(float(states[1]))
    found = re.search(r"^pan:1: (.*)", output, re.M)
    return found[1] if found else "an error", int(float(states[1]))


def perform(check: Check, compiler: str, soak: bool) -> bool:
    start = time.monotonic()
    found, states = verdict(
        explore(check, compiler, SOAK_MEMORY_MB if soak else MEMORY_MB, SOAK_WATCHDOG_S if soak else WATCHDOG_S)
    )
    passed = found.startswith(check.finds)
    what = check.what if check.finds == NOTHING else f"broken: {check.what}: found"
    print(f"{'PASSED' if passed else 'FAILED'} {what} ({states} states, {time.monotonic() - start:.1f} s)")
    if not passed:
        print(f"    -D{check.defines.replace(' ', ' -D')}: expected {check.finds!r}, spin found {found!r}")
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak", action="store_true", help="more slots and messages")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    compiler = find_compiler()
    if shutil.which("spin") is None or compiler is None:
        missing = "no C compiler" if compiler is None else "no spin"
        print(f"SKIPPED: the model of the ring's protocol, as there is {missing} here: apt-get install spin gcc")
        return 0
    checks = [*RIGHT, *BROKEN, *(SOAK if options.soak else ())]
    failed = [check for check in checks if not perform(check, compiler, options.soak)]
    print(f"{len(checks) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
