"""As much of ZMTP 3.0 (rfc.zeromq.org/spec/23) as an attacker needs, over a bare socket: hardly any work for whoever
sends, so that what a measurement shows is what it costs the one who is attacked."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

#: The greeting of a peer without authentication.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
#: How the other end's last word begins before there can be messages.
READY = b"\x05READY"
_MORE, _LONG, _COMMAND = 1, 2, 4
_SHORT_MAX = 255


def command(name: bytes, *properties: tuple[bytes, bytes]) -> bytes:
    """A command frame."""
    body = bytes([len(name)]) + name
    for key, value in properties:
        body += bytes([len(key)]) + key + struct.pack(">I", len(value)) + value
    return bytes([_COMMAND, len(body)]) + body


def message(frames: Sequence[bytes]) -> bytes:
    """The frames of one message."""
    parts = []
    for left, frame in zip(range(len(frames) - 1, -1, -1), frames, strict=True):
        flags = _MORE if left else 0
        if len(frame) > _SHORT_MAX:
            parts.append(struct.pack(">BQ", flags | _LONG, len(frame)))
        else:
            parts.append(bytes([flags, len(frame)]))
        parts.append(frame)
    return b"".join(parts)


def opening(kind: bytes = b"DEALER", identity: bytes = b"") -> bytes:
    """All that a peer says before its first message, at once."""
    return GREETING + command(b"READY", (b"Socket-Type", kind), (b"Identity", identity))


def hear(sock: socket.socket, *words: bytes) -> bytes:
    """Reads until one of ``words`` was heard, and returns that one; ConnectionError where the other end hung up."""
    heard = b""
    while True:
        for word in words:
            if word in heard:
                return word
        more = sock.recv(1 << 16)
        if not more:
            raise ConnectionError("the server hung up")
        heard += more
