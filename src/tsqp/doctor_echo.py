"""A real echo through a ring, for a second: that it works here, and how fast.

The other end is a process of its own, which ends with the connection and is killed at the latest when the check is
over. As a program (``python -m tsqp.doctor_echo ENDPOINT``) this module is that other end.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO

import torch

from .channel import Channel
from .config import without_keys
from .doctor_machine import NOTE, OK, PROBLEM, Finding, Machine
from .doctor_software import short_directory
from .errors import ClosedError, ConnectError, PeerDiedError, TsqpError, WaitTimeoutError
from .exits import signals_deferred
from .listener import Listener
from .transport import connect

SIZES = {"1 KB": 1024, "1 MB": 1 << 20}
#: Both sizes together take the one second.
SECONDS_EACH = 0.5
_SLOT_BYTES, _SLOTS = 2 << 20, 4
#: Loading torch takes seconds on a busy machine.
_START_S, _ANSWER_S, _END_S = 60.0, 5.0, 5.0
#: How long the other end goes on without hearing anything: so soon it is gone where this end was killed.
_SILENCE_S = 10.0
_WARM_UP = 20
#: A round trip of 1 KB that takes so long means that an end waits for a core, not for memory.
_SLOW_US = 500.0


def echo(machine: Machine) -> Finding:
    """Sends tensors to another process and back through shared memory."""
    if machine.in_gramine:
        return _inside()
    directory = short_directory()
    try:
        with Listener(f"ipc://{directory}/echo", _SLOT_BYTES, _SLOTS, reap=False, shm_name="") as listener:
            return _told(_with_child(listener), "another process")
    except (TsqpError, OSError) as error:
        text = " ".join(str(error).split())
        advice = "Look at what the checks above found; if they found nothing, report it."
        return Finding("echo", PROBLEM, f"No message came back from another process: {text}.", advice)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _told(figures: dict[str, dict[str, float]], whom: str) -> Finding:
    parts = [
        f"{size} {row['median_us']:.1f} µs (99 %: {row['p99_us']:.0f} µs), {row['mb_per_second']:.0f} MB/s"
        for size, row in figures.items()
    ]
    told = f"Tensors went to {whom} and back: {'; '.join(parts)}."
    if figures["1 KB"]["median_us"] < _SLOW_US:
        return Finding("echo", OK, told, figures=figures)
    advice = "Give both ends a core of their own, and look whether others use the machine (top)."
    return Finding("echo", NOTE, f"{told} That is slow: an end waits for a core.", advice, figures)


def _measure(trip: Callable[[torch.Tensor], torch.Tensor], nbytes: int) -> dict[str, float]:
    """Round trips of a tensor of ``nbytes`` for :data:`SECONDS_EACH`; raises :class:`TsqpError` for other bytes."""
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    for _ in range(_WARM_UP):
        back = trip(data)
    spent: list[int] = []
    began = now = time.perf_counter_ns()
    while now - began < SECONDS_EACH * 1e9:
        before, back = now, trip(data)
        now = time.perf_counter_ns()
        spent.append(now - before)
    if not torch.equal(back, data):
        raise TsqpError("what came back is not what was sent, which is a fault of tsqp or of the machine's memory")
    spent.sort()
    return {
        "bytes": nbytes,
        "round_trips": len(spent),
        "median_us": statistics.median(spent) / 1e3,
        "p99_us": spent[len(spent) * 99 // 100] / 1e3,
        "mb_per_second": 2 * nbytes * len(spent) / ((now - began) / 1e9) / 1e6,
    }


# --- with a process -------------------------------------------------------------------------------------------


def _with_child(listener: Listener) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "tsqp.doctor_echo", listener.endpoint]
    with tempfile.TemporaryFile() as said:
        child: subprocess.Popen[bytes] | None = None
        try:
            with signals_deferred(), without_keys():
                child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said)
            with _accept(listener, child, said) as channel:
                return {size: _measure(lambda data: _trip(channel, data), nbytes) for size, nbytes in SIZES.items()}
        finally:
            if child is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_END_S)  # it leaves with the connection
                child.kill()
                child.wait()


def _accept(listener: Listener, child: subprocess.Popen[bytes], said: IO[bytes]) -> Channel:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            return listener.accept(0.2)
        except WaitTimeoutError:
            if child.poll() is not None:
                said.seek(0)
                lines = said.read(1 << 16).decode(errors="replace").strip().splitlines()
                last = lines[-1] if lines else "it said nothing"
                raise ConnectError(f"the other process ended with code {child.returncode}: {last}") from None
            if time.monotonic() > deadline:
                raise ConnectError(f"the other process did not connect within {_START_S:g} s") from None


def _trip(channel: Channel, data: torch.Tensor) -> torch.Tensor:
    channel.send([data], timeout=_ANSWER_S)
    return channel.recv(_ANSWER_S).tensors[0]


def answer(endpoint: str) -> None:
    """Sends back what comes, until the connection ends."""
    torch.set_num_threads(1)
    with (
        contextlib.suppress(ClosedError, PeerDiedError, ConnectError, WaitTimeoutError),
        connect(endpoint, _SILENCE_S) as channel,
    ):
        while True:
            with channel.lease(_SILENCE_S) as message:
                channel.send(message.tensors, tag=message.tag, timeout=_ANSWER_S)


# --- inside an enclave ----------------------------------------------------------------------------------------


def _inside() -> Finding:
    """A process would be a new enclave, and neither a port can be bound nor a ring be made."""
    return Finding(
        "echo",
        NOTE,
        "Not measured: the other end of a ring is on the host, which also makes the ring.",
        "Go all the way to a server there: tsqp health --endpoint tcp://127.0.0.1:PORT.",
    )


if __name__ == "__main__":
    answer(sys.argv[1])
