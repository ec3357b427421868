"""This process's end of a channel and a process at the other one, over any carrier."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import peers
from carriers import LARGE, SMALL, Carrier, pass_on
from peers import PATIENCE_S, Peer
from wire_bytes import check_numbered, numbered

import tsqp
from tsqp.listener import Listener
from tsqp.transport import Channel


@dataclass
class Ends:
    """`peer` obeys as a :class:`peers.ChannelEnd`; `listener` is ours where the peer is the client."""

    channel: Channel
    peer: Peer
    listener: Listener | None


@contextmanager
def ends_over(carrier: Carrier, role: str, ipc: str, start_peer: Callable[..., Peer], **listen: Any) -> Iterator[Ends]:
    """A process that is `server` or `client`, connected; the socket file of a killed server is removed.

    `listen` are more options of the server.
    """
    with ExitStack() as stack:
        if role == "server":
            peer = start_peer(peers.channel_end, role, carrier.endpoint(ipc), {**carrier.listen_options, **listen})
            assert peer.hear() == "made"
            address = peer.ask("endpoint")
            channel = stack.enter_context(tsqp.connect(address, PATIENCE_S, **carrier.connect_options))
            assert peer.ask("accept") == carrier.transport
            yield Ends(channel, peer, None)
        else:
            listener = stack.enter_context(tsqp.listen(carrier.endpoint(ipc), **carrier.listen_options, **listen))
            peer = start_peer(peers.channel_end, role, listener.endpoint, carrier.connect_options)
            channel = stack.enter_context(listener.accept(PATIENCE_S))
            assert peer.hear() == "made"
            yield Ends(channel, peer, listener)
    path = urlsplit(ipc).path
    if os.path.exists(path):
        os.unlink(path)


def path_of(endpoint: str) -> Path:
    return Path(urlsplit(endpoint).path)


@contextmanager
def client_of(listener: Listener, carrier: Carrier) -> Iterator[tuple[Channel, Channel]]:
    """A connected client and the server's channel to it."""
    with (
        tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options) as client,
        listener.accept(PATIENCE_S) as server,
    ):
        yield client, server


def assert_works(client: Channel, server: Channel) -> None:
    for number, nbytes in enumerate([SMALL, LARGE]):
        message = pass_on(client, server, [numbered(number, nbytes)], request_id=number)
        check_numbered(message, number, nbytes)
