"""Operators that read a reply's slot and write the next request's: the same bits, and nothing is ever kept or lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from carriers import CARRIERS, Background, Pair, pair_over
from models import make_model, serving, token_ids
from peers import PATIENCE_S
from rpc_support import run_all, until
from torch import Tensor
from transformers import PreTrainedModel

from tsqp import from_pretrained, in_place, ops
from tsqp._message import Lease, Message
from tsqp.client import GPUClient
from tsqp.errors import RemoteError, WaitTimeoutError
from tsqp.server import GPUServer

TILE_BYTES = 4096
TOKENS = 90


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture(params=[2, 4], ids=["2 slots", "4 slots"])
def server(request: pytest.FixtureRequest, stock: PreTrainedModel) -> Iterator[GPUServer]:
    with serving(stock, max_chunks=request.param) as running:
        yield running


def split_of(server: GPUServer, **options: Any) -> PreTrainedModel:
    sizes = {"tile_bytes": TILE_BYTES, "mlp_tile_bytes": TILE_BYTES}
    return from_pretrained(endpoint=server.endpoint, placement="ops", **sizes, **options)


@torch.no_grad()
def forward(split: PreTrainedModel, tokens: int = TOKENS) -> Tensor:
    return split(token_ids(1, tokens)).logits


def double(x: Tensor, out: Tensor) -> None:
    torch.mul(x, 2, out=out)


class Counts:
    """How often a client's results stayed in their slots, and requests were written in theirs."""

    def __init__(self, client: GPUClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.written = self.copied = 0
        flight: Any = client._flight
        deliver, submit = flight._deliver_in_place, flight.submit_in_place

        def delivered(call: Any, arrived: Any) -> None:
            self.held += isinstance(arrived, Lease)
            deliver(call, arrived)

        def submitted(*args: Any) -> bool:
            done: bool = submit(*args)
            self.written += done
            self.copied += not done
            return done

        monkeypatch.setattr(flight, "_deliver_in_place", delivered)
        monkeypatch.setattr(flight, "submit_in_place", submitted)


def assert_all_given_back(client: GPUClient, server: GPUServer) -> None:
    """Every slot of both directions takes a message, and the next answers are right."""
    client._flight.take_ready()
    until(lambda: client.stats["in_flight"] == 0 or not client._flight.take_ready())
    slots = client._channel.reply_slots
    for _ in range(2 * slots + 1):
        client.ping()
    until(lambda: client._channel.can_send(slots))
    (session,) = server._answering.sessions.values()
    until(lambda: session.channel.can_send(slots))


# --- the same results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_as_with_copies(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(make_model("llama", dtype=dtype), max_chunks=10) as running:
        split = split_of(running)
        client = split.tsqp_client
        counts = Counts(client, monkeypatch)
        direct = forward(split)
        assert counts.held > 20
        assert counts.written > 20
        seen = counts.held, counts.written
        client.in_place.enabled = False
        assert torch.equal(forward(split), direct)
        assert (counts.held, counts.written) == seen
        assert_all_given_back(client, running)
        split.close()


def test_with_few_slots(server: GPUServer, monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_of(server)
    counts = Counts(split.tsqp_client, monkeypatch)
    direct = forward(split)
    assert counts.held > 0
    split.tsqp_client.in_place.enabled = False
    assert torch.equal(forward(split), direct)
    assert_all_given_back(split.tsqp_client, server)
    split.close()


@pytest.mark.parametrize("options", [{"wire_dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"dtype": "float16"}], ids=str)
def test_another_dtype_on_the_wire_is_copied(
    server: GPUServer, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    split = split_of(server, **options)
    counts = Counts(split.tsqp_client, monkeypatch)
    found = forward(split)
    assert (counts.held, counts.written) == (0, 0)
    split.tsqp_client.in_place.enabled = False
    assert torch.equal(forward(split), found)
    split.close()


def test_an_enclave_copies(server: GPUServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "in_gramine", lambda: True)
    with GPUClient(server.endpoint) as client:
        assert not client.in_place.suits(torch.float32)


def test_without_a_ring_it_is_copied(server: GPUServer) -> None:
    with GPUClient(server.endpoint, shm=False) as client:
        assert not client.in_place.suits(torch.float32)


def test_probabilities_that_are_wanted_are_not_read_back_from_a_slot(
    server: GPUServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_of(server)
    weights = []
    values = split.tsqp_client.in_place.attention_values
    monkeypatch.setattr(split.tsqp_client.in_place, "attention_values", lambda *a: weights.append(1) or values(*a))
    with torch.no_grad():
        seen = split(token_ids(1, TOKENS), output_attentions=True)
        assert not weights
        assert torch.equal(seen.logits, forward(split))
    assert weights
    split.close()


@pytest.mark.parametrize("large", ["tile", "zmq"])
def test_replies_that_fit_no_slot(stock: PreTrainedModel, large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(stock, max_chunk_bytes=1 << 14) as running, GPUClient(running.endpoint, large=large) as client:
        counts = Counts(client, monkeypatch)
        name = "model.layers.0.mlp.gate_proj"
        x = torch.randn(100, 48)  # to 100 x 80 floats
        with client.in_place.result(client.submit.linear(name, x), True) as found:
            assert torch.equal(found, client.linear(name, x))
        assert counts.held == 0
        assert client.in_place.linear("model.layers.0.mlp.down_proj", torch.empty(100, 80), Tensor.zero_) is None


# --- whoever writes in a slot


def test_a_hostile_writer_decides_numbers_only(server: GPUServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiles so large that the operator lets the scribbler run beside it.
    split, tokens = from_pretrained(endpoint=server.endpoint, placement="ops", tile_bytes=1 << 17), 200
    expected = forward(split, tokens)
    victims: list[Tensor] = []
    stop, writing = threading.Event(), threading.Lock()
    noise = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)

    def scribble() -> None:
        while not stop.is_set():
            with writing:
                for victim in victims:
                    raw = victim.view(-1).view(torch.uint8)
                    raw.copy_(noise[: raw.numel()])

    softmax = ops.causal_softmax

    def watched(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        victims.extend((scores, kwargs["out"]))
        while not writing.locked():
            time.sleep(0)
        weights = softmax(scores, *args, **kwargs)
        with writing:
            victims.clear()  # what is in these slots later may be another message's head
        return weights

    monkeypatch.setattr(ops, "causal_softmax", watched)
    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    try:
        for _ in range(5):
            assert forward(split, tokens).shape == expected.shape
    finally:
        stop.set()
        scribbler.join()
    monkeypatch.undo()
    assert torch.equal(forward(split, tokens), expected)
    assert split.tsqp_client.errors == 0
    assert_all_given_back(split.tsqp_client, server)
    split.close()


# --- faults


@pytest.mark.parametrize("error", [RuntimeError("here"), KeyboardInterrupt(), WaitTimeoutError("late")], ids=repr)
def test_a_fault_of_an_operator_gives_both_slots_back(
    server: GPUServer, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    split = split_of(server)
    expected = forward(split)
    softmax, calls = ops.causal_softmax, iter(range(10**6))

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) % 7 == 3:
            kwargs["out"].fill_(3)
            raise error
        return softmax(*args, **kwargs)

    for _ in range(5):  # more often than there are slots
        with monkeypatch.context() as patch:
            patch.setattr(ops, "causal_softmax", failing)
            with pytest.raises(type(error)):
                forward(split)
        assert_all_given_back(split.tsqp_client, server)
    assert torch.equal(forward(split), expected)
    split.close()


def test_a_refusal_is_raised_and_keeps_no_slot(server: GPUServer) -> None:
    with GPUClient(server.endpoint) as client:
        for _ in range(5):
            call = client.submit.linear("model.layers.0.mlp.down_proj", torch.zeros(2, 79))
            with pytest.raises(RemoteError, match=r"expected \[.., 80\]"), client.in_place.result(call, True):
                pass
            assert call.lease is None
        assert_all_given_back(client, server)


def test_a_result_that_does_not_come_in_time_may_be_asked_for_again(server: GPUServer) -> None:
    with GPUClient(server.endpoint) as client:
        x = torch.randn(3, 48)
        expected = client.linear("lm_head", x)
        client.timeout = 0.0
        call = client._flight.submit(client._requests.linear("lm_head", x), PATIENCE_S)
        for _ in range(200):
            try:
                with client.in_place.result(call, True) as found:
                    result = found.clone()
                break
            except WaitTimeoutError:
                client.timeout = 0.1
        assert torch.equal(result, expected)
        client.timeout = PATIENCE_S
        assert_all_given_back(client, server)


def test_what_was_cancelled_keeps_no_slot(server: GPUServer) -> None:
    with GPUClient(server.endpoint) as client:
        for _ in range(5):
            call = client.submit.linear("lm_head", torch.randn(3, 48))
            call.cancel()
            with pytest.raises(BaseException, match="cancelled"), client.in_place.result(call, True):
                pass
        assert_all_given_back(client, server)
        assert client.stale_replies == 5


def test_a_client_closed_while_a_slot_is_held(server: GPUServer) -> None:
    with GPUClient(server.endpoint) as client:
        call = client.submit.linear("lm_head", torch.randn(3, 48))
        with client.in_place.result(call, True) as found:
            client.close()
            assert found.shape == (3, 97)
            found.sum()  # the mapping is still there
    with GPUClient(server.endpoint) as other:
        other.ping()


# --- slots that are not to be had


def test_where_somebody_else_sends_nothing_is_done(server: GPUServer) -> None:
    with GPUClient(server.endpoint) as client:
        like = torch.empty(2, 80)
        client.init()
        before = client._flight._next_id
        with client._flight._sending:
            assert client.in_place.linear("model.layers.0.mlp.down_proj", like, Tensor.zero_) is None
        assert client._flight._next_id == before
        call = client.in_place.linear("model.layers.0.mlp.down_proj", like, Tensor.zero_)
        assert call is not None
        assert (call.result(PATIENCE_S) == 0).all()


def test_a_held_slot_blocks_nobody_for_longer_than_its_block(stock: PreTrainedModel) -> None:
    """Another thread fills both rings meanwhile; it waits, and goes on when the slot is given back."""
    x = torch.randn(3, 48)
    with serving(stock, max_chunks=2) as running, GPUClient(running.endpoint) as client:
        expected = client.linear("lm_head", x)
        done: list[Tensor] = []

        def fill() -> None:
            done.extend([call.result() for call in [client.submit.linear("lm_head", x) for _ in range(9)]])

        for number in range(1, 11):
            call = client.submit.linear("lm_head", x)
            filling = Background()
            with client.in_place.result(call, True) as found:
                assert call.lease is not None
                filling.start(fill)
                until(lambda: len(client._flight) > 2)
                assert torch.equal(found, expected)
            filling.join()
            assert len(done) == 9 * number
        assert all(torch.equal(each, expected) for each in done)
        assert_all_given_back(client, running)


def test_threads_and_pipelined_calls_beside_it(server: GPUServer) -> None:
    split = split_of(server)
    client, x = split.tsqp_client, torch.randn(3, 48)
    expected, row = forward(split), client.linear("lm_head", x)
    stop = threading.Event()

    def tiles() -> None:
        try:
            for _ in range(4):
                assert torch.equal(forward(split), expected)
        finally:
            stop.set()

    def calls() -> None:
        while not stop.is_set():
            for call in [client.submit.linear("lm_head", x) for _ in range(6)]:
                assert torch.equal(call.result(PATIENCE_S), row)
            assert torch.equal(client.linear("lm_head", x), row)

    run_all(tiles, calls, calls)
    assert_all_given_back(client, server)
    split.close()


def test_threads_that_all_work_in_slots(server: GPUServer) -> None:
    gate, down = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"
    with GPUClient(server.endpoint) as client:
        written: list[bool] = []

        def work(seed: int) -> None:
            x = torch.randn(3, 48, generator=torch.Generator().manual_seed(seed))
            inner = client.linear(gate, x)
            expected = client.linear(down, inner * 2)
            for _ in range(100):
                with client.in_place.leaving_replies(True):
                    first = client.submit.linear(gate, x)
                    with client.in_place.result(first, True) as found:
                        call = client.in_place.linear(down, found, partial(double, found))
                        copied = None if call is not None else found * 2
                    written.append(call is not None)
                    if copied is not None:
                        call = client.submit.linear(down, copied)
                    assert torch.equal(call.result(PATIENCE_S), expected)

        run_all(*[partial(work, seed) for seed in range(3)])
        assert any(written)
        assert_all_given_back(client, server)


# --- the channel's part


@pytest.fixture(params=CARRIERS)
def pair(request: pytest.FixtureRequest, endpoint: str) -> Iterator[Pair]:
    with pair_over(CARRIERS[request.param], endpoint) as both:
        yield both


def test_only_the_message_of_that_id_stays_in_its_slot(pair: Pair) -> None:
    x = torch.arange(5.0)
    on_ring = pair.client.transport.startswith("shm") and pair.client.threshold > 1000
    for request_id in (1, 2, 3):
        pair.server.send([x + request_id], request_id=request_id, timeout=PATIENCE_S)
    first = pair.client.recv_or_lease(2, PATIENCE_S)
    assert isinstance(first, Message)
    assert (first.request_id, first.tensors[0].tolist()) == (1, (x + 1).tolist())
    second = pair.client.recv_or_lease(2, PATIENCE_S)
    assert isinstance(second, Lease) is on_ring
    third = pair.client.recv(PATIENCE_S)  # read past the slot that is held
    assert third.tensors[0].tolist() == (x + 3).tolist()
    message = second.message if isinstance(second, Lease) else second
    assert (message.request_id, message.tensors[0].tolist()) == (2, (x + 2).tolist())
    if isinstance(second, Lease):
        second.release()
    with pytest.raises(WaitTimeoutError):
        pair.client.recv_or_lease(2, 0.01)
    assert pair.client.stats["received_messages"] == 3
