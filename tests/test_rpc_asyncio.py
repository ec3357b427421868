"""Calls awaited by coroutines: results, errors, cancels, beside threads, and an event loop that goes on."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest
import torch
from rpc_support import (
    GEOMETRY,
    HIDDEN,
    PATIENCE_S,
    VOCAB,
    client_of,
    gated_model,
    run_all,
    serving,
    until,
)

from tsqp.client import GPUClient
from tsqp.errors import ClosedError, PeerDiedError, RemoteError

pytest_plugins = ["rpc_fixtures"]

#: Rows of which neither request nor reply fits a slot.
LARGE_ROWS = 2 * GEOMETRY["max_chunk_bytes"] // (4 * HIDDEN)


@pytest.fixture
def client(model, tmp_path):
    with serving(model, tmp_path) as server, client_of(server) as connected:
        connected.init()
        yield connected


def heads(count: int, rows: int = 1) -> list[torch.Tensor]:
    return [torch.full((rows, HIDDEN), float(number)) for number in range(count)]


def check(model: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        for x, y in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(y, model.lm_head(x))


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main, PATIENCE_S)

    return asyncio.run(bounded())


async def in_order(client: GPUClient, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each input through the LM head, at most as many in flight as may be."""
    calls = []
    for x in inputs:
        await client.submit.room()
        calls.append(client.submit.lm_head(x))
    return [await call for call in calls]


# --- results


@pytest.mark.parametrize("rows", [1, LARGE_ROWS], ids=["small", "large"])
@pytest.mark.parametrize("large", ["zmq", "tile"])
def test_awaited_results_are_those_of_blocking_calls(model, tmp_path, rows, large):
    inputs = heads(12, rows)
    with serving(model, tmp_path, large=large) as server, client_of(server, large=large, max_in_flight=4) as client:
        check(model, inputs, run(in_order(client, inputs)))
        check(model, inputs, [client.lm_head(x) for x in inputs])


def test_many_coroutines_await_at_once(model, client):
    inputs = heads(60)

    async def one(x: torch.Tensor) -> torch.Tensor:
        return await client.submit.lm_head(x)

    async def main() -> list[torch.Tensor]:
        return await asyncio.gather(*map(one, inputs))

    before = threading.active_count()
    check(model, inputs, run(main()))
    assert threading.active_count() <= before + 1  # the channel's
    assert len(client._flight) == 0


def test_a_call_may_be_awaited_twice_and_by_several(model, client):
    async def main() -> None:
        call = client.submit.lm_head(torch.ones(1, HIDDEN))
        first, second = await asyncio.gather(call, call)
        assert first is second is await call
        assert call.result(0) is first
        check(model, [torch.ones(1, HIDDEN)], [first])

    run(main())


def test_an_error_of_the_server_is_raised_by_await(client):
    async def main() -> None:
        good = client.submit.lm_head(torch.ones(1, HIDDEN))
        bad = client.submit.attention_values(0, torch.ones(1, 4, 1, 3))  # there is no V
        with pytest.raises(RemoteError):
            await bad
        assert (await good).shape == (1, VOCAB)

    run(main())


# --- the loop goes on


def test_the_loop_goes_on_and_nobody_is_busy(tmp_path):
    model, ticks = gated_model(), 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def main(client: GPUClient) -> None:
        ticking = asyncio.create_task(tick())
        waiting = [asyncio.ensure_future(client.submit.lm_head(x)) for x in heads(4)]
        await asyncio.sleep(0.1)
        begin, ticks_before = time.process_time(), ticks
        await asyncio.sleep(0.6)
        assert time.process_time() - begin < 0.3  # all threads of this process, the server's among them
        assert ticks > ticks_before
        model.lm_head.gate.set()
        assert [out.shape for out in await asyncio.gather(*waiting)] == [(1, VOCAB)] * 4
        ticking.cancel()

    with serving(model, tmp_path) as server, client_of(server) as client:
        client.init()
        run(main(client))


def test_room_waits_for_replies(tmp_path):
    model = gated_model()

    async def main(client: GPUClient) -> None:
        calls = [client.submit.lm_head(x) for x in heads(2)]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.submit.room(), 0.05)
        model.lm_head.gate.set()
        await client.submit.room()
        assert calls[0].done()
        assert len(client._flight) < 2

    with serving(model, tmp_path) as server, client_of(server, max_in_flight=2) as client:
        client.init()
        run(main(client))


# --- cancelling


