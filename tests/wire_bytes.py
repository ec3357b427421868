"""Messages as bytes, made by hand from the layout, so that the tests can also make wrong ones; and tensors to send."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tsqp import ShmRingBuffer
from tsqp._message import DTYPE_CODES, Decoder, Message, deadline_ns
from tsqp._ring import Ring, Segment

HEADER = struct.Struct("<IHHIIQiIIIQQQQ7Q")
DESC = struct.Struct("<BBBBIQQ8qQ")
MAGIC, VERSION = 0x4D515354, 1
DTYPES = list(DTYPE_CODES)


def align(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


@dataclass
class Desc:
    """A tensor descriptor."""

    code: int = 1
    shape: Sequence[int] = ()
    nbytes: int = 4
    offset: int = 0
    ndim: int | None = None
    encoding: int = 0
    reserved: tuple[int, int, int] = (0, 0, 0)

    def pack(self) -> bytes:
        shape = [*self.shape, *[0] * (8 - len(self.shape))]
        ndim = len(self.shape) if self.ndim is None else self.ndim
        return DESC.pack(
            self.code, ndim, self.encoding, *self.reserved[:2], self.nbytes, self.offset, *shape, self.reserved[2]
        )


@dataclass
class Raw:
    """A whole message of tensors of float32 zeros, right unless changed: ``replace(raw, version=2).pack()``."""

    descs: Sequence[Desc] = ()
    meta: bytes = b""
    magic: int = MAGIC
    version: int = VERSION
    header_bytes: int = HEADER.size
    flags: int = 0
    tensor_count: int | None = None
    meta_bytes: int | None = None
    total: int | None = None
    reserved: Sequence[int] = field(default_factory=lambda: [0] * 7)

    def head_bytes(self) -> int:
        return align(HEADER.size + len(self.descs) * DESC.size + len(self.meta))

    def pack(self) -> bytes:
        total = self.head_bytes() + sum(align(desc.nbytes) for desc in self.descs if desc.nbytes < 1 << 20)
        header = HEADER.pack(
            *(self.magic, self.version, self.header_bytes, 7, self.flags, 42, 0),
            len(self.descs) if self.tensor_count is None else self.tensor_count,
            len(self.meta) if self.meta_bytes is None else self.meta_bytes,
            *(0, 0, total if self.total is None else self.total, 0, 0, *self.reserved),
        )
        head = header + b"".join(desc.pack() for desc in self.descs) + self.meta
        return head + bytes(total - len(head))


def raw(*shapes: Sequence[int], meta: bytes = b"", **changes: Any) -> Raw:
    """A right message with float32 tensors of these shapes; `changes` make it a wrong one."""
    descs = [Desc(shape=shape, nbytes=4 * int(torch.Size(shape).numel())) for shape in shapes]
    message = Raw(descs, meta, **changes)
    offset = message.head_bytes()
    for desc in descs:
        desc.offset = offset
        offset += align(desc.nbytes)
    return message


def with_desc(message: Raw, index: int, **changes: Any) -> Raw:
    """The same message with one descriptor changed."""
    descs = list(message.descs)
    descs[index] = replace(descs[index], **changes)
    return replace(message, descs=descs)


class Reader:
    """A ring whose reading end decodes messages and whose writing end puts any bytes into a slot."""

    def __init__(self, chunk: int, count: int) -> None:
        self.writer = ShmRingBuffer(chunk, count)
        handle = self.writer.handle()
        segment = Segment.attach(handle.max_chunk_bytes, handle.max_chunks, 1, handle.name, handle.session)
        self.ring = Ring(segment, 0, False)
        self.codec = Decoder()

    def put(self, data: bytes) -> None:
        with self.writer.acquire_write(0, len(data)) as view:
            view[:] = data

    def read(self) -> Message:
        return self.codec.read(self.ring, deadline_ns(0))

    def lease(self) -> Message:
        """The message as a lease gives it; the lease is over when this returns."""
        with self.codec.lease(self.ring, deadline_ns(0)) as message:
            message.tensors[:] = [tensor.clone() for tensor in message.tensors]
            return message


@contextmanager
def reader(chunk: int = 1 << 16, count: int = 2) -> Iterator[Reader]:
    made = Reader(chunk, count)
    try:
        yield made
    finally:
        made.ring.close()
        made.writer.close()


# --- tensors --------------------------------------------------------------------------------------------------


def tensor_of(dtype: torch.dtype, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Random bits: every value of the dtype, NaN payloads included."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = int(torch.Size(shape).numel()) * dtype.itemsize
    bits = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        bits &= 1
    return bits.view(dtype).reshape(tuple(shape))


def numbered(number: int, nbytes: int) -> torch.Tensor:
    """What the `number`-th message of a test carries: bytes nobody else sends."""
    return (torch.arange(nbytes, dtype=torch.int32) * 31 + number).to(torch.uint8)


def check_numbered(message: Message, number: int, nbytes: int) -> None:
    """`message` is the `number`-th, and every byte of it."""
    assert message.request_id == number
    (tensor,) = message.tensors
    assert torch.equal(tensor, numbered(number, nbytes))


def bits_of(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    dense = tensor.clone(memory_format=torch.contiguous_format)
    return bytes(dense.reshape(-1).view(torch.uint8).numpy())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal dtype, shape and bits: NaN equals the same NaN, and 0.0 is not -0.0."""
    return one.dtype == other.dtype and one.shape == other.shape and bits_of(one) == bits_of(other)
