"""Replays the stored inputs of the fuzz targets, or fuzzes them, under ASan and UBSan.

    python tests/fuzz/run.py               # the corpus, and random changes of it: seconds
    python tests/fuzz/run.py --minutes 2   # libFuzzer, so long for each target
    python tests/fuzz/run.py --minutes 5 --update   # and store what it found, minimised, as the corpus

The replay needs a C compiler; libFuzzer is clang's (``FUZZ_CC``, else the newest clang on the path). What is missing
is a visible SKIPPED line.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from seeds import SEEDS

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "c"))

from toolchain import (  # noqa: E402 (found by the line above)
    BUILD,
    CSRC,
    WARNINGS,
    Flavour,
    Tally,
    build,
    find_compiler,
    probe,
    run,
    run_program,
    usable,
)

CORPUS = HERE / "corpus"
#: The source of the core that a target includes, to look at private accounts.
INCLUDES = {"fuzz_ring": "ring"}
#: Random changes of each stored input in a replay.
CHANGES = 3000
WATCHDOG_S = 120
MAX_INPUT_BYTES = 8192
MAX_ADDED_FILES = 60
#: An input may not take longer, nor make the target use more.
SLOWEST_S, MEMORY_MB = 10, 1024


def stored(target: str) -> list[Path]:
    return sorted(path for path in (CORPUS / target).iterdir() if path.is_file())


def replay(tally: Tally) -> None:
    compiler = find_compiler()
    flavour = usable(compiler, "asan", "AddressSanitizer and UndefinedBehaviorSanitizer", tally)
    programs = build(compiler, flavour, [HERE / f"{target}.c" for target in SEEDS], INCLUDES, [HERE / "replay.c"])
    for target, program in programs.items():
        with tempfile.TemporaryDirectory(prefix="tsqp-replay-") as folder:
            os.chdir(folder)
            failed = tally.failed
            run_program(flavour, program, [str(CHANGES), *map(str, stored(target))], WATCHDOG_S, tally)
            os.chdir(HERE)
            if tally.failed > failed:
                keep_crash(target, Path(folder) / "crash-input")


def keep_crash(target: str, kept: Path) -> None:
    """Shows where the input lies that ended the process; its first 8 bytes are the input's length."""
    if kept.exists():
        data = kept.read_bytes()
        crash = BUILD / f"crash-{target}"
        crash.write_bytes(data[8 : 8 + int.from_bytes(data[:8], "little")])
        print(f"    the input is in {crash}")


# ---- libFuzzer ----


def find_clang() -> str | None:
    names = [os.environ.get("FUZZ_CC", ""), "clang", *(f"clang-{version}" for version in range(22, 10, -1))]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def fuzzing_flavour(clang: str, tally: Tally) -> Flavour | None:
    """Clang with libFuzzer, or None with the reason said."""
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    flavour = Flavour("fuzz", flags)
    problem = probe([clang], flavour, tally)
    if problem is None:
        return flavour
    print(f"SKIPPED: fuzzing, as {problem}")
    tally.skipped += 1
    return None


def build_fuzzer(clang: str, flavour: Flavour, target: str) -> Path:
    program = BUILD / f"{target}-libfuzzer"
    core = [source for source in sorted(CSRC.glob("*.c")) if source.stem != INCLUDES.get(target)]
    flags = [*flavour.flags, "-fsanitize=fuzzer", *WARNINGS, "-I", str(CSRC)]
    command = [clang, *flags, str(HERE / f"{target}.c"), *map(str, core), "-o", str(program)]
    code, output = run(command, {}, WATCHDOG_S)
    if code != 0:
        raise SystemExit(f"failed: {' '.join(command)}\n{output}")
    return program


def write_seeds(target: str, folder: Path) -> None:
    for name, data in SEEDS[target]():
        (folder / f"seed-{name}").write_bytes(data)


def fuzz(target: str, minutes: float, update: bool, clang: str, flavour: Flavour, tally: Tally) -> None:
    program = build_fuzzer(clang, flavour, target)
    found = BUILD / f"found-{target}"
    for folder in (found, CORPUS / target):
        folder.mkdir(parents=True, exist_ok=True)
    write_seeds(target, found)
    crashes = BUILD / f"crashes-{target}"
    crashes.mkdir(exist_ok=True)
    limits = [f"-max_len={MAX_INPUT_BYTES}", f"-timeout={SLOWEST_S}", f"-rss_limit_mb={MEMORY_MB}"]
    limits += [f"-artifact_prefix={crashes}/", "-print_final_stats=1"]
    command = [*flavour.launcher, str(program), *limits, f"-max_total_time={round(60 * minutes)}", str(found)]
    code, output = run([*command, str(CORPUS / target)], flavour.options, 60 * minutes + WATCHDOG_S)
    executed = re.search(r"number_of_executed_units: (\d+)", output)
    coverage = re.findall(r"cov: (\d+)", output)
    if code != 0 or executed is None:
        tally.failed += 1
        print(f"FAILED {target}: it ended with {code}; inputs that do are in {crashes}\n{output[-4000:]}")
        return
    tally.passed += 1
    print(f"PASSED {target}: {executed[1]} inputs in {minutes:g} minutes, {coverage[-1] if coverage else '?'} edges")
    if update:
        store(target, program, found, flavour)


def store(target: str, program: Path, found: Path, flavour: Flavour) -> None:
    """Replaces the corpus by the smallest inputs that reach what all found ones reach, and the seeds."""
    folder = CORPUS / target
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_seeds(target, folder)
    code, output = run([*flavour.launcher, str(program), "-merge=1", str(folder), str(found)], flavour.options, 1200)
    if code != 0:
        raise SystemExit(f"the merge failed\n{output[-2000:]}")
    added = [path for path in folder.iterdir() if not path.name.startswith("seed-")]
    for path in sorted(added, key=lambda path: path.stat().st_size)[MAX_ADDED_FILES:]:
        path.unlink()  # the longest ones
    kept = stored(target)
    print(f"    the corpus of {target}: {len(kept)} files, {sum(path.stat().st_size for path in kept)} bytes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0, help="fuzz each target so long")
    parser.add_argument("--update", action="store_true", help="store what was found as the corpus")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    BUILD.mkdir(parents=True, exist_ok=True)
    tally = Tally()
    if not options.minutes:
        replay(tally)
    elif (clang := find_clang()) is None:
        print("SKIPPED: fuzzing, as there is no clang here, which brings libFuzzer: apt-get install clang")
        tally.skipped += 1
        replay(tally)
    elif flavour := fuzzing_flavour(clang, tally):
        with tempfile.TemporaryDirectory(prefix="tsqp-fuzz-", dir="/tmp") as folder:
            flavour.options["TSQP_SHM_DIR"] = folder
            for target in SEEDS:
                fuzz(target, options.minutes, options.update, clang, flavour, tally)
    print(tally.line())
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
