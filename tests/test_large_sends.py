"""Large messages that do not get away over ZeroMQ: nothing of them arrives, and what is sent afterwards does, once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from carriers import CARRIERS, CHUNK, COUNT, LARGE, SMALL, Background, Carrier, pass_on, recv_numbered, send_numbered
from ends import Ends, ends_over
from patience import until
from peers import PATIENCE_S
from wire_bytes import check_numbered, numbered

from tsqp._message import deadline_ns
from tsqp.errors import ClosedError, DescriptorsExhaustedError, WaitTimeoutError
from tsqp.sending import Sender
from tsqp.transport import Channel

#: More than the buffers of a socket hold.
HUGE = 1 << 20
TIMEOUT_S = 0.3


@pytest.fixture(params=["ring", "zmq-ipc"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


@pytest.fixture
def stopped(carrier: Carrier, endpoint: str, start_peer: Callable[..., Any]) -> Iterator[Ends]:
    """A client that was stopped; the server lets less than two messages of it wait."""
    with ends_over(carrier, "client", endpoint, start_peer, max_inbox_bytes=HUGE) as ends:
        ends.peer.stop()
        yield ends


def assert_goes_on(sender: Channel, receiver: Channel, number: int) -> None:
    """What is sent from now on arrives, and nothing comes before or after it."""
    for nbytes in (LARGE, SMALL, LARGE):
        check_numbered(pass_on(sender, receiver, [numbered(number, nbytes)], request_id=number), number, nbytes)
        number += 1
    with pytest.raises(WaitTimeoutError):
        receiver.recv(0.05)


@pytest.mark.parametrize("carrier", ["ring"], indirect=True)
def test_a_ring_without_room_for_the_note(direction):
    """The error tells that the message is not on its way: it is to be sent again."""
    sender, receiver = direction
    send_numbered(sender, [LARGE] * COUNT)
    with pytest.raises(WaitTimeoutError) as refused:
        sender.send([numbered(COUNT, LARGE)], request_id=COUNT, timeout=TIMEOUT_S)
    assert not refused.value.queued
    recv_numbered(receiver, [LARGE] * COUNT)
    assert_goes_on(sender, receiver, COUNT)


def test_a_stopped_client_for_which_too_much_waits(stopped):
    """The first messages time out and stay queued, others are refused; the client then gets the first, and others."""
    count = 0
    for _ in range(4):
        with pytest.raises(WaitTimeoutError) as refused:
            stopped.channel.send([numbered(count, HUGE)], request_id=count, timeout=TIMEOUT_S)
        count += refused.value.queued
    assert 1 <= count < 4
    stopped.peer.go_on()
    stopped.peer.say(("check", [HUGE] * (count + 2)))
    for number in (count, count + 1):
        stopped.channel.send([numbered(number, HUGE)], request_id=number, timeout=PATIENCE_S)
    assert stopped.peer.hear() == count + 2


def test_close_ends_the_wait_for_room(stopped, background):
    def send_all() -> None:
        for number in range(4):
            stopped.channel.send([numbered(number, HUGE)], request_id=number, transfer=True)

    def send() -> None:
        with pytest.raises(ClosedError):
            send_all()

    background.start(send)
    time.sleep(TIMEOUT_S)
    stopped.channel.close()


def interrupt_post(monkeypatch: pytest.MonkeyPatch, channel: Channel, error: BaseException, late: bool) -> None:
    """The next message fails before it is with ZeroMQ, or (`late`) when it just got there."""
    post = channel._link.post

    def fail(*arguments: Any) -> None:
        monkeypatch.undo()
        if late:
            post(*arguments)
        raise error

    monkeypatch.setattr(channel._link, "post", fail)


def test_no_descriptors_for_a_large_message(direction, monkeypatch):
    sender, receiver = direction
    interrupt_post(monkeypatch, sender, DescriptorsExhaustedError(24, "too few descriptors"), late=False)
    with pytest.raises(DescriptorsExhaustedError):
        sender.send([numbered(0, LARGE)], timeout=PATIENCE_S)
    assert_goes_on(sender, receiver, 1)


@pytest.mark.parametrize("carrier", ["ring"], indirect=True)
def test_ctrl_c_between_a_message_and_its_note(direction, monkeypatch):
    """A message that was not announced is passed over when the next one comes."""
    sender, receiver = direction
    for number in range(3):
        interrupt_post(monkeypatch, sender, KeyboardInterrupt(), late=True)
        with pytest.raises(KeyboardInterrupt):
            sender.send([numbered(number, LARGE)], request_id=number, timeout=PATIENCE_S)
    assert_goes_on(sender, receiver, 3)


@pytest.mark.parametrize("carrier", ["ring"], indirect=True)
def test_unannounced_messages_without_end_do_not_hold_a_receiver(direction, monkeypatch):
    """A hostile peer announces a message and sends others: the receiver's deadline passes as ever."""
    sender, receiver = direction
    sender._encoder.plan([], b"", *[0] * 8, None)
    sender._encoder.announce(sender._tx, deadline_ns(PATIENCE_S)).publish(1 << 40)
    numbers = itertools.count()
    monkeypatch.setattr(receiver._link, "recv", lambda deadline: (next(numbers), b"", []))
    with pytest.raises(WaitTimeoutError):
        receiver.recv(TIMEOUT_S)
    assert receiver.recv_nowait() is None
    assert next(numbers) >= 2


