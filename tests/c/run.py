"""Builds and runs the C core's tests: units under ASan and UBSan, the threads under TSan, the stress also bare.

    python tests/c/run.py            # well under a minute
    python tests/c/run.py --soak     # 20 million messages under each build of the stress

Needs a C compiler (``CC``, else gcc or cc) and the standard library. A sanitizer that the compiler or the machine
lacks is a visible SKIPPED line; the tests then run without it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from toolchain import BUILD, FLAVOURS, Tally, build, find_compiler, run_program, usable

HERE = Path(__file__).resolve().parent
UNITS = (
    "test_codec",
    "test_convert",
    "test_copy",
    "test_forecast",
    "test_kernels",
    "test_perf",
    "test_pool",
    "test_segment",
    "test_processes",
    "test_ring",
    "test_ring_random",
    "test_threads",
    "test_wait",
)
STRESS = ("stress_ring", "stress_many")
#: Tests that include a source of the core instead of linking it.
INCLUDES = {"test_copy": "copy", "test_convert": "convert"}
MESSAGES = {"tsan": 300_000, "bare": 1_000_000}
SOAK_MESSAGES = 20_000_000
WATCHDOG_S, SOAK_WATCHDOG_S = 120, 7200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak", action="store_true", help=f"{SOAK_MESSAGES} messages under each stress build")
    parser.add_argument("--messages", type=int, help="messages of each stress run")
    parser.add_argument("--seed", type=int, default=1, help="seed of the stress runs (default 1)")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    BUILD.mkdir(parents=True, exist_ok=True)
    compiler, tally = find_compiler(), Tally()

    asan = usable(compiler, "asan", "AddressSanitizer and UndefinedBehaviorSanitizer", tally)
    tsan = usable(compiler, "tsan", "ThreadSanitizer", tally)
    bare = FLAVOURS["bare"]
    wanted: dict[str, list[str]] = {}
    for flavour, tests in (
        (asan, list(UNITS)),
        (tsan, ["test_pool", "test_threads", "test_wait", *STRESS]),
        (bare, list(STRESS)),
    ):
        known = wanted.setdefault(flavour.name, [])
        known += [test for test in tests if test not in known]

    timeout_s = SOAK_WATCHDOG_S if options.soak else WATCHDOG_S
    for name, tests in wanted.items():
        programs = build(compiler, FLAVOURS[name], [HERE / f"{test}.c" for test in tests], INCLUDES)
        for test in tests:
            messages = options.messages or (SOAK_MESSAGES if options.soak else MESSAGES.get(name, 0))
            args = [str(messages), str(options.seed)] if test in STRESS else []
            run_program(FLAVOURS[name], programs[test], args, timeout_s, tally)
    print(tally.line())
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
