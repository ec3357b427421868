"""Peers that mean ill, each of one kind: what the tests throw at a server, and the benchmark at a stated rate.

An attacker knows where the server listens and may connect, and no more. :func:`attack` runs one as a process.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import msgpack
import torch

from tsqp import handshake as hs
from tsqp._message import Encoder
from tsqp.config import parse_endpoint

from . import zmtp

_SHORT_S = 1.0


def hello(**changes: Any) -> list[bytes]:
    """The message that a client begins with."""
    body = {"protocol": hs.PROTOCOL, "shm": False, "futex": False, **changes}
    return [hs.envelope(hs.HELLO), msgpack.packb(body)]


def ready() -> list[bytes]:
    """The message that ends a handshake without shared memory."""
    return [hs.envelope(hs.READY), hs.pack(hs.Ready(False, True))]


class Attacker:
    """Base of them all. :meth:`turn` is one blow; what the server does to the attacker is no error."""

    def __init__(self, endpoint: str) -> None:
        self._parsed = parse_endpoint(endpoint)
        self._sockets: deque[socket.socket] = deque()

    def turn(self) -> None:
        raise NotImplementedError

    def raw(self) -> socket.socket:
        """A bare connection."""
        parsed = self._parsed
        made = socket.socket(socket.AF_UNIX if parsed.scheme == "ipc" else socket.AF_INET, socket.SOCK_STREAM)
        made.settimeout(_SHORT_S)
        self._sockets.append(made)
        made.connect(parsed.path if parsed.scheme == "ipc" else (parsed.host, parsed.port))
        return made

    def speaker(self, *messages: Sequence[bytes], kind: bytes = b"DEALER") -> socket.socket:
        """A connection that speaks ZeroMQ, and says something at once."""
        made = self.raw()
        made.sendall(zmtp.opening(kind))
        zmtp.hear(made, zmtp.READY)  # libzmq ends a connection that does not wait for it
        made.sendall(b"".join(map(zmtp.message, messages)))
        return made

    def client(self) -> socket.socket | None:
        """A connection let in as a client without shared memory; None if the server had it otherwise."""
        made = self.speaker(hello())
        if zmtp.hear(made, hs.envelope(hs.WELCOME), hs.envelope(hs.REFUSE)) == hs.envelope(hs.REFUSE):
            return None
        made.sendall(zmtp.message(ready()))
        return made

    def leave(self, most: int = 0) -> None:
        """Leaves all connections but the newest ``most``."""
        while len(self._sockets) > most:
            self._sockets.popleft().close()

    def go_on(self, *messages: Sequence[bytes]) -> None:
        """Says something over the only connection, made now if there is none."""
        if not self._sockets:
            self.speaker(*messages)
            return
        try:
            for message in messages:
                self._sockets[0].sendall(zmtp.message(message))
        except OSError:  # cut off: comes again next time
            self.leave()
            raise


class SlowGreeting(Attacker):
    """Forty connections, and on each a byte of the greeting now and then: a slow loris."""

    COUNT = 40

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self._said: deque[tuple[socket.socket, int]] = deque()

    def turn(self) -> None:
        if len(self._sockets) < self.COUNT:
            self._said.append((self.raw(), 0))
        sock, at = self._said.popleft()
        try:
            sock.sendall(zmtp.GREETING[at : at + 1])
            self._said.append((sock, min(at + 1, 62)))  # never the last one
        except OSError:
            self._sockets.remove(sock)
            sock.close()

    def leave(self, most: int = 0) -> None:
        self._said.clear()
        super().leave(most)


class HugeFrame(Attacker):
    """A connection that is in order, and a frame that claims gigabytes and never comes."""

    CLAIMS = (1 << 62, (1 << 32) - 100)

    def turn(self) -> None:
        sock = self.raw()
        sock.sendall(zmtp.opening())
        for claim in self.CLAIMS:
            with contextlib.suppress(OSError):
                sock.sendall(b"\x02" + struct.pack(">Q", claim) + b"x" * 100)
        self.leave(20)


class Garbage(Attacker):
    """Speaks something else, and hangs up."""

    WORDS = (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\xff" * 4000, bytes(4000), zmtp.GREETING + b"\xff" * 4000)

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self._turns = 0

    def turn(self) -> None:
        self._turns += 1
        self.raw().sendall(self.WORDS[self._turns % len(self.WORDS)])
        self.leave(5)


class OpenAndLeft(Attacker):
    """Opens hundreds of connections and says nothing."""

    COUNT = 300

    def turn(self) -> None:
        self.raw()
        self.leave(self.COUNT)


class HalfOpen(Attacker):
    """Begins handshakes, segments and all, and does not go on."""

    COUNT = 40

    def turn(self) -> None:
        self.speaker(hello(shm=True))
        self.leave(self.COUNT)


class Replay(Attacker):
    """Frames twice, too early, too late, and out of order."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self._turns = 0

    def turn(self) -> None:
        self._turns += 1
        message = [hs.envelope(hs.MESSAGE, 5), b"x" * 128]
        stories = (
            [message, message],
            [message, [hs.envelope(hs.MESSAGE, 4), b"x" * 128]],
            [ready()],
            [hello()],
            [[hs.envelope(hs.PROBE), b"x"]],
            [[hs.envelope(hs.WELCOME), b"x"]],
            [[hs.envelope(hs.BYE)], message],
            [[b""]],
        )
        client = self.client()
        if client is not None:
            client.sendall(b"".join(map(zmtp.message, stories[self._turns % len(stories)])))
        self.leave(2)


