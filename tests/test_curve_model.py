"""Keys all the way: server, client, split model, health check."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from keys import Keys, own_address
from rpc_support import GEOMETRY, PATIENCE_S, tiny_model, until

import tsqp
from tsqp.client import GPUClient
from tsqp.errors import AuthenticationError, ClosedError, InsecureEndpointError, KeyFileError, TsqpError
from tsqp.health import check_health
from tsqp.server import GPUServer


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture(params=["ipc", "tcp", "tcp beyond this host"])
def server(request: pytest.FixtureRequest, keys: Keys, endpoint: str) -> Iterator[GPUServer]:
    if request.param != "ipc":
        address = "127.0.0.1" if request.param == "tcp" else own_address(2)
        if address is None:
            pytest.skip("this machine has no address beyond its loopback")
        endpoint = f"tcp://{address}:0"
    with GPUServer(tiny_model(), endpoint, **GEOMETRY, **keys.listen) as running:
        yield running


def test_a_split_model_works_with_keys_and_only_with_them(server, keys):
    model = tsqp.from_pretrained(endpoint=server.endpoint, timeout=PATIENCE_S, **keys.connect)
    try:
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, tiny_model()(ids).logits, atol=1e-4)
    finally:
        model.close()
    with pytest.raises(AuthenticationError):
        tsqp.from_pretrained(endpoint=server.endpoint, **keys.connect_as("other"))
    with pytest.raises((AuthenticationError, InsecureEndpointError)):
        tsqp.from_pretrained(endpoint=server.endpoint)


def test_a_busy_client_whose_key_goes_is_forgotten_with_all_that_was_kept_for_it(server, keys):
    ended = threading.Event()

    def ask() -> None:
        with GPUClient(server.endpoint, PATIENCE_S, **keys.connect) as client:
            try:
                while True:
                    client.ping()
            except (ClosedError, TsqpError):
                ended.set()

    keys.admit("other")
    with GPUClient(server.endpoint, PATIENCE_S, **keys.connect_as("other")) as stays:
        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: server.stats["clients"] == 2)
        keys.expel("client")
        until(lambda: server.stats["clients"] == 1)
        asking.join(PATIENCE_S)
        assert ended.is_set()
        stays.ping()


def test_the_health_check_uses_them(server, keys):
    assert check_health(server.endpoint, PATIENCE_S, **keys.connect).healthy
    refused = check_health(server.endpoint, PATIENCE_S, **keys.connect_as("other"))
    assert not refused.healthy
    assert "refused this client" in refused.error
    keys.secret("client").chmod(0o644)
    with pytest.raises(KeyFileError):
        check_health(server.endpoint, PATIENCE_S, **keys.connect)
