"""What the two ends of a channel do until one of them is killed, and the processes in which the victims do it."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from random import Random
from typing import Any

import torch
from peers import PATIENCE_S, Peer

import tsqp
from tsqp.errors import ClosedError, ConnectError, PeerDiedError
from tsqp.listener import Listener
from tsqp.transport import Channel

#: Slots large enough for a kill to hit the middle of a copy; what is large needs several of them.
CHUNK, COUNT = 1 << 19, 4
_LARGE = 3 << 20
_SHIFT = 1 << 16
#: The promise is one second; a machine that is busy with other things may take this much longer.
NOTICED_WITHIN_S, SLACK_S = 1.0, 3.0
#: How many times the usual number of kills: ``TSQP_SOAK=20 pytest tests/test_kill_campaign.py``.
SOAK = max(1, int(os.environ.get("TSQP_SOAK") or 1))

_BYTES = torch.randint(0, 256, (_LARGE + 2 * _SHIFT,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def content(number: int, large: bool) -> torch.Tensor:
    """What message `number` carries: bytes at a place of its own in a random text that both ends know."""
    nbytes = _LARGE + number * 97 % _SHIFT if large else number * 104_729 % (CHUNK - 512)
    start = number * 7919 % _SHIFT
    return _BYTES[start : start + nbytes]


def check(message: Any, number: int, large: bool) -> None:
    """`message` is number `number`, whole and byte for byte."""
    assert message.request_id == number
    assert len(message.tensors) == 1
    assert torch.equal(message.tensors[0], content(number, large)), f"message {number} has wrong bytes"


# --- what an end does for ever ----------------------------------------------------------------------------------


def write(channel: Channel, large: bool) -> None:
    for number in itertools.count():
        channel.send([content(number, large)], request_id=number)


def read(channel: Channel, large: bool) -> None:
    for number in itertools.count():
        if number % 2:
            check(channel.recv(), number, large)
        else:
            with channel.lease() as message:
                check(message, number, large)


def wait(channel: Channel, large: bool) -> None:
    channel.recv()
    raise AssertionError("nobody sent anything")


ACTS: dict[str, Callable[[Channel, bool], None]] = {"write": write, "read": read, "wait": wait}
#: What the other end does meanwhile.
MEANWHILE = {"write": read, "read": write, "wait": wait}


def ask(channel: Channel, number: int, large: bool) -> None:
    """One request, answered with its own content."""
    channel.send([content(number, large)], request_id=number, timeout=PATIENCE_S)
    check(channel.recv(PATIENCE_S), number, large)


# --- victims ----------------------------------------------------------------------------------------------------


def client(wire: Connection, endpoint: str, options: dict[str, Any], act: str, large: bool) -> None:
    channel = tsqp.connect(endpoint, **options)
    wire.send("ready")
    ACTS[act](channel, large)


def server(wire: Connection, endpoint: str, options: dict[str, Any], act: str, large: bool) -> None:
    """Serves two clients: one with `act`, one that it only keeps."""
    with tsqp.listen(endpoint, **options) as listener:
        wire.send("listening")
        first = listener.accept(PATIENCE_S)
        wire.send("accepted")
        _second = listener.accept(PATIENCE_S)
        wire.send("ready")
        ACTS[act](first, large)


def connecting_client(wire: Connection, endpoint: str, options: dict[str, Any]) -> None:
    wire.send("ready")
    while True:
        tsqp.connect(endpoint, **options).close()


def accepting_server(wire: Connection, endpoint: str, options: dict[str, Any]) -> None:
    with tsqp.listen(endpoint, **options) as listener:
        wire.send("ready")
        while True:
            listener.accept().close()


def asking_client(wire: Connection, endpoint: str, options: dict[str, Any], seed: int) -> None:
    """Asks small and large things in turn until it is killed, or told to stop; then it says how many."""
    random = Random(seed)
    with tsqp.connect(endpoint, **options) as channel:
        wire.send("ready")
        for number in itertools.count():
            ask(channel, number, large=random.random() < 0.3)
            if wire.poll():
                wire.recv()
                wire.send(number + 1)
                return


# --- survivors --------------------------------------------------------------------------------------------------


class Survivor(threading.Thread):
    """Does something in a thread until that raises, and keeps what it raised and when."""

    def __init__(self, act: Callable[..., object], *arguments: object) -> None:
        super().__init__(daemon=True)
        self._act, self._arguments = act, arguments
        self.error: BaseException | None = None
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        try:
            self._act(*self._arguments)
        except BaseException as error:  # noqa: BLE001 (judged by whoever waits)
            self.ended_at = time.monotonic()
            self.error = error.with_traceback(None)

    def outcome(self) -> BaseException | None:
        self.join(PATIENCE_S)
        assert not self.is_alive(), "the survivor still waits for the dead"
        return self.error


class EchoServer(threading.Thread):
    """One thread that serves every client of a listener: each gets its own message back."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(name="echo-server")
        self._listener, self._stop_now = listener, threading.Event()
        self.accepted = 0
        self.deaths: list[float] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            while not self._stop_now.is_set():
                while self._listener.accept_nowait() is not None:
                    self.accepted += 1
                for channel in self._listener.wait(0.05):
                    self._turn(channel)
        except BaseException as error:  # noqa: BLE001 (raised by stop)
            self.error = error

    def _turn(self, channel: Channel) -> None:
        try:
            if not channel.can_send():
                return
            held = channel.recv_nowait()
            if held is not None:
                with held as message:
                    channel.send(message.tensors, request_id=message.request_id, timeout=PATIENCE_S, transfer=True)
        except PeerDiedError:
            self.deaths.append(time.monotonic())
            channel.close()
        except ClosedError:
            channel.close()

    def told_of(self, deaths: int) -> bool:
        """True once so many clients were seen to die; raises what ended this thread before."""
        if self.error is not None:
            raise self.error
        return len(self.deaths) == deaths

    def stop(self) -> None:
        self._stop_now.set()
        self._listener.interrupt()
        self.join(PATIENCE_S)
        if self.error is not None:
            raise self.error


def connect_again_and_again(endpoint: str, options: dict[str, Any]) -> None:
    """Until the server is gone: then nobody answers, or it went away in the middle."""
    while True:
        try:
            with tsqp.connect(endpoint, 0.5, **options) as channel:
                channel.recv(PATIENCE_S)
        except ClosedError:
            continue  # the server's own close
        except ConnectError as error:
            raise PeerDiedError(str(error)) from None


def kill(peer: Peer, delay_s: float) -> float:
    """Kills after a delay, and returns when; what went wrong in the victim before is raised."""
    time.sleep(delay_s)
    killed_at = time.monotonic()
    try:
        peer.kill()
    finally:
        peer.check_last_words()  # also of one that ended by itself
    return killed_at
