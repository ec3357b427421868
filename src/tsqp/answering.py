"""How the server answers: one request of every client that has one, alone or together with others.

What a client does wrong ends at worst its own connection: a request that can be read but not fulfilled gets an error
reply, bytes that are no message, or a dead peer, end that connection and free what was kept for it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .batching import JoinLearner, Linger, Request, compute_joined, groups
from .cuda import CudaWork
from .errors import (
    ClosedError,
    MessageError,
    MessageTooLargeError,
    PeerDiedError,
    RemoteError,
    RingCorruptedError,
    TsqpError,
    WaitTimeoutError,
)
from .in_slot import ComputingError, InSlot, send_in_slot
from .protocol import MAX_ERROR_CHARS, METHOD_NAMES, METHOD_OPERATORS, Method, Status
from .server_ops import LinearTarget, Operators, Reply
from .sessions import Session
from .telemetry import Telemetry, sum_transfers

log = logging.getLogger("tsqp.server")

#: No request is taken before its reply has room, so no reply waits, however busy the machine is; except for a client
#: that takes the room back, by turning a word in shared memory, and it is given up before others notice.
_REPLY_TIMEOUT_S = 0.01
#: A client that was answered within this time is one that may ask again in a moment.
_JUST_BEFORE_NS = 100_000_000
_CLIENT_FAULTS = (PeerDiedError, ClosedError, MessageError, RingCorruptedError, WaitTimeoutError)
_NAMES = {int(method): name for method, name in METHOD_NAMES.items()}


class Answering:
    """Takes, computes and answers the requests of all sessions; one thread's."""

    def __init__(
        self,
        operators: Operators,
        handlers: Mapping[int, Callable[[Session, Any], Reply]],
        telemetry: Telemetry,
        batching: bool,
        cuda: CudaWork | None,
    ) -> None:
        self.sessions: dict[Any, Session] = {}
        self.errors = self.busy_ns = self.joined = 0
        self._operators = operators
        self._telemetry = telemetry
        #: By tag: what answers a request, and the telemetry's rows of the method and of its operator.
        self._methods = {tag: (handler, *self._rows(tag)) for tag, handler in handlers.items()}
        self._batching = batching
        self._cuda = cuda
        self._learner = JoinLearner()
        self._linger = Linger()
        self._past_transfers = sum_transfers(())
        self._ending = threading.Lock()  # or a client that goes would be in neither, or in both, for a moment

    def _rows(self, tag: int) -> tuple[list[int], list[int] | None]:
        method = Method(tag)
        operator = METHOD_OPERATORS.get(method)
        times = None if operator is None else self._telemetry.row(operator)
        return self._telemetry.counter(METHOD_NAMES[method]), times

    def admit(self, session: Session) -> None:
        """A new client."""
        if self._cuda is not None:
            session.page_lock = self._cuda.page_lock(session.channel)
        self.sessions[session.channel] = session

    def transfers(self) -> dict[str, Any]:
        """Counters of all channels there are and were."""
        sessions, past = self.all_transfers()
        return sum_transfers([past, *(session.channel.stats for session in sessions)])

    def all_transfers(self) -> tuple[list[Session], dict[str, Any]]:
        """The clients there are, and the counters of the channels there were. Any thread may ask."""
        with self._ending:
            return list(self.sessions.values()), self._past_transfers

    def serve(self, ready: list[Any], stopping: Callable[[], bool]) -> bool:
        """Answers one request of each of the ``ready`` channels that has one; False where nothing could be done for
        any. No further request is taken once ``stopping()``."""
        now = time.perf_counter_ns()
        progress = not ready
        requests = []
        for channel in ready:
            if stopping():
                break
            session = self.sessions.get(channel)
            taken = True if session is None else self._safely(session, self._take, session, now)
            if isinstance(taken, Request):
                requests.append(taken)
            progress |= taken is not False
        if self._batching and requests and len(self.sessions) > 1:
            self._wait_for_others(requests, now)
            self._serve_together(requests)
        else:
            for request in requests:
                self._serve_alone(request)
        return progress

    def _safely(self, session: Session, step: Callable[..., Any], *args: Any) -> Any:
        """``step(*args)``; what goes wrong ends the client's connection and no more."""
        try:
            return step(*args)
        except _CLIENT_FAULTS as error:
            self.drop(session, error)
        except Exception as error:
            log.exception("unexpected fault with client %s", session.channel.peer)
            self.drop(session, error)
        return None

    def _take(self, session: Session, ready_ns: int) -> Request | bool:
        """The next request of a client, which was seen at ``ready_ns``; where none can be answered now, False if that
        is for want of room for its reply.
        """
        channel = session.channel
        if channel.closed:  # by the listener
            raise ClosedError("it is not let in any more")
        # Not read before its reply has room: a client that takes no replies must not block the others.
        if not session.room:
            sending: bool = channel.sending
            if not channel.can_send():
                session.seen_ns = session.seen_ns or ready_ns
                return sending  # the wait ends when there is room for more of a large reply
            session.room = True
        lease = channel.recv_nowait()
        if lease is None:
            return True  # a large message is announced and still on its way
        request = Request(session, lease, session.seen_ns or ready_ns)
        session.seen_ns = time.perf_counter_ns() if session.pipelines and channel.poll() else 0
        return request

    # --- alone ---------------------------------------------------------------------------------------------

    def _serve_alone(self, request: Request) -> None:
        begin = time.perf_counter_ns()
        self._safely(request.session, self._finish, request, begin, partial(self._answer, request, begin))

    def _finish(self, request: Request, begin: int, answer: Callable[[], None]) -> None:
        """Sends the answer and gives the request's memory back, then looks whether the next one may come, and already
        could."""
        session = request.session
        try:
            answer()
        finally:
            request.lease.release()
        # The client has its reply: from here on the time is not its.
        end = session.served_ns = time.perf_counter_ns()
        self.busy_ns += end - begin
        session.room = session.channel.can_send()
        session.pipelines = session.room and session.channel.poll()
        if session.pipelines and not session.seen_ns:
            session.seen_ns = end

    def _answer(self, request: Request, begin: int) -> None:
        """Computes and sends the reply to one request; raises only what ends the client's connection."""
        session, msg = request.session, request.message
        tag = msg.tag
        session.requests += 1
        try:
            method = self._methods.get(tag)
            if method is None:
                raise RemoteError(f"method {tag} is unknown", Status.UNKNOWN_METHOD)
            reply = method[0](session, msg)
        except Exception as error:  # noqa: BLE001 - an operator's own fault must not end the server
            self._fail(session, msg, error)
            return
        if isinstance(reply, InSlot):
            self._reply_in_slot(request, reply, begin)
            return
        request.compute_ns = time.perf_counter_ns() - begin
        self._reply(request, *reply, begin - request.seen_ns)

    # --- together ------------------------------------------------------------------------------------------

    def _wait_for_others(self, requests: list[Request], now: int) -> None:
        """Adds the requests that come in a moment from clients that were answered just before."""
        first = requests[0]
        active = [session for session in self.sessions.values() if session.served_ns > now - _JUST_BEFORE_NS]
        taken = {request.session for request in requests}
        missing = [session for session in active if session not in taken]
        target = self._operators.target_of(first) if missing else None
        if target is None:
            return
        cost_ns = self._learner.alone_ns(target.key, target.rows(first.message.tensors[0]))
        begin = time.perf_counter_ns()
        end = begin + self._linger.budget_ns(cost_ns)
        if end == begin:
            return
        count = len(requests)
        while missing and time.perf_counter_ns() < end:
            for session in [session for session in missing if session.channel.poll()]:
                missing.remove(session)
                request = self._safely(session, self._take, session, time.perf_counter_ns())
                if isinstance(request, Request):
                    requests.append(request)
            os.sched_yield()  # whom this waits for may need the core
        self._linger.tell(len(requests) > count)

    def _serve_together(self, requests: list[Request]) -> None:
        """Answers requests of several clients, those that name the same linear modules as one where that pays."""
        for target, group in groups(requests, self._operators.target_of):
            rows = [] if target is None else [target.rows(request.message.tensors[0]) for request in group]
            if target is not None and self._learner.pays(target.key, rows) and self._serve_joined(target, group, rows):
                continue
            for number, request in enumerate(group):
                self._serve_alone(request)
                if target is not None:
                    self._learner.observe(target.key, rows[number], request.compute_ns)

    def _serve_joined(self, target: LinearTarget, group: list[Request], rows: list[int]) -> bool:
        """Answers a group as one; False where that can't be computed, and nothing was answered."""
        begin = time.perf_counter_ns()
        try:
            inputs = [request.message.tensors[0] for request in group]
            replies = compute_joined(inputs, partial(self._operators.linear, target))
        except RemoteError:
            return False  # together they pass a limit
        except Exception:
            log.exception("%d requests failed together; each is computed by itself", len(group))
            return False
        spent = time.perf_counter_ns() - begin
        self._learner.observe(target.key, sum(rows), spent)
        self.joined += len(group)
        for request, tensors, count in zip(group, replies, rows, strict=True):
            request.session.requests += 1
            # Of the common time each is charged its rows' share; the rest it waited for the others.
            request.compute_ns = spent * count // sum(rows)
            queue_ns = begin + spent - request.compute_ns - request.seen_ns
            answer = partial(self._reply, request, tensors, None, queue_ns)
            counted = time.perf_counter_ns() - request.compute_ns
            self._safely(request.session, self._finish, request, counted, answer)
        return True

    # --- answers -------------------------------------------------------------------------------------------

    def _reply(self, request: Request, tensors: list[torch.Tensor], meta: Any, queue_ns: int) -> None:
        session, msg = request.session, request.message
        try:
            if self._cuda is not None and self._cuda.holds(tensors):
                self._send_from_device(request, tensors, meta, queue_ns)
            else:
                session.channel.send(
                    tensors,
                    meta=meta,
                    **_in_reply_to(msg),
                    compute_ns=request.compute_ns,
                    queue_ns=queue_ns,
                    transfer=True,  # fresh results: a large one need not be waited for
                )
        except MessageTooLargeError as error:
            self._refuse_too_large(session, msg, error)
            return
        self._count(request, queue_ns)

    def _reply_in_slot(self, request: Request, reply: InSlot, begin: int) -> None:
        session, msg = request.session, request.message
        queue_ns = begin - request.seen_ns
        try:
            request.compute_ns = send_in_slot(session.channel, reply, begin, queue_ns, **_in_reply_to(msg))
        except ComputingError as failed:
            self._fail(session, msg, failed.__cause__ or failed)
            return
        except MessageTooLargeError as error:
            self._refuse_too_large(session, msg, error)
            return
        self._count(request, queue_ns)

    def _count(self, request: Request, queue_ns: int) -> None:
        request.session.refused = 0
        _, calls, times = self._methods[request.message.tag]
        calls[0] += 1
        if times is not None:
            times[0] += 1
            times[1] += request.compute_ns
            times[3] += queue_ns

    def _send_from_device(self, request: Request, tensors: list[torch.Tensor], meta: Any, queue_ns: int) -> None:
        assert self._cuda is not None
        request.compute_ns = self._cuda.send(
            request.session.channel,
            tensors,
            # Launching returns at once: what it took so far is counted on until the results are in the slot.
            time.perf_counter_ns() - request.compute_ns,
            queue_ns,
            meta=meta,
            **_in_reply_to(request.message),
        )

    def _fail(self, session: Session, msg: Any, error: BaseException) -> None:
        """Tells the client what is wrong with its request, or that an operator failed."""
        if isinstance(error, RemoteError):
            self._refuse(session, msg, str(error), error.code)
            return
        text, status = _operator_fault(error, msg.tag)
        log.error("method %s failed", _NAMES.get(msg.tag, msg.tag), exc_info=error)
        self._refuse(session, msg, text, status)

    def _refuse_too_large(self, session: Session, msg: Any, error: MessageTooLargeError) -> None:
        self._refuse(session, msg, f"the reply is too large for a message: {error}", Status.LIMIT)

    def _refuse(self, session: Session, msg: Any, text: str, status: int) -> None:
        """Raises ClosedError where that was one too many: who is never right costs the others more than it is worth."""
        session.errors += 1
        session.refused += 1
        self.errors += 1
        last = session.refused >= session.limits.refused
        why = f"{session.refused} of its requests in a row were refused"
        ending = f"; this connection ends: {why}" if last else ""
        meta = {"error": text[: MAX_ERROR_CHARS - len(ending)] + ending}
        session.channel.send((), meta=meta, status=int(status), **_in_reply_to(msg))
        if last:
            raise ClosedError(why)

    # --- ends ----------------------------------------------------------------------------------------------

    def drop(self, session: Session, reason: BaseException | str) -> None:
        """Ends a client's connection and frees what was kept for it."""
        channel = session.channel
        with self._ending:
            if self.sessions.pop(channel, None) is None:
                return
            self._past_transfers = sum_transfers([self._past_transfers, channel.stats])
        session.drop_cache()
        if session.page_lock is not None:
            session.page_lock.release()
        log.info("client gone: %s (%s)", channel.peer, reason)
        try:
            channel.close()
        except (TsqpError, OSError) as error:
            log.warning("closing the channel of %s failed: %s", channel.peer, error)

    def dismiss_all(self) -> None:
        """Tells clients that wait for a reply that the server stops, then ends every connection."""
        for session in list(self.sessions.values()):
            self._dismiss(session)
            self.drop(session, "the server stops")

    def _dismiss(self, session: Session) -> None:
        channel = session.channel
        try:
            while channel.can_send() and (lease := channel.recv_nowait(lease=True)) is not None:
                with lease as msg:
                    self._refuse(session, msg, "the server is shutting down", Status.SHUTTING_DOWN)
        except (TsqpError, OSError) as error:
            log.info("client %s left while the server stopped: %s", channel.peer, error)


def _in_reply_to(msg: Any) -> dict[str, Any]:
    """What every reply repeats of its request, and how long it may take to be sent."""
    return {
        "tag": msg.tag,
        "request_id": msg.request_id,
        "site": msg.site,
        "index": msg.index,
        "timeout": _REPLY_TIMEOUT_S,
    }


def _operator_fault(error: BaseException, tag: int) -> tuple[str, Status]:
    """The sentence and status for what torch raised; its own text may hold values, so none of it is passed on."""
    name = _NAMES.get(tag, str(tag))
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error))
    )
    if out_of_memory:
        return f"{name}: the server has too little memory; send fewer rows per request", Status.OUT_OF_MEMORY
    return f"{name} failed on the server ({type(error).__name__}); its log has the cause", Status.INTERNAL
