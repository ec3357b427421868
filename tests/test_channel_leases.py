"""Leases, what never waits, and statistics: the same tests over the ring, tiles, ZeroMQ on ipc and ZeroMQ on tcp."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

import pytest
from carriers import (
    CARRIERS,
    CHUNK,
    COUNT,
    LARGE,
    SIZES,
    SMALL,
    Background,
    Carrier,
    pass_on,
    recv_numbered,
    send_numbered,
)
from peers import PATIENCE_S
from wire_bytes import check_numbered, numbered

from tsqp.errors import RingUsageError


@pytest.fixture(params=CARRIERS)
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


# --- leases, recv_nowait, poll, can_send ----------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_lease_gives_the_message_and_allows_a_reply_inside(direction, background, nbytes):
    sender, receiver = direction
    background.start(send_numbered, sender, [nbytes] * 3 * COUNT)
    for number in range(3 * COUNT):
        with receiver.lease(PATIENCE_S) as message:
            check_numbered(message, number, nbytes)
            replying = Background()
            replying.start(receiver.send, message.tensors, request_id=number, timeout=PATIENCE_S)
            check_numbered(sender.recv(PATIENCE_S), number, nbytes)
            replying.join()


def test_leases_may_overlap_and_end_in_any_order(direction):
    sender, receiver = direction
    random = Random(8)
    for _ in range(10):
        leases = []
        for number in range(COUNT):
            sender.send([numbered(number, SMALL)], request_id=number, timeout=PATIENCE_S)
            leases.append(receiver.lease(PATIENCE_S))
        random.shuffle(leases)
        for lease in leases:
            check_numbered(lease.message, lease.message.request_id, SMALL)
            lease.release()


def test_with_every_slot_leased_there_is_nothing_to_take(pair, carrier):
    leases = []
    for number in range(COUNT):
        pair.client.send([numbered(number, SMALL)], request_id=number, timeout=PATIENCE_S)
        leases.append(pair.server.lease(PATIENCE_S))
    assert not pair.server.poll()
    if carrier.shm:
        assert not pair.client.can_send()
        with pytest.raises(RingUsageError, match="leases"):
            pair.server.recv(PATIENCE_S)
    for lease in leases:
        lease.release()
    pair.client.send([numbered(9, SMALL)], request_id=9, timeout=PATIENCE_S)
    check_numbered(pair.server.recv(PATIENCE_S), 9, SMALL)


def test_a_sender_that_waits_reads_ahead_around_what_it_has_leased(direction, background):
    """A reply inside a lease, to a peer that sends more requests before it reads replies."""
    sender, receiver = direction
    count = 20 * COUNT

    def echo() -> None:
        for _ in range(count):
            with receiver.lease(PATIENCE_S) as message:
                receiver.send(message.tensors, request_id=message.request_id, timeout=PATIENCE_S)

    background.start(echo)
    send_numbered(sender, [SMALL] * count)
    recv_numbered(sender, [SMALL] * count)


def test_an_error_in_the_block_of_a_lease_frees_its_slot(direction):
    sender, receiver = direction
    for number in range(2 * COUNT):
        sender.send([numbered(number, SMALL)], request_id=number, timeout=PATIENCE_S)
        with pytest.raises(ZeroDivisionError), receiver.lease(PATIENCE_S) as message:
            assert message.request_id // 0


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("lease", [True, False], ids=["lease", "copy"])
@pytest.mark.parametrize("nbytes", SIZES)
def test_recv_nowait_and_poll_never_wait(direction, background, nbytes, lease):
    sender, receiver = direction
    assert receiver.recv_nowait(lease) is None
    assert not receiver.poll()
    background.start(send_numbered, sender, [nbytes] * 3)
    for number in range(3):
        wait_for(receiver.poll)
        while (held := receiver.recv_nowait(lease)) is None:  # perhaps only a part of it is there
            time.sleep(0.001)
        with held as message:
            check_numbered(message, number, nbytes)
    background.join()
    assert receiver.recv_nowait(lease) is None
    assert not receiver.poll()


def test_can_send_counts_free_slots(pair, carrier):
    sender, receiver = pair.client, pair.server
    assert sender.can_send(COUNT)
    if not carrier.shm:
        return
    assert not sender.can_send(COUNT + 1)
    for number in range(COUNT):
        assert sender.can_send()
        sender.send([numbered(number, SMALL)], request_id=number)
    assert not sender.can_send()
    receiver.recv(PATIENCE_S)
    assert sender.can_send(1)
    assert not sender.can_send(2)


# --- statistics -----------------------------------------------------------------------------------------------


def by_ring(carrier: Carrier, total: int) -> bool:
    """Whether a message of `total` bytes goes through shared memory."""
    return carrier.shm and (total < CHUNK or carrier.large == "tile")


def test_stats_count_each_carrier(pair, carrier):
    totals = [pass_on(pair.client, pair.server, [numbered(0, nbytes)]).nbytes for nbytes in (0, SMALL, LARGE)]
    edge = [pass_on(pair.client, pair.server, [numbered(0, CHUNK - nbytes)]).nbytes for nbytes in (320, 256)]
    assert edge == [CHUNK - 64, CHUNK]  # the last that fits, and the first that is large
    reply = pass_on(pair.server, pair.client, [numbered(0, 10)]).nbytes
    there = [*totals, *edge]
    ring = [total for total in [*there, reply] if by_ring(carrier, total)]
    zmq = [total for total in [*there, reply] if not by_ring(carrier, total)]
    both = {
        "transport": carrier.transport,
        **{"shm_transfers": len(ring), "shm_bytes": sum(ring)},
        **{"zmq_transfers": len(zmq), "zmq_bytes": sum(zmq)},
    }
    sent = {"sent_messages": 5, "sent_bytes": sum(there), "received_messages": 1, "received_bytes": reply}
    received = {"sent_messages": 1, "sent_bytes": reply, "received_messages": 5, "received_bytes": sum(there)}
    assert pair.client.stats == {**both, **sent}
    assert pair.server.stats == {**both, **received}
    assert pair.client.transport == pair.server.transport == carrier.transport


def test_the_carrier_of_each_message_is_told(pair, carrier):
    for nbytes in SIZES:
        message = pass_on(pair.client, pair.server, [numbered(0, nbytes)])
        assert message.carrier == ("ring" if by_ring(carrier, message.nbytes) else "zmq")


def test_leases_count_like_copies(pair, background):
    background.start(send_numbered, pair.client, [SMALL, LARGE])
    for count in (1, 2):
        with pair.server.lease(PATIENCE_S):
            pass
        assert pair.server.stats["received_messages"] == count
    background.join()
    assert pair.server.stats["received_bytes"] == pair.client.stats["sent_bytes"]
