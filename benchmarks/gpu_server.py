"""The server's end of the GPU hand-off benchmark: lanes whose copies are enqueued ahead, and the way by events.

A lane is one client's: a CUDA stream of its own and pairs of rings of one slot each. With one slot it is known in
advance which memory the next message lies in, so that waiting, copying and publishing can all be enqueued before
the client has sent anything. The client is an ordinary end of these rings; only, it has to spin or to poll, since a
stream wakes nobody. See ``tsqp.cuda_driver`` for how a client could hold such a stream, and why it is a stream that
nobody else computes on; :meth:`Lane.let_go` is the host's way to end that.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from tsqp import ShmRingBuffer, listen
from tsqp.cuda import CudaWork, PageLock
from tsqp.cuda_driver import Driver
from tsqp.errors import ClosedError, DeviceError, PeerDiedError, TsqpError

from . import machine

#: Rounds enqueued ahead at once. A stream takes about a thousand operations; then enqueuing waits for the client.
AHEAD = 100
PATIENCE_S = 20.0
LINE, PAGE = 64, 4096
#: The words of a ring's entry that are used here, by their place in csrc/layout.h.
_SEQUENCE, _SLOT, _NBYTES, _FILLED = 0, 24, 32, 40
#: More than any sequence word a lane waits for, and small enough for words of 32 bits.
_PAST_ALL = 1 << 30


@dataclass(frozen=True)
class Plan:
    """``lanes`` streams, each with ``depth`` pairs of rings, for messages of ``nbytes``; 0: words alone."""

    lanes: int
    depth: int
    nbytes: int


class OneSlot:
    """A registered ring of one slot, as the device sees it."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.ring = ShmRingBuffer(max(nbytes, LINE), 1, wait="spin")
        segment = self.ring.segment
        self.entry, self.slot = segment.address + PAGE, segment.address + 2 * PAGE
        self.lock = PageLock((segment.address, segment.nbytes), driver, lambda: None)
        if not self.lock.pinned:
            self.ring.close()
            raise DeviceError(f"a ring can't be page-locked: {self.lock.reason}")
        self.sequence = driver.device_pointer(self.entry + _SEQUENCE)

    def word(self, place: int) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_address(self.entry + place)

    def close(self) -> None:
        self.lock.release()
        self.ring.close()


