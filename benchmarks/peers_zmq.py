"""Peers over ZeroMQ: msgpack messages, multipart without copies, and a flag ring with control messages."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import zmq

from .peers import Copies, Peer, shm_shortage

# Received bytes are read-only to Python; nobody writes to these tensors.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


_BY_SOCKET = Copies(2, 0, 2, 0, "ZeroMQ sends from the tensor and keeps what arrives; the kernel copies in and out")


class ZmqPeer(Peer):
    """A REQ socket at the client, a REP socket at the server."""

    def connect(self, address: Any) -> None:
        context = zmq.Context()
        self.stack.callback(context.destroy, linger=0)
        self._socket = context.socket(zmq.REQ)
        self._socket.linger = 0
        self._socket.connect(address)

    def send_end(self) -> None:
        self._send(self._socket, torch.empty(0))
        self._socket.recv()

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self._send(self._socket, tensor)
        return self._recv(self._socket)

    @classmethod
    def _serve(cls, address: Any, ready: Callable[[], None]) -> None:
        with zmq.Context() as context, context.socket(zmq.REP) as socket:
            socket.bind(address)
            ready()
            while (tensor := cls._recv(socket)).numel() > 0:
                cls._send(socket, tensor)
            socket.send(b"")

    @staticmethod
    def _send(socket: zmq.Socket[bytes], tensor: torch.Tensor) -> None:
        raise NotImplementedError

    @staticmethod
    def _recv(socket: zmq.Socket[bytes]) -> torch.Tensor:
        raise NotImplementedError


class MsgpackRequest(ZmqPeer):
    """Each message is one msgpack map with the tensor's bytes in it."""

    key = "msgpack"
    title = "msgpack over ZeroMQ ipc"

    @classmethod
    def copies(cls, nbytes: int) -> Copies:
        why = "tobytes, packb, send, the kernel in and out; recv, unpackb"
        return Copies(5, 2, 5, 2, why)

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        MsgpackRequest._serve(address, ready)

    @staticmethod
    def _send(socket: zmq.Socket[bytes], tensor: torch.Tensor) -> None:
        array = tensor.numpy()
        socket.send(msgpack.packb({"data": array.tobytes(), "shape": array.shape, "dtype": str(array.dtype)}))

    @staticmethod
    def _recv(socket: zmq.Socket[bytes]) -> torch.Tensor:
        message = msgpack.unpackb(socket.recv(), max_bin_len=1 << 31)
        return _tensor(message["data"], message["shape"], message["dtype"])


class Multipart(ZmqPeer):
    """A small header frame and a frame that is the tensor's own memory."""

    key = "multipart"
    title = "ZeroMQ multipart, no copy"

    @classmethod
    def copies(cls, nbytes: int) -> Copies:
        return _BY_SOCKET

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        Multipart._serve(address, ready)

    @staticmethod
    def _send(socket: zmq.Socket[bytes], tensor: torch.Tensor) -> None:
        array = tensor.numpy()
        head = msgpack.packb((array.shape, str(array.dtype)))
        socket.send_multipart([head, array], copy=False)

    @staticmethod
    def _recv(socket: zmq.Socket[bytes]) -> torch.Tensor:
        head, payload = socket.recv_multipart(copy=False)
        shape, dtype = msgpack.unpackb(head.buffer)
        return _tensor(payload.buffer, shape, dtype)


