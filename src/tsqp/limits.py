"""What one client may take of a server, all in one place; see :class:`Limits`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from .errors import ConfigError
from .protocol import MAX_KV_BYTES, MAX_REPLY_BYTES

#: Unread messages over ZeroMQ of one client of :func:`tsqp.listen`; a server of a model has a tighter limit.
MAX_INBOX_MESSAGES = 1 << 16
#: Handshakes under way at once.
MAX_HANDSHAKES = 4

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZE = re.compile(r"(\d{1,18})([kmgt]?)(i?b)?", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """What one client may take of a :class:`GPUServer`. A request beyond a limit gets an error that names it; a
    client that goes on sending is cut off and told why. Nobody else notices.

    ``kv_bytes``: K and V, and masks and rotary tables, kept for it. ``sequences``: caches kept for it.
    ``reply_bytes``: the largest result of one request. ``message_bytes``: one request. ``unread_bytes`` and
    ``unread_messages``: requests that came over ZeroMQ and were not begun; through shared memory there are never more
    than it has slots. ``graphs``: CUDA graphs made of its requests' shapes. ``refused``: requests in a row that get an
    error; with the last one the connection ends.

    ``handshakes`` is of all clients together: connections that are being made at the same time.
    """

    kv_bytes: int = MAX_KV_BYTES
    sequences: int = 4096
    reply_bytes: int = MAX_REPLY_BYTES
    message_bytes: int = 4 << 30
    unread_bytes: int = 4 << 30
    unread_messages: int = 1024
    graphs: int = 256
    refused: int = 128
    handshakes: int = MAX_HANDSHAKES

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("kv_bytes", "reply_bytes", "sequences", "graphs") else 1
            if not _is_count(value, least):
                raise ConfigError(f"the limit {field.name}={value!r} is no whole number from {least} on; give one")

    def changed(self, settings: Iterable[str]) -> Limits:
        """These limits with some changed, each written ``name=number``; a number may end in K, M, G or T (of 1024).

        Raises :class:`ConfigError` for what is no limit, or no number.
        """
        changes = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            match = _SIZE.fullmatch(text.strip())
            if name not in (known := [field.name for field in fields(self)]) or match is None:
                raise ConfigError(
                    f"{setting!r} is no limit; write name=number, as in kv_bytes=2G, with one of {', '.join(known)}"
                )
            changes[name] = int(match[1]) << _UNITS[match[2].lower()]
        return replace(self, **changes)


def limited(limits: Limits, kv_limit_bytes: int | None, reply_limit_bytes: int | None) -> Limits:
    """``limits`` with those that were given by themselves; raises :class:`ConfigError`."""
    for name, nbytes in (("kv_limit_bytes", kv_limit_bytes), ("reply_limit_bytes", reply_limit_bytes)):
        if nbytes is not None and nbytes < 0:
            raise ConfigError(f"{name}={nbytes} is negative; give a number of bytes")
    if kv_limit_bytes is not None:
        limits = replace(limits, kv_bytes=kv_limit_bytes)
    return limits if reply_limit_bytes is None else replace(limits, reply_bytes=reply_limit_bytes)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63


def check_count(value: int, name: str) -> None:
    """Raises :class:`ConfigError` where it is no positive number."""
    if not _is_count(value, 1):
        raise ConfigError(f"{name}={value!r} is not a positive whole number; give one")
