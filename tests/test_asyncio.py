"""The asyncio face of channels: over every carrier, without a busy loop, and nothing lost by a cancel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
import torch
from carriers import CARRIERS, CHUNK, LARGE, SMALL, Background, Pair, pair_over, send_numbered
from peers import PATIENCE_S
from wire_bytes import check_numbered, numbered, same_bits

from tsqp import aio
from tsqp.errors import ClosedError, WaitTimeoutError
from tsqp.transport import Channel


@pytest.fixture(params=CARRIERS)
def pair(request: pytest.FixtureRequest, endpoint: str) -> Iterator[Pair]:
    with pair_over(CARRIERS[request.param], endpoint) as both:
        yield both


def test_messages_of_all_sizes_arrive_in_order(pair: Pair) -> None:
    sizes = [SMALL, LARGE, 0, CHUNK - 320, LARGE + 17, SMALL] * 3
    sender = Background()
    sender.start(send_numbered, pair.client, sizes)

    async def receive_all() -> None:
        for number, nbytes in enumerate(sizes):
            check_numbered(await pair.server.arecv(PATIENCE_S), number, nbytes)

    asyncio.run(receive_all())
    sender.join()


def test_both_directions_at_once_and_the_loop_goes_on(pair: Pair) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    async def echo(count: int) -> None:
        for _ in range(count):
            message = await pair.server.arecv(PATIENCE_S)
            await pair.server.asend(message.tensors, request_id=message.request_id, timeout=PATIENCE_S)

    async def ask(count: int) -> None:
        for number in range(count):
            tensor = numbered(number, LARGE if number % 3 else SMALL)
            await pair.client.asend([tensor], request_id=number, timeout=PATIENCE_S)
            await asyncio.sleep(0.002)
            reply = await pair.client.arecv(PATIENCE_S)
            assert reply.request_id == number
            assert same_bits(reply.tensors[0], tensor)

    async def run() -> None:
        ticking = asyncio.create_task(tick())
        await asyncio.gather(echo(12), ask(12))
        ticking.cancel()

    asyncio.run(run())
    assert ticks > 0


def test_waiting_uses_next_to_no_cpu(pair: Pair) -> None:
    async def wait() -> None:
        with pytest.raises(WaitTimeoutError):
            await pair.client.arecv(timeout=1.0)

    pair.server.send([torch.ones(3)], timeout=PATIENCE_S)
    asyncio.run(pair.client.arecv(PATIENCE_S))
    before, begin = time.process_time(), time.monotonic()
    asyncio.run(wait())
    assert time.process_time() - before < 0.5 * (time.monotonic() - begin)  # a busy loop uses all of it, or more


def test_a_cancelled_receive_loses_nothing(pair: Pair) -> None:
    async def run() -> None:
        for number in range(5):
            waiting = asyncio.create_task(pair.server.arecv(PATIENCE_S))
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            pair.client.send([numbered(number, SMALL)], request_id=number, timeout=PATIENCE_S)
            check_numbered(await pair.server.arecv(PATIENCE_S), number, SMALL)

    asyncio.run(run())


def test_two_coroutines_get_one_message_each(pair: Pair) -> None:
    async def run() -> None:
        both = [asyncio.create_task(pair.server.arecv(PATIENCE_S)) for _ in range(2)]
        await asyncio.sleep(0.02)
        for number in range(2):
            pair.client.send([torch.tensor(number)], timeout=PATIENCE_S)
        assert sorted(int(message.tensors[0]) for message in await asyncio.gather(*both)) == [0, 1]

    asyncio.run(run())


def test_close_ends_a_wait(pair: Pair) -> None:
    async def run(close_peer: bool) -> None:
        waiting = asyncio.create_task(pair.server.arecv(PATIENCE_S))
        await asyncio.sleep(0.02)
        (pair.client if close_peer else pair.server).close()
        with pytest.raises(ClosedError):
            await waiting
        with pytest.raises(ClosedError):
            await pair.server.arecv(PATIENCE_S)

    asyncio.run(run(close_peer=True))
    if not pair.server.closed:
        pair.server.close()
    with pytest.raises(ClosedError):
        asyncio.run(pair.server.arecv(PATIENCE_S))


def test_own_close_ends_a_wait(pair: Pair) -> None:
    async def run() -> None:
        waiting = asyncio.create_task(pair.client.arecv(PATIENCE_S))
        await asyncio.sleep(0.02)
        pair.client.close()
        with pytest.raises(ClosedError):
            await waiting

    asyncio.run(run())


def test_a_cancellation_that_comes_with_the_message_is_not_forgotten(pair: Pair, monkeypatch) -> None:
    """Else a task that waits in a loop would go on for ever, and the end of its event loop wait for it."""
    waits: list[aio._Wait] = []

    class Noted(aio._Wait):
        def __init__(self) -> None:
            super().__init__()
            waits.append(self)

    monkeypatch.setattr(aio, "_Wait", Noted)

    async def run() -> None:
        task = asyncio.create_task(pair.server.helper().wait(PATIENCE_S))
        while not waits:
            await asyncio.sleep(0)
        waits[0]._finish()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_a_wait_for_a_message_has_an_end(pair: Pair) -> None:
    async def run() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await pair.server.helper().wait(0.05)

    asyncio.run(run())


@pytest.mark.parametrize("waited", [False, True], ids=["the first wait", "a later wait"])
def test_close_just_before_a_wait_begins_ends_it(pair: Pair, monkeypatch: pytest.MonkeyPatch, waited: bool) -> None:
    """After the look, and before the helper's thread knows of the wait."""
    channel, helper = pair.client, Channel.helper

    def close_then_help(self: Channel) -> aio.Helper:
        monkeypatch.undo()
        if waited:
            found = helper(self)
            self.close()
            return found
        self.close()
        return helper(self)

    async def receive() -> None:
        if waited:
            with pytest.raises(WaitTimeoutError):
                await channel.arecv(0.05)
        monkeypatch.setattr(Channel, "helper", close_then_help)
        with pytest.raises(ClosedError):
            await asyncio.wait_for(channel.arecv(None), PATIENCE_S)

    asyncio.run(receive())
