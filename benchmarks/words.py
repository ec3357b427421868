"""Words that two processes share and may sleep on: the barest way from one to the other."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from typing import ClassVar


def shared_page(path: str) -> mmap.mmap:
    """One page that every process which names the file has."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, mmap.PAGESIZE)
    page = mmap.mmap(fd, mmap.PAGESIZE)
    os.close(fd)
    return page


class Words:
    """A question and its answer, on cache lines of their own, and a number that comes with the answer."""

    SYS_FUTEX: ClassVar[dict[str, int]] = {"x86_64": 202, "aarch64": 98}
    _WAIT, _WAKE = 0, 1

    def __init__(self, path: str) -> None:
        self._map = shared_page(path)
        self.question = ctypes.c_uint32.from_buffer(self._map, 0)
        self.answer = ctypes.c_uint32.from_buffer(self._map, 1024)
        self.number = ctypes.c_uint64.from_buffer(self._map, 2048)
        self._call = ctypes.CDLL(None).syscall

    def sleep(self, word: ctypes.c_uint32, value: int) -> None:
        """Sleeps until somebody wakes it; returns at once where the word is not `value`, and now and then for no
        reason."""
        self._futex(word, self._WAIT, value)

    def wake(self, word: ctypes.c_uint32) -> None:
        self._futex(word, self._WAKE, 1)

    def _futex(self, word: ctypes.c_uint32, operation: int, value: int) -> None:
        number = self.SYS_FUTEX[platform.machine()]
        self._call(number, ctypes.byref(word), operation, value, None, None, 0)
