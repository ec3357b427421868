"""What a test module about trusted weights gets with ``pytest_plugins = ["trusting_fixtures"]``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from models import serving
from trusting import Made, made

from tsqp.server import GPUServer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made("llama", tmp_path_factory.mktemp("llama"), eos_token_id=5)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def server(llama: Made) -> Iterator[GPUServer]:
    with serving(llama.stock) as server:
        yield server
