"""Which user is at the other end of a Unix socket: the kernel says it (SO_PEERCRED, unix(7)), the peer can't lie."""

from __future__ import annotations

import os
import socket
import struct

#: ``struct ucred``: pid, uid, gid.
_UCRED = struct.Struct("iII")
#: Said of a descriptor that is closed, or something else by now.
GONE = "somebody who has left"


def stranger(descriptor: int) -> str:
    """Who is connected to this Unix socket, for a sentence; empty where that is this process's user or root.

    For a client that is the user who made the server listen, for a server the one who connected. The descriptor stays
    its owner's: where it was closed meanwhile, the answer is :data:`GONE`.
    """
    try:
        uid = _peer_uid(descriptor)
    except (OSError, ValueError):  # a negative number is what libzmq has for none
        return GONE
    return "" if uid in (os.geteuid(), 0) else f"user {uid}"


def _peer_uid(descriptor: int) -> int:
    # Family and type are given: the socket is not asked for them, and nothing about it is changed.
    borrowed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=descriptor)
    try:
        return credentials(borrowed)[1]
    finally:
        borrowed.detach()


def credentials(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a Unix socket. Raises OSError."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(pid), int(uid)
