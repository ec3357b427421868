"""The lock of a listener's door: who is let in, by user id on a Unix socket and by CURVE keys where there are some.

libzmq asks about each key by ZAP (https://rfc.zeromq.org/spec/27). The thread that owns the ROUTER answers, in its own
poll loop, and asks again when a client says hello; a client whose key is removed from the directory is cut off.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import time
from collections.abc import Container

import zmq
from zmq.utils import z85

from .curve import ZAP_DOMAIN, ServerKeys
from .peer_uid import stranger

log = logging.getLogger("tsqp.door_lock")

#: libzmq's own address for the questions of all sockets of a context.
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_ZAP_VERSION, _ZAP_PARTS = b"1.0", 7
#: Questions answered before other work is looked at.
_AT_ONCE = 64
#: An unknown key may have been added just now: the directory is looked at again, but not more often than this.
_FRESH_S = 0.002
_MANY = 64
#: Whoever is refused can come again at once, and must not fill a log.
_LOG_EVERY_S = 1.0
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


def seed_identities() -> None:
    """To be called before a ROUTER is made: it numbers its peers from C's ``rand()`` on, which starts the same in every
    process. A peer that foresees a number can choose it as its own identity, and libzmq aborts the process when the
    number's turn comes (an assertion in ``routing_socket_base_t::add_out_pipe``)."""
    ctypes.CDLL(None).srand(secrets.randbits(32))


class DoorLock:
    """Of one ROUTER that is not bound yet. Used by the thread that owns it."""

    def __init__(self, context: zmq.Context, router: zmq.Socket, unix: bool, keys: ServerKeys | None) -> None:
        self._unix, self._keys = unix, keys
        #: Which key each client came in with.
        self._came_with: dict[bytes, bytes] = {}
        self._version = -1
        #: Those who have left are forgotten when there are so many.
        self._many = _MANY
        self._logged, self._unlogged = float("-inf"), 0
        self._zap: zmq.Socket | None = None
        #: What the ROUTER's monitor has to watch for :meth:`hear`.
        self.events = 0
        if keys is not None:
            self.events = _FAILED
            self._zap = context.socket(zmq.REP)
            self._zap.setsockopt(zmq.LINGER, 0)
            self._zap.bind(_ZAP_ADDRESS)
            keys.apply(router)
            log.info("clients need keys: %d are known in %s", len(keys.clients), keys.clients.directory)

    def register(self, poller: zmq.Poller) -> None:
        """Lets a poll end when there is a question."""
        if self._zap is not None:
            poller.register(self._zap, zmq.POLLIN)

    def close(self) -> None:
        """After the ROUTER's close. What libzmq asks then, nobody answers, and so nobody is let in."""
        if self._zap is not None:
            self._zap.close(0)

    def look(self, *present: Container[bytes]) -> list[bytes]:
        """Answers questions; returns which of the clients that are ``present`` have no key here any more."""
        if self._keys is None:
            return []
        self._answer()
        clients = self._keys.clients
        clients.look()
        if clients.version == self._version and len(self._came_with) < self._many:
            return []
        self._version = clients.version
        self._came_with = {who: key for who, key in self._came_with.items() if any(who in some for some in present)}
        self._many = 2 * len(self._came_with) + _MANY
        return [who for who, key in self._came_with.items() if not clients.knows(key)]

    def refusal(self, identity: bytes, hello: zmq.Frame) -> str:
        """Why the sender of this frame, its first, is not let in; empty where it is."""
        if self._unix:
            who = stranger(int(hello.get(zmq.SRCFD)))
            if who:
                self._log(f"refused {who}: this server is for user {os.geteuid()} and root")
                return f"it serves user {os.geteuid()} and root, and this is {who}; run both ends as one user"
        if self._keys is None:
            return ""
        key = key_of(hello)
        if not self._keys.clients.knows(key):
            return "this client's key was removed from the server's directory; have it added again"
        self._came_with[identity] = key
        return ""

    def hear(self, event: int) -> None:
        """Logs a handshake that failed before there was a question."""
        if event & _FAILED:
            self._log("refused a connection: it has no keys, or other ones than this server's, or is no tsqp client")

    # --- ZAP ------------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        assert self._zap is not None
        for _ in range(_AT_ONCE):
            try:
                question = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            request_id = question[1] if len(question) > 1 else b""
            user = self._user(question)
            verdict = (b"200", b"OK", user) if user else (b"400", b"unknown key", b"")
            self._zap.send_multipart([_ZAP_VERSION, request_id, *verdict, b""], zmq.NOBLOCK)

    def _user(self, question: list[bytes]) -> bytes:
        """The key (Z85) of a client that may come in, else nothing."""
        assert self._keys is not None
        if len(question) != _ZAP_PARTS:
            return b""
        version, _, domain, address, _, mechanism, key = question
        if (version, domain, mechanism, len(key)) != (_ZAP_VERSION, ZAP_DOMAIN, b"CURVE", 32):
            return b""
        text, clients = bytes(z85.encode(key)), self._keys.clients
        if not clients.knows(text):
            clients.look(_FRESH_S)
        if clients.knows(text):
            return text
        self._log(f"refused {address.decode(errors='replace')}: its key {text.decode()} is not in {clients.directory}")
        return b""

    def _log(self, text: str) -> None:
        now = time.monotonic()
        if now - self._logged < _LOG_EVERY_S:
            self._unlogged += 1
            return
        more = f" ({self._unlogged} more since the last line)" if self._unlogged else ""
        self._logged, self._unlogged = now, 0
        log.warning("%s%s", text, more)


def key_of(frame: zmq.Frame) -> bytes:
    """The key that the sender of this frame came in with, empty where nobody asked: our own answer put it there, the
    client can't."""
    try:
        return str(frame.get("User-Id")).encode()
    except zmq.ZMQError:
        return b""
