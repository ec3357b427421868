"""The parts of a remote call: where it is made from, how its tensors are protected, what its reply may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgpack
import torch
from torch import Tensor

from .errors import MetaError, ProtocolError, RemoteError
from .protocol import MAX_ERROR_CHARS, Method

Shape = tuple[int, ...]


class Site:
    """One place of the program that makes remote calls: its id, its request meta, how often it called."""

    __slots__ = ("id", "index", "meta", "method", "outs")

    def __init__(self, number: int, method: Method, meta: dict[str, Any] | None, outs: tuple[int, ...] = ()) -> None:
        self.id = number
        self.index = 0
        self.method = method
        self.meta: bytes | None = None if meta is None else msgpack.packb(meta)
        self.outs = outs


class Protection(Protocol):
    """How the inputs and outputs of remote linear modules are protected from the server."""

    name: str

    def linear(self, call: Callable[[Site, Tensor], list[Tensor]], site: Site, h: Tensor) -> list[Tensor]:
        """The outputs of the site's modules for ``h``; ``call`` makes the round trip with what the server may see."""


class NoProtection:
    """Sends activations as they are."""

    name = "none"

    def linear(self, call: Callable[[Site, Tensor], list[Tensor]], site: Site, h: Tensor) -> list[Tensor]:
        return call(site, h)


def checked_tensors(reply: Any, shapes: Sequence[Shape], dtype: torch.dtype | None) -> list[Tensor]:
    """The reply's tensors if they are as many, of exactly these shapes and of this dtype.

    Raises :class:`ProtocolError` otherwise: the server is not trusted.
    """
    tensors: list[Tensor] = reply.tensors
    if len(tensors) != len(shapes):
        raise ProtocolError(f"the server's reply holds {len(tensors)} tensors, expected {len(shapes)}")
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype is not dtype:
            raise ProtocolError(
                f"the server replied {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
            )
    return tensors


def reply_meta(reply: Any) -> dict[str, Any]:
    """The reply's meta; raises :class:`ProtocolError` where it is none."""
    try:
        meta = reply.meta
    except MetaError as error:
        raise ProtocolError(f"the server's reply has an unreadable meta: {error}") from None
    if not isinstance(meta, dict):
        raise ProtocolError("the server's reply has a meta that is no mapping")
    return meta


def remote_error(reply: Any) -> RemoteError:
    """The error a reply with a status stands for; the server's text is cut and its control characters removed."""
    text = reply_meta(reply).get("error")
    if not isinstance(text, str) or not text:
        text = f"the server refused the request with status {reply.status} and gave no reason"
    clean = "".join(char if char.isprintable() else "?" for char in text[:MAX_ERROR_CHARS])
    return RemoteError(clean, reply.status)
