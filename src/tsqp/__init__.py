"""tsqp: transformer models split between a trusted execution environment and an untrusted GPU.

Tensor IPC by itself is :func:`listen`, :func:`connect` and :class:`Channel`, or the bare
:class:`ShmRingBuffer`; the split model is :class:`GPUServer`, :func:`from_pretrained` and :class:`GPUClient`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Name -> module: loaded when first used, so that a process imports only its own side.
_LAZY = {
    "Channel": "transport",
    "connect": "transport",
    "Listener": "listener",
    "listen": "listener",
    "RingHandle": "_ring",
    "ShmRingBuffer": "_ring",
    "GPUClient": "client",
    "GPUServer": "server",
    "PendingCall": "pending",
    "CpuLatency": "cpu_latency",
    "Limits": "limits",
    "attach": "split",
    "detach": "split",
    "from_pretrained": "split",
}
_MODULES = ("errors", "ops")

__all__ = [*_LAZY, *_MODULES, "__version__"]  # noqa: PLE0604 (all of them are strings)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if TYPE_CHECKING:
    from . import errors as errors
    from . import ops as ops
    from ._ring import RingHandle as RingHandle
    from ._ring import ShmRingBuffer as ShmRingBuffer
    from .client import GPUClient as GPUClient
    from .cpu_latency import CpuLatency as CpuLatency
    from .limits import Limits as Limits
    from .listener import Listener as Listener
    from .listener import listen as listen
    from .pending import PendingCall as PendingCall
    from .server import GPUServer as GPUServer
    from .split import attach as attach
    from .split import detach as detach
    from .split import from_pretrained as from_pretrained
    from .transport import Channel as Channel
    from .transport import connect as connect
