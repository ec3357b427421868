"""Peers through shared memory or a pipe, and the copies nobody can avoid."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import multiprocessing
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import msgpack
import numpy as np
import torch

from .peers import Copies, Peer, shm_shortage


class Pipe(Peer):
    """multiprocessing's duplex pipe, used well: a small header, then the memory itself, read where it stays."""

    key = "pipe"
    title = "multiprocessing.Pipe"

    @classmethod
    def copies(cls, nbytes: int) -> Copies:
        return Copies(1, 3, 1, 3, "the kernel in and out; recv_bytes_into gathers what it read, then copies it again")

    def address(self) -> Any:
        self._mine, self._theirs = multiprocessing.Pipe()
        self.stack.callback(self._mine.close)
        return self._theirs

    def started(self) -> None:
        self._theirs.close()  # or this end would not notice the server's death

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        ready()
        while (tensor := Pipe._recv(address)).numel() > 0:
            Pipe._send(address, tensor)

    @staticmethod
    def _send(end: Any, tensor: torch.Tensor) -> None:
        array = tensor.numpy()
        end.send_bytes(msgpack.packb((array.shape, str(array.dtype))))
        if array.nbytes:
            end.send_bytes(array.reshape(-1).view(np.uint8))

    @staticmethod
    def _recv(end: Any) -> torch.Tensor:
        shape, dtype = msgpack.unpackb(end.recv_bytes())
        array = np.empty(shape, dtype)
        if array.nbytes:
            end.recv_bytes_into(array.reshape(-1).view(np.uint8))
        return torch.from_numpy(array)

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self._send(self._mine, tensor)
        return self._recv(self._mine)

    def send_end(self) -> None:
        self._send(self._mine, torch.empty(0))


class _Iceoryx2End:
    """A publisher and a subscriber of byte slices; both ends wait by looking all the time.

    A message is a 64-byte header (rank and shape; float32 is understood) and the tensor's bytes.
    """

    HEADER = struct.Struct("<8q")

    def __init__(self, address: tuple[str, str], outgoing: str, incoming: str) -> None:
        import iceoryx2 as iox

        prefix, root = address
        iox.set_log_level(iox.LogLevel.Error)
        config = iox.config.default()
        config.global_cfg.prefix = iox.FileName.new(prefix)
        config.global_cfg.root_path = iox.Path.new(root)
        self._node = iox.NodeBuilder.new().config(config).create(iox.ServiceType.Ipc)
        self._publisher = (
            self._service(iox, outgoing)
            .publisher_builder()
            .initial_max_slice_len(1 << 20)
            .allocation_strategy(iox.AllocationStrategy.PowerOfTwo)
            .create()
        )
        self._subscriber = self._service(iox, incoming).subscriber_builder().create()

    def _service(self, iox: Any, name: str) -> Any:
        builder = self._node.service_builder(iox.ServiceName.new(name))
        service = builder.publish_subscribe(iox.Slice[ctypes.c_uint8])
        return service.payload_alignment(iox.Alignment.new(64)).open_or_create()

    def send(self, shape: torch.Size, pointer: int, nbytes: int) -> None:
        sample = self._publisher.loan_slice_uninit(self.HEADER.size + nbytes)
        target = sample.payload_ptr
        header = self.HEADER.pack(len(shape), *shape, *([0] * (7 - len(shape))))
        ctypes.memmove(target, header, len(header))
        ctypes.memmove(target + len(header), pointer, nbytes)
        sample.assume_init().send()

    def wait(self) -> tuple[Any, list[int], int]:
        """The next sample, its tensor's shape and the address of its bytes; valid until the sample is deleted."""
        while (sample := self._subscriber.receive()) is None:
            pass
        pointer = sample.payload_ptr
        rank, *dims = self.HEADER.unpack(ctypes.string_at(pointer, self.HEADER.size))
        return sample, dims[:rank], pointer + self.HEADER.size


class Iceoryx2(Peer):
    """iceoryx2's Python binding, publish-subscribe both ways with dynamic payloads and busy polling."""

    key = "iceoryx2"
    title = "iceoryx2, busy polling"
    SHM_BYTES: ClassVar[int] = 512 << 20

    @classmethod
    def copies(cls, nbytes: int) -> Copies:
        return Copies(1, 0, 1, 1, "into the sample; the server reads it there; into the sample; out of the sample")

    @classmethod
    def unavailable(cls) -> str | None:
        if importlib.util.find_spec("iceoryx2") is None:
            return "it is not installed (pip install 'tsqp[bench]')"
        return shm_shortage(cls.SHM_BYTES)

    def address(self) -> Any:
        root = self.folder / "iox2"
        root.mkdir()
        prefix = f"bench{os.getpid()}_"
        self.stack.callback(_remove_iceoryx2, prefix, root)
        return prefix, str(root)

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        end = _Iceoryx2End(address, "reply", "request")
        ready()
        while True:
            sample, shape, pointer = end.wait()
            if 0 in shape:
                return
            end.send(torch.Size(shape), pointer, 4 * int(np.prod(shape)))
            sample.delete()

    def connect(self, address: Any) -> None:
        self._end = _Iceoryx2End(address, "request", "reply")

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self._end.send(tensor.shape, tensor.data_ptr(), tensor.nbytes)
        sample, shape, pointer = self._end.wait()
        result = torch.empty(shape)
        ctypes.memmove(result.data_ptr(), pointer, result.nbytes)
        sample.delete()
        return result

    def send_end(self) -> None:
        self._end.send(torch.Size([0]), 0, 0)


def _remove_iceoryx2(prefix: str, root: Path) -> None:
    """A server that was killed leaves its files behind."""
    for path in Path("/dev/shm").glob(f"{prefix}*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(root, ignore_errors=True)


class CopyLimit(Peer):
    """The three copies between private memories in one process: in, across, out. Nobody waits for anybody and
    the result's memory is there already."""

    key = "copies"
    title = "the three copies, no waiting"
    has_server = False

    @classmethod
    def copies(cls, nbytes: int) -> Copies:
        return Copies(1, 0, 1, 1, "in, across, out")

    def connect(self, address: Any) -> None:
        self._buffers: dict[int, tuple[np.ndarray, np.ndarray, torch.Tensor, np.ndarray]] = {}

    def _prepare(self, tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray, torch.Tensor, np.ndarray]:
        request, reply = (np.frombuffer(mmap.mmap(-1, tensor.nbytes), dtype=np.float32) for _ in range(2))
        result = torch.empty_like(tensor)
        self._buffers[tensor.nbytes] = request, reply, result, result.numpy()
        return self._buffers[tensor.nbytes]

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        request, reply, result, array = self._buffers.get(tensor.nbytes) or self._prepare(tensor)
        np.copyto(request, tensor.numpy())
        np.copyto(reply, request)
        np.copyto(array, reply)
        return result
