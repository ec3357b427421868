"""What carries a call of a baseline: a small mapping and tensors, one way or the other, counted per carrier."""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import zmq
from torch import Tensor

from ..peers import shm_shortage
from ..peers_zmq import _Slots as Slots

# Received bytes are read-only to Python; nobody writes to these tensors.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

TITLES = {"msgpack": "baseline: msgpack over ZeroMQ", "flags": "baseline: Python flag ring"}
_LARGEST_BIN = (1 << 32) - 1


class MsgpackWire:
    """One ZeroMQ message a call, with every tensor's bytes in it."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self.shm_transfers = self.shm_bytes = self.zmq_transfers = self.zmq_bytes = 0

    def send(self, head: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        packed = [{**_described(tensor), "data": _bytes_of(tensor).tobytes()} for tensor in tensors]
        message = msgpack.packb({**head, "tensors": packed})
        self._count(message)
        self._socket.send(message)

    def recv(self) -> tuple[dict[str, Any], list[Tensor]]:
        message = self._socket.recv()
        self._count(message)
        head = msgpack.unpackb(message, max_bin_len=_LARGEST_BIN)
        return head, [_tensor(one["data"], one) for one in head.pop("tensors")]

    def _count(self, message: bytes) -> None:
        self.zmq_transfers += 1
        self.zmq_bytes += len(message)

    def close(self) -> None:
        self._socket.close(linger=0)


class FlagWire:
    """A ring for each direction, a ZeroMQ control message beside each call, ZeroMQ frames for what fits no slot."""

    def __init__(self, socket: zmq.Socket[bytes], outgoing: Slots, incoming: Slots) -> None:
        self._socket, self._outgoing, self._incoming = socket, outgoing, incoming
        self.shm_transfers = self.shm_bytes = self.zmq_transfers = self.zmq_bytes = 0

    def send(self, head: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        described, frames = [], []
        for tensor in tensors:
            about, data = _described(tensor), _bytes_of(tensor)
            if data.nbytes < Slots.SLOT_BYTES:
                about["slot"] = self._outgoing.write(data)
            else:
                frames.append(data)
            self._count(data.nbytes, "slot" in about)
            described.append(about)
        control = msgpack.packb({**head, "tensors": described})
        self._count(len(control), in_ring=False)
        self._socket.send_multipart([control, *frames], copy=False)

    def recv(self) -> tuple[dict[str, Any], list[Tensor]]:
        control, *frames = self._socket.recv_multipart(copy=False)
        self._count(len(control.buffer), in_ring=False)
        head = msgpack.unpackb(control.buffer)
        tensors = []
        for about in head.pop("tensors"):
            if "slot" in about:
                data: Any = self._incoming.read(about["slot"], [about["nbytes"]], "uint8")
            else:
                data = frames.pop(0).buffer
            self._count(about["nbytes"], "slot" in about)
            tensors.append(_tensor(data, about))
        return head, tensors

    def _count(self, nbytes: int, in_ring: bool) -> None:
        if in_ring:
            self.shm_transfers += 1
            self.shm_bytes += nbytes
        else:
            self.zmq_transfers += 1
            self.zmq_bytes += nbytes

    def close(self) -> None:
        self._socket.close(linger=0)


Wire = MsgpackWire | FlagWire


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes, copied only where it is not contiguous (NumPy has no bfloat16)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).rpartition(".")[2], "nbytes": tensor.nbytes}


def _tensor(data: Any, about: dict[str, Any]) -> Tensor:
    """A tensor over bytes that are this process's own already."""
    dtype: torch.dtype = getattr(torch, about["dtype"])
    if 0 in about["shape"]:
        return torch.empty(about["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(about["shape"])


@contextlib.contextmanager
def addresses(wanted: Sequence[str], folder: Path, skipped: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Where server and client of each wanted baseline meet; in ``skipped`` is why one can't run here."""
    found: dict[str, Any] = {key: (f"ipc://{folder}/{key}.sock",) for key in wanted}
    files = [folder / f"{key}.sock" for key in wanted]  # ZeroMQ leaves them behind
    if "flags" in found:
        shortage = shm_shortage(2 * (Slots.COUNT * Slots.SLOT_BYTES + mmap.PAGESIZE))
        if shortage is None:
            rings = [Path(f"/dev/shm/flag-ring-{os.getpid()}-{way}") for way in ("request", "reply")]
            found["flags"] += tuple(rings)
            files += rings
        else:
            del found["flags"]
            skipped[TITLES["flags"]] = shortage
    try:
        yield found
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def server_wire(key: str, address: tuple[Any, ...], socket: zmq.Socket[bytes]) -> Wire:
    """Binds the socket and makes the rings."""
    socket.bind(address[0])
    if key == "msgpack":
        return MsgpackWire(socket)
    request, reply = (Slots(path, create=True) for path in address[1:])
    return FlagWire(socket, outgoing=reply, incoming=request)


def client_wire(key: str, address: tuple[Any, ...], socket: zmq.Socket[bytes]) -> Wire:
    """Reaches a server that is ready; a server's rings are for one client."""
    socket.connect(address[0])
    if key == "msgpack":
        return MsgpackWire(socket)
    request, reply = (Slots(path, create=False) for path in address[1:])
    for path in address[1:]:
        path.unlink()  # both ends have mapped it: nothing is left behind, whatever happens
    return FlagWire(socket, outgoing=request, incoming=reply)
