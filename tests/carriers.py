"""The ways a channel can carry messages, and a pair of channels over one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

from peers import PATIENCE_S
from wire_bytes import check_numbered, numbered

import tsqp
from tsqp._message import Message
from tsqp.listener import Listener
from tsqp.transport import Channel

#: Slots of 64 KiB, so that the tests also send much that does not fit one.
CHUNK, COUNT = 1 << 16, 4
#: Message sizes in bytes of payload: in one slot, just below and just at the threshold, and far above it.
SMALL, LARGE = 1000, 3 * CHUNK
SIZES = [0, 1, SMALL, CHUNK - 320, CHUNK - 256, CHUNK, LARGE + 17]


@dataclass(frozen=True)
class Carrier:
    """How to get there: the endpoint's scheme, and options for both ends."""

    scheme: str
    shm: bool
    large: str = "zmq"

    @property
    def transport(self) -> str:
        return f"shm+{self.scheme}" if self.shm else self.scheme

    @property
    def rings(self) -> bool:
        return self.shm

    @property
    def connect_options(self) -> dict[str, Any]:
        return {"shm": self.shm, "large": self.large}

    @property
    def listen_options(self) -> dict[str, Any]:
        return {**self.connect_options, "max_chunk_bytes": CHUNK, "max_chunks": COUNT}

    def endpoint(self, ipc: str) -> str:
        """Where to listen: the test's own ipc endpoint, or any free port."""
        return ipc if self.scheme == "ipc" else "tcp://127.0.0.1:0"


CARRIERS = {
    "ring": Carrier("ipc", True),
    "ring-tcp": Carrier("tcp", True),
    "ring-tiled": Carrier("ipc", True, "tile"),
    "zmq-ipc": Carrier("ipc", False),
    "zmq-tcp": Carrier("tcp", False),
}


@dataclass
class Pair:
    """A listener and the two ends of a connection to it, in one process."""

    listener: Listener
    client: Channel
    server: Channel


@contextmanager
def pair_over(carrier: Carrier, ipc: str, **options: Any) -> Iterator[Pair]:
    with (
        tsqp.listen(carrier.endpoint(ipc), **{**carrier.listen_options, **options}) as listener,
        tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options) as client,
        listener.accept(PATIENCE_S) as server,
    ):
        yield Pair(listener, client, server)


class Background:
    """Functions in threads; what they raised is raised by :meth:`join`."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, function: Callable[..., object], *arguments: object, **named: object) -> None:
        def run() -> None:
            try:
                function(*arguments, **named)
            except BaseException as error:  # noqa: BLE001 (raised by join)
                self._errors.append(error)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors.pop()


def pass_on(sender: Channel, receiver: Channel, tensors: Any, **fields: Any) -> Message:
    """Sends in a thread, because a message may need more slots than there are, and receives here."""
    sending = Background()
    sending.start(sender.send, tensors, timeout=PATIENCE_S, **fields)
    message = receiver.recv(PATIENCE_S)
    sending.join()
    return message


def send_numbered(channel: Channel, sizes: list[int]) -> None:
    for number, nbytes in enumerate(sizes):
        channel.send([numbered(number, nbytes)], request_id=number, timeout=PATIENCE_S)


def recv_numbered(channel: Channel, sizes: list[int]) -> None:
    for number, nbytes in enumerate(sizes):
        check_numbered(channel.recv(PATIENCE_S), number, nbytes)


def random_sizes(count: int, seed: int, large: float = 0.2) -> list[int]:
    """`large`: the share of messages at or above the threshold."""
    random = Random(seed)
    return [random.choice(SIZES[4:]) if random.random() < large else random.choice(SIZES[:4]) for _ in range(count)]