def test_a_cancelled_await_loses_nothing(tmp_path):
    model = gated_model()

    async def main(client: GPUClient) -> None:
        calls = [client.submit.lm_head(x) for x in heads(3)]
        waiting = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0.02)
        for number in (0, 2):
            waiting[number].cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting[number]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(calls[0], 0.02)
        assert not calls[0].done()
        model.lm_head.gate.set()
        assert len({id(await call) for call in calls}) == 3
        assert (await waiting[1]).shape == (1, VOCAB)

    with serving(model, tmp_path) as server, client_of(server) as client:
        client.init()
        run(main(client))
        assert len(client._flight) == 0
        assert client.stale_replies == 0


def test_a_cancelled_call_ends_its_await(tmp_path):
    model = gated_model()

    async def main(client: GPUClient) -> None:
        call = client.submit.lm_head(torch.ones(1, HIDDEN))
        waiting = asyncio.ensure_future(call)
        await asyncio.sleep(0.02)
        assert call.cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            await waiting

    with serving(model, tmp_path) as server, client_of(server) as client:
        client.init()
        run(main(client))
        model.lm_head.gate.set()
        client.ping()
        assert client.stale_replies == 1


def test_a_loop_that_ended_is_no_burden_for_the_next(model, client):
    async def leave() -> None:
        left = asyncio.ensure_future(client.submit.lm_head(torch.zeros(1, HIDDEN)))
        await asyncio.sleep(0)
        assert not left.cancelled()

    for _ in range(3):
        run(leave())
        check(model, heads(2), run(in_order(client, heads(2))))
    assert client.ping() > 0


# --- beside threads, and other loops


def test_coroutines_and_threads_side_by_side(model, client):
    inputs = heads(40)

    def awaits() -> None:
        check(model, inputs, run(in_order(client, inputs)))

    def blocks() -> None:
        check(model, inputs, [client.lm_head(x) for x in inputs])

    def submits() -> None:
        for _ in range(4):
            calls = [client.submit.lm_head(x) for x in inputs[:10]]
            check(model, inputs[:10], [call.result(PATIENCE_S) for call in calls])

    run_all(awaits, blocks, submits, awaits)
    assert len(client._flight) == 0
    assert not client._flight._awaited


def test_a_thread_reads_while_the_loop_is_held_up(tmp_path):
    """Both wait, the loop's thread then does something else: the other thread gets its reply all the same."""
    model = gated_model()
    with serving(model, tmp_path) as server, client_of(server) as client:
        client.init()
        done = threading.Event()

        def block() -> None:
            client.lm_head(torch.ones(1, HIDDEN))
            done.set()

        async def main() -> None:
            waiting = asyncio.ensure_future(client.submit.lm_head(torch.zeros(1, HIDDEN)))
            await asyncio.sleep(0.02)
            thread = threading.Thread(target=block)
            thread.start()
            until(lambda: len(client._flight) == 2)
            model.lm_head.gate.set()
            assert done.wait(PATIENCE_S)  # holds up the loop
            await waiting
            thread.join()

        run(main())


def test_a_reader_that_leaves_lets_the_loop_read(tmp_path):
    """The coroutine finds a thread reading, and goes on by itself when that one has its reply."""
    model = gated_model()
    with serving(model, tmp_path) as server, client_of(server) as client:
        client.init()

        async def main() -> None:
            thread = threading.Thread(target=client.lm_head, args=(torch.ones(1, HIDDEN),))
            thread.start()
            until(client._flight._reading.locked)
            call = client.submit.lm_head(torch.zeros(1, HIDDEN))
            waiting = asyncio.ensure_future(call)
            await asyncio.sleep(0.05)
            model.lm_head.gate.set()
            assert (await waiting).shape == (1, VOCAB)
            thread.join()

        run(main())


# --- the end


@pytest.mark.parametrize("end", ["client", "server"])
def test_the_end_of_the_connection_ends_every_await(tmp_path, end):
    model = gated_model()

    async def main(server: Any, client: GPUClient) -> None:
        waiting = [asyncio.ensure_future(client.submit.lm_head(x)) for x in heads(3)]
        await asyncio.sleep(0.05)
        if end == "client":
            client.close()
        else:
            model.lm_head.gate.set()
            await asyncio.get_running_loop().run_in_executor(None, server.stop)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        expected = (ClosedError, PeerDiedError, RemoteError) + ((torch.Tensor,) if end == "server" else ())
        assert all(isinstance(outcome, expected) for outcome in outcomes), outcomes
        with pytest.raises((ClosedError, PeerDiedError)):
            await client.submit.ping()

    with serving(model, tmp_path) as server, client_of(server) as client:
        client.init()
        run(main(server, client))
        model.lm_head.gate.set()
