"""The bookkeeping of calls in flight: which are unanswered, and what a reply, or a fault, does to them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from copy import copy
from typing import Any

from ._perf import RoundTrips
from .awaiting import Loops
from .errors import ClosedError, PeerDiedError, ProtocolError, TsqpError
from .kv_lengths import Outcome
from .pending import DROPPED, OPEN, SETTLED, PendingCall
from .tracing import Recorder
from .waiter import Waiter

#: Ids of requests that failed here and may still be answered; beyond this many the oldest are forgotten.
_MAX_LOST = 4096


class CallTable:
    """The calls in flight on one channel, and who waits for them. Threads may share it; `_table` guards it."""

    def __init__(self) -> None:
        self.round_trips = self.stale_replies = self.errors = self.busy_ns = 0
        #: Where each call is written down; see ``GPUClient.trace``.
        self.recorder: Recorder | None = None
        #: Where each round trip is noted for the performance log.
        self.round_trip_log: RoundTrips | None = None
        self._table = threading.RLock()  # a signal handler may close the client while its thread is in here
        self._pending: dict[int, PendingCall[Any]] = {}
        self._bytes = 0  # of the pending
        self._lost: dict[int, None] = {}
        self._waiters: list[Waiter] = []
        self._loops = Loops(self._table)
        self._next_id = 1
        self._busy_since_ns = 0
        self._end: TsqpError | None = None  # why there is no connection any more

    def __len__(self) -> int:
        """How many calls are in flight now, cancelled ones included, a blocking call alone on the channel not."""
        return len(self._pending)

    def cancel(self, call: PendingCall[Any]) -> bool:
        """See :meth:`PendingCall.cancel`."""
        with self._table:
            if call.state == OPEN:
                call.error = CancelledError("this call was cancelled; make it anew")
                call.state = DROPPED
                self._wake_ready()
            return call.state == DROPPED

    def _deliver(self, reply: Any) -> None:
        """Gives a reply to its call. Raises :class:`ProtocolError` if there is none. Callers hold `_reading`."""
        request_id = reply.request_id
        with self._table:
            call = self._pending.get(request_id)
            if call is not None:
                self._delist(call)
                if call.state == OPEN:
                    self._settle(call, reply, time.perf_counter_ns() - call.begin_ns)
                else:
                    self.stale_replies += 1
                    if call.history is not None:
                        call.accept(reply)  # what it did to the server's state counts
                self._wake_ready()
            elif request_id in self._lost:
                del self._lost[request_id]
                self.stale_replies += 1
            else:
                fault = "a second time" if 0 < request_id < self._next_id else "which was never made"
                raise ProtocolError(f"the server answered request {request_id}, {fault}")

    def _settle(self, call: PendingCall[Any], reply: Any, spent_ns: int) -> None:
        """Checks and counts the reply to a call. Callers hold `_reading`."""
        site = call.site
        call.accept(reply)
        self.round_trips += 1
        site.calls[0] += 1
        if self.round_trip_log is not None:
            self.round_trip_log.note(site, reply)
        times = site.times
        if times is not None:
            times[0] += 1
            times[1] += spent_ns
            compute_ns, queue_ns = reply.compute_ns, reply.queue_ns
            if compute_ns + queue_ns > spent_ns:  # the server may say anything
                compute_ns = min(compute_ns, spent_ns)
                queue_ns = min(queue_ns, spent_ns - compute_ns)
            times[2] += compute_ns
            times[3] += queue_ns
            if self.recorder is not None:
                now = time.perf_counter_ns()
                self.recorder.call(site.method, now - spent_ns, now, compute_ns, queue_ns)
        if reply.status:
            self.errors += 1
        call.state = SETTLED

    def _fail_all(self, error: Exception) -> None:
        """Ends everything in flight: after this error nobody knows which reply was lost."""
        with self._table:
            if isinstance(error, (ClosedError, PeerDiedError)):
                self._end = self._end or error
            for call in list(self._pending.values()):
                self._lose(call, Outcome.UNKNOWN)
                if call.state == OPEN:
                    call.error = copy(error) if isinstance(error, TsqpError) else error
                    call.state = SETTLED
            self._wake_ready()

    def _lose(self, call: PendingCall[Any], outcome: Outcome) -> None:
        """Takes a call out; a reply that comes all the same will be dropped and counted."""
        with self._table:
            self._delist(call)
            self._lost[call.request_id] = None
            if len(self._lost) > _MAX_LOST:
                del self._lost[next(iter(self._lost))]
            if call.history is not None:
                call.history.settle(outcome)
                call.history = None
            self._wake_ready()

    def _delist(self, call: PendingCall[Any]) -> None:
        if self._pending.pop(call.request_id, None) is not None:
            self._bytes -= call.nbytes
            if not self._pending:
                self.busy_ns += time.perf_counter_ns() - self._busy_since_ns

    def _wake_ready(self) -> None:
        for waiter in self._waiters:
            if waiter.ready():
                waiter.wake()
        self._loops.wake_ready()
