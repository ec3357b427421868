"""Processes in bad places: no file descriptors left, or another user's rights."""

from __future__ import annotations

import os
import resource
from multiprocessing.connection import Connection
from typing import Any

import zmq
from peers import PATIENCE_S, obey
from wire_bytes import check_numbered, numbered

import tsqp
from tsqp.errors import TsqpError
from tsqp.transport import Channel

NOBODY = 65534


class Starved:
    """A process that opens so many files that only some descriptors are left."""

    def __init__(self, limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        self._files: list[int] = []
        self._listener: Any = None
        self._channels: list[Channel] = []

    def leave(self, spare: int) -> None:
        """Opens files until `spare` descriptors are left."""
        self.open_again()
        try:
            while True:
                self._files.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            for _ in range(spare):
                os.close(self._files.pop())

    def open_again(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def open_files(self) -> int:
        return len(os.listdir("/proc/self/fd")) - len(self._files)

    def listen(self, endpoint: str, max_chunk_bytes: int, max_chunks: int, max_clients: int) -> None:
        self._listener = tsqp.listen(endpoint, max_chunk_bytes, max_chunks, max_clients=max_clients)

    def try_listening(self, endpoint: str, spares: list[int], options: dict[str, Any]) -> dict[int, str]:
        """Listens with each of these many descriptors left; the outcome of each."""
        outcomes = {}
        for spare in spares:
            self.leave(spare)
            try:
                tsqp.listen(endpoint, **options).close()
                outcomes[spare] = "works"
            except (TsqpError, OSError) as error:
                outcomes[spare] = f"{type(error).__name__}: {error}"
            self.open_again()
        return outcomes

    def try_connecting(self, endpoint: str, spares: list[int], nbytes: int) -> dict[int, str]:
        """Connects, and has a message of `nbytes` echoed, with each of these many descriptors left."""
        outcomes = {}
        for spare in spares:
            self.leave(spare)
            try:
                with tsqp.connect(endpoint, PATIENCE_S) as channel:
                    channel.send([numbered(spare, nbytes)], request_id=spare, timeout=PATIENCE_S)
                    check_numbered(channel.recv(PATIENCE_S), spare, nbytes)
                outcomes[spare] = "works"
            except (TsqpError, OSError) as error:
                outcomes[spare] = f"{type(error).__name__}: {error}"
            self.open_again()
        return outcomes

    def refuses(self) -> bool:
        """Whether the listener has seen by now that few descriptors are left."""
        return self._listener._hub.reserve.scarce

    def accept(self) -> None:
        self._channels.append(self._listener.accept(PATIENCE_S))

    def echo(self, number: int) -> None:
        """One message of the client that was accepted as this one."""
        channel = self._channels[number]
        message = channel.recv(PATIENCE_S)
        channel.send(message.tensors, request_id=message.request_id, timeout=PATIENCE_S)

    def drop(self, number: int) -> None:
        self._channels[number].close()

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._listener.close()


def starved(wire: Connection, limit: int) -> None:
    obey(wire, Starved, limit)


def as_nobody(wire: Connection, function: str, endpoint: str, options: dict[str, Any]) -> None:
    """``tsqp.listen`` or ``tsqp.connect`` without root's rights."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with getattr(tsqp, function)(endpoint, **options):
        wire.send("works")


def router_of_nobody(wire: Connection, path: str) -> None:
    """A server of another user, with whatever it hears until it is told to stop."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.bind(f"ipc://{path}")
        wire.send("bound")
        wire.recv()
        wire.send(bool(router.poll(0)))
