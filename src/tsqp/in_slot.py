"""Replies that are computed in the slot they are sent from, instead of being copied there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


class InSlot:
    """A reply whose request has passed every check and which is still to be computed.

    ``specs`` are shape and dtype of its tensors; ``compute_into(outs)`` writes them. ``outs`` may be memory that the
    client can write at any time: they are to be written, never to be read for a decision. What the request changes on
    the server is changed by ``compute_into`` once the results are there.
    """

    __slots__ = ("compute_into", "specs")

    def __init__(
        self,
        specs: Sequence[tuple[Sequence[int], torch.dtype]],
        compute_into: Callable[[list[torch.Tensor]], None],
    ) -> None:
        self.specs, self.compute_into = specs, compute_into


class ComputingError(Exception):
    """``compute_into`` failed, and nothing was sent; its cause says why."""


def send_in_slot(channel: Any, reply: InSlot, begin_ns: int, queue_ns: int, **fields: Any) -> int:
    """Computes a reply where it is sent from, and sends it.

    ``fields`` are those of ``Channel.reserve``; a reply that does not fit a slot is computed in private memory there.
    Returns the nanoseconds since ``begin_ns`` that computing took. Raises :class:`ComputingError`, else what
    ``Channel.reserve`` does.
    """
    reservation = channel.reserve(reply.specs, transfer=True, **fields)
    with reservation as outs:
        try:
            reply.compute_into(outs)
        except Exception as error:
            raise ComputingError from error
        compute_ns = time.perf_counter_ns() - begin_ns
        reservation.set_times(compute_ns, queue_ns)
    return compute_ns
