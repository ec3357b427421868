"""Requests of several clients for the same linear modules, computed as one matrix product.

A decoder step multiplies a row or two with a whole weight matrix: what it costs is reading the weights. Where several
clients ask for the same modules at the same time, their rows are put under each other and the weights are read once.
Whether that is faster depends on the machine, the weights and the number of rows, so it is measured:
:class:`JoinLearner` keeps what each number of rows has cost and joins only where that has paid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .sessions import Session

#: With more rows than this a product is bound by arithmetic, and the first client would wait for the last.
MAX_JOINED_ROWS = 256
#: Every so often the choice that looks worse is tried again: the machine may have changed.
_TRY_AGAIN = 64
#: Weight of the newest measurement.
_NEWEST = 0.25
#: A wait for others' requests: part of the computation's time, and a limit; given up where fewer than these come.
_WAITED_SHARE, _LONGEST_WAIT_NS, _WORTH_WAITING = 0.08, 300_000, 0.25
#: Distinct targets remembered; clients choose what they name.
_REMEMBERED = 4096


class Request:
    """One client's request, taken from its channel and not yet answered; ``lease`` is released with its answer."""

    __slots__ = ("compute_ns", "lease", "message", "seen_ns", "session")

    def __init__(self, session: Session, lease: Any, seen_ns: int) -> None:
        self.session = session
        self.lease = lease
        self.message = lease.message
        self.seen_ns = seen_ns
        self.compute_ns = 0


class JoinLearner:
    """Knows what a target has cost with 1, 2, 4, ... rows, and so whether requests are better joined."""

    def __init__(self) -> None:
        self._costs: dict[Any, dict[int, float]] = {}
        self._decisions = 0

    def observe(self, target: Any, rows: int, ns: float) -> None:
        """Notes that ``target`` took ``ns`` for ``rows`` rows."""
        if target not in self._costs and len(self._costs) >= _REMEMBERED:
            self._costs.clear()
        costs = self._costs.setdefault(target, {})
        bucket = _bucket(rows)
        before = costs.get(bucket)
        costs[bucket] = ns if before is None else before + _NEWEST * (ns - before)

    def pays(self, target: Any, rows: Sequence[int]) -> bool:
        """Whether requests of ``rows`` rows each are better computed as one. What is not known is tried."""
        total = sum(rows)
        if len(rows) < 2 or total > MAX_JOINED_ROWS:
            return False
        costs = self._costs.get(target, {})
        joined = costs.get(_bucket(total))
        alone = [costs.get(_bucket(count)) for count in rows]
        if joined is None:
            return True
        known = [cost for cost in alone if cost is not None]
        if len(known) < len(alone):
            return False
        self._decisions += 1
        better = joined < sum(known)
        return better if self._decisions % _TRY_AGAIN else not better

    def alone_ns(self, target: Any, rows: int) -> float:
        """What one request of ``rows`` rows has cost, 0.0 where that is not known."""
        return self._costs.get(target, {}).get(_bucket(rows), 0.0)


class Linger:
    """How long to wait with a request for those of other clients, and whether that has paid.

    Clients that are answered together ask again together, a moment apart: who answers the first of them at once has
    separated them. A small part of what the computation takes is worth waiting, as long as somebody comes.
    """

    def __init__(self) -> None:
        self._comes = 1.0  # share of the waits at whose end somebody had come, the latest ones count most
        self._asked = 0

    def budget_ns(self, cost_ns: float) -> int:
        """Nanoseconds to wait at most before a computation that takes ``cost_ns``."""
        self._asked += 1
        if self._comes < _WORTH_WAITING and self._asked % _TRY_AGAIN:
            return 0
        return int(min(cost_ns * _WAITED_SHARE, _LONGEST_WAIT_NS))

    def tell(self, came: bool) -> None:
        """Whether somebody came within the budget."""
        self._comes += _NEWEST * (came - self._comes)


def _bucket(rows: int) -> int:
    return max(rows - 1, 0).bit_length()


def groups(requests: Sequence[Request], target_of: Callable[[Request], Any]) -> list[tuple[Any, list[Request]]]:
    """Requests that name the same target, in the order of their first; those that name none (None) stay alone."""
    found: dict[Any, tuple[Any, list[Request]]] = {}
    for number, request in enumerate(requests):
        target = target_of(request)
        key = ("alone", number) if target is None else (target.key, request.message.tensors[0].dtype)
        found.setdefault(key, (target, []))[1].append(request)
    return list(found.values())


def compute_joined(
    inputs: Sequence[torch.Tensor], linear: Callable[[torch.Tensor], Sequence[torch.Tensor]]
) -> list[list[torch.Tensor]]:
    """Outputs of ``linear`` for each of ``inputs`` (``[.., in]``, one dtype), computed for all rows at once.

    Returns per input the list of its outputs ``[.., out_i]``.
    """
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    outs = [out.split([x.shape[0] for x in flat]) for out in linear(torch.cat(flat))]
    return [[out[n].view(*x.shape[:-1], out[n].shape[-1]) for out in outs] for n, x in enumerate(inputs)]