@pytest.mark.parametrize("carrier", ["ring"], indirect=True)
def test_a_note_that_nobody_publishes_keeps_no_slot(direction):
    sender, receiver = direction
    for _ in range(COUNT + 1):
        sender._encoder.announce(sender._tx, deadline_ns(PATIENCE_S))
    assert_goes_on(sender, receiver, 0)


def test_a_client_that_was_interrupted_between_two_frames_says_so(pair, monkeypatch):
    """The next message would be taken for the rest of this one."""
    socket = pair.client._link._socket

    def cut(parts: list[Any], **options: Any) -> None:
        socket.send(parts[0], zmq.NOBLOCK | zmq.SNDMORE)
        raise KeyboardInterrupt

    monkeypatch.setattr(pair.client._link, "_socket", SimpleNamespace(send_multipart=cut, recv=socket.recv))
    with pytest.raises(KeyboardInterrupt):
        pair.client.send([numbered(0, LARGE)], timeout=PATIENCE_S)
    monkeypatch.undo()
    with pytest.raises(ClosedError, match="interrupted"):
        pair.client.send([numbered(1, LARGE)], timeout=PATIENCE_S)


class InterruptedEncoder:
    """An encoder whose `count`-th call of one method is followed by Ctrl-C."""

    def __init__(self, encoder: Any, name: str, count: int) -> None:
        self._encoder, self._name, self._left = encoder, name, count

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._encoder, name)
        if name != self._name:
            return method

        def call(*arguments: Any) -> Any:
            found = method(*arguments)
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
            return found

        return call


TILES = 3  # of CHUNK bytes in a message


@pytest.mark.parametrize("carrier", ["ring-tiled"], indirect=True)
@pytest.mark.parametrize(
    ("name", "count", "transfer", "arrives"),
    [
        ("write_tiled_head", 1, False, False),
        ("write_tiled_head", 1, True, False),
        ("write_tile", 1, False, False),
        ("write_tile", 1, True, True),
        ("write_tile", TILES, False, True),
        ("write_tile", TILES, True, True),
    ],
)
def test_ctrl_c_within_a_message_in_tiles(direction, monkeypatch, name, count, transfer, arrives):
    """What was written counts as written: the message goes on from there, or is given up."""
    sender, receiver = direction
    codec = InterruptedEncoder(sender._encoder, name, count)
    monkeypatch.setattr(sender._sender, "_codec", codec)
    with pytest.raises(KeyboardInterrupt):
        sender.send([numbered(0, TILES * CHUNK)], request_id=0, timeout=PATIENCE_S, transfer=transfer)
    monkeypatch.undo()
    if arrives:
        check_numbered(pass_on_rest(sender, receiver), 0, TILES * CHUNK)
    assert_goes_on(sender, receiver, 1)


@pytest.mark.parametrize("carrier", ["ring-tiled"], indirect=True)
@pytest.mark.parametrize("reserved", [None, 100, TILES * CHUNK])
def test_an_interrupted_send_is_given_up_before_anything_else_is_planned(direction, monkeypatch, reserved):
    """Ctrl-C before the first tile: the tensors are the caller's again, and the encoder's plan the next message's."""
    sender, receiver = direction
    flush = Sender.flush

    def interrupt(self: Sender, deadline: int) -> bool:
        if self._tail is None:
            return flush(self, deadline)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Sender, "flush", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sender.send([numbered(0, TILES * CHUNK)], request_id=0, timeout=PATIENCE_S)
    if reserved is not None:
        receiving = Background()
        receiving.start(lambda: check_numbered(receiver.recv(PATIENCE_S), 1, reserved))
        with sender.reserve([numbered(1, reserved)], request_id=1, timeout=PATIENCE_S) as out:
            out[0].copy_(numbered(1, reserved))
        receiving.join()
    assert_goes_on(sender, receiver, 2)


def pass_on_rest(sender: Channel, receiver: Channel) -> Any:
    """Writes what is left of a message that was given away, and receives it."""
    found: list[Any] = []

    def look() -> bool:
        sender.can_send()
        held = receiver.recv_nowait(lease=False)
        if held is not None:
            found.append(held.message)
        return bool(found)

    until(look)
    return found[0]
