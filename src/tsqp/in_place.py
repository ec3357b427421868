"""Calls whose tensors the runner's operators read from the reply's slot and write into the next request's.

Between two calls an operator reads a result once and writes its own once: private copies of both would cost more than
it does. What lies in a slot the server may change at any time, so this is for operators to which an input is numbers
and no more (:mod:`tsqp.ops`), and whose results the server gets anyway. Number, shapes and dtype of a reply are checked
from a private copy of its header, as ever. In an enclave nothing is done in place: there untrusted memory is read and
written in whole aligned words only, which the operators don't do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from .handshake import in_gramine
from .in_flight import InFlight
from .pending import PendingCall
from .requests import Requests

T = TypeVar("T")

#: What the operators compute in one pass; of others they may read an input more often.
_DTYPES = (torch.float32, torch.bfloat16)


class InPlace:
    """In-place calls of one client. They are pipelined with those of its ``submit``, and as checked."""

    def __init__(self, requests: Requests, flight: InFlight) -> None:
        self._requests, self._flight = requests, flight
        #: False: every tensor comes and goes through private memory. It is that in an enclave and without slots.
        self.enabled = flight.channel.reply_slots > 0 and not in_gramine()

    def suits(self, dtype: torch.dtype) -> bool:
        """Whether activations of this dtype may lie in slots: they travel as they are, and there are slots."""
        return self.enabled and dtype in _DTYPES and dtype is self._requests.wire() and not self._requests.protected

    def leaving_replies(self, wanted: bool) -> AbstractContextManager[None]:
        """A block in which submitted calls' replies are left in their slots, where ``wanted``, for :meth:`result`."""
        return self._flight.leaving_replies() if wanted else nullcontext()

    def result(self, call: PendingCall[T], wanted: bool) -> AbstractContextManager[T]:
        """A block with the call's result, in its slot where it is ``wanted`` there and possible.

        Nobody else may ask for it, and nothing may be waited for in the block. Raises as ``call.result``.
        """
        timeout = self._flight.timeout
        return self._flight.held(call, timeout) if wanted else nullcontext(call.result(timeout))

    def attention_values(
        self, layer_idx: int, like: Tensor, fill: Callable[[Tensor], object]
    ) -> PendingCall[Tensor] | None:
        """``submit.attention_values`` of weights like ``like``, which ``fill(out)`` writes completely; None, and
        nothing was done, where there is no slot to write them in now.
        """
        return self._filled(self._requests.values_of(layer_idx, like.shape), like, fill)

    def linear(self, name: str, like: Tensor, fill: Callable[[Tensor], object]) -> PendingCall[Tensor] | None:
        """``submit.linear`` of an input like ``like``, which ``fill(out)`` writes completely; None as above."""
        return self._filled(self._requests.linear_of(name, like.shape), like, fill)

    def _filled(
        self, call: PendingCall[Tensor], like: Tensor, fill: Callable[[Tensor], object]
    ) -> PendingCall[Tensor] | None:
        def fill_one(outs: list[Any]) -> None:
            fill(outs[0])

        return call if self._flight.submit_in_place(call, ((like.shape, like.dtype),), fill_one) else None
