"""Runs a program as Gramine would let it run: builds the launcher beside this file, starts it, reads its report."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from commands import LIMIT_S, environment

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
SOURCES = ("profile.c", "filter.c", "view.c", "supervisor.c")
#: The launcher's own status where it can't set the profile up.
CAN_NOT = 125
_FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror")


@dataclass
class Inside:
    """A program that ended inside: its status (128 + N after signal N), output, and how often what was refused."""

    code: int
    out: str
    err: str
    refused: dict[str, int] = field(default_factory=dict)
    signal: int = 0


@functools.cache
def launcher() -> Path:
    """The launcher, built once for each state of its sources. Raises ``RuntimeError`` where that is impossible."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "cc"))), None)
    if compiler is None:
        raise RuntimeError("there is no C compiler")
    texts = [(HERE / name).read_bytes() for name in (*SOURCES, "profile.h")]
    program = PROJECT / "build" / "enclave" / f"profile-{hashlib.sha256(b''.join(texts)).hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=program.parent, delete=False) as made:
            pass
        command = [compiler, *_FLAGS, "-o", made.name, *(str(HERE / name) for name in SOURCES)]
        subprocess.run(command, check=True, timeout=LIMIT_S)
        os.replace(made.name, program)
    return program


@functools.cache
def missing() -> str:
    """Why the profile can't be had on this machine; empty where it can."""
    if not sys.platform.startswith("linux") or os.uname().machine not in ("x86_64", "aarch64"):
        return "the enclave profile needs Linux on x86-64 or AArch64"
    try:
        program = launcher()
    except RuntimeError as error:
        return f"the enclave profile can't be built: {error}"
    with tempfile.TemporaryDirectory() as directory:
        command = [str(program), f"{directory}/report", directory, "--", "/bin/true"]
        tried = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    return "" if tried.returncode == 0 else f"the enclave profile can't be set up here: {tried.stderr.strip()}"


def require_profile() -> None:
    """Skips a module of tests, with the reason, where the profile can't be had."""
    if missing():
        pytest.skip(missing(), allow_module_level=True)


_started: list[Started] = []


def kill_all() -> None:
    """Ends what a failed test has left running."""
    while _started:
        _started.pop().kill()


class Started:
    """A program inside, running. ``pid`` is its number outside."""

    def __init__(self, command: Sequence[str], shm: Path, *, keep: Sequence[Path] = (), **env: str) -> None:
        _started.append(self)
        self._directory = tempfile.TemporaryDirectory(prefix="tsqp-enclave-")
        self._report = Path(self._directory.name) / "report"
        kept = [str(path) for path in (*_needed(), *keep) if str(path).startswith("/tmp/")]
        given = environment(**env)
        for name in ("TSQP_SHM_DIR", "TMPDIR"):  # /dev/shm and /tmp are what they are inside
            given.pop(name, None)
        self.process = subprocess.Popen(
            [str(launcher()), str(self._report), str(shm), *dict.fromkeys(kept), "--", *command],
            env=given,
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """The program's process, as this side sees it; 0 where it is not running yet."""
        lines = self._lines()
        return int(lines["pid"]) if "pid" in lines else 0

    def finish(self) -> Inside:
        """Waits for the end; a program that does not end is killed, which its status shows."""
        try:
            out, err = self.process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()  # and with it the program
            out, err = self.process.communicate()
        lines = self._lines()
        self._directory.cleanup()
        refused = {name[8:]: int(count) for name, count in lines.items() if name.startswith("refused ")}
        return Inside(self.process.returncode, out, err, refused, int(lines.get("signal", 0)))

    def kill(self) -> None:
        """Ends the program and its launcher, whatever they do."""
        if self.process.poll() is None:
            self.process.kill()
            self.finish()

    def _lines(self) -> dict[str, str]:
        """The report: several rules of one name are one line here."""
        found: dict[str, str] = {}
        text = self._report.read_text() if self._report.exists() else ""
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            found[name] = str(int(found.get(name, 0)) + int(value))
        return found


def _needed() -> list[Path]:
    """What Python and the project need, wherever they lie."""
    found = [PROJECT, Path(sys.prefix), Path(sys.base_prefix)]
    return [path for path in found if not any(other in path.parents for other in found)]


def run_inside(command: Sequence[str], shm: Path, *, keep: Sequence[Path] = (), **env: str) -> Inside:
    """Runs a program inside to its end; ``shm`` is what it sees as /dev/shm."""
    return Started(command, shm, keep=keep, **env).finish()


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *arguments]
