"""How fast a CUDA stream takes a message out of a ring and answers it, without and with the server's CPU in between.

    python -m benchmarks.gpu_handoff --device cuda:0 --out results/gpu_handoff.json

The client is a plain process. The server's waits, copies and writes are enqueued ahead, on streams that wait for the
ring's own words (``stream``), or the server's thread takes each message and sends the reply behind an event, as tsqp's
server does (``events``). Measured is from the moment the client publishes a message until it sees the reply, all of
it there; every reply's bytes are checked, outside of that time. Beside it stands what was published elsewhere for an
SGX enclave and an H100 over registered memory: other machines, so no more than a direction.

Needs a GPU and its driver; without, it says so and exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table

from tsqp import ShmRingBuffer, connect
from tsqp.errors import DeviceError, TsqpError

from . import gpu_server, machine
from .gpu_server import AHEAD, LINE, PATIENCE_S, Plan
from .peers import WrongAnswerError
from .report import NOTHING, Samples, figure, size_text

SIZES = (0, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
#: Microseconds by size, and GB/s by lanes.
PUBLISHED_US = {0: "7", 16 << 10: "15-20", 64 << 10: "15-20", 256 << 10: "37", 1 << 20: "90"}
PUBLISHED_GB_PER_S = {1: "28", 4: "32"}
BATCHES = 5
RATE_NBYTES, RATE_DEPTH = 1 << 20, 2
#: Of every batch: what wakes up is not what is measured.
WARMUP_ROUNDS = 10


class Server:
    """The process that has the GPU; every answer of its is waited for with a deadline."""

    def __init__(self, device: int, library: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=gpu_server.serve, args=(theirs, device, library), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self, expected: str) -> Any:
        """What the server says next, which has to be what is expected; raises DeviceError for a fault."""
        try:
            if not self._connection.poll(3 * PATIENCE_S):
                raise DeviceError(f"the server's process said nothing for {3 * PATIENCE_S:g} s")
            what, value = self._connection.recv()
        except (EOFError, ConnectionError):
            raise DeviceError("the server's process ended; see what it printed") from None
        if what != expected:
            raise DeviceError(value if what == "fault" else f"the server's process said {what!r}, not {expected!r}")
        return value

    def ask(self, what: str, value: Any, expected: str) -> Any:
        try:
            self._connection.send((what, value))
        except ConnectionError:
            raise DeviceError("the server's process ended; see what it printed") from None
        return self.answer(expected)

    def close(self) -> None:
        with contextlib.suppress(ConnectionError):
            self._connection.send(None)
        self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()


class Caller:
    """The client's end of a pair of rings: messages of one size, each with contents of its own."""

    def __init__(self, request: Any, reply: Any, nbytes: int) -> None:
        self._request = ShmRingBuffer(*request, wait="spin")
        self._reply = ShmRingBuffer(*reply, wait="spin")
        self._nbytes = nbytes
        self._contents = numpy.random.default_rng(0).integers(0, 1 << 62, max(nbytes, LINE) // 8, dtype=numpy.int64)
        self._sent = 0

    def publish(self, whole: bool = True) -> int:
        """Sends the next message; returns the time just before the reader may see it, in ns. Not ``whole``: what the
        slot held stays, but for a stamp at each end."""
        self._sent += 1
        with self._request.acquire_write(PATIENCE_S, len(self._contents) * 8) as view:
            words = numpy.frombuffer(view, dtype=numpy.int64)
            if whole:
                words[:] = self._contents
            words[0] = words[-1] = self._sent
            del words  # the view ends with the block
            return time.perf_counter_ns()

    def take(self, whole: bool = True) -> int:
        """Waits for the reply and checks it; returns when it was seen, in ns. Raises WrongAnswerError."""
        with self._reply.acquire_read(PATIENCE_S) as view:
            seen = time.perf_counter_ns()
            words = numpy.frombuffer(view, dtype=numpy.int64)
            if self._nbytes:
                stamped = words[0] == words[-1] == self._sent
                if not stamped or (whole and not numpy.array_equal(words[1:-1], self._contents[1:-1])):
                    raise WrongAnswerError(f"message {self._sent} of {size_text(self._nbytes)} came back changed")
            del words
            return seen

    def close(self) -> None:
        self._request.close()
        self._reply.close()


@contextlib.contextmanager
def lanes_of(server: Server, plan: Plan) -> Iterator[list[list[Caller]]]:
    """The callers of each lane; the server gives back what it holds for them at the end."""
    callers: list[list[Caller]] = []
    try:
        for lane in server.ask("lanes", plan, "handles"):
            callers.append([Caller(request, reply, plan.nbytes) for request, reply in lane])
        yield callers
        server.ask("end", None, "ended")
    finally:
        for caller in (caller for lane in callers for caller in lane):
            caller.close()


def by_stream(server: Server, nbytes: int, batches: int) -> Samples:
    """One message at a time through one lane."""
    samples = Samples()
    with lanes_of(server, Plan(1, 1, nbytes)) as ((caller,),):
        for _ in range(batches):
            server.ask("rounds", AHEAD, "enqueued")
            for number in range(AHEAD):
                begin = caller.publish()
                taken = caller.take() - begin
                if number >= WARMUP_ROUNDS:
                    samples.ns.append(taken)
    return samples


def by_events(server: Server, nbytes: int, batches: int) -> Samples:
    """One message at a time through a channel whose server sends replies behind an event."""
    samples, specs = Samples(), [((nbytes // 8,), torch.int64)]
    endpoint = server.ask("events", None, "listening")
    with connect(endpoint, timeout=PATIENCE_S) as channel:
        for number in range(batches * AHEAD):
            sent = torch.arange(number, number + nbytes // 8)
            with channel.reserve(specs, timeout=PATIENCE_S) as out:
                out[0].copy_(sent)
                begin = time.perf_counter_ns()
            with channel.lease(timeout=PATIENCE_S) as message:
                taken = time.perf_counter_ns() - begin
                if not torch.equal(message.tensors[0], sent):
                    raise WrongAnswerError(f"message {number} of {size_text(nbytes)} came back changed")
            if number >= WARMUP_ROUNDS:
                samples.ns.append(taken)
    server.answer("ended")
    return samples


def rate(server: Server, lanes: int, batches: int) -> float:
    """Bytes copied in and out, together, per second, in GB/s: the best of the batches, every lane kept full."""
    best = 0.0
    with lanes_of(server, Plan(lanes, RATE_DEPTH, RATE_NBYTES)) as callers:
        every = [lane[place] for place in range(RATE_DEPTH) for lane in callers]
        for batch in range(batches):
            server.ask("rounds", AHEAD // RATE_DEPTH, "enqueued")
            whole = batch == 0  # later the slots hold the contents already, and a core copies slower than this
            begin = time.perf_counter_ns()
            for caller in every:
                caller.publish(whole)
            for _ in range(AHEAD // RATE_DEPTH - 1):
                for caller in every:
                    caller.take(whole)
                    caller.publish(whole)
            for caller in every:
                caller.take(whole=True)
            if not whole:
                moved = 2 * len(every) * (AHEAD // RATE_DEPTH) * RATE_NBYTES
                best = max(best, moved / (time.perf_counter_ns() - begin))
    return best


@contextlib.contextmanager
def serving(device: int, library: str) -> Iterator[tuple[Server, dict[str, Any]]]:
    """A server's process of its own, and what it says of the device."""
    server = Server(device, library)
    try:
        yield server, server.answer("device")
    finally:
        server.close()


def measure(device: int, library: str, batches: int) -> dict[str, Any]:
    """All of it. What could not be measured is missing; ``device`` or ``faults`` says why.

    Raises :class:`~tsqp.errors.DeviceError` where there is no device at all.
    """
    result: dict[str, Any] = {"machine": machine.describe(), "stream": {}, "rate": {}, "events": {}, "faults": {}}
    with serving(device, library) as (server, about):
        result["device"] = about
        if not about["without_words"]:
            with _noting_faults(result, "stream"):
                for nbytes in SIZES:
                    result["stream"][str(nbytes)] = by_stream(server, nbytes, batches).as_json()
                for lanes in PUBLISHED_GB_PER_S:
                    result["rate"][str(lanes)] = rate(server, lanes, batches + 1)
    if about["events"]:
        with _noting_faults(result, "events"), serving(device, library) as (server, _):
            for nbytes in filter(None, SIZES):
                result["events"][str(nbytes)] = by_events(server, nbytes, batches).as_json()
    return result


@contextlib.contextmanager
def _noting_faults(result: dict[str, Any], way: str) -> Iterator[None]:
    """What one way can't do does not keep the other from being measured, nor what was measured from being kept."""
    try:
        yield
    except (TsqpError, WrongAnswerError) as error:
        result["faults"][way] = str(error)


def table(result: dict[str, Any]) -> Table:
    """A row for each size, which is copied in and out, and one for each number of lanes with messages of 1 MB."""
    device = result["device"]
    title = f"Hand-off to {device['name']} and back, CUDA {device['cuda']}, words of {device['word_bits']} bits"
    shown = Table(title=title, title_justify="left")
    for column in ("", "stream", "p99", "events", "p99", "published"):
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for nbytes, published in PUBLISHED_US.items():
        text = f"{size_text(nbytes)}, µs" if nbytes else "words alone, µs"
        cells = [result[way].get(str(nbytes), {}) for way in ("stream", "events")]
        times = [figure(cell[key]) if cell else NOTHING for cell in cells for key in ("median_us", "p99_us")]
        shown.add_row(text, *times, published)
    for lanes, published in PUBLISHED_GB_PER_S.items():
        found = result["rate"].get(str(lanes))
        text = f"{lanes} lane{'s' if lanes > 1 else ''}, in + out, GB/s"
        shown.add_row(text, NOTHING if found is None else figure(found), "", NOTHING, "", published)
    return shown


def notes(result: dict[str, Any]) -> list[str]:
    """What the table leaves unsaid: where the published figures are from, what was not measured, and why."""
    device = result["device"]
    found = ["published: an SGX enclave and an H100, elsewhere"]
    if device["without_words"]:
        found.append(f"streams were not measured: {device['without_words']}")
    if not device["events"]:
        found.append("events were not measured: torch sees no CUDA device; install a torch that fits the driver")
    return found + [f"{way} FAILED: {fault}" for way, fault in result["faults"].items()]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_handoff", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", default="cuda:0", help="cuda:0, cuda:1, ... (default cuda:0)")
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"of {AHEAD} messages each (default {BATCHES})")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    parser.add_argument("--library", default="libcuda.so.1", help="the CUDA driver (default libcuda.so.1)")
    options = parser.parse_args(argv)
    if not re.fullmatch(r"cuda(:\d+)?", options.device):
        parser.error(f"--device {options.device} is unknown; give cuda:0")
    if options.batches < 1:
        parser.error(f"--batches {options.batches} is no number of 1 or more")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    try:
        result = measure(int(options.device.partition(":")[2] or 0), options.library, options.batches)
    except TsqpError as error:
        print(f"gpu_handoff: {error}", file=sys.stderr)
        return 1
    console = Console()
    console.print(table(result))
    for line in notes(result):
        console.print(line, highlight=False)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["stream"] and not result["faults"] else 1


if __name__ == "__main__":
    sys.exit(main())
