"""A message through one carrier and back, in one process."""

from __future__ import annotations

from typing import Any

from tsqp._message import Decoder, Encoder, Message, deadline_ns
from tsqp._ring import Ring, Segment

FIELDS = {"tag": 0, "flags": 0, "request_id": 0, "status": 0, "site": 0, "index": 0, "compute_ns": 0, "queue_ns": 0}
#: The names of the ways through which :class:`Through` sends.
WAYS = ["slot", "lease", "frames"]


class Through:
    """Sends messages through one carrier and returns what arrives."""

    def __init__(self) -> None:
        self.segment = Segment.create(1 << 18, 3, 1)
        self.out, self.inn = Encoder(), Decoder()
        self.writer = Ring(self.segment, 0, True)
        self.reader = Ring(self.segment, 0, False)

    def plan(self, tensors: list[Any], meta: bytes, **fields: int) -> int:
        return self.out.plan(tensors, meta, *{**FIELDS, **fields}.values())

    def slot(self, tensors: list[Any], meta: bytes = b"", **fields: int) -> Message:
        self.plan(tensors, meta, **fields)
        self.out.write(self.writer, meta, deadline_ns(0))
        return self.inn.read(self.reader, deadline_ns(0))

    def lease(self, tensors: list[Any], meta: bytes = b"", **fields: int) -> Message:
        self.plan(tensors, meta, **fields)
        self.out.write(self.writer, meta, deadline_ns(0))
        with self.inn.lease(self.reader, deadline_ns(0)) as message:
            message.tensors[:] = [tensor.clone() for tensor in message.tensors]
            return message

    def frames(self, tensors: list[Any], meta: bytes = b"", **fields: int) -> Message:
        self.plan(tensors, meta, **fields)
        frames = [bytearray(memoryview(part)) for part in self.out.as_they_travel(tensors)]
        return self.inn.decode_frames(self.out.head_bytes(meta), frames)
