"""One remote call between its request and its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from ._message import Lease
from .calls import Shapes, Site, check_tensors, remote_error
from .errors import ConfigError, ProtocolError, RemoteError, TsqpError
from .kv_lengths import Outcome
from .protocol import Status

T = TypeVar("T")

#: States of a call: unanswered; answered, or failed; its result made; given up.
OPEN, SETTLED, CONCLUDED, DROPPED = range(4)


class Flight(Protocol):
    """Where a call is in flight; see ``in_flight``."""

    def wait_for(self, call: PendingCall[Any], timeout: float | None) -> None: ...
    def cancel(self, call: PendingCall[Any]) -> bool: ...
    async def arrival(self, ready: Callable[[], bool]) -> None: ...


class History(Protocol):
    """What a call does to the state the server keeps; see ``kv_lengths``."""

    broken: bool

    def plan(self) -> Shapes: ...
    def settle(self, outcome: Outcome) -> None: ...


@contextmanager
def settle_all(timeout: float | None) -> Iterator[list[PendingCall[Any]]]:
    """A list for calls made inside the block. Where that fails, none of them is left for somebody to wait for.

    Where the server refused one it still answers the others: they are waited for, at most ``timeout`` seconds each,
    and the first refusal is raised, whichever was seen first. After any other error they are cancelled.
    """
    calls: list[PendingCall[Any]] = []
    try:
        try:
            yield calls
        except (RemoteError, ConfigError) as error:
            # Nothing can be built upon what was refused: to try that is a ConfigError.
            refused = [fault for call in calls if isinstance(fault := call.exception(timeout), RemoteError)]
            if refused and refused[0] is not error:
                raise refused[0] from error
            raise
    except BaseException:
        for call in calls:
            call.cancel()
        raise


class PendingCall(Generic[T]):
    """A request that was sent, and its result once the reply is there. Made by ``client.submit``.

    Any thread may wait for it, several together too, and so may coroutines: ``await call`` is its result. The reply
    is checked exactly as that of a blocking call.
    """

    # Without an underscore: for the table it is in.
    __slots__ = (
        "_cast",
        "_dtype",
        "_finish",
        "_reply",
        "_single",
        "_value",
        "begin_ns",
        "error",
        "flight",
        "history",
        "index",
        "lease",
        "meta",
        "nbytes",
        "request_id",
        "shapes",
        "site",
        "state",
        "tensors",
    )

    flight: Flight
    request_id: int
    begin_ns: int
    nbytes: int
    _value: Any

    def __init__(
        self,
        site: Site,
        tensors: Sequence[Tensor],
        shapes: Shapes | None,
        dtype: torch.dtype | None,
        single: bool = False,
        cast: torch.dtype | None = None,
        *,
        meta: bytes | None = None,
        index: int | None = None,
        finish: Callable[[Any], T] | None = None,
        history: History | None = None,
    ) -> None:
        """``shapes`` and ``dtype`` of the reply's tensors are what is checked, None: ``finish`` does. The result
        is the tensors, as ``cast`` where given, or the first of them (``single``), or ``finish(reply)``, which
        may be asked twice.
        """
        self.site = site
        self.index = site.next_index() if index is None else index
        self.history = history
        self.tensors = tensors
        self.shapes, self._dtype = shapes, dtype
        self.meta = site.meta if meta is None else meta
        self._single, self._cast, self._finish = single, cast, finish
        self.error: BaseException | None = None
        self.state = OPEN
        self.request_id = 0  # not numbered yet
        #: Holds the slot in which the result lies, where that is still the reply's.
        self.lease: Lease | None = None

    # --- for users -----------------------------------------------------------------------------------------

    def done(self) -> bool:
        """True once :meth:`result` would not wait. It does not look for the reply: somebody has to wait for one."""
        return self.state != OPEN

    def result(self, timeout: float | None = None) -> T:
        """The call's result, after at most ``timeout`` seconds (None: however long it takes).

        Raises what the blocking call would, :class:`WaitTimeoutError` when the time is over, after which it
        may be asked again, and ``CancelledError`` after :meth:`cancel`.
        """
        if self.state == OPEN:
            self.flight.wait_for(self, timeout)
        return self.conclude()

    def __await__(self) -> Generator[Any, None, T]:
        """:meth:`result` for asyncio: the event loop goes on meanwhile, with no thread for this call.

        Cancelling the coroutine that waits leaves the call in flight: it may be awaited again, or cancelled by
        :meth:`cancel`. ``asyncio.wait_for`` bounds the wait.
        """
        if self.state == OPEN:
            yield from self.flight.arrival(self.done).__await__()
        return self.conclude()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What :meth:`result` raises, or None; waits, times out and is cancelled as that."""
        if self.state == OPEN:
            self.flight.wait_for(self, timeout)
        try:
            self.conclude()
        except CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - it is the result
            return error
        return None

    def cancel(self) -> bool:
        """Gives the result up; False if it is there already.

        A request on its way can't be called back: the server answers it, and the reply is dropped and counted
        (``stale_replies``). What it does to the server's K and V it does.
        """
        return self.flight.cancel(self)

    def cancelled(self) -> bool:
        """True after a :meth:`cancel` that was in time."""
        return self.state == DROPPED

    def __repr__(self) -> str:
        state = ("in flight", "done", "done", "cancelled")[self.state]
        return f"<PendingCall {self.request_id}, {state}>"

    # --- for the table -------------------------------------------------------------------------------------

    def accept(self, reply: Any) -> None:
        """Takes the reply; what is wrong with it becomes the call's error."""
        if self.history is not None:
            self._accept_scores(reply, self.history)
            return
        try:
            self._check(reply)
        except TsqpError as error:
            self.error = error
        self._reply = reply

    def _check(self, reply: Any) -> None:
        if reply.status or reply.tag != self.site.method:
            self._refuse(reply)
        if self.shapes is not None:
            check_tensors(reply, self.shapes, self._dtype)

    def _refuse(self, reply: Any) -> NoReturn:
        if reply.tag != self.site.method:
            raise ProtocolError(
                f"request {reply.request_id} of method {self.site.method} was answered as method {reply.tag}"
            )
        raise remote_error(reply)

    def _accept_scores(self, reply: Any, history: History) -> None:
        outcome = Outcome.DONE
        if history.broken:
            self.shapes = None  # they were reckoned on another state of the server
        try:
            self._check(reply)
            if history.broken:
                self.error = RemoteError(
                    "an earlier request that was in flight, which this one builds upon, was refused; send both again "
                    "with keep=",
                    Status.BAD_REQUEST,
                )
        except RemoteError as error:
            self.error, outcome = error, Outcome.REFUSED
        except TsqpError as error:
            self.error, outcome = error, Outcome.UNKNOWN
        history.settle(outcome)
        self._reply = reply

    def conclude(self) -> T:
        """The result of a call that is done."""
        if self.error is not None:
            raise self.error
        if self.state == CONCLUDED:
            return self._value
        value: Any
        if self._finish is not None:
            value = self._finish(self._reply)
        else:
            value = self._reply.tensors
            if self._cast is not None:
                value = [tensor.to(self._cast) for tensor in value]
            if self._single:
                value = value[0]
        self._value = value
        self.state = CONCLUDED
        return value

    def give_back(self) -> None:
        """Releases the slot in which the result lies, if there is one; the result is gone with it."""
        lease, self.lease = self.lease, None
        if lease is not None:
            self._reply = self._value = None
            self.state = CONCLUDED
            lease.release()

    def wire_bytes(self) -> int:
        """Bytes of the request's and the expected reply's tensors."""
        nbytes = sum(tensor.nbytes for tensor in self.tensors)
        if self.shapes is not None and self._dtype is not None:
            nbytes += sum(math.prod(shape) for shape in self.shapes) * self._dtype.itemsize
        return nbytes
