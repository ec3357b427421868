"""What building and running C programs against the core needs: a compiler, the sanitizers that work here, counts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "ctests"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-std=c11", "-D_GNU_SOURCE", "-pthread")
PROBE = "#include <stdlib.h>\nint main(void) { void *p = malloc(8); free(p); return p == 0; }\n"
#: A sanitizer may need this where the kernel randomises addresses further than it expects.
FIXED_ADDRESSES = ("setarch", "-R")
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_string_checks=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=0:allocator_may_return_null=1",
}


@dataclass
class Flavour:
    """One way to build: its flags, and what its programs are started with."""

    name: str
    flags: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)


FLAVOURS = {
    "asan": Flavour("asan", ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")),
    "tsan": Flavour("tsan", ("-O1", "-g", "-fsanitize=thread")),
    "bare": Flavour("bare", ("-O3",)),
}


@dataclass
class Tally:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def line(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def find_compiler() -> list[str]:
    """The compiler's command line, from CC or the path."""
    named = os.environ.get("CC", "").split()
    for candidate in [named] if named else [["gcc"], ["cc"], ["clang"]]:
        if shutil.which(candidate[0]):
            return candidate
    raise SystemExit(f"no C compiler found ({named[0] if named else 'gcc, cc, clang'}); install gcc or set CC")


def run(command: list[str], options: dict[str, str], timeout_s: float) -> tuple[int, str]:
    """Exit code and output; a program past its time is killed and said to be."""
    env = {**os.environ, **options}
    with subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += f"\nkilled after {timeout_s:.0f} s\n"
        return process.returncode, output


# ---- sanitizers: what works here ----


def reason_of(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"error|FATAL|fatal|cannot", line)), lines[-1] if lines else "?")


def starts(flavour: Flavour, program: Path) -> str | None:
    """Why the program does not run reliably, or None."""
    # Several times: with randomised addresses a sanitizer may start only now and then.
    for _ in range(8):
        code, output = run([*flavour.launcher, str(program)], flavour.options, 60)
        if code != 0:
            return reason_of(output)
    return None


def probe(compiler: list[str], flavour: Flavour, tally: Tally) -> str | None:
    """Makes the flavour ready to use; returns why it can't be."""
    source, program = BUILD / "probe.c", BUILD / f"probe-{flavour.name}"
    source.write_text(PROBE)
    code, output = run([*compiler, *flavour.flags, str(source), "-o", str(program)], {}, 60)
    if code != 0:
        return f"the compiler can't build with {' '.join(flavour.flags)}: {reason_of(output)}"
    flavour.options = dict(SANITIZER_OPTIONS)
    problem = starts(flavour, program)
    if problem and shutil.which(FIXED_ADDRESSES[0]):
        flavour.launcher = FIXED_ADDRESSES
        if starts(flavour, program) is None:
            return None
        flavour.launcher = ()
    if problem and "Leak" in problem:
        # It traces its own process, which some containers forbid.
        flavour.options["ASAN_OPTIONS"] += ":detect_leaks=0"
        if starts(flavour, program) is None:
            print(f"SKIPPED: the leak check because {problem}")
            tally.skipped += 1
            return None
    return f"its programs don't run here: {problem}" if problem else None


def usable(compiler: list[str], name: str, what: str, tally: Tally) -> Flavour:
    """The flavour, or the bare build with a visible reason."""
    problem = probe(compiler, FLAVOURS[name], tally)
    if problem is None:
        return FLAVOURS[name]
    print(f"SKIPPED: {what} because {problem}; the tests run without it")
    tally.skipped += 1
    return FLAVOURS["bare"]


# ---- build ----


def compile_all(commands: list[list[str]]) -> None:
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        for command, (code, output) in zip(commands, pool.map(lambda c: run(c, {}, 300), commands), strict=True):
            if output.strip():
                print(output.rstrip())
            if code != 0:
                raise SystemExit(f"failed: {' '.join(command)}")


def build(
    compiler: list[str],
    flavour: Flavour,
    tests: Sequence[Path],
    includes: Mapping[str, str],
    extra: Sequence[Path] = (),
) -> dict[str, Path]:
    """Compiles the core once and each test's source against it; returns the programs by the tests' names.

    `includes` names the source of the core that a test includes instead of linking it; `extra` sources are linked to
    each test.
    """
    folder = BUILD / flavour.name
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*flavour.flags, *WARNINGS, "-I", str(CSRC), "-I", str(HERE)]
    sources = [*sorted(CSRC.glob("*.c")), *extra, *tests]
    objects = {source.stem: folder / f"{source.stem}.o" for source in sources}
    compile_all([[*compiler, *flags, "-c", str(source), "-o", str(objects[source.stem])] for source in sources])
    core = sorted(source.stem for source in CSRC.glob("*.c"))
    programs = {test.stem: folder / test.stem for test in tests}
    commands = []
    for test, program in programs.items():
        linked = [objects[test], *(objects[name] for name in core if name != includes.get(test))]
        linked += [objects[source.stem] for source in extra]
        commands.append([*compiler, *flavour.flags, "-pthread", *map(str, linked), "-lm", "-o", str(program)])
    compile_all(commands)
    return programs


# ---- run ----


def run_program(flavour: Flavour, program: Path, args: list[str], timeout_s: float, tally: Tally) -> None:
    """Runs one test program and counts what it printed; whatever else it prints is shown."""
    start = time.monotonic()
    code, output = run([*flavour.launcher, str(program), *args], flavour.options, timeout_s)
    counts = {word: len(re.findall(rf"^{word} ", output, re.M)) for word in ("PASSED", "FAILED", "SKIPPED")}
    tally.passed += counts["PASSED"]
    tally.failed += counts["FAILED"]
    tally.skipped += counts["SKIPPED"]
    print(f"{program.name} [{flavour.name}]: {counts['PASSED']} passed, {time.monotonic() - start:.1f} s")
    for line in output.splitlines():
        if not line.startswith("PASSED "):
            print(f"    {line}")
    if code != 0 and counts["FAILED"] == 0:
        tally.failed += 1
        print(f"FAILED {program.name} [{flavour.name}]: it ended with {code} (a crash, a sanitizer's report or a hang)")
    elif code == 0 and counts["PASSED"] == 0:
        tally.failed += 1
        print(f"FAILED {program.name} [{flavour.name}]: it ran no test")
