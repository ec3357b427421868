"""Processes of another user, which only root can start."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import places
import pytest
from peers import Peer

StartPeer = Callable[..., Peer]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def as_nobody(start_peer: StartPeer, function: str, endpoint: str, **options: Any) -> Any:
    return start_peer(places.as_nobody, function, endpoint, options).hear()
