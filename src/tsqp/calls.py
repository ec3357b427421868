"""The parts of a remote call: where it is made from, how its tensors are protected, what its reply may be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import msgpack
import torch
from torch import Tensor

from ._channel import Forecast
from .errors import MetaError, ProtocolError, RemoteError
from .protocol import MAX_ERROR_CHARS, METHOD_NAMES, METHOD_OPERATORS, Method
from .telemetry import Telemetry

Shape = tuple[int, ...]
Shapes = Sequence[Shape]


class Site:
    """One place of the program that makes remote calls: its id, its request meta, its counters.

    ``method`` is a plain int, ``meta`` packed, ``calls`` and ``times`` are the telemetry's own rows: a call
    converts and looks up nothing. ``next_index()`` numbers the calls from 0; no two threads get one number.
    """

    __slots__ = (
        "_known",
        "calls",
        "forecast",
        "id",
        "label",
        "layer",
        "meta",
        "method",
        "next_index",
        "outs",
        "times",
    )

    def __init__(
        self,
        number: int,
        method: Method,
        meta: dict[str, Any] | None,
        outs: tuple[int, ...],
        telemetry: Telemetry,
    ) -> None:
        self.id = number
        self.method = int(method)
        self.meta: bytes = b"" if meta is None else msgpack.packb(meta)
        self.outs = outs
        self.next_index = itertools.count().__next__
        self.calls = telemetry.counter(METHOD_NAMES[method])
        operator = METHOD_OPERATORS.get(method)
        self.times = None if operator is None else telemetry.row(operator)
        #: When its replies come; None: not to be reckoned with.
        self.forecast: Forecast | None = Forecast()
        #: For the performance log: the layer, where it is known, and the log's own number of this site.
        self.layer: int | None = None if meta is None else meta.get("layer")
        self.label: int | None = None
        self._known: tuple[Any, Shapes] = (None, ())

    def shapes(self, shape: torch.Size) -> Shapes:
        """The outputs' shapes for an input of this shape; those of the last one are remembered."""
        known = self._known
        if known[0] != shape:
            lead = tuple(shape[:-1])
            known = self._known = (shape, tuple((*lead, out) for out in self.outs))
        return known[1]


class Protection(Protocol):
    """How the inputs and outputs of remote linear modules are protected from the server.

    ``index`` is never the same for two calls of a site, so that a mask made from both is never used twice.
    Calls may overlap: :meth:`reveal` is for the one whose ``secret`` it gets, and must give the same result
    if it is asked twice.
    """

    name: str

    def conceal(self, site: Site, index: int, h: Tensor) -> tuple[Tensor, Any]:
        """What the server may see of ``h``, and what :meth:`reveal` needs to know."""

    def reveal(self, site: Site, secret: Any, outs: list[Tensor]) -> list[Tensor]:
        """The true outputs of the site's modules, from those for what the server saw."""


def check_tensors(reply: Any, shapes: Shapes, dtype: torch.dtype | None) -> None:
    """Raises :class:`ProtocolError` unless the reply's tensors are as many, of exactly these shapes and of this
    dtype: the server is not trusted.
    """
    tensors: list[Tensor] = reply.tensors
    if len(tensors) != len(shapes):
        raise ProtocolError(f"the server's reply holds {len(tensors)} tensors, expected {len(shapes)}")
    for tensor, shape in zip(tensors, shapes):  # noqa: B905 - as many, and strict costs
        if tensor.shape != shape or tensor.dtype is not dtype:
            raise ProtocolError(
                f"the server replied {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
            )


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