class Pair:
    """The rings of a client's requests and of its replies."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.request = OneSlot(driver, nbytes)
        try:
            self.reply = OneSlot(driver, nbytes)
        except TsqpError:
            self.request.close()
            raise
        # What every reply's entry says beside its sequence word; a reader checks it and leaves it as it is.
        for place, value in ((_SLOT, 0), (_NBYTES, max(nbytes, LINE)), (_FILLED, max(nbytes, LINE))):
            self.reply.word(place).value = value

    def close(self) -> None:
        self.request.close()
        self.reply.close()


class Lane:
    """A stream, its rings and its memory on the device."""

    def __init__(self, driver: Driver, plan: Plan) -> None:
        self._driver, self._nbytes, self._lap = driver, plan.nbytes, 0
        self.pairs: list[Pair] = []
        self._stream = driver.stream()
        self._memory = 0
        try:
            self._memory = driver.allocate(max(plan.nbytes, LINE))
            for _ in range(plan.depth):
                self.pairs.append(Pair(driver, plan.nbytes))
        except TsqpError:
            self.close()
            raise

    def enqueue(self, rounds: int) -> None:
        """So many answers of every pair, in turn. The pair's words are those of message ``self._lap`` (csrc/ring.c):
        odd, there is one to read; even, there is room for the next."""
        driver, stream = self._driver, self._stream
        for _ in range(rounds):
            for pair in self.pairs:
                driver.wait_word(stream, pair.request.sequence, 2 * self._lap + 1)
                if self._nbytes:
                    driver.copy_in(stream, self._memory, pair.request.slot, self._nbytes)
                    driver.copy_out(stream, pair.reply.slot, self._memory, self._nbytes)
                driver.write_word(stream, pair.reply.sequence, 2 * self._lap + 1)
                driver.write_word(stream, pair.request.sequence, 2 * self._lap + 2)
            self._lap += 1

    def let_go(self, patience_s: float = PATIENCE_S) -> None:
        """Makes the stream run to its end whatever the client does, by writing the words it waits for.

        Again and again: the stream's own writes, and a hostile client's, take the word back. Raises
        :class:`~tsqp.errors.DeviceError` where that takes longer than ``patience_s``.
        """
        end = time.monotonic() + patience_s
        while not self._driver.done(self._stream):
            if time.monotonic() > end:
                raise DeviceError(f"a stream still waits after {patience_s:g} s; end this process")
            for pair in self.pairs:
                pair.request.word(_SEQUENCE).value = _PAST_ALL
            os.sched_yield()

    def close(self) -> None:
        """Gives everything back; the stream has to have run to its end."""
        self._driver.destroy(self._stream)
        for pair in self.pairs:
            pair.close()
        if self._memory:
            self._driver.free(self._memory)


class Lanes:
    """What is measured on at a time, made and driven as the client says."""

    def __init__(self, driver: Driver, plan: Plan) -> None:
        self.lanes: list[Lane] = []
        try:
            for _ in range(plan.lanes):
                self.lanes.append(Lane(driver, plan))
        except TsqpError:
            self.close()
            raise

    def handles(self) -> list[list[tuple[Any, Any]]]:
        """By lane and pair: how the client attaches to requests and replies."""
        return [[(pair.request.ring.handle(), pair.reply.ring.handle()) for pair in lane.pairs] for lane in self.lanes]

    def enqueue(self, rounds: int) -> None:
        for lane in self.lanes:
            lane.enqueue(rounds)

    def close(self) -> None:
        for lane in self.lanes:
            lane.let_go()
        for lane in self.lanes:
            lane.close()


def answer_by_events(connection: Connection, device: torch.device, driver: Any = None, runtime: Any = None) -> None:
    """One client's messages there and back as the server sends replies: an event after the copies, then published.

    Ends when the client closes its channel. ``driver`` and ``runtime`` are :class:`~tsqp.cuda.CudaWork`'s.
    """
    work = CudaWork(device, driver, torch.cuda if runtime is None else runtime)
    with listen("tcp://127.0.0.1:0") as listener:
        connection.send(("listening", listener.endpoint))
        channel = listener.accept(timeout=PATIENCE_S)
        lock = work.page_lock(channel)
        try:
            while True:
                with channel.lease(timeout=PATIENCE_S) as message:
                    begin = time.perf_counter_ns()
                    results = [tensor.to(device, non_blocking=True) for tensor in message.tensors]
                    work.send(channel, results, begin, 0, tag=message.tag, timeout=PATIENCE_S)
        except (ClosedError, PeerDiedError):
            return
        finally:
            lock.release()
            channel.close()


def serve(connection: Connection, device: int, library: str) -> None:
    """Does what the client asks for over ``connection`` until told to stop; a fault is its answer."""
    machine.die_with_parent()
    # Streams that share a hardware queue wait for each other; read when the driver starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    lanes: Lanes | None = None
    try:
        driver = Driver(device, library)
        connection.send(("device", about(driver)))
        while (asked := connection.recv()) is not None:
            what, value = asked
            if what == "lanes":
                lanes = Lanes(driver, value)
                connection.send(("handles", lanes.handles()))
            elif what == "rounds" and lanes is not None:
                lanes.enqueue(value)
                connection.send(("enqueued", value))
            elif what == "end" and lanes is not None:
                ending, lanes = lanes, None
                ending.close()
                connection.send(("ended", None))
            elif what == "events":
                answer_by_events(connection, torch.device("cuda", device))
                connection.send(("ended", None))
    except (TsqpError, RuntimeError) as error:  # torch's faults are RuntimeErrors
        connection.send(("fault", str(error).partition("\n")[0]))
    except EOFError:
        pass  # the client went; what is held is given back below
    finally:
        if lanes is not None:
            lanes.close()


def about(driver: Driver) -> dict[str, Any]:
    """What the device is, and what its streams can do. ``without_words`` says why they can't wait for words."""
    why = driver.without_words()
    return {
        "name": driver.name,
        "cuda": driver.version,
        "without_words": why,
        "word_bits": 0 if why else 64 if driver.wide else 32,
        "events": torch.cuda.is_available(),
    }
