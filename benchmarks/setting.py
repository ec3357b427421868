"""What the parts of the transport benchmark share: cores, durations, progress."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import machine

#: Where nobody watches a bar, a line of progress comes not more often than this.
LINES_S = 2.0


@dataclass
class Setting:
    """Where and how long a run measures. ``pace`` multiplies every duration of a part."""

    cores: tuple[int, int] | None
    pace: float
    console: Console
    _progress: Progress = field(init=False)
    _task: Any = None
    _done: int = 0
    _steps: int = 0
    _line_at: float = 0.0

    def __post_init__(self) -> None:
        columns = (TextColumn("{task.description:46}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # No thread of its own that draws: it would take part in what is measured.
        self._progress = Progress(*columns, console=self.console, transient=True, auto_refresh=False)

    @property
    def client_core(self) -> int | None:
        return self.cores[0] if self.cores else None

    @property
    def server_core(self) -> int | None:
        return self.cores[1] if self.cores else None

    def seconds(self, duration: float) -> float:
        """`duration` at this run's pace."""
        return duration * self.pace

    @contextlib.contextmanager
    def part(self, steps: int) -> Iterator[None]:
        """A progress bar over `steps` calls of :meth:`step`; where there is no terminal, a line now and then."""
        self._done, self._steps, self._line_at = 0, steps, 0.0
        gc.collect()
        gc.freeze()  # what lives now need not be looked at before every turn
        with self._progress:
            self._task = self._progress.add_task("", total=steps)
            try:
                yield
            finally:
                self._progress.remove_task(self._task)
                gc.unfreeze()

    def step(self, text: str) -> None:
        """Says what is measured next."""
        self._done += 1
        if not self.console.is_terminal:
            self._print_line(text)
            return
        self._progress.update(self._task, description=text)
        self._progress.refresh()
        self._progress.advance(self._task)

    def _print_line(self, text: str) -> None:
        """On the standard error: the standard output is the result."""
        if time.monotonic() >= self._line_at:
            print(f"{self._done} of {self._steps}: {text.strip()}", file=sys.stderr, flush=True)
            self._line_at = time.monotonic() + LINES_S

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """This thread on the client's core while inside; threads that exist already (ZeroMQ's) stay free."""
        if self.client_core is None:
            yield
            return
        before = os.sched_getaffinity(0)
        machine.pin(self.client_core)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def random_tensor(nbytes: int, seed: int) -> torch.Tensor:
    """float32 of `nbytes` bytes, the same for the same seed."""
    return torch.randn(nbytes // 4, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed_calls(call: Callable[[], Any], seconds: float, samples_ns: list[int], at_least: int = 2) -> None:
    """Calls again and again for `seconds`, `at_least` so many times, and adds what each call took."""
    clock, add = time.perf_counter_ns, samples_ns.append
    end = clock() + int(seconds * 1e9)
    count, before = 0, clock()
    while before < end or count < at_least:
        before = clock()
        call()
        after = clock()
        add(after - before)
        count += 1
        before = after


def in_turn(contestants: Sequence[Any], rounds: int) -> Iterator[Any]:
    """Each contestant once per round, every round starting with another one, so that noise hits all alike."""
    for turn in range(rounds):
        shift = turn % len(contestants)
        yield from (*contestants[shift:], *contestants[:shift])


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))
