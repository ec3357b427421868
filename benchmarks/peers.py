"""The ways of moving a tensor that the echo benchmark compares, each behind the same two functions.

A peer's ``serve(address)`` runs in a child process and echoes until its connection ends; ``connect(address)`` returns
an :class:`Echo`. Every echo starts and ends in private memory of the client: a torch tensor goes in, another comes
back. The server holds no private copy where the transport allows it.
"""

from __future__ import annotations

import ctypes
import multiprocessing.connection
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgpack
import numpy as np
import torch
import zmq

import tsqp

from . import flag_ring

_STOP = b"stop"


class Echo(Protocol):
    """A client of one peer."""

    def echo(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Peer:
    """A transport by name; `available` is a reason why it can't run here, or ''."""

    name: str
    serve: Callable[[str], None]
    connect: Callable[[str], Echo]
    available: str = ""


# ---- tsqp ----


class _TsqpEcho:
    def __init__(self, address: str, large: str) -> None:
        self._channel = tsqp.connect(f"ipc://{address}/tsqp.sock", timeout=30.0, large=large)

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self._channel.send((tensor,), timeout=30.0)
        return self._channel.recv(timeout=30.0).tensors[0]

    def close(self) -> None:
        self._channel.close()


def _serve_tsqp(address: str, max_chunk_bytes: int, max_chunks: int, large: str) -> None:
    with tsqp.listen(f"ipc://{address}/tsqp.sock", max_chunk_bytes, max_chunks, large=large) as listener:
        channel = listener.accept(timeout=60.0)
        try:
            while True:
                with channel.lease(timeout=60.0) as message:
                    channel.send(message.tensors, timeout=30.0)
        except tsqp.errors.ClosedError:
            channel.close()


def tsqp_peer(name: str, max_chunk_bytes: int = 10 << 20, max_chunks: int = 10, large: str = "zmq") -> Peer:
    """tsqp with a slot size, and a way of sending what does not fit a slot."""
    return Peer(name, _Bound(_serve_tsqp, max_chunk_bytes, max_chunks, large), _Bound(_TsqpEcho, large))


class _Bound:
    """``functools.partial`` that appends its arguments; picklable for spawn."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __call__(self, address: str) -> Any:
        return self._function(address, *self._arguments)


# ---- msgpack over ZeroMQ REQ/REP: the first system's transport ----


class _MsgpackEcho:
    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.connect(f"ipc://{address}/msgpack.sock")

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self._socket.send(_pack(tensor))
        return _unpack(self._socket.recv())

    def close(self) -> None:
        self._socket.send(_STOP)
        self._socket.close(1000)
        self._context.term()


def _pack(tensor: torch.Tensor) -> bytes:
    array = tensor.numpy()
    return msgpack.packb({"data": array.tobytes(), "shape": list(array.shape), "dtype": str(array.dtype)})


def _unpack(data: bytes) -> torch.Tensor:
    message = msgpack.unpackb(data, max_bin_len=1 << 31)
    array = np.frombuffer(message["data"], dtype=message["dtype"]).reshape(message["shape"])
    return torch.from_numpy(array.copy())


def _serve_msgpack(address: str) -> None:
    with zmq.Context() as context, context.socket(zmq.REP) as replies:
        replies.bind(f"ipc://{address}/msgpack.sock")
        while (data := replies.recv()) != _STOP:
            replies.send(_pack(_unpack(data)))


# ---- ZeroMQ multipart without copies ----


class _MultipartEcho:
    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(f"ipc://{address}/multipart.sock")

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self._socket.send_multipart([b"float32", tensor.numpy()], copy=False)
        frames = self._socket.recv_multipart(copy=False)
        return torch.frombuffer(frames[1].buffer, dtype=torch.float32)

    def close(self) -> None:
        self._socket.send_multipart([_STOP])
        self._socket.close(1000)
        self._context.term()


def _serve_multipart(address: str) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.bind(f"ipc://{address}/multipart.sock")
        while len(frames := dealer.recv_multipart(copy=False)) > 1:
            dealer.send_multipart(frames, copy=False)


# ---- multiprocessing.Pipe ----


class _PipeEcho:
    def __init__(self, address: str) -> None:
        self._connection = _retry(lambda: multiprocessing.connection.Client(f"{address}/pipe.sock", "AF_UNIX"))

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self._connection.send_bytes(tensor.numpy())
        return torch.frombuffer(bytearray(self._connection.recv_bytes()), dtype=torch.float32)

    def close(self) -> None:
        self._connection.close()


def _serve_pipe(address: str) -> None:
    with multiprocessing.connection.Listener(f"{address}/pipe.sock", "AF_UNIX") as listener:
        connection = listener.accept()
        try:
            while True:
                connection.send_bytes(connection.recv_bytes())
        except EOFError:
            connection.close()


def _retry(connect: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return connect()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


# ---- iceoryx2: publish-subscribe of bytes both ways, busy polling ----


class _Iceoryx:
    """One publisher and one subscriber of byte slices."""

    MAX_BYTES = 80 << 20

    def __init__(self, address: str, out: str, into: str) -> None:
        import iceoryx2 as iox2

        iox2.set_log_level(iox2.LogLevel.Error)
        self._node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
        prefix = address.replace("/", "_")
        self._publisher = self._service(iox2, prefix + out).publisher_builder()
        self._publisher = self._publisher.initial_max_slice_len(self.MAX_BYTES).create()
        self._subscriber = self._service(iox2, prefix + into).subscriber_builder().create()

    def _service(self, iox2: Any, name: str) -> Any:
        builder = self._node.service_builder(iox2.ServiceName.new(name))
        return builder.publish_subscribe(iox2.Slice[ctypes.c_uint8]).open_or_create()

    def send(self, address: int, nbytes: int) -> None:
        sample = self._publisher.loan_slice_uninit(nbytes)
        ctypes.memmove(sample.payload_ptr, address, nbytes)
        sample.assume_init().send()

    def receive(self) -> Any:
        while (sample := self._subscriber.receive()) is None:
            pass
        return sample

    def drop(self) -> None:
        self._publisher = self._subscriber = self._node = None


class _IceoryxEcho:
    def __init__(self, address: str) -> None:
        self._ends = _Iceoryx(address, "request", "reply")
        self._hello()

    def _hello(self) -> None:
        """Samples published before the other end is there are lost: say hello until it answers."""
        byte = ctypes.create_string_buffer(1)
        while True:
            self._ends.send(ctypes.addressof(byte), 1)
            deadline = time.monotonic() + 0.2
            while time.monotonic() < deadline:
                if self._ends._subscriber.receive() is not None:
                    return

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self._ends.send(tensor.data_ptr(), tensor.nbytes)
        sample = self._ends.receive()
        result = torch.empty(tensor.shape, dtype=tensor.dtype)
        ctypes.memmove(result.data_ptr(), sample.payload_ptr, result.nbytes)
        return result

    def close(self) -> None:
        byte = ctypes.create_string_buffer(3)
        self._ends.send(ctypes.addressof(byte), 3)
        time.sleep(0.1)
        self._ends.drop()


def _serve_iceoryx(address: str) -> None:
    ends = _Iceoryx(address, "reply", "request")
    while True:
        sample = ends.receive()
        nbytes = sample.payload().number_of_elements
        if nbytes == 3:  # no tensor of float32 has three bytes: goodbye
            return
        ends.send(sample.payload_ptr, nbytes)
        del sample


def _iceoryx_missing() -> str:
    try:
        import iceoryx2  # noqa: F401
    except ImportError:
        return "iceoryx2 is not installed (pip install 'tsqp[bench]')"
    return ""


class CopyLimit:
    """The three copies no transport of this kind can avoid, in one process, without waiting: in, across, out."""

    def __init__(self) -> None:
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        slots = self._slots.get(tensor.numel())
        if slots is None:
            slots = (torch.empty_like(tensor), torch.empty_like(tensor), torch.empty_like(tensor))
            self._slots[tensor.numel()] = slots
        slots[0].copy_(tensor)
        slots[1].copy_(slots[0])
        return slots[2].copy_(slots[1])

    def close(self) -> None:
        self._slots.clear()


PEERS = [
    tsqp_peer("tsqp"),
    tsqp_peer("tsqp tiled", large="tile"),
    tsqp_peer("tsqp 80 MB slots", max_chunk_bytes=80 << 20, max_chunks=2),
    Peer("msgpack over ZeroMQ", _serve_msgpack, _MsgpackEcho),
    Peer("ZeroMQ multipart", _serve_multipart, _MultipartEcho),
    Peer("Python flag ring", flag_ring.serve, flag_ring.FlagRingEcho),
    Peer("multiprocessing pipe", _serve_pipe, _PipeEcho),
    Peer("iceoryx2", _serve_iceoryx, _IceoryxEcho, _iceoryx_missing()),
]
