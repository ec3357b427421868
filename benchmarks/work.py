"""Work that takes as long as was asked for."""

from __future__ import annotations

import queue
import time

import torch

from .setting import median

SIZE = 512


class Work:
    """A product of matrices that takes as long as was asked for. Its matrices stay in the cache: what neighbours do
    to the memory is not what is measured."""

    def __init__(self) -> None:
        self._a, self._b = torch.randn(64 * SIZE, SIZE), torch.randn(SIZE, SIZE)
        self._rows = 1
        self.order: tuple[int, float] | None = None
        self.alone_s: queue.Queue[float] = queue.Queue()

    def __call__(self) -> None:
        """In the server's thread: torch's number of threads belongs to the thread that asks."""
        if self.order is not None:
            order, self.order = self.order, None
            self.alone_s.put(self._fit(*order))
        self._compute()

    def _compute(self) -> None:
        torch.matmul(self._a[: self._rows], self._b)

    def _fit(self, threads: int, seconds: float) -> float:
        """Finds how many rows take `seconds` by `threads` threads; returns what they take."""
        torch.set_num_threads(threads)
        self._rows = SIZE // 4
        for _ in range(6):
            self._rows = max(1, min(len(self._a), int(self._rows * seconds / self._typical())))
        return self._typical()

    def _typical(self) -> float:
        took = []
        for _ in range(20):
            begin = time.perf_counter()
            self._compute()
            took.append(time.perf_counter() - begin)
        return median(took)
