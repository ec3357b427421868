"""What a test module about messages gets with ``pytest_plugins = ["message_fixtures"]``: each carrier in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from through import WAYS, Through

from tsqp._message import Message


@pytest.fixture(scope="module")
def through() -> Iterator[Through]:
    made = Through()
    yield made
    vars(made).clear()  # the last test's arguments outlive the fixture; its segment must not


@pytest.fixture(params=WAYS)
def send(request: pytest.FixtureRequest, through: Through) -> Callable[..., Message]:
    """Sends tensors by one way and returns the message that arrives."""
    return getattr(through, request.param)