class HelloAgain(Attacker):
    """Says hello over and over on one connection."""

    def turn(self) -> None:
        self.go_on(hello(shm=True))


class OtherVersion(Attacker):
    """Speaks another version of the protocol."""

    def turn(self) -> None:
        self.speaker(hello(protocol=hs.PROTOCOL + 1))
        self.leave(2)


class OtherSockets(Attacker):
    """Connects with other types of ZeroMQ sockets, and says what it likes."""

    KINDS = (b"REQ", b"SUB", b"PUB", b"PUSH", b"PULL", b"PAIR", b"ROUTER", b"REP", b"XPUB")

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self._turns = 0

    def turn(self) -> None:
        self._turns += 1
        self.speaker(hello(), kind=self.KINDS[self._turns % len(self.KINDS)])
        self.leave(len(self.KINDS))


class Flood(Attacker):
    """Sends messages as a client, and reads no answers; comes again after some."""

    NBYTES, COUNT = 64, 2000
    TAG = 0

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self._sent = 0
        encoder, tensor = Encoder(), torch.zeros(self.NBYTES, dtype=torch.uint8)
        encoder.plan([tensor], b"", self.TAG, 0, 1, 0, 0, 0, 0, 0)
        self._frames = [encoder.head_bytes(b""), bytes(self.NBYTES)]

    def turn(self) -> None:
        if not self._sockets or self._sent >= self.COUNT:
            self.leave()
            self._sent = 0
            if self.client() is None:
                return
        self._sent += 1
        self.go_on([hs.envelope(hs.MESSAGE, self._sent), *self._frames])


class LargeFlood(Flood):
    """The same with 4 MiB each."""

    NBYTES, COUNT = 4 << 20, 40


class Stranger(Attacker):
    """Sends messages without a handshake, as many as it can before it is cut off."""

    def turn(self) -> None:
        self.go_on([hs.envelope(hs.MESSAGE, 0), b"x" * 128])


ATTACKERS: dict[str, Callable[[str], Attacker]] = {
    "slow greeting": SlowGreeting,
    "huge frame": HugeFrame,
    "garbage": Garbage,
    "open and left": OpenAndLeft,
    "half-open": HalfOpen,
    "replay": Replay,
    "hello again": HelloAgain,
    "other version": OtherVersion,
    "other sockets": OtherSockets,
    "flood": Flood,
    "large flood": LargeFlood,
    "stranger": Stranger,
}


def attack(wire: Connection, name: str, endpoint: str, rate: float) -> None:
    """Attacks, ``rate`` turns a second at most, from one word of ``wire`` to the next; then says how many turns there
    were, how many of them the server kept from happening, and the seconds of CPU time they took. None ends it."""
    attacker = ATTACKERS[name](endpoint)
    wire.send("ready")
    while wire.recv() is not None:
        turns = refused = 0
        begin, cpu_s = time.monotonic(), time.process_time()
        while not wire.poll(max(0.0, begin + turns / rate - time.monotonic())):
            try:
                attacker.turn()
            except OSError:
                refused += 1
            turns += 1
        wire.recv()
        attacker.leave()
        wire.send((turns, refused, time.process_time() - cpu_s))
    attacker.leave()
