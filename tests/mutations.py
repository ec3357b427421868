"""A process that decodes messages of which a few bytes were changed, under a cap on its memory."""

from __future__ import annotations

from multiprocessing.connection import Connection
from random import Random
from typing import Any


def _mutate(data: bytes, random: Random) -> bytes:
    """A few bytes, words or the length of a message changed."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 3, 8])):
        kind, at = random.randrange(4), random.randrange(len(changed))
        if kind == 0:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            changed[at] = random.choice([0, 1, 8, 9, 14, 15, 127, 128, 255])
        elif kind == 2:
            at &= ~7
            changed[at : at + 8] = random.choice(
                [0, 1, 64, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
            ).to_bytes(8, "little")
        else:
            changed = changed[:at] or bytearray(1)
    return bytes(changed)


def _look_at(end: Any, random: Random, originals: list[bytes]) -> str:
    from tsqp.errors import TsqpError

    data = _mutate(random.choice(originals), random)
    end.put(data)
    try:
        message = end.read() if random.random() < 0.5 else end.lease()
        taken = sum(tensor.numel() * tensor.element_size() for tensor in message.tensors)
        assert taken <= len(data), f"{taken} bytes of tensors out of {len(data)}"
        _ = message.meta
    except TsqpError:
        return "refused"
    return "valid"


def mutate_messages(wire: Connection, count: int, seed: int) -> None:
    """Decodes mutated messages; says how many were refused or valid, and lists everything else."""
    import resource

    from wire_bytes import raw, reader

    random = Random(seed)
    originals = [
        raw().pack(),
        raw(meta=b"\x82\xa1x\x01\xa1y\xa3abc").pack(),
        raw((2, 3)).pack(),
        raw((0, 4), (), (2, 2, 2), meta=b"\x80").pack(),
        raw(*[(i % 4, i % 3) for i in range(20)], meta=b"\x81\xa1x\xc4\x64" + bytes(100)).pack(),
    ]
    outcomes: dict[str, Any] = {"refused": 0, "valid": 0, "wrong": []}
    with reader(1 << 14, 3) as end, open("/proc/self/statm") as statm:
        allowed = int(statm.read().split()[0]) * resource.getpagesize() + (256 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
        for _ in range(count):
            try:
                outcomes[_look_at(end, random, originals)] += 1
            except BaseException as error:  # noqa: BLE001 (reported)
                outcomes["wrong"].append(repr(error))
    wire.send(outcomes)
