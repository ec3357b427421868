"""A length that a peer claims: bounded before anything is allocated for it, and the next message still arrives."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from carriers import CARRIERS, CHUNK, LARGE, SMALL, Background, Carrier, Pair, pair_over, send_numbered
from peers import PATIENCE_S, Peer
from wire_bytes import Raw, check_numbered, numbered, raw, reader, with_desc

import tsqp
from tsqp._message import FLAG_TILED, deadline_ns
from tsqp.errors import ClosedError, ConfigError, MessageTooLargeError, WaitTimeoutError
from tsqp.transport import MAX_MESSAGE_BYTES, Channel

LIMIT = 2 * LARGE
CLAIMED = 3 << 30


@pytest.fixture(params=["ring-tiled", "ring", "zmq-ipc", "zmq-tcp"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


@pytest.fixture
def pair(carrier: Carrier, endpoint: str) -> Iterator[Pair]:
    with pair_over(carrier, endpoint, max_message_bytes=LIMIT) as made:
        yield made


def huge_head(nbytes: int) -> bytes:
    """The head of a tiled message of one float32 tensor of `nbytes`."""
    message = replace(Raw([raw((1,)).descs[0]]), flags=FLAG_TILED, total=256 + nbytes)
    return with_desc(message, 0, shape=(nbytes // 4,), nbytes=nbytes, offset=256).pack()[:256]


def claim(channel: Channel, nbytes: int) -> None:
    """Announces a tiled message of one tensor of `nbytes`, of which nothing follows."""
    one = torch.zeros(1).expand(nbytes // 4)  # takes no memory here either
    channel._encoder.plan([one], b"", *[0] * 8)
    channel._encoder.write_tiled_head(channel._tx, b"", deadline_ns(PATIENCE_S))


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def take_nowait(channel: Any) -> None:
    while channel.recv_nowait() is None:
        pass


WAYS: dict[str, Callable[[Any], object]] = {
    "recv": lambda channel: channel.recv(PATIENCE_S),
    "lease": lambda channel: channel.lease(PATIENCE_S),
    "recv_nowait": take_nowait,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_message_over_the_limit_is_dropped_and_the_next_arrive(pair: Pair, background: Background, way: str) -> None:
    sizes = [LIMIT + CHUNK, SMALL, LIMIT + CHUNK, LARGE, SMALL]

    background.start(send_numbered, pair.client, sizes)
    for number, nbytes in enumerate(sizes):
        if nbytes > LIMIT:
            with pytest.raises(MessageTooLargeError, match=f"over the limit of {LIMIT} bytes.*raise max_message_bytes"):
                WAYS[way](pair.server)
        else:
            check_numbered(pair.server.recv(PATIENCE_S), number, nbytes)


def test_a_sender_that_waits_for_a_slot_reads_past_one_over_the_limit(endpoint: str, background: Background) -> None:
    """What either sends does not fit its ring, so each reads ahead while it waits for a slot, unless it is read for
    already. The refusal comes in its turn."""
    with pair_over(CARRIERS["ring-tiled"], endpoint, max_message_bytes=LIMIT) as pair:
        background.start(pair.server.send, [numbered(1, LARGE * 2)], request_id=1, timeout=PATIENCE_S)
        background.start(send_numbered, pair.client, [LIMIT + CHUNK, SMALL])
        check_numbered(pair.client.recv(PATIENCE_S), 1, LARGE * 2)
        with pytest.raises(MessageTooLargeError):
            pair.server.recv(PATIENCE_S)
        check_numbered(pair.server.recv(PATIENCE_S), 1, SMALL)


def test_what_is_small_on_the_wire_and_over_the_limit_in_memory_is_refused(
    endpoint: str, background: Background
) -> None:
    with pair_over(CARRIERS["ring-tiled"], endpoint, max_message_bytes=LIMIT) as pair:
        background.start(pair.client.send, [torch.ones(LIMIT // 3)], wire="bfloat16", timeout=PATIENCE_S)
        with pytest.raises(MessageTooLargeError, match=f"in memory, is over the limit of {LIMIT} bytes"):
            pair.server.recv(PATIENCE_S)
        background.start(pair.client.send, [numbered(1, SMALL)], request_id=1, timeout=PATIENCE_S)
        check_numbered(pair.server.recv(PATIENCE_S), 1, SMALL)


@pytest.mark.parametrize("end", ["server", "client"])
def test_a_claim_takes_no_memory(endpoint: str, end: str) -> None:
    with pair_over(CARRIERS["ring-tiled"], endpoint) as pair:
        victim, hostile = (pair.server, pair.client) if end == "server" else (pair.client, pair.server)
        before = virtual_bytes()
        claim(hostile, MAX_MESSAGE_BYTES)
        with pytest.raises(MessageTooLargeError, match=f"is over the limit of {MAX_MESSAGE_BYTES} bytes"):
            victim.recv(PATIENCE_S)
        assert virtual_bytes() - before < 1 << 30


def test_a_claim_that_finds_no_memory_is_refused(start_peer: Callable[..., Peer]) -> None:
    """Below the limit, but more than the process may have."""
    peer = start_peer(assemble_huge, CLAIMED)
    assert peer.hear() == f"a message of {CLAIMED + 256} bytes was announced and there is no memory for it; lower " + (
        "max_message_bytes to what this process may use, or free memory"
    )
    assert peer.hear() == "the next one arrived"
    assert peer.join() == 0


def assemble_huge(wire: Connection, nbytes: int) -> None:
    with reader() as end:
        allowed = virtual_bytes() + (256 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
        end.put(huge_head(nbytes))
        assembly = end.codec.assemble(end.read(), 4 << 30)
        assert isinstance(assembly.refusal, MessageTooLargeError)
        wire.send(str(assembly.refusal))
        end.put(raw((2, 3)).pack())
        assert [tuple(tensor.shape) for tensor in end.read().tensors] == [(2, 3)]
        wire.send("the next one arrived")


# --- what is not read yet -------------------------------------------------------------------------------------

INBOX = 1 << 20
UNREAD = INBOX // 8


def fill(sender: Channel, reader: Channel) -> int:
    """Sends numbered messages until there is room for no more; the reader's end looks, and reads none of them."""
    for number in range(4 * INBOX):
        try:
            sender.send([numbered(number, UNREAD)], request_id=number, timeout=0.5, transfer=True)
        except WaitTimeoutError:
            return number
        reader.poll()
        assert reader._link._inbox_bytes < INBOX + 2 * UNREAD
    raise AssertionError("there was always room for one more")


