"""A hundred thousand messages of random size and content between two processes, each byte checked.

The sizes crowd where the transport changes its way: around a cache line, the first look at a message, a page, the
parts of a message cut through, a tile and a whole slot. ``TSQP_SOAK=1`` makes it ten million messages.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from peers import PATIENCE_S, Peer

import tsqp

StartPeer = Callable[..., Peer]

SOAK = os.environ.get("TSQP_SOAK") == "1"
ROUNDS, LENGTH = (4, 25) if SOAK else (1, 1)
MESSAGES = {kind: count * LENGTH for kind, count in {"small": 75_000, "pages": 24_000, "parts": 4_000}.items()}
#: A last resort: what ends a run that hangs is that no single message may take longer than PATIENCE_S.
LIFE_S = 3600.0 if SOAK else 170.0
#: Slots and, for each kind of run, the sizes around which the messages' sizes lie, in bytes.
CHUNKS = {"small": (4096, 4), "pages": (1 << 16, 5), "parts": (3 << 20, 3)}
EDGES = {
    "small": (0, 64, 128, 192, 256, 320, 512 - 224, 512, 1024, 4096 - 256),
    "pages": (64, 512, 4096, 8192, 16384, 32768 - 256, 32768, 49152, 65536 - 256),
    "parts": (4096, 32768, 65536, 1 << 17, 1 << 20, (1 << 20) + (1 << 17), 2 << 20, (3 << 20) - 256),
}
DTYPES = tuple(map(np.dtype, ("u1", "i2", "f4", "i8")))
#: Contents to choose from for each message, besides its number.
CONTENTS = {"small": 2048, "pages": 512, "parts": 64}

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def _sizes(kind: str, random: Random) -> Iterator[list[int]]:
    """For each message the bytes of its tensors; with its head it fits a slot."""
    limit = CHUNKS[kind][0] - 1024
    while True:
        nbytes = random.choice(EDGES[kind]) + random.randrange(-70, 70)
        if random.random() < 0.1:
            nbytes = random.randrange(limit)
        nbytes = min(max(nbytes, 0), limit)
        cut = random.randrange(nbytes + 1) if random.random() < 0.2 else nbytes
        yield [cut, nbytes - cut] if cut < nbytes else [nbytes]


class Content:
    """Tensors of random bytes, into each of which the number of the message they are used for is written."""

    def __init__(self, sizes: list[int], random: Random, generator: np.random.Generator) -> None:
        self.tensors: list[torch.Tensor] = []
        self._stamps: list[np.ndarray] = []
        for nbytes in sizes:
            dtype = random.choice(DTYPES)
            data = generator.integers(0, 256, nbytes // dtype.itemsize * dtype.itemsize, dtype=np.uint8)
            self.tensors.append(torch.from_numpy(data.view(dtype)))
            self._stamps.append(data[:8].view("<i8") if data.nbytes >= 8 else data)

    def stamp(self, number: int) -> list[torch.Tensor]:
        """The tensors of message `number`: it is in their first eight bytes, its low ones where there is less room."""
        for stamp in self._stamps:
            if stamp.dtype == np.uint8:
                stamp[:] = tuple(number.to_bytes(8, "little")[: len(stamp)])
            else:
                stamp[0] = number
        return self.tensors


class Source:
    """The messages of a run, the same at both ends; no two are alike."""

    def __init__(self, kind: str, seed: int) -> None:
        self._order, random, generator = Random(seed), Random(seed + 1), np.random.default_rng(seed)
        sizes = _sizes(kind, Random(seed + 2))
        self._contents = [Content(next(sizes), random, generator) for _ in range(CONTENTS[kind])]

    def next(self) -> int:
        """Which content the next message has."""
        return int(self._order.random() * len(self._contents))

    def tensors(self, which: int, number: int) -> list[torch.Tensor]:
        return self._contents[which].stamp(number)


def send_all(wire: Connection, endpoint: str, kind: str, seed: int) -> None:
    """Sends the messages as fast as they are taken."""
    source = Source(kind, seed)
    with tsqp.connect(endpoint) as channel:
        for number in range(MESSAGES[kind]):
            which = source.next()
            channel.send(source.tensors(which, number), request_id=number, index=which, timeout=PATIENCE_S)
        wire.send(channel.stats)
        wire.recv()


def _check(message: Any, number: int, which: int, source: Source) -> None:
    """`message` is what was sent as the `number`-th, byte for byte."""
    assert (message.request_id, message.index) == (number, which)
    expected = source.tensors(which, number)
    assert len(message.tensors) == len(expected)
    for got, wanted in zip(message.tensors, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        assert _memcmp(got.data_ptr(), wanted.data_ptr(), wanted.nbytes) == 0, f"message {number} is torn"


class Reader:
    """Takes the messages as copies and as leases; some leases it holds while the sender writes other slots."""

    def __init__(self, channel: Any, kind: str, seed: int) -> None:
        self._channel, self._source, self._random = channel, Source(kind, seed), Random(seed + 3)
        self._slots = CHUNKS[kind][1]
        self._held: dict[int, tuple[Any, int]] = {}

    def take(self, number: int) -> None:
        """The next message; some of those that are held are given back."""
        if number - self._slots in self._held:  # the next message needs its entry
            self._give_back(number - self._slots)
        which = self._source.next()
        if self._random.random() < 0.5:
            lease = self._channel.lease(PATIENCE_S)
            _check(lease.message, number, which, self._source)
            self._held[number] = (lease, which)
        else:
            _check(self._channel.recv(PATIENCE_S), number, which, self._source)
        while self._held and self._random.random() < 0.4:
            self._give_back(self._random.choice(list(self._held)))

    def _give_back(self, number: int) -> None:
        """The sender wrote other slots meanwhile, never this one."""
        lease, which = self._held.pop(number)
        _check(lease.message, number, which, self._source)
        lease.release()

    def finish(self) -> None:
        for number in list(self._held):
            self._give_back(number)


@pytest.mark.watchdog(LIFE_S)
@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("kind", MESSAGES)
def test_no_message_is_torn_lost_doubled_or_out_of_order(
    start_peer: StartPeer, endpoint: str, kind: str, seed: int
) -> None:
    chunk_bytes, chunks = CHUNKS[kind]
    with tsqp.listen(endpoint, chunk_bytes, chunks) as listener:
        sender = start_peer(send_all, endpoint, kind, seed, life_s=LIFE_S)
        with listener.accept(PATIENCE_S) as channel:
            reader = Reader(channel, kind, seed)
            for number in range(MESSAGES[kind]):
                reader.take(number)
            reader.finish()
            stats = sender.hear()
            assert stats["shm_transfers"] == MESSAGES[kind]
            assert channel.stats["received_messages"] == MESSAGES[kind]
            assert channel.stats["received_bytes"] == stats["sent_bytes"]
            sender.say("done")
            assert sender.join() == 0


def test_enough_messages_are_sent() -> None:
    assert ROUNDS * sum(MESSAGES.values()) >= (10_000_000 if SOAK else 100_000)
