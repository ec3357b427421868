"""The barest call there can be, as a floor: two words in shared memory, and the same work between them.

No message, no check, no server; the one who is asked looks at its word without pause. What such a call takes beside the
work is what this machine takes from any two processes.
"""

from __future__ import annotations

import contextlib
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from . import machine
from .clients import Worker
from .words import Words
from .work import Work

#: Said instead of a number: no more calls for now.
_REST = (1 << 32) - 1


def answer(wire: Connection, path: str) -> None:
    """The one who is asked. Hears how long its work is to take (threads and seconds), or None: calls come now."""
    machine.die_with_parent()
    words, work = Words(path), Work()
    wire.send("ready")
    while True:
        order = wire.recv()
        if order is not None:
            work.order = order
            work()
            wire.send(work.alone_s.get())
            continue
        wire.send("awake")
        seen = words.answer.value
        while seen != _REST:
            while (number := words.question.value) == seen:
                pass
            begin = time.perf_counter_ns()
            if number != _REST:
                work()
            words.number.value = time.perf_counter_ns() - begin
            words.answer.value = seen = number
            words.wake(words.answer)


class Bare:
    """The one who asks."""

    def __init__(self, other: Worker, path: str) -> None:
        self._other, self._words = other, Words(path)
        self._asked = 0
        self.pid = other.pid

    def fit(self, threads: int, seconds: float) -> None:
        """Has the work take so long."""
        self._other.say((threads, seconds))
        self._other.hear()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Calls are answered meanwhile, at the cost of a core."""
        self._words.question.value = self._words.answer.value = self._asked
        self._other.say(None)
        self._other.hear()
        try:
            yield
        finally:
            self._ask(_REST, self._look)

    def call(self, sleeps: bool) -> tuple[int, int]:
        """Nanoseconds that the call took, and those of its work; ``sleeps``: or looks at its word without pause."""
        self._asked += 1
        begin = time.perf_counter_ns()
        self._ask(self._asked, self._sleep if sleeps else self._look)
        return time.perf_counter_ns() - begin, self._words.number.value

    def _ask(self, number: int, wait: Callable[[int], None]) -> None:
        self._words.question.value = number
        wait(number)

    def _look(self, number: int) -> None:
        while self._words.answer.value != number:
            pass

    def _sleep(self, number: int) -> None:
        words = self._words
        while (found := words.answer.value) != number:
            words.sleep(words.answer, found)


@contextlib.contextmanager
def bare() -> Iterator[Bare | None]:
    """A process that answers, and who asks it; None where the number of the system call is not known."""
    if platform.machine() not in Words.SYS_FUTEX:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="bare-") as folder, contextlib.ExitStack() as stack:
        path = str(Path(folder) / "words")
        other = Worker(answer, path)
        stack.callback(other.end)
        other.hear()
        yield Bare(other, path)
