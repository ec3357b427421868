"""Answers that are expected at a time: whatever is expected, each arrives, and every wait ends as it would without."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from carriers import CARRIERS, Background, Pair, pair_over
from peers import PATIENCE_S
from rpc_support import HIDDEN, client_of, serving, tiny_model
from torch import nn

import tsqp
from tsqp._channel import Forecast
from tsqp.errors import ClosedError, WaitTimeoutError
from tsqp.transport import Channel

WAITS = ("auto", "spin", "block", "poll")
SLOW_S = 0.02


@pytest.fixture
def background() -> Iterator[Background]:
    threads = Background()
    yield threads
    threads.join()


@pytest.fixture(params=CARRIERS)
def pair(request: pytest.FixtureRequest, endpoint: str) -> Iterator[Pair]:
    with pair_over(CARRIERS[request.param], endpoint) as ends:
        yield ends


def answer(channel: Channel, delays: Sequence[float]) -> None:
    """Sends back what comes, each after its delay."""
    for delay in delays:
        message = channel.recv(PATIENCE_S)
        time.sleep(delay)
        channel.send(message.tensors, request_id=message.request_id, timeout=PATIENCE_S)


def ask(channel: Channel, number: int, forecast: Forecast, lease: bool = False) -> None:
    """Sends `number`, in a message of 404 bytes, and checks the answer."""
    channel.send([torch.full((4,), number)], request_id=number, timeout=PATIENCE_S)
    if lease:
        with channel.lease(PATIENCE_S, forecast) as message:
            assert message.request_id == number
            assert message.tensors[0].tolist() == [number] * 4
    else:
        message = channel.recv(PATIENCE_S, forecast)
        assert message.request_id == number
        assert message.tensors[0].tolist() == [number] * 4


DELAYS = [SLOW_S, SLOW_S, 0.0, 0.05, 0.0, SLOW_S]


@pytest.mark.parametrize("lease", [False, True], ids=["copy", "lease"])
def test_every_answer_arrives_over_every_carrier(pair, background, lease):
    forecast = Forecast()
    background.start(answer, pair.server, DELAYS)
    for number in range(len(DELAYS)):
        ask(pair.client, number, forecast, lease)


@pytest.mark.parametrize("wait", WAITS)
def test_every_answer_arrives_however_it_is_waited_for(endpoint, background, wait):
    forecast = Forecast()
    with tsqp.listen(endpoint, wait=wait) as listener, tsqp.connect(endpoint, PATIENCE_S, wait=wait) as client:
        background.start(answer, listener.accept(PATIENCE_S), DELAYS)
        for number in range(len(DELAYS)):
            ask(client, number, forecast)
        background.join()


def test_a_forecast_is_of_answers_to_requests_of_that_size(endpoint, background):
    forecast = Forecast()
    with pair_over(CARRIERS["ring"], endpoint) as pair:
        assert forecast.expected_s(404) == 0
        background.start(answer, pair.server, [SLOW_S] * 3)
        for number in range(3):
            ask(pair.client, number, forecast)
        assert forecast.expected_s(404) > 0
        assert forecast.expected_s(404 * 1000) == 0
        background.join()


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("timeout", [0.0, SLOW_S / 2, 2 * SLOW_S])
def test_a_deadline_before_or_after_the_expected_time_ends_the_wait_and_loses_nothing(
    endpoint, background, wait, timeout
):
    forecast, go = Forecast(), threading.Event()
    with tsqp.listen(endpoint, wait=wait) as listener, tsqp.connect(endpoint, PATIENCE_S, wait=wait) as client:
        server = listener.accept(PATIENCE_S)
        background.start(answer, server, [SLOW_S] * 3)
        for number in range(3):
            ask(client, number, forecast)
        client.send([torch.full((4,), 3)], request_id=3)
        with pytest.raises(WaitTimeoutError):
            client.recv(timeout, forecast)
        background.start(lambda: (go.wait(PATIENCE_S), answer(server, [0.0])))
        go.set()
        assert client.recv(PATIENCE_S, forecast).request_id == 3
        background.join()


@pytest.mark.parametrize("closing", ["the peer", "this end"])
@pytest.mark.parametrize("wait", WAITS)
def test_close_ends_a_wait_for_an_answer(endpoint, background, wait, closing):
    forecast = Forecast()
    with tsqp.listen(endpoint, wait=wait) as listener, tsqp.connect(endpoint, PATIENCE_S, wait=wait) as client:
        server = listener.accept(PATIENCE_S)
        background.start(answer, server, [0.15])  # what comes next is slept for
        ask(client, 0, forecast)
        background.start(lambda: (time.sleep(0.03), (server if closing == "the peer" else client).close()))
        with pytest.raises(ClosedError):
            client.recv(None, forecast)


class Slow(nn.Linear):
    """A projection that takes as long as it is told."""

    delay_s = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.delay_s)
        return super().forward(x)


@pytest.mark.parametrize("wait", WAITS)
def test_a_client_expects_what_it_saw_at_each_site_and_size(tmp_path, wait):
    model = tiny_model()
    slow = model.model.layers[0].self_attn.q_proj = Slow(HIDDEN, HIDDEN, bias=False)
    h = torch.randn(1, 1, HIDDEN)
    prompt = torch.randn(1, 300, HIDDEN)
    with serving(model, tmp_path, wait=wait) as server, client_of(server, wait=wait) as client:
        slow.delay_s = SLOW_S
        for _ in range(4):
            client.batch_linear(0, ["q_proj"], h)
        here, elsewhere = (client._requests.batch_linear(layer, ["q_proj"], h).site.forecast for layer in (0, 1))
        before = client.stats["sent_bytes"]
        client.batch_linear(0, ["q_proj"], h)
        nbytes = client.stats["sent_bytes"] - before
        assert here.expected_s(nbytes) > 0
        assert elsewhere.expected_s(nbytes) == 0
        slow.delay_s = 0.0
        for _ in range(4):
            torch.testing.assert_close(client.batch_linear(0, ["q_proj"], h)[0], slow(h))
            torch.testing.assert_close(client.batch_linear(0, ["q_proj"], prompt)[0], slow(prompt))
