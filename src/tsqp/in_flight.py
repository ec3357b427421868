"""Requests in flight: many on one channel, each answered by request id, in whatever order replies come.

There is no thread of its own here. Whoever waits reads for all: one thread at a time receives replies and
settles the calls they belong to, the others sleep until theirs is settled or it is their turn to read.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

import torch

from ._channel import Holder
from ._message import Lease
from .call_table import CallTable
from .errors import ClosedError, MessageError, WaitTimeoutError
from .kv_lengths import Outcome
from .pending import OPEN, SETTLED, PendingCall
from .waiter import Waiter

T = TypeVar("T")

#: Requests and their replies that may be under way together, in bytes; a larger one travels alone. Less than
#: what a channel reads ahead while it waits for a slot, and than what a server takes unread from one client.
MAX_BYTES_IN_FLIGHT = 512 << 20
#: From this many in flight on, each submit takes the replies that are there: a server whose replies find no room
#: stops working.
_TAKE_FROM = 4
#: How long a thread that has its reply reads on at a time, while another thread can't get its request sent.
_RELIEF_S = 0.005
#: What a message of a tensor or two holds beside them, and more.
_HEAD_BYTES = 8192


class InFlight(CallTable):
    """The requests in flight on one channel. Threads may share it.

    A thread sends under `_sending`, so that ids, the state the server keeps and the wire have one order, and
    receives under `_reading`; `_table` guards the bookkeeping. Who holds `_sending` may take `_reading`, the other
    way round only without waiting, and nothing is waited for under `_table`.
    """

    def __init__(self, channel: Any, max_in_flight: int, timeout: float | None = None) -> None:
        super().__init__()
        #: Seconds the client's calls may take; the client's own attribute.
        self.timeout = timeout
        self.channel = channel
        self._send, self._recv = channel.send, channel.recv
        self._max_in_flight = max_in_flight
        self._sending = threading.Lock()
        self._reading = threading.Lock()
        self._awaited = self._loops.readers  # asking a list costs less
        self._writing = False  # a thread is in the channel's send, and may need somebody to read
        self._leaving = 0  # who wants replies left in their slots

    # --- calls ---------------------------------------------------------------------------------------------

    def run(self, call: PendingCall[T], timeout: float | None) -> T:
        """Sends a request and returns its result. Raises :class:`WaitTimeoutError` after ``timeout`` seconds."""
        begin = time.perf_counter_ns()
        turn = Holder(self._reading)
        try:
            with self._sending:
                if not self._pending and turn.take():
                    self._prepare(call)
                    self._transmit(call, timeout)
                else:
                    self._submit(call, timeout)
            if turn.held:
                self._receive_alone(call, timeout, begin)
        except BaseException:
            self._lose_interrupted(call)
            raise
        finally:
            read = turn.held
            turn.give()  # itself, and not in a method: Ctrl-C comes where one begins
            if read and (self._waiters or self._writing or self._awaited):
                self._relieve()
        return self._finish(call, timeout, begin) if call.state == OPEN else call.conclude()

    def ask(self, call: PendingCall[T]) -> T:
        """:meth:`run` with the client's timeout."""
        return self.run(call, self.timeout)

    def submit(self, call: PendingCall[T], timeout: float | None) -> PendingCall[T]:
        """Sends a request and returns it; waits for replies, ``timeout`` seconds, where too much is in flight."""
        with self._sending:
            self._submit(call, timeout)
        return call

    def wait_for(self, call: PendingCall[Any], timeout: float | None, in_place: bool = False) -> None:
        """Returns when the call is done; raises :class:`WaitTimeoutError` after ``timeout`` seconds. ``in_place`` is
        for :meth:`held`."""
        if not self._wait(call.done, timeout, call if in_place else None):
            raise WaitTimeoutError(
                f"no reply to request {call.request_id} in {timeout} s; it may still come, ask again"
            )

    @contextmanager
    def held(self, call: PendingCall[T], timeout: float | None) -> Iterator[T]:
        """The result of a call that nobody else asks for, valid inside the block only: its tensors lie where the reply
        does, if this thread is the one that reads it from a slot. The server may write there at any time. Nothing is to
        be waited for inside: nobody else reads meanwhile, as a ring can't be read past a lap that holds a lease.
        """
        try:
            if call.state == OPEN:
                self.wait_for(call, timeout, in_place=True)
            yield call.conclude()
        finally:
            if call.lease is not None:
                try:
                    call.give_back()
                finally:
                    self._reading.release()
                    self._relieve()

    @contextmanager
    def leaving_replies(self) -> Iterator[None]:
        """Inside the block :meth:`submit` leaves replies in their slots for :meth:`held` while there are enough."""
        with self._table:
            self._leaving += 1
        try:
            yield
        finally:
            with self._table:
                self._leaving -= 1

    async def arrival(self, ready: Callable[[], bool]) -> None:
        """Returns once ``ready()``, for coroutines and without a limit: the event loop goes on."""
        try:
            await self._loops.wait(self, ready)
        finally:
            self._relieve()

    def close(self) -> None:
        """Ends every call with :class:`ClosedError`, those to come too."""
        self._fail_all(ClosedError("this client is closed; make a new one"))

    # --- sending -------------------------------------------------------------------------------------------

    def _prepare(self, call: PendingCall[Any]) -> None:
        """Fixes the call's place in the order of sending. Callers hold `_sending`."""
        if self._end is not None:
            raise copy(self._end)
        if call.history is not None:
            call.shapes = call.history.plan()
        call.request_id = self._next_id
        self._next_id += 1

    def _enlist(self, call: PendingCall[Any], begin_ns: int, nbytes: int) -> None:
        with self._table:
            if not self._pending:
                self._busy_since_ns = begin_ns
            call.flight, call.begin_ns, call.nbytes = self, begin_ns, nbytes
            self._pending[call.request_id] = call
            self._bytes += nbytes

    def _transmit(self, call: PendingCall[Any], timeout: float | None) -> None:
        site = call.site
        try:
            self._send(
                call.tensors,
                tag=site.method,
                meta=call.meta,
                request_id=call.request_id,
                site=site.id,
                index=call.index,
                timeout=timeout,
            )
        except BaseException as error:
            # A message that can't be encoded was not sent; of another fault nobody knows how far it got.
            self._lose(call, Outcome.REFUSED if isinstance(error, MessageError) else Outcome.UNKNOWN)
            raise

    def _submit(self, call: PendingCall[Any], timeout: float | None) -> None:
        """Sends a request of which the table knows. Callers hold `_sending`."""
        if len(self._pending) >= (max(_TAKE_FROM, self.channel.reply_slots) if self._leaving else _TAKE_FROM):
            self.take_ready()
        try:
            self._prepare(call)
            begin = time.perf_counter_ns()
            nbytes = call.wire_bytes()
            if not self.has_room(nbytes):
                self._wait_for_room(call, nbytes, timeout)
            self._enlist(call, begin, nbytes)
            self._writing = True
            self._transmit(call, timeout)
        except BaseException:
            self._lose_interrupted(call)
            raise
        finally:
            self._writing = False
            if self._awaited:
                self.channel.helper().look()  # a send that had to wait may have read ahead
        call.tensors = ()

    def submit_in_place(
        self,
        call: PendingCall[Any],
        specs: Sequence[tuple[Sequence[int], torch.dtype]],
        fill: Callable[[list[torch.Tensor]], object],
    ) -> bool:
        """Sends a request whose tensors, of these shapes and dtypes, ``fill`` writes where they are sent from. False,
        and nothing is done, where that might mean waiting for anybody: the caller may hold what they wait for.

        The call must change nothing the server keeps.
        """
        request_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)
        nbytes = request_bytes + call.wire_bytes()
        fits = request_bytes + _HEAD_BYTES < self.channel.threshold
        turn = Holder(self._sending)
        try:
            if not (fits and turn.take()):
                return False
            if not (self.has_room(nbytes) and self.channel.can_send()):
                return False
            self._prepare(call)
            try:
                with self.channel.reserve(
                    specs,
                    tag=call.site.method,
                    meta=call.meta,
                    request_id=call.request_id,
                    site=call.site.id,
                    index=call.index,
                    timeout=self.timeout,
                ) as outs:
                    fill(outs)
                    self._enlist(call, time.perf_counter_ns(), nbytes)
            except BaseException:
                self._lose(call, Outcome.UNKNOWN)
                raise
            return True
        finally:
            turn.give()

    def has_room(self, nbytes: int = 0) -> bool:
        """Whether another request of ``nbytes`` may be sent without waiting for a reply."""
        count = len(self._pending)
        return not count or (count < self._max_in_flight and self._bytes + nbytes <= MAX_BYTES_IN_FLIGHT)

    def _wait_for_room(self, call: PendingCall[Any], nbytes: int, timeout: float | None) -> None:
        done = False
        try:
            done = self._wait(lambda: self.has_room(nbytes), timeout)
        finally:
            if not done:
                self._lose(call, Outcome.REFUSED)  # it was not sent
        if not done:
            raise WaitTimeoutError(
                f"{len(self._pending)} requests of {self._bytes} bytes are in flight and there was no room for another "
                f"in {timeout} s; wait longer or look at the server"
            )

    def _lose_interrupted(self, call: PendingCall[Any]) -> None:
        """Ctrl-C may come between two steps of a call that is numbered and may be sent: nobody will ask for it."""
        with self._table:  # another thread may be settling it
            if call.request_id and call.state == OPEN and call.request_id not in self._lost:
                self._lose(call, Outcome.UNKNOWN)

    # --- receiving -----------------------------------------------------------------------------------------

    def _receive_alone(self, call: PendingCall[Any], timeout: float | None, begin: int) -> None:
        """Settles a call that nothing was in flight beside when it was sent, and of which the table need not know; or
        puts it there, where another reply came first. Callers hold `_reading`.
        """
        try:
            reply = self._recv(timeout, call.site.forecast)
            if reply.request_id == call.request_id:
                spent = time.perf_counter_ns() - begin
                self.busy_ns += spent
                self._settle(call, reply, spent)
            else:
                self._enlist(call, begin, 0)
                self._deliver(reply)
        except WaitTimeoutError:
            self._lose(call, Outcome.UNKNOWN)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, a reply may be lost with it
            self._enlist(call, begin, 0)
            self._fail_all(error)

    def _finish(self, call: PendingCall[T], timeout: float | None, begin: int) -> T:
        """The result of a call in the table; if it does not come in time, nobody will ask for it any more."""
        spent_s = (time.perf_counter_ns() - begin) / 1e9
        try:
            self._wait(call.done, None if timeout is None else max(timeout - spent_s, 0.0))
        finally:
            with self._table:
                late = call.state == OPEN
                if late:
                    self._lose(call, Outcome.UNKNOWN)
        if late:
            raise WaitTimeoutError(f"no reply to request {call.request_id} in {timeout} s")
        return call.conclude()

    def _wait(self, ready: Callable[[], bool], timeout: float | None, in_place: PendingCall[Any] | None = None) -> bool:
        """Waits until ``ready()``, and while it is this thread's turn reads for all; False after ``timeout`` s. The
        reply to ``in_place`` stays in its slot if it is read here, and `_reading` with this thread."""
        deadline = None if timeout is None else time.monotonic() + timeout
        waiter: Waiter | None = None
        turn = Holder(self._reading)
        try:
            while not ready():
                if turn.take():
                    return self._read_until(ready, deadline, in_place)
                if waiter is None:
                    waiter = Waiter(ready)
                    with self._table:
                        self._waiters.append(waiter)
                    continue  # look again: who leaves from now on sees this waiter
                if not waiter.sleep(None if deadline is None else deadline - time.monotonic()):
                    return ready()
            return True
        finally:
            try:
                if in_place is None or in_place.lease is None:  # else it goes with the lease
                    turn.give()
            finally:
                if waiter is not None:
                    with self._table:
                        self._waiters.remove(waiter)
                self._relieve()

    def _read_until(self, ready: Callable[[], bool], deadline: float | None, in_place: PendingCall[Any] | None) -> bool:
        """Callers hold `_reading`."""
        while not ready():
            try:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                if in_place is None:
                    self._deliver(self._recv(left))
                else:
                    self._deliver_in_place(in_place, self.channel.recv_or_lease(in_place.request_id, left))
            except WaitTimeoutError:
                return ready()
            except Exception as error:  # noqa: BLE001 - whatever it is, a reply may be lost with it
                self._fail_all(error)
        return True

    def _deliver_in_place(self, call: PendingCall[Any], arrived: Any) -> None:
        if not isinstance(arrived, Lease):
            self._deliver(arrived)
            return
        call.lease = arrived
        try:
            self._deliver(arrived.message)
        finally:
            if call.state != SETTLED or call.error is not None:
                call.lease = None
                arrived.release()

    def take_ready(self) -> bool:
        """Delivers the replies that are there already; False: another thread reads."""
        turn = Holder(self._reading)
        try:
            if not turn.take():
                return False
            while self.channel.poll():
                self._deliver(self._recv(0.0))
        except WaitTimeoutError:
            pass  # a part of a large one
        except Exception as error:  # noqa: BLE001 - whatever it is, a reply may be lost with it
            self._fail_all(error)
        finally:
            read = turn.held
            turn.give()
            if read and (self._waiters or self._awaited):
                self._relieve()
        return True

    def _relieve(self) -> None:
        """Leaves the reading to the next thread. Where none waits, but one sends and has no room because the server
        can't get rid of its replies, it goes on here until there is room: a sender that found somebody reading
        does not read itself.
        """
        turn = Holder(self._reading)
        while self._writing and not (self._waiters or self._awaited) and not self.channel.can_send():
            try:
                if not turn.take():
                    return
                self._deliver(self._recv(_RELIEF_S))
            except WaitTimeoutError:
                pass
            except Exception as error:  # noqa: BLE001 - whatever it is, a reply may be lost with it
                self._fail_all(error)
                return
            finally:
                turn.give()
        if self._waiters or self._awaited:
            with self._table:
                if self._reading.locked():
                    return
                # A thread first: what a loop's thread does meanwhile, nobody knows.
                (self._waiters[0] if self._waiters else self._loops).wake()
