"""How many messages wait in a channel, over each carrier, counted by a thread that does not receive."""

from __future__ import annotations

import pytest
import torch
from carriers import CARRIERS, Carrier
from rpc_support import PATIENCE_S, until

import tsqp
from tsqp.listener import Listener


@pytest.fixture(params=CARRIERS)
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


def test_messages_that_came_and_were_not_taken(listener: Listener, carrier: Carrier) -> None:
    with tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options) as client:
        with listener.accept(PATIENCE_S) as server:
            assert server.waiting == 0
            for number in range(3):
                client.send([torch.zeros(2)], tag=number)
            until(lambda: server.waiting == 3)
            for left in (2, 1, 0):
                server.recv(PATIENCE_S)
                assert server.waiting == left
            client.send([torch.zeros(2)])
            until(lambda: server.waiting == 1)
        assert server.waiting == 0  # closed
