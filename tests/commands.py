"""Runs tsqp's commands as a user does: in a process of their own, looking at output and exit status."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tsqp import cli, run

#: Long enough for a busy machine; a command that needs it has hung.
LIMIT_S = 120.0
_ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
#: Variables of the machine the tests run on that would change what a command does.
_OURS = ("LLAMA_MODEL_PATH", "LLAMA_GPU_DEVICE", "LLAMA_DTYPE", "LLAMA_IPC_PATH")
_OURS += ("TSQP_MAX_SHM_CHUNK_BYTES", "TSQP_SHM_MAX_CHUNKS", "TSQP_TRUSTED_DIGEST")


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed, without colours."""

    code: int
    out: str
    err: str


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for a command: CPU, wide terminal, no settings of tsqp but ``changes``."""
    env = {name: value for name, value in os.environ.items() if name not in _OURS}
    env.update(OMP_WAIT_POLICY="passive", LLAMA_GPU_DEVICE="cpu", COLUMNS="200", HF_HUB_OFFLINE="1")
    return env | changes


def tsqp(*arguments: str, **env: str) -> Outcome:
    """Runs ``tsqp`` to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "tsqp", *arguments],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return Outcome(done.returncode, _ANSI.sub("", done.stdout), _ANSI.sub("", done.stderr))


def tsqp_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """Runs ``tsqp`` in this process, which has torch loaded already."""
    outcome = _here(cli.main, capsys, arguments)
    return Outcome(outcome.code, _ANSI.sub("", outcome.out), _ANSI.sub("", outcome.err))


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """Runs ``tsqp run`` in this process, by the way it has of its own; it prints no colours, and none are taken out."""
    return _here(run.main, capsys, arguments)


def _here(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> Outcome:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    printed = capsys.readouterr()
    return Outcome(int(stop.value.code or 0), printed.out, printed.err)


def start(*arguments: str, **env: str) -> subprocess.Popen[bytes]:
    """Starts ``tsqp`` with pipes for its output."""
    return subprocess.Popen(
        [sys.executable, "-m", "tsqp", *arguments],
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> Outcome:
    """Waits for a started command; kills it where it hangs, which fails the test by its exit status."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return Outcome(process.returncode, _plain(out), _plain(err))


def _plain(output: bytes | None) -> str:
    """Output without colours; none where the test closed the pipe."""
    return _ANSI.sub("", (output or b"").decode())


def wait_for(condition: object, what: str) -> None:
    """Waits until ``condition()`` is true; fails naming ``what`` when it takes too long."""
    assert callable(condition)
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {LIMIT_S:.0f} s"
        time.sleep(0.02)


@contextmanager
def short_directory() -> Iterator[Path]:
    """A temporary directory whose path leaves room for a socket's name (pytest's own may not)."""
    with tempfile.TemporaryDirectory(prefix="tsqp-test-", dir="/tmp") as directory:
        yield Path(directory)


@dataclass
class Served:
    """A ``tsqp serve`` process: where it listens, and how it ended once :func:`serving` has stopped it."""

    process: subprocess.Popen[bytes]
    socket: Path
    outcome: Outcome | None = None

    @property
    def endpoint(self) -> str:
        """Its endpoint."""
        return f"ipc://{self.socket}"

    def stop(self, number: int = signal.SIGTERM) -> Outcome:
        """Sends a signal and waits for the end."""
        if self.outcome is None:
            self.process.send_signal(number)
            self.outcome = finish(self.process)
        return self.outcome


@contextmanager
def serving(directory: Path, *arguments: str, **env: str) -> Iterator[Served]:
    """A ready ``tsqp serve`` on the embedded model with one thread; stopped at the end of the block."""
    socket = directory / "server.sock"
    process = start("serve", "--endpoint", f"ipc://{socket}", "--dtype", "float32", "--threads", "1", *arguments, **env)
    served = Served(process, socket)
    try:
        wait_for(lambda: socket.exists() or process.poll() is not None, "the server's socket")
        assert process.poll() is None, finish(process)
        yield served
    finally:
        served.stop()


def processes_naming(text: str) -> list[int]:
    """Ids of live processes whose command line holds ``text``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if text.encode() in words and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found
