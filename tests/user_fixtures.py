"""What a test module about other users gets with ``pytest_plugins = ["user_fixtures"]``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ends import path_of


@pytest.fixture
def open_directory(endpoint: str) -> Iterator[Path]:
    """Every user may enter and write the directory of sockets."""
    sockets = path_of(endpoint).parent
    sockets.chmod(0o777)
    sockets.parent.chmod(0o755)
    yield sockets
    sockets.chmod(0o700)
    sockets.parent.chmod(0o700)
