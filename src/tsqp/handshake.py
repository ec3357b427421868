"""What client and server say to each other before the first message, and the first frame of every later one.

A ZeroMQ message is ``[kind + sequence][...]``. The handshake is HELLO (client), WELCOME or REFUSE (server),
READY (client); its bodies are small msgpack maps. Every field is checked for type and range on receipt. Before READY
the client may send a few PROBEs, bytes that the server acknowledges with an empty PROBE: it measures the connection.
An empty PROBE before the WELCOME means nothing: the server learns from libzmq whether the connection is there still.
A BYE of the server may have the body of a REFUSE: why.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

import msgpack

from .errors import ConfigError, ProtocolError

PROTOCOL = 1
HELLO, WELCOME, REFUSE, READY, MESSAGE, BYE, PROBE = b"HWERMBP"
_ENVELOPE = struct.Struct("<BQ")
_MAX_BODY_BYTES = 4096


def envelope(kind: int, sequence: int = 0) -> bytes:
    """The first frame: one byte of kind and, for messages, their sequence number on this link."""
    return _ENVELOPE.pack(kind, sequence)


def open_envelope(frame: bytes | memoryview) -> tuple[int, int]:
    """``(kind, sequence)`` of a first frame. Raises :class:`ProtocolError`."""
    if len(frame) != _ENVELOPE.size:
        raise ProtocolError(f"an envelope has {_ENVELOPE.size} bytes, not {len(frame)}; the peer speaks something else")
    kind, sequence = _ENVELOPE.unpack(frame)
    return kind, sequence


def in_gramine() -> bool:
    """True inside a Gramine enclave or gramine-direct, where futexes and ipc:// do not reach the host.

    Raises :class:`ConfigError` where ``TSQP_ENCLAVE`` names something else: a runner that took itself for a plain
    process would wait by what does not work there.
    """
    told = os.environ.get("TSQP_ENCLAVE", "")
    if told not in ("", "gramine"):
        raise ConfigError(f"TSQP_ENCLAVE={told!r} is unknown; set it to gramine, or unset it")
    return told == "gramine" or os.path.exists("/dev/attestation")


def futex_works() -> bool:
    """Whether this process can wake, and be woken by, another process of this host through a futex."""
    return sys.platform.startswith("linux") and not in_gramine()


@dataclass(frozen=True)
class Hello:
    protocol: int
    shm: bool  # the client can map the host's shared memory
    futex: bool


@dataclass(frozen=True)
class Welcome:
    protocol: int
    shm: bool
    futex: bool  # both ends can
    name: str = ""
    session: bytes = b""
    max_chunk_bytes: int = 0
    max_chunks: int = 0


@dataclass(frozen=True)
class Ready:
    shm: bool  # the client has mapped the segment
    native: bool  # its name is not needed any more


@dataclass(frozen=True)
class Refuse:
    reason: str


Body = TypeVar("Body", Hello, Welcome, Ready, Refuse)
_TYPES = {"int": int, "bool": bool, "str": str, "bytes": bytes}
#: The types of each body's fields, by name.
_FIELDS: dict[type, dict[str, type]] = {
    kind: {field.name: _TYPES[str(field.type)] for field in fields(kind)} for kind in (Hello, Welcome, Ready, Refuse)
}


def pack(body: Hello | Welcome | Ready | Refuse) -> bytes:
    """A handshake body as msgpack."""
    return msgpack.packb(vars(body))


def unpack(kind: type[Body], data: bytes) -> Body:
    """A body of the dataclass `kind`; unknown or missing fields and wrong types are a :class:`ProtocolError`."""
    if len(data) > _MAX_BODY_BYTES:
        raise ProtocolError(f"a handshake of {len(data)} bytes is over the limit of {_MAX_BODY_BYTES}")
    try:
        body = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError):
        raise ProtocolError("the peer's handshake is no valid msgpack; it speaks something else") from None
    names = _FIELDS[kind]
    if not isinstance(body, Mapping) or body.keys() != names.keys():
        raise ProtocolError(f"the peer's {kind.__name__} has other fields; use one version of tsqp at both ends")
    for name, wanted in names.items():
        if type(body[name]) is not wanted:
            raise ProtocolError(f"the peer's {kind.__name__}.{name} is no {wanted.__name__}")
    return kind(**body)


def reason_of(bodies: list[bytes]) -> str:
    """Why the server said goodbye: the first of the bodies, as far as it can be shown; empty: it gave no reason."""
    try:
        reason = unpack(Refuse, bodies[0]).reason if bodies else ""
    except ProtocolError:
        return ""
    return "".join(filter(str.isprintable, reason[:500]))
