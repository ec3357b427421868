"""tsqp itself, in the geometries and with the carriers that are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

import tsqp

from .peers import Copies, Peer, shm_shortage

CONNECT_S = 30.0
ECHO, STREAM, END = 0, 1, 2
DEFAULT_CHUNK_BYTES, DEFAULT_CHUNKS = 10 << 20, 10

_IN_SLOT = Copies(1, 0, 1, 1, "into the slot; the server's lease reads it there; into the slot; out of the slot")
_BY_SOCKET = Copies(2, 0, 2, 0, "ZeroMQ sends from the tensor and keeps what arrives; the kernel copies in and out")
_IN_TILES = Copies(1, 1, 1, 1, "tile by tile into slots, and out of them at both ends")
_EITHER_WAY = Copies(1, 1, 1, 1, "through the kernel's socket or tile by tile, in and out at both ends")


class Tsqp(Peer):
    """tsqp as it comes: 10 slots of 10 MiB, ZeroMQ above. The server echoes from a lease.

    ``geometry`` are the options of :func:`tsqp.listen` that set slots, ``large`` what a message does that fits none.
    """

    key = "tsqp"
    title = "tsqp"
    large: ClassVar[str] = "zmq"
    geometry: ClassVar[dict[str, int]] = {}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.slots = dict(self.geometry)

    @classmethod
    def unavailable(cls) -> str | None:
        chunks = cls.geometry.get("max_chunks", DEFAULT_CHUNKS)
        return shm_shortage(2 * chunks * cls.geometry.get("max_chunk_bytes", DEFAULT_CHUNK_BYTES))

    @classmethod
    def copies(cls, nbytes: int) -> Copies:
        if nbytes < cls.geometry.get("max_chunk_bytes", DEFAULT_CHUNK_BYTES):
            return _IN_SLOT
        return {"zmq": _BY_SOCKET, "tile": _IN_TILES}.get(cls.large, _EITHER_WAY)

    def address(self) -> Any:
        return super().address(), {**self.slots, "large": self.large}

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        endpoint, options = address
        with tsqp.listen(endpoint, **options) as listener:
            ready()
            channel = listener.accept(timeout=CONNECT_S)
            while True:
                with channel.lease() as message:
                    if message.tag == ECHO:
                        channel.send(message.tensors)
                        continue
                    if message.tag == END:
                        return
                    order = message.meta
                _swallow(channel, order["count"], order["lease"])
                channel.send([])

    def connect(self, address: Any) -> None:
        endpoint, _ = address
        self.channel = self.stack.enter_context(tsqp.connect(endpoint, timeout=CONNECT_S, large=self.large))
        self.echo(torch.zeros(1))  # now the server has accepted, and may be stopped

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self.channel.send([tensor])
        return self.channel.recv().tensors[0]

    def stream(self, tensor: torch.Tensor, count: int, lease: bool) -> None:
        """Sends `tensor` that many times, one way; returns when the server has received the last one."""
        channel, payload = self.channel, [tensor]
        channel.send([], tag=STREAM, meta={"count": count, "lease": lease})
        for _ in range(count):
            channel.send(payload)
        channel.recv()

    def send_end(self) -> None:
        self.channel.send([], tag=END)


def _swallow(channel: Any, count: int, lease: bool) -> None:
    for _ in range(count):
        if lease:
            with channel.lease():
                pass
        else:
            channel.recv()


class TsqpTiled(Tsqp):
    """tsqp as it comes, but what does not fit a slot goes through the ring in tiles."""

    key = "tsqp-tile"
    title = "tsqp, large ones in tiles"
    large: ClassVar[str] = "tile"


class TsqpAuto(Tsqp):
    """tsqp as it comes, but it picks the carrier of what does not fit a slot by itself."""

    key = "tsqp-auto"
    title = "tsqp, large ones by auto"
    large: ClassVar[str] = "auto"


class TsqpLarge(Tsqp):
    """tsqp with slots that hold every tensor of the table: nothing takes ZeroMQ."""

    key = "tsqp-slots"
    title = "tsqp, 140 MB slots"
    geometry: ClassVar[dict[str, int]] = {"max_chunk_bytes": 140 << 20, "max_chunks": 2}


class TsqpSlots(Tsqp):
    """tsqp with `count` slots of a size that holds 1 MB."""

    key = "tsqp-count"
    title = "tsqp"
    geometry: ClassVar[dict[str, int]] = {"max_chunk_bytes": 2 << 20, "max_chunks": 32}

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder)
        self.key, self.title = f"{self.key}-{count}", f"{count} slots"  # type: ignore[misc]
        self.slots["max_chunks"] = count
