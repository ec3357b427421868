"""The first shared-memory system, written from its description: flags set from Python, a ZeroMQ message per transfer.

Each direction is a ring of ten 10 MB slots with one metadata byte each (written or read). The sender copies the tensor
into a slot, sets the flag, and sends slot number, shape and dtype over ZeroMQ; the receiver copies it out and clears
the flag. Tensors over 10 MB go over ZeroMQ themselves. This is a baseline to measure against, not something to use:
the flags have no memory order (on AArch64 it may deliver torn data).
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import msgpack
import numpy as np
import torch
import zmq

CHUNK_BYTES = 10 << 20
CHUNKS = 10
_STOP = b"stop"


class FlagRing:
    """One direction: slots with a flag byte each, in a mapped file."""

    def __init__(self, path: str, create: bool) -> None:
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if create:
                os.posix_fallocate(descriptor, 0, CHUNKS * CHUNK_BYTES + CHUNKS)
            self._map = mmap.mmap(descriptor, CHUNKS * CHUNK_BYTES + CHUNKS)
        finally:
            os.close(descriptor)
        self._next = 0

    def write(self, array: np.ndarray) -> int:
        """Copies `array` into the next slot once it is free; returns the slot's number."""
        slot = self._next
        while self._map[CHUNKS * CHUNK_BYTES + slot]:
            pass
        start = slot * CHUNK_BYTES
        np.frombuffer(self._map, dtype=np.uint8, count=array.nbytes, offset=start)[:] = array.view(np.uint8).ravel()
        self._map[CHUNKS * CHUNK_BYTES + slot] = 1
        self._next = (slot + 1) % CHUNKS
        return slot

    def read(self, slot: int, shape: list[int], dtype: str) -> np.ndarray:
        """A private copy of the array in `slot`, which is free afterwards."""
        while not self._map[CHUNKS * CHUNK_BYTES + slot]:
            pass
        count = int(np.prod(shape))
        view = np.frombuffer(self._map, dtype=dtype, count=count, offset=slot * CHUNK_BYTES)
        array = view.reshape(shape).copy()
        self._map[CHUNKS * CHUNK_BYTES + slot] = 0
        return array


class _Ends:
    """Both rings and the control socket of one side."""

    def __init__(self, address: str, server: bool) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.REP if server else zmq.REQ)
        endpoint = f"ipc://{address}/flags.sock"
        if server:
            self.into, self.out = (FlagRing(f"{_shm(address)}-{name}", True) for name in ("request", "reply"))
            self.socket.bind(endpoint)
        else:
            self.socket.connect(endpoint)
            self.socket.send(b"hello")
            self.socket.recv()
            self.out, self.into = (FlagRing(f"{_shm(address)}-{name}", False) for name in ("request", "reply"))
            for name in ("request", "reply"):
                os.unlink(f"{_shm(address)}-{name}")

    def send(self, array: np.ndarray) -> None:
        head: dict[str, Any] = {"shape": list(array.shape), "dtype": str(array.dtype)}
        if array.nbytes < CHUNK_BYTES:
            head["slot"] = self.out.write(array)
            self.socket.send(msgpack.packb(head))
        else:
            self.socket.send_multipart([msgpack.packb(head), array], copy=False)

    def receive(self) -> np.ndarray | None:
        frames = self.socket.recv_multipart(copy=False)
        if frames[0].buffer == _STOP:
            return None
        head = msgpack.unpackb(frames[0].buffer)
        if "slot" in head:
            return self.into.read(head["slot"], head["shape"], head["dtype"])
        return np.frombuffer(frames[1].buffer, dtype=head["dtype"]).reshape(head["shape"])


def _shm(address: str) -> str:
    return f"/dev/shm/flagring-{os.path.basename(address)}"


class FlagRingEcho:
    """The client."""

    def __init__(self, address: str) -> None:
        self._ends = _Ends(address, server=False)

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self._ends.send(tensor.numpy())
        array = self._ends.receive()
        assert array is not None
        return torch.from_numpy(array)

    def close(self) -> None:
        self._ends.socket.send(_STOP)
        self._ends.socket.close(1000)
        self._ends.context.term()


def serve(address: str) -> None:
    """Echoes until told to stop."""
    ends = _Ends(address, server=True)
    ends.socket.recv()
    ends.socket.send(b"hello")
    while (array := ends.receive()) is not None:
        ends.send(array)
    ends.socket.close(0)
    ends.context.term()
