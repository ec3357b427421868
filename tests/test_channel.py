"""Conformance of channels: the same tests over the ring, tiles, ZeroMQ on ipc and ZeroMQ on tcp."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from carriers import (
    CARRIERS,
    CHUNK,
    COUNT,
    LARGE,
    SIZES,
    SMALL,
    Background,
    Carrier,
    pair_over,
    pass_on,
    random_sizes,
    recv_numbered,
    send_numbered,
)
from patience import until
from peers import PATIENCE_S
from wire_bytes import DTYPES, check_numbered, numbered, same_bits, tensor_of

from tsqp._channel import Gate, Holder
from tsqp.errors import ClosedError, DTypeError, MessageTooLargeError, MetaError, TooManyTensorsError, WaitTimeoutError
from tsqp.transport import Channel


@pytest.fixture(params=CARRIERS)
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


# --- what travels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 1000], ids=["small", "large"])
def test_every_dtype_there_and_back(pair, rows):
    tensors = [tensor_of(dtype, (rows, 33), number) for number, dtype in enumerate(DTYPES)]
    received = pass_on(pair.client, pair.server, tensors)
    echoed = pass_on(pair.server, pair.client, received.tensors)
    for tensor, there, back in zip(tensors, received.tensors, echoed.tensors, strict=True):
        assert same_bits(there, tensor)
        assert same_bits(back, tensor)


@pytest.mark.parametrize("scale", [1, 400], ids=["small", "large"])
def test_every_rank_and_layout(direction, scale):
    ranks = [tensor_of(torch.float32, (2,) * rank, rank) for rank in range(9)]
    empties = [torch.empty(0), torch.empty(3, 0, 2)]
    base = torch.arange(30.0 * scale).reshape(5, 6 * scale)
    strided = [base.t(), base[:, ::2], base[1:, 1:-1], base[:1].expand(4, -1)]
    arrays = [np.arange(40 * scale, dtype="i4")[::-1], np.asfortranarray(base.numpy())]
    sent = [*ranks, *empties, *strided, *arrays]
    received = pass_on(*direction, sent).tensors
    expected = [torch.from_numpy(np.array(t, order="C")) if isinstance(t, np.ndarray) else t for t in sent]
    assert all(same_bits(one, other) for one, other in zip(received, expected, strict=True))


@pytest.mark.parametrize("nbytes", [10, 5000])
def test_many_tensors_in_one_message(direction, nbytes):
    tensors = [numbered(number, nbytes) for number in range(64)]
    received = pass_on(*direction, tensors).tensors
    assert all(torch.equal(one, other) for one, other in zip(received, tensors, strict=True))


@pytest.mark.parametrize("nbytes", SIZES)
def test_every_field_of_the_header_arrives(direction, nbytes):
    fields = {
        **{"tag": 2**32 - 1, "request_id": 2**64 - 1, "status": -5, "flags": 2**24 - 1},
        **{"site": 17, "index": 2**40, "compute_ns": 12345, "queue_ns": 678},
    }
    meta = {"layer": 3, "names": ["q", "k"], "raw": b"\0\1"}
    message = pass_on(*direction, [numbered(0, nbytes)], meta=meta, **fields)
    assert {name: getattr(message, name) for name in fields} == fields
    assert message.meta == meta
    assert torch.equal(message.tensors[0], numbered(0, nbytes))


def test_a_message_may_be_all_meta_or_nothing(direction):
    sender, receiver = direction
    meta = {"x": "y" * 60_000}
    assert sender.send([], meta=meta, timeout=PATIENCE_S) == 60_160
    sender.send([], meta=b"\x81\xa1a\x01", timeout=PATIENCE_S)
    sender.send((), timeout=PATIENCE_S)
    assert receiver.recv(PATIENCE_S).meta == meta
    assert receiver.recv(PATIENCE_S).meta == {"a": 1}
    last = receiver.recv(PATIENCE_S)
    assert (last.meta, last.meta_bytes, last.tensors) == ({}, b"", [])


def test_what_cannot_be_sent_is_refused_and_the_channel_goes_on(direction):
    sender, receiver = direction
    for tensors, meta, error in (
        ([torch.zeros(2, dtype=torch.complex64)], None, DTypeError),
        ([torch.zeros(1)] * 65, None, TooManyTensorsError),
        ([], {"x": object()}, MetaError),
        ([], {"x": bytes(70_000)}, MetaError),
        ([torch.zeros(1, dtype=torch.uint8).expand(1 << 40)], None, MessageTooLargeError),
    ):
        with pytest.raises(error):
            sender.send(tensors, meta=meta, timeout=PATIENCE_S)
    sender.send([torch.ones(1)])
    assert receiver.recv(PATIENCE_S).tensors[0].item() == 1


def test_tensors_may_be_changed_after_send(direction, background):
    """Also those of a large message, whose memory ZeroMQ borrows: send() returns only when it is done with it."""
    sender, receiver = direction
    sizes = [LARGE] * 20 + [16 * LARGE] * 3

    def send() -> None:
        for number, nbytes in enumerate(sizes):
            tensor = numbered(number, nbytes)
            sender.send([tensor], request_id=number, timeout=PATIENCE_S)
            tensor.zero_()

    background.start(send)
    recv_numbered(receiver, sizes)


def test_a_received_message_is_private(direction):
    for nbytes in (SMALL, LARGE):
        kept = pass_on(*direction, [numbered(0, nbytes)], request_id=0)
        for number in range(1, 2 * COUNT):
            pass_on(*direction, [numbered(number, nbytes)], request_id=number)
        check_numbered(kept, 0, nbytes)
        kept.tensors[0].fill_(3)  # writable, and nobody else's


# --- order and room -------------------------------------------------------------------------------------------


def test_order_is_kept_across_the_threshold(direction, background):
    sender, receiver = direction
    sizes = random_sizes(200, 1)
    background.start(send_numbered, sender, sizes)
    recv_numbered(receiver, sizes)


def test_order_is_kept_while_more_is_under_way_than_is_taken(carrier, endpoint, background):
    """Nothing is read at first: queues fill, and what could not go at once goes later, in its turn."""
    with pair_over(carrier, endpoint) as pair:
        sizes = [200] * 5000
        background.start(send_numbered, pair.server, sizes)
        time.sleep(0.3)
        recv_numbered(pair.client, sizes)


def test_both_directions_at_once_with_two_threads_at_each_end(pair, background):
    """One thread sends while another receives on the same channel."""
    there, back = random_sizes(300, 4), random_sizes(300, 5)
    background.start(send_numbered, pair.client, there)
    background.start(send_numbered, pair.server, back)
    background.start(recv_numbered, pair.client, back)
    recv_numbered(pair.server, there)


def test_two_threads_may_send_on_one_channel(direction, background):
    sender, receiver = direction

    def send(first: int) -> None:
        for number in range(first, first + 100):
            nbytes = SIZES[number % len(SIZES)]
            sender.send([numbered(number, nbytes)], request_id=number, timeout=PATIENCE_S)

    background.start(send, 0)
    background.start(send, 1000)
    numbers = []
    for _ in range(200):
        message = receiver.recv(PATIENCE_S)
        numbers.append(message.request_id)
        check_numbered(message, message.request_id, SIZES[message.request_id % len(SIZES)])
    assert [n for n in numbers if n < 1000] == list(range(100))
    assert [n for n in numbers if n >= 1000] == list(range(1000, 1100))


def test_two_threads_may_receive_on_one_channel(direction, background):
    sender, receiver = direction
    numbers: list[int] = []
    receiving = Background()
    for _ in range(2):
        receiving.start(lambda: numbers.extend([receiver.recv(PATIENCE_S).request_id for _ in range(100)]))
    background.start(send_numbered, sender, random_sizes(200, 6, 0.05))
    receiving.join()
    assert sorted(numbers) == list(range(200))


# --- deadlines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
@pytest.mark.parametrize("timeout", [0, 0.05, 0.15])
def test_a_deadline_passes_and_the_message_comes_later(direction, timeout, nbytes):
    receiver = direction[1]
    for number in range(3):
        with pytest.raises(WaitTimeoutError):
            receiver.recv(timeout)
        with pytest.raises(TimeoutError):
            receiver.lease(timeout)
        check_numbered(pass_on(*direction, [numbered(number, nbytes)], request_id=number), number, nbytes)


def test_sending_to_a_full_ring_ends_at_its_deadline_and_loses_nothing(endpoint):
    with pair_over(CARRIERS["ring"], endpoint) as pair:
        send_numbered(pair.client, [SMALL] * COUNT)
        for timeout in (0, 0.1):
            for nbytes in (SMALL, LARGE):
                with pytest.raises(WaitTimeoutError):
                    pair.client.send([numbered(99, nbytes)], request_id=99, timeout=timeout)
        recv_numbered(pair.server, [SMALL] * COUNT)
        for number, nbytes in enumerate([LARGE, SMALL] * COUNT):
            message = pass_on(pair.client, pair.server, [numbered(number, nbytes)], request_id=number)
            check_numbered(message, number, nbytes)


def is_free(gate: Gate) -> bool:
    turn = Holder(gate)
    try:
        return turn.take()
    finally:
        turn.give()


def test_the_deadline_holds_while_another_thread_sends(endpoint, background):
    with pair_over(CARRIERS["ring"], endpoint) as pair:
        send_numbered(pair.client, [SMALL] * COUNT)
        background.start(pair.client.send, [numbered(COUNT, SMALL)], request_id=COUNT, timeout=PATIENCE_S)
        until(lambda: not is_free(pair.client.send_gate))
        with pytest.raises(WaitTimeoutError, match="another thread is sending"):
            pair.client.send([numbered(99, SMALL)], request_id=99, timeout=0.1)
        recv_numbered(pair.server, [SMALL] * (COUNT + 1))


def test_what_was_given_away_outlives_the_deadline_of_the_next(endpoint, background):
    with pair_over(CARRIERS["ring-tiled"], endpoint) as pair:
        pair.client.send([numbered(0, 10 * CHUNK)], request_id=0, transfer=True)
        with pytest.raises(WaitTimeoutError) as refused:
            pair.client.send([numbered(99, SMALL)], request_id=99, timeout=0.1)
        assert not refused.value.queued
        background.start(pair.client.send, [numbered(1, SMALL)], request_id=1, timeout=PATIENCE_S)
        check_numbered(pair.server.recv(PATIENCE_S), 0, 10 * CHUNK)
        check_numbered(pair.server.recv(PATIENCE_S), 1, SMALL)


def test_a_tiled_message_that_was_broken_off_is_given_up(endpoint):
    with pair_over(CARRIERS["ring-tiled"], endpoint) as pair:
        with pytest.raises(WaitTimeoutError):
            pair.client.send([numbered(99, 10 * CHUNK)], request_id=99, timeout=0.1)
        with pytest.raises(WaitTimeoutError):
            pair.server.recv(0.1)
        for number, nbytes in enumerate([SMALL, LARGE, SMALL]):
            message = pass_on(pair.client, pair.server, [numbered(number, nbytes)], request_id=number)
            check_numbered(message, number, nbytes)


# --- closing --------------------------------------------------------------------------------------------------


def test_what_was_sent_before_close_arrives_then_closed_error(direction, carrier):
    sender, receiver = direction
    sizes = [SMALL, SMALL if carrier.large == "tile" else LARGE, 0]
    send_numbered(sender, sizes)
    sender.close()
    recv_numbered(receiver, sizes)
    for receive in (receiver.recv, receiver.recv, receiver.recv_nowait, receiver.lease):
        with pytest.raises(ClosedError):
            receive()
    assert receiver.poll()


def test_many_messages_sent_before_close_all_arrive(carrier, endpoint, background):
    """A reader that starts late loses nothing to the goodbye or to the end of the connection behind it."""
    with pair_over(carrier, endpoint) as pair:

        def send() -> None:
            send_numbered(pair.client, [SMALL] * 900)
            pair.client.close()

        background.start(send)
        time.sleep(0.2)
        recv_numbered(pair.server, [SMALL] * 900)
        with pytest.raises(ClosedError):
            pair.server.recv()


def send_until_refused(channel: Channel) -> None:
    for _ in range(500):
        channel.send([numbered(0, SMALL)], timeout=PATIENCE_S)
        time.sleep(0.01)


def test_sending_to_a_closed_peer_is_an_error(direction):
    sender, receiver = direction
    receiver.close()
    with pytest.raises(ClosedError):
        send_until_refused(sender)


def test_a_channel_closed_here_says_so(direction):
    channel, _ = direction
    assert not channel.closed
    channel.close()
    channel.close()
    assert channel.closed
    assert not channel.can_send()
    assert "closed" in repr(channel)
    for use in (lambda: channel.send([]), channel.recv, channel.lease, channel.recv_nowait):
        with pytest.raises(ClosedError, match="is closed; connect again"):
            use()


@pytest.mark.parametrize("closing", ["the peer", "this end"])
def test_close_ends_a_wait_in_progress(direction, background, closing):
    receiver, other = direction

    def wait() -> None:
        with pytest.raises(ClosedError):
            receiver.recv()

    background.start(wait)
    time.sleep(0.1)
    (other if closing == "the peer" else receiver).close()


def test_tensors_outlive_their_channel(direction, background):
    sender, receiver = direction
    background.start(send_numbered, sender, [SMALL, LARGE, SMALL])
    copies = [receiver.recv(PATIENCE_S) for _ in range(2)]
    held = receiver.lease(PATIENCE_S)
    background.join()
    sender.close()
    receiver.close()
    for number, (message, nbytes) in enumerate(zip([*copies, held.message], [SMALL, LARGE, SMALL], strict=True)):
        check_numbered(message, number, nbytes)
    held.release()
