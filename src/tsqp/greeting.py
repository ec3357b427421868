"""What a client learns of a server before it says anything to it: who it is, and why a connection fails.

libzmq tries again and again, in silence; its monitor says what went wrong with each try.
"""

from __future__ import annotations

import errno
import os

import zmq

from .errors import AuthenticationError
from .peer_uid import GONE, stranger

_UNCLEAR = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
#: What the monitor of a client's socket has to watch.
EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | _UNCLEAR
)
#: A server that is just being stopped ends a handshake, too; this many in a row are no accident.
_TRIES = 3
_BOTH = "give both ends keys (the client curve_key and curve_server, the server curve_key and curve_clients), or none"


class Greeting:
    """Hears the monitor of a client's socket until there is a connection.

    ``error``, once set, is why there will be none; ``hint`` is what is known where there was none in time.
    """

    def __init__(self, endpoint: str, keys: bool) -> None:
        self._endpoint, self._keys = endpoint, keys
        self._unix = endpoint.startswith("ipc://")
        self._known = False
        self._failed = 0
        self.error: AuthenticationError | None = None
        self.hint = ""

    def hear(self, event: int, value: int) -> bool:
        """True with the event that makes a connection, to a server that is one to talk to."""
        if event == zmq.EVENT_CONNECTED:
            self._known = not self._unix or self._look_at(value)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return self._known and self.error is None
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._end("refused this client: the public key of curve_key is not among its curve_clients; have it added")
        elif event & _UNCLEAR:
            self._fail(event, value)
        return False

    def _look_at(self, descriptor: int) -> bool:
        who = stranger(descriptor)
        if who and who != GONE:
            self._end(
                f"is of {who}, and this is user {os.geteuid()}; run both ends as one user (a server may be root's)"
            )
        return not who

    def _fail(self, event: int, value: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            this, other = ("has", "has none") if self._keys else ("has no", "wants some")
            self._end(f"does not fit: this client {this} keys and the server {other}; {_BOTH}")
        elif value == errno.ETIMEDOUT:
            return  # the server is stopped, or busy with something else: that says nothing about keys
        elif self._keys:
            self._failed += 1
            self.hint = "something ends the connection during the handshake: perhaps it has no keys, or other ones"
            if self._failed >= _TRIES:
                self._end("has other keys than curve_server says, or none; give the public key of that very server")
        else:
            self.hint = f"something ends the connection during the handshake: perhaps it wants keys; {_BOTH}"

    def _end(self, text: str) -> None:
        if self.error is None:
            self.error = AuthenticationError(f"the server at {self._endpoint} {text}")
