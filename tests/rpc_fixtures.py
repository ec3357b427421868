"""What a test module about RPC gets with ``pytest_plugins = ["rpc_fixtures"]``: a model, its server, a client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rpc_support import client_of, serving, tiny_model
from torch import nn

from tsqp.client import GPUClient
from tsqp.server import GPUServer


@pytest.fixture
def model() -> nn.Module:
    return tiny_model()


@pytest.fixture
def server(model: nn.Module, tmp_path: Path) -> Iterator[GPUServer]:
    with serving(model, tmp_path) as running:
        yield running


@pytest.fixture
def client(server: GPUServer) -> Iterator[GPUClient]:
    with client_of(server) as connected:
        yield connected