class _Slots:
    """Slots in a shared file with two one-byte flags each, written and read, all of it set from Python."""

    COUNT = 10
    SLOT_BYTES = 10 << 20
    WRITTEN, READ = 0, 1

    def __init__(self, path: Path, create: bool) -> None:
        flags_bytes = mmap.PAGESIZE
        fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)
        try:
            nbytes = flags_bytes + self.COUNT * self.SLOT_BYTES
            if create:
                os.posix_fallocate(fd, 0, nbytes)
            self._map = mmap.mmap(fd, nbytes)
        finally:
            os.close(fd)
        whole = np.frombuffer(self._map, dtype=np.uint8)
        self._flags = whole[: 2 * self.COUNT].reshape(self.COUNT, 2)
        self._slots = whole[flags_bytes:].reshape(self.COUNT, self.SLOT_BYTES)
        self._next = 0

    def write(self, array: np.ndarray) -> int:
        """Copies `array` into the next slot and returns its number."""
        slot, self._next = self._next, (self._next + 1) % self.COUNT
        flags = self._flags[slot]
        while flags[self.WRITTEN] and not flags[self.READ]:
            os.sched_yield()
        flags[self.WRITTEN] = 0
        np.copyto(self._slots[slot, : array.nbytes].view(array.dtype).reshape(array.shape), array)
        flags[self.READ] = 0
        flags[self.WRITTEN] = 1
        return slot

    def read(self, slot: int, shape: list[int], dtype: str) -> np.ndarray:
        """A private copy of what lies in `slot`."""
        flags = self._flags[slot]
        while not flags[self.WRITTEN]:
            os.sched_yield()
        array = np.empty(shape, dtype)
        np.copyto(array, self._slots[slot, : array.nbytes].view(dtype).reshape(shape))
        flags[self.READ] = 1
        return array


class _FlagEnd:
    """One end: a ring for each direction and a socket for control messages and whatever fits no slot."""

    def __init__(self, socket: zmq.Socket[bytes], outgoing: _Slots, incoming: _Slots) -> None:
        self._socket, self._outgoing, self._incoming = socket, outgoing, incoming

    def send(self, tensor: torch.Tensor) -> None:
        array = tensor.numpy()
        control: dict[str, Any] = {"shape": array.shape, "dtype": str(array.dtype)}
        if array.nbytes > _Slots.SLOT_BYTES:
            self._socket.send_multipart([msgpack.packb(control), array], copy=False)
            return
        control["slot"] = self._outgoing.write(array)
        self._socket.send(msgpack.packb(control))

    def recv(self) -> torch.Tensor:
        frames = self._socket.recv_multipart(copy=False)
        control = msgpack.unpackb(frames[0].buffer)
        if len(frames) > 1:
            return _tensor(frames[1].buffer, control["shape"], control["dtype"])
        return torch.from_numpy(self._incoming.read(control["slot"], control["shape"], control["dtype"]))


class FlagRing(ZmqPeer):
    """Slots with flags written from Python; a ZeroMQ message beside each transfer says which slot and what is in it.
    Tensors that fit no slot (10 MiB) go over ZeroMQ whole."""

    key = "flagring"
    title = "Python flag ring + ZeroMQ control"

    @classmethod
    def copies(cls, nbytes: int) -> Copies:
        if nbytes > _Slots.SLOT_BYTES:
            return _BY_SOCKET
        return Copies(1, 1, 1, 1, "into the slot and out of it, at both ends")

    @classmethod
    def unavailable(cls) -> str | None:
        return shm_shortage(2 * (_Slots.COUNT * _Slots.SLOT_BYTES + mmap.PAGESIZE))

    def address(self) -> Any:
        paths = [Path(f"/dev/shm/flag-ring-{os.getpid()}-{way}") for way in ("request", "reply")]
        for path in paths:
            self.stack.callback(path.unlink, missing_ok=True)
        return super().address(), *paths

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        endpoint, request, reply = address
        incoming, outgoing = _Slots(request, create=True), _Slots(reply, create=True)
        with zmq.Context() as context, context.socket(zmq.REP) as socket:
            socket.bind(endpoint)
            ready()
            end = _FlagEnd(socket, outgoing, incoming)
            while (tensor := end.recv()).numel() > 0:
                end.send(tensor)
            socket.send(b"")

    def connect(self, address: Any) -> None:
        endpoint, request, reply = address
        super().connect(endpoint)
        self._end = _FlagEnd(self._socket, _Slots(request, create=False), _Slots(reply, create=False))
        for path in (request, reply):
            path.unlink()  # both ends have mapped it

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self._end.send(tensor)
        return self._end.recv()

    def send_end(self) -> None:
        self._end.send(torch.empty(0))
        self._socket.recv()


def _tensor(data: Any, shape: list[int], dtype: str) -> torch.Tensor:
    """A tensor over bytes that are this process's own already."""
    if 0 in shape:
        return torch.empty(shape)
    return torch.frombuffer(data, dtype=getattr(torch, dtype)).reshape(shape)
