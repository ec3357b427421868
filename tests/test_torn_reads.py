"""A hundred thousand messages of random size and content between two processes, each byte checked.

The sizes crowd where the transport changes its way: around a cache line, the first look at a message, a page, the
parts of a message cut through, a tile and a whole slot. ``TSQP_SOAK=1`` makes it ten million messages.
"""

from __future__ import annotations

import os
import zlib
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
#: A process of the tests lives 200 s (peers.LIFE_S): the long form is many rounds of the short one.
ROUNDS = 100 if SOAK else 1
MESSAGES = {"small": 75_000, "pages": 24_000, "parts": 4_000}
#: Slots and, for each kind of run, the sizes around which the messages' sizes lie, in bytes.
CHUNKS = {"small": (4096, 4), "pages": (1 << 16, 5), "parts": (3 << 20, 3)}
EDGES = {
    "small": (0, 64, 128, 192, 256, 320, 512 - 224, 512, 1024, 4096 - 256),
    "pages": (64, 512, 4096, 8192, 16384, 32768 - 256, 32768, 49152, 65536 - 256),
    "parts": (4096, 32768, 65536, 1 << 17, 1 << 20, (1 << 20) + (1 << 17), 2 << 20, (3 << 20) - 256),
}
DTYPES = tuple(map(np.dtype, ("u1", "i2", "f4", "i8")))


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


class Source:
    """Random bytes to cut messages from; the same at both ends, of which no two messages are alike."""

    def __init__(self, kind: str, seed: int) -> None:
        self.bytes = np.random.default_rng(seed).integers(0, 256, CHUNKS[kind][0] * 2, dtype=np.uint8)
        self.random, self.sizes = Random(seed), _sizes(kind, Random(seed + 1))

    def next(self, number: int) -> list[torch.Tensor]:
        """Tensors of the `number`-th message, its number in their first bytes where there is room."""
        tensors = []
        for nbytes in next(self.sizes):
            dtype = self.random.choice(DTYPES)
            start = self.random.randrange(len(self.bytes) - nbytes)
            data = self.bytes[start : start + nbytes // dtype.itemsize * dtype.itemsize].copy()
            data[:8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)[: len(data[:8])]
            tensors.append(torch.from_numpy(data.view(dtype)))
        return tensors


def _checksum(tensors: list[torch.Tensor]) -> int:
    value = 0
    for tensor in tensors:
        if tensor.numel() == 0:
            continue  # such a tensor has no bytes to view
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), value)
    return value


def send_all(wire: Connection, endpoint: str, kind: str, seed: int) -> None:
    """Sends the messages as fast as they are taken, each with the checksum of its tensors."""
    source = Source(kind, seed)
    with tsqp.connect(endpoint) as channel:
        for number in range(MESSAGES[kind]):
            tensors = source.next(number)
            channel.send(tensors, request_id=number, index=_checksum(tensors), timeout=PATIENCE_S)
        wire.send(channel.stats)
        wire.recv()


def _check(message: Any, number: int) -> None:
    assert message.request_id == number
    assert _checksum(message.tensors) == message.index, f"message {number} is torn"


def _take(channel: Any, number: int, as_lease: bool, held: dict[int, Any]) -> None:
    """The next message as a copy, or as a lease that is held."""
    if as_lease:
        held[number] = channel.lease(PATIENCE_S)
        _check(held[number].message, number)
    else:
        _check(channel.recv(PATIENCE_S), number)


def _give_back(number: int, held: dict[int, Any]) -> None:
    """The sender wrote other slots meanwhile, never this one."""
    lease = held.pop(number)
    _check(lease.message, number)
    lease.release()


@pytest.mark.watchdog(170)
@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("kind", MESSAGES)
def test_no_message_is_torn_lost_doubled_or_out_of_order(
    start_peer: StartPeer, endpoint: str, kind: str, seed: int
) -> None:
    chunk_bytes, chunks = CHUNKS[kind]
    random, held = Random(seed + 2), dict[int, Any]()
    with tsqp.listen(endpoint, chunk_bytes, chunks) as listener:
        sender = start_peer(send_all, endpoint, kind, seed)
        with listener.accept(PATIENCE_S) as channel:
            for number in range(MESSAGES[kind]):
                if number - chunks in held:  # the next message needs its entry
                    _give_back(number - chunks, held)
                _take(channel, number, random.random() < 0.5, held)
                while held and random.random() < 0.4:
                    _give_back(random.choice(list(held)), held)
            for number in list(held):
                _give_back(number, held)
            stats = sender.hear()
            assert stats["shm_transfers"] == MESSAGES[kind]
            assert channel.stats["received_messages"] == MESSAGES[kind]
            assert channel.stats["received_bytes"] == stats["sent_bytes"]
            sender.say("done")
            assert sender.join() == 0
