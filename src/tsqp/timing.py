"""Where a split model's forward spends its time in the runner.

A :class:`Clock` gives the runner's operators (``tee_*``) to the telemetry. Wrapped are the norm modules, the
rotary module, the gated activations and, where attention is split, its softmax; ``tee_other`` is what remains
of the forward's time without round trips (masks, residuals, cache updates, and the attention of a placement
that leaves it whole in the runner). Wrapping is per instance and reversible.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .telemetry import Telemetry


class Clock:
    """Adds durations, in nanoseconds of this process's ``perf_counter_ns``, to a
    :class:`~tsqp.telemetry.Telemetry`.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._spent_ns = 0  # in operators and round trips since the forward began
        self._begin_ns = 0  # of the forward; 0 outside
        self._projected_ns = 0  # when the last projection came back; 0 once an attention has used it
        self._aside_ns = 0  # in operators since then

    now = staticmethod(time.perf_counter_ns)

    def add(self, operator: str, begin_ns: int) -> None:
        """Counts the time from ``begin_ns`` until now as ``operator``."""
        spent = time.perf_counter_ns() - begin_ns
        self._telemetry.add(operator, spent)
        if self._telemetry.recorder is not None:
            self._telemetry.recorder.span(operator, begin_ns, begin_ns + spent)
        self._spent_ns += spent
        self._aside_ns += spent

    def remote_done(self, begin_ns: int) -> None:
        """A call to the server, begun at ``begin_ns``, is over; the client counts its time as a ``gpu_*``
        operator.
        """
        now = time.perf_counter_ns()
        self._spent_ns += now - begin_ns
        self._projected_ns, self._aside_ns = now, 0
        if self._telemetry.recorder is not None:
            self._telemetry.recorder.span("remote", begin_ns, now)

    def attention_entered(self) -> None:
        """Counts the time since the last projection, norms aside, as ``tee_rotary``: what lies between is the
        rotation.
        """
        if self._projected_ns:
            now = time.perf_counter_ns()
            spent = now - self._projected_ns - self._aside_ns
            self._telemetry.add("tee_rotary", spent)
            if self._telemetry.recorder is not None:
                self._telemetry.recorder.span("tee_rotary", self._projected_ns, now)
            self._spent_ns += spent
            self._projected_ns = 0

    def forward_began(self, *_: Any) -> None:
        """A forward pre-hook."""
        self._spent_ns, self._begin_ns = 0, time.perf_counter_ns()

    def forward_ended(self, *_: Any) -> None:
        """A forward hook: counts the rest of the forward's time as ``tee_other``."""
        if self._begin_ns:
            now = time.perf_counter_ns()
            rest = now - self._begin_ns - self._spent_ns
            self._telemetry.add("tee_other", rest)
            if self._telemetry.recorder is not None:
                self._telemetry.recorder.span("forward", self._begin_ns, now)
            self._begin_ns = 0

    def timed(self, operator: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time counted as ``operator``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter_ns()
            result = function(*args, **kwargs)
            self.add(operator, begin)
            return result

        return timed
