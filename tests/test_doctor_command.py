"""The doctor as a user meets it: what the command prints and leaves, and an echo whose other end misbehaves."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from commands import environment, finish, processes_naming, start, tsqp, tsqp_here, wait_for
from doctoring import check

from tsqp import doctor_echo
from tsqp.doctor import CHECKS
from tsqp.doctor_machine import NOTE, OK, PROBLEM, Machine
from tsqp.exits import termination_raises
from tsqp.segments import leftovers, reap

# --- the echo


def stand_in(directory: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Lets this Python code be the other process of the echo; its endpoint is ``sys.argv[1]``."""
    program, script = directory / "other", directory / "other.py"
    script.write_text(code)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$3"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.fixture
def quiet(shm_directory: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where the echo leaves anything behind. The directory for temporary files is the test's own."""
    place = Path(endpoint.removeprefix("ipc://")).parent
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    yield
    assert [*place.iterdir(), *shm_directory.iterdir()] == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit('the ring is broken')", "ended with code 1: the ring is broken"),
        ("import time; time.sleep(600)", "did not connect within 1 s"),
        (
            "import sys, tsqp\nc = tsqp.connect(sys.argv[1])\n"
            "while True:\n    m = c.recv(60)\n    c.send([m.tensors[0] + 1])",
            "what came back is not what was sent",
        ),
        ("import sys, tsqp\nc = tsqp.connect(sys.argv[1])\nc.recv(60)\nc.recv(60)", "before the deadline"),
    ],
)
def test_an_other_end_that_misbehaves_is_a_problem_and_gone(
    tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    if "sleep" in code:
        monkeypatch.setattr(doctor_echo, "_START_S", 1.0)
    monkeypatch.setattr(doctor_echo, "_ANSWER_S", 0.5 if "c.recv(60)\nc.recv" in code else 20.0)
    monkeypatch.setattr(doctor_echo, "_END_S", 0.5)
    monkeypatch.setattr(doctor_echo, "SECONDS_EACH", 0.05)
    stand_in(tmp_path, monkeypatch, code)
    check(doctor_echo.echo(Machine()), PROBLEM, "No message came back", words)


@pytest.mark.watchdog(120)
def test_a_doctor_that_is_told_to_leave_leaves_nothing(shm_directory: Path, endpoint: str) -> None:
    place = Path(endpoint.removeprefix("ipc://")).parent
    process = start("doctor", TMPDIR=str(place))
    try:
        wait_for(lambda: processes_naming(f"{place}/tsqp-doctor-"), "the echo's other end")
        process.send_signal(signal.SIGTERM)
        outcome = finish(process)
    finally:
        process.kill()
        process.wait()
    assert outcome.code == 128 + signal.SIGTERM, outcome
    assert "Traceback" not in outcome.err
    assert processes_naming(f"{place}/tsqp-doctor-") == []
    assert list(place.iterdir()) == []
    assert list(shm_directory.iterdir()) == []


def test_a_signal_while_the_other_end_starts_loses_nobody(
    shm_directory: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the process is there already, and nobody has been told of it yet."""
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(doctor_echo.subprocess, "Popen", Interrupted)
    with pytest.raises(SystemExit), termination_raises():
        doctor_echo.echo(Machine())
    assert [process.returncode is not None for process in started] == [True]
    assert list(shm_directory.iterdir()) == []


# --- the command


@pytest.mark.watchdog(120)
def test_the_command_says_what_is_so(quiet: None, shm_directory: Path, endpoint: str) -> None:
    """Every figure against what Python itself says; and a leftover is told of, and left."""
    code = "import os, tsqp\nring = tsqp.ShmRingBuffer(4096, 2)\nprint(ring.name, flush=True)\nos._exit(1)"
    out = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    name = out.stdout.strip()
    try:
        outcome = tsqp("doctor", "--json", LLAMA_IPC_PATH=endpoint, OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="1")
        assert [left.name for left in leftovers()] == [name]
    finally:
        reap(leftovers())
    told = json.loads(outcome.out)
    assert outcome.err == ""
    assert outcome.out.count("\n") == 1
    assert outcome.code == (0 if told["healthy"] else 1)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert list(found) == [*(name for name, _, _ in CHECKS), "echo"]
    assert not [finding for finding in told["findings"] if "failed itself" in finding["found"]]
    figures = {name: finding["figures"] for name, finding in found.items()}
    assert figures["leftover_segments"]["names"] == [name]
    assert found["leftover_segments"]["state"] == NOTE
    assert figures["shared_memory"]["total_bytes"] == shutil.disk_usage(shm_directory).total
    assert figures["cores"]["affinity"] == len(os.sched_getaffinity(0))
    assert figures["threads"]["torch"] == 1
    assert figures["threads"]["wait_policy"] == "ACTIVE"
    assert figures["torch"]["version"] == torch.__version__
    assert figures["zeromq"]["libzmq"] == zmq.zmq_version()
    assert figures["descriptors"]["soft"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert figures["unix_sockets"]["default_endpoint"] == endpoint
    assert found["echo"]["state"] in (OK, NOTE)
    for nbytes in (1024, 1 << 20):
        row = figures["echo"]["1 KB" if nbytes == 1024 else "1 MB"]
        assert row["bytes"] == nbytes
        assert row["median_us"] <= row["p99_us"]
        seconds = 2 * nbytes * row["round_trips"] / row["mb_per_second"] / 1e6
        assert seconds >= 0.5
        assert row["round_trips"] * row["median_us"] / 2 <= seconds * 1e6  # half of them took the median or longer


def test_the_command_leaves_with_1_for_a_problem(
    endpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSQP_MAX_SHM_CHUNK_BYTES", str(1 << 39))
    monkeypatch.setenv("LLAMA_IPC_PATH", endpoint)
    outcome = tsqp_here(capsys, "doctor", "--no-echo")
    assert (outcome.code, outcome.err) == (1, "")
    lines = outcome.out.splitlines()
    assert "problem   shared_memory" in lines
    assert "one client takes 10 TiB" in outcome.out
    assert any(line.strip().startswith("-> Make it larger") for line in lines)
    assert lines[-1].startswith(f"{len(CHECKS)} checks: ")
    assert not [line for line in lines if line.endswith(" ")]
    monkeypatch.setenv("TSQP_MAX_SHM_CHUNK_BYTES", "ten")
    told = json.loads(tsqp_here(capsys, "doctor", "--no-echo", "--json").out)
    states = {finding["name"]: finding for finding in told["findings"]}
    assert "TSQP_MAX_SHM_CHUNK_BYTES='ten'" in states["shared_memory"]["found"]
    assert states["shared_memory"]["state"] == PROBLEM
