"""Inputs to start fuzzing from: messages of every dtype, one of them wrong, and runs of a ring with an honest peer."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

HEADER = struct.Struct("<IHHIIQiIIIQQQQ7Q")
DESC = struct.Struct("<BBBBIQQ8qQ")
MAGIC, VERSION = 0x4D515354, 1
#: By code on the wire, from 1: float32 float16 bfloat16 float64, int8..64, uint8..32, bool, the float8s.
ITEMSIZES = (4, 2, 2, 8, 1, 2, 4, 8, 1, 2, 4, 1, 1, 1)
SEGMENT_TAG = 0x01_67657370717374
PLAIN, AS_BFLOAT16, AS_INT8_ROWS = range(3)
FLAG_VIA_ZMQ, FLAG_TILED = 1 << 24, 1 << 25


def align(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def wire_bytes(code: int, shape: Sequence[int], encoding: int) -> int:
    """Bytes of a tensor on the wire: plain, as bfloat16, or as int8 with a float32 scale for each row."""
    count = 1
    for dim in shape:
        count *= dim
    if encoding == PLAIN or count == 0:
        return count * ITEMSIZES[code - 1]
    return 2 * count if encoding == AS_BFLOAT16 else align(4 * (count // shape[-1])) + count


def message(
    tensors: Sequence[tuple[int, Sequence[int]]], meta: bytes = b"", flags: int = 0, encoding: int = 0
) -> bytes:
    """A right message; tensors are (dtype code, shape)."""
    head_bytes = align(HEADER.size + len(tensors) * DESC.size + len(meta))
    offset, descs = head_bytes, b""
    for code, shape in tensors:
        nbytes = wire_bytes(code, shape, encoding)
        dims = [*shape, *[0] * (8 - len(shape))]
        descs += DESC.pack(code, len(shape), encoding, 0, 0, nbytes, offset, *dims, 0)
        offset += align(nbytes)
    header = HEADER.pack(
        *(MAGIC, VERSION, HEADER.size, 7, flags, 42, 0, len(tensors), len(meta), 3, 5, offset, 11, 13, *[0] * 7)
    )
    return (header + descs + meta).ljust(offset, b"\x01")


def messages() -> Iterator[tuple[str, bytes]]:
    for code in range(1, len(ITEMSIZES) + 1):
        yield f"dtype{code}", message([(code, (3, 5))])
    yield "bfloat16", message([(1, (3, 50)), (1, ())], encoding=AS_BFLOAT16)
    yield "int8-rows", message([(1, (3, 50)), (2, (2, 3, 4)), (3, (7,))], encoding=AS_INT8_ROWS)
    yield "no-tensors", message([])
    yield "meta", message([], b"\x82\xa1x\x01\xa1y\xa3abc")
    yield "scalar", message([(1, ())])
    yield "empty", message([(4, (0, 7)), (1, (2, 0, 1 << 20))])
    yield "rank8", message([(9, (1, 2, 1, 2, 1, 2, 1, 2))])
    yield "three", message([(3, (4, 8)), (3, (1, 8)), (5, (9,))], b"\x81\xa1k\xc3")
    yield "sixty-four", message([(9, (0,))] * 64)
    yield "sixty-five", message([(9, (0,))] * 65)  # one too many
    yield "announced", message([], flags=FLAG_VIA_ZMQ)
    yield "tiled", message([(1, (1 << 20, 4)), (2, (7,))], flags=FLAG_TILED)[:384]


def runs() -> Iterator[tuple[str, bytes]]:
    """Steps of fuzz_ring.c: 2 the peer advances, 4 write, 5 publish, 6 cancel, 7 read, 8 release, 9 fill, 10 look."""
    exchange = (
        b"\x04" + b"\x05\x40\x00\x01\x01" + b"\x02\x01\x40\x00" + b"\x07\x02" + b"\x08\x01\x00" + b"\x02\x00\x00\x00"
    )
    for geometry in range(0, 64, 5):
        yield f"exchange{geometry}", bytes([0, geometry, geometry % 2]) + exchange * 6
    full = b"\x04\x05\x10\x00\x01\x01" * 6
    yield "full", b"\x00\x08\x00" + full + b"\x02\x00\x00\x00" * 3 + full + b"\x0a"
    yield "cancelled", b"\x00\x08\x01" + (b"\x04\x06" * 3 + b"\x04\x05\x08\x00\x01\x01\x0a") * 3
    yield (
        "leases",
        b"\x00\x2c\x00" + b"\x02\x01\x20\x00\x07\x02" * 3 + b"\x08\x01\x01\x08\x01\x00\x08\x01\x00" + exchange,
    )
    part = b"\x04\x05\x40\x00\x01\x00\x60" + b"\x09\x80\x09\xff" + b"\x02\xe1\x40\x00\x07\x01\x0a\x08\x01\x00"
    yield "in-parts", b"\x00\x09\x00" + part * 4
    yield "changed", b"\x00\x09\x00" + exchange + b"\x00\x00\x00\x00\x0c" + exchange + b"\x01\x10\x00\x0e" + exchange
    for kind in (0, 1, 2, 3):
        yield f"segment{kind}", segment(kind)


def segment(kind: int) -> bytes:
    """An attach: a header page for 64 bytes and one slot in one ring; `kind` 2 and 3 spoil session and length."""
    header = struct.pack("<QQQQQQQ", SEGMENT_TAG, 1, 2, 64, 1, 1, 3 * 4096)
    return b"\x0f\x00" + bytes([kind]) + header.ljust(4096, b"\x00")


SEEDS = {"fuzz_message": messages, "fuzz_ring": runs}
