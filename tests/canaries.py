"""Secrets that can be recognised, and the search for them in memory, files and texts.

A run is at least :data:`RUN` token ids one after the other as integers of one width: fewer may be a coincidence.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

#: So many ids in a row are a find.
RUN = 4
_PIECE_BYTES = 32 << 20
_OVERLAP_BYTES = RUN * 8 + 8
_WIDTHS = ("<u8", "<u4", "<u2")
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ")


def canary_words(count: int) -> str:
    """Random words that are in no dictionary."""
    letters = np.random.default_rng().integers(97, 123, (count, 9), dtype=np.uint8)
    return " ".join(bytes(word).decode() for word in letters)


def canary_ids(count: int, low: int, high: int, seed: int | None = None) -> list[int]:
    """Different random ids, without ``seed`` others in every run of the tests: nothing but the test can know them."""
    chosen = np.random.default_rng(seed).choice(np.arange(low, high), size=count, replace=False)
    return [int(number) for number in chosen]


class Search:
    """Looks for token ids, texts and keys; what it finds is named by its kind, never shown."""

    def __init__(self, ids: Sequence[int] = (), texts: Iterable[str] = (), keys: Iterable[bytes] = ()) -> None:
        self._ids = list(ids)
        self._runs = {tuple(ids[first : first + RUN]) for first in range(len(ids) - RUN + 1)}
        # A run of one id or two may stand in any table, and zeros (a start token's id) everywhere.
        self._runs = {run for run in self._runs if len(set(run)) > 2 and 0 not in run}
        self._member = np.zeros(1 << 16, dtype=bool)
        self._member[self._ids] = True
        self._member[0] = False
        assert self._runs or not self._ids
        self._texts, self._keys = list(texts), list(keys)

    def in_bytes(self, data: bytes, aligned: bool = False) -> set[str]:
        """What was found: ``8-byte ids``, ``utf-8 text``, ...

        ``aligned``: integers are looked for at multiples of their size only.
        """
        codes = ("utf-8", "utf-16-le")
        found = {f"{code} text" for code in codes for text in self._texts if text.encode(code) in data}
        found |= {"key" for key in self._keys if key in data}
        memory = np.frombuffer(data, dtype=np.uint8)
        for width in _WIDTHS:
            if self._runs and self._run_in(memory, width, aligned):
                found.add(f"{np.dtype(width).itemsize}-byte ids")
        return found

    def _run_in(self, memory: np.ndarray, width: str, aligned: bool) -> bool:
        nbytes = np.dtype(width).itemsize
        for shift in range(1 if aligned else nbytes):
            words = memory[shift : len(memory) - (len(memory) - shift) % nbytes].view(width)
            if nbytes == 2:
                hits = np.flatnonzero(self._member[words])
            else:
                small = np.flatnonzero((words - 1) < len(self._member) - 1)  # zeros are most of all memory
                hits = small[self._member[words[small]]]
            starts = hits[: 1 - RUN][hits[RUN - 1 :] - hits[: 1 - RUN] == RUN - 1] if len(hits) >= RUN else hits[:0]
            if any(tuple(words[start : start + RUN].tolist()) in self._runs for start in starts):
                return True
        return False

    def in_text(self, text: str) -> set[str]:
        """A text, or an id as a number of four digits or more: in a message one is enough."""
        found = {"text" for needle in self._texts if needle in text}
        numbers = {int(number) for number in re.findall(r"(?<![\w.])\d{4,5}(?![\w.])", text)}
        return found | ({"ids"} if numbers & set(self._ids) else set())

    def in_rows(self, text: str) -> set[str]:
        """Ids in a row in a table of many numbers, of which some are equal to an id by chance."""
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        runs = {tuple(numbers[first : first + RUN]) for first in range(len(numbers) - RUN + 1)}
        texts = {"text" for needle in self._texts if needle in text}
        return texts | ({"ids"} if runs & self._runs else set())

    def in_process(self, pid: int) -> set[str]:
        """All that a core image of the process would hold of what it can have written: its writable mappings.

        It is stopped meanwhile. Raises PermissionError where the machine does not let a process read another's memory.
        """
        found: set[str] = set()
        with _stopped(pid), open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for first, last in _mappings(pid):
                for start in range(first, last, _PIECE_BYTES):
                    data = os.pread(memory.fileno(), min(_PIECE_BYTES + _OVERLAP_BYTES, last - start), start)
                    found |= self.in_bytes(data, aligned=True)
        return found


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """A child that does not run in the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _mappings(pid: int) -> Iterator[tuple[int, int]]:
    """First and last address of each writable mapping that has pages."""
    area: tuple[int, int] | None = None
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        mapping = _MAPPING.match(line)
        if mapping:
            area = int(mapping[1], 16), int(mapping[2], 16)
            if mapping[3][:2] != "rw":
                area = None
        elif area and line.startswith("Rss:") and line.split()[1] != "0":
            yield area


def messages(error: BaseException) -> str:
    """The texts of an exception and of all it came from."""
    texts, chain = [], [error]
    while chain:
        each = chain.pop()
        texts += [str(each), repr(each), *map(str, getattr(each, "__notes__", ()))]
        chain += [other for other in (each.__cause__, each.__context__) if other is not None]
    return "\n".join(texts)


def as_tensor(ids: Sequence[int]) -> torch.Tensor:
    """One prompt, int64 [1, count]."""
    return torch.tensor([ids])
