"""Echoes of messages that fit no slot: what each carrier gives, beside slots that do hold them."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from . import echo
from .peers import Peer
from .peers_shm import CopyLimit
from .peers_tsqp import Tsqp, TsqpAuto, TsqpLarge, TsqpTiled
from .peers_zmq import Multipart
from .setting import Setting

SIZES = (15 << 20, 64 << 20, 134 << 20)
SECONDS_PER_CELL = 1.2
CONTESTANTS: tuple[type[Peer], ...] = (Tsqp, TsqpTiled, TsqpAuto, TsqpLarge, Multipart, CopyLimit)


def run(setting: Setting, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    return echo.run(setting, CONTESTANTS, sizes, setting.seconds(SECONDS_PER_CELL))


def tables(result: dict[str, Any]) -> list[Table]:
    return echo.tables(result, bases=(Multipart.key, CopyLimit.key))