@pytest.mark.parametrize("name", ["zmq-ipc", "zmq-tcp"])
def test_a_client_takes_no_more_than_its_inbox_holds(endpoint: str, name: str) -> None:
    """What it does not read waits on the way and then at the server; nothing is lost, and order stays."""
    carrier = CARRIERS[name]
    with tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options, max_inbox_bytes=INBOX) as listener:
        options = {**carrier.connect_options, "max_inbox_bytes": INBOX}
        with (
            tsqp.connect(listener.endpoint, PATIENCE_S, **options) as client,
            listener.accept(PATIENCE_S) as server,
        ):
            count = fill(server, client)
            assert count * UNREAD < 40 * INBOX
            # The way back is open meanwhile.
            client.send([numbered(1, LARGE)], request_id=1, timeout=PATIENCE_S)
            check_numbered(server.recv(PATIENCE_S), 1, LARGE)
            for number in range(count):
                check_numbered(client.recv(PATIENCE_S), number, UNREAD)
            server.send([numbered(count, SMALL)], request_id=count, timeout=PATIENCE_S)
            server.close()
            check_numbered(client.recv(PATIENCE_S), count, SMALL)
            with pytest.raises(ClosedError):
                client.recv(PATIENCE_S)
            assert client._link._inbox_bytes == 0


@pytest.mark.parametrize("name", ["max_message_bytes", "max_inbox_bytes"])
@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "1", 1 << 63])
def test_a_limit_that_is_none_is_refused(endpoint: str, limit: object, name: str) -> None:
    for make in (tsqp.listen, tsqp.connect):
        with pytest.raises(ConfigError, match=f"{name}=.* is not a positive whole number of bytes"):
            make(endpoint, **{name: limit})  # type: ignore[operator]
