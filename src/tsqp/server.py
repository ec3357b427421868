"""The server: one loop that answers every connected runner.

One thread serves all clients, one request per client and turn, so that none can starve another. What a client
does wrong ends at worst its own connection: a request that can be read but not fulfilled gets an error reply,
bytes that are no message, or a dead peer, end that connection and free what was kept for it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import torch
from torch import nn

from . import config
from .errors import (
    ClosedError,
    ConfigError,
    MessageError,
    MessageTooLargeError,
    PeerDiedError,
    RemoteError,
    RingCorruptedError,
    TsqpError,
    WaitTimeoutError,
)
from .listener import check_endpoint, listen
from .loading import Progress, load_model
from .protocol import (
    MAX_ERROR_CHARS,
    MAX_KV_BYTES,
    MAX_REPLY_BYTES,
    METHOD_NAMES,
    METHOD_OPERATORS,
    PROTECTION_LINE,
    Method,
    Status,
)
from .server_ops import Operators
from .serving import make_default_directory, stop_signals
from .sessions import Session
from .telemetry import Telemetry, print_stats, sum_transfers

log = logging.getLogger("tsqp.server")

#: How long the loop waits at most before it looks at its stop flag by itself.
_WAIT_S = 0.2
#: How long a reply may wait for a client that does not take it, before that client is given up.
_REPLY_TIMEOUT_S = 5.0
#: The first and the longest pause while every client with a request takes no replies.
_BLOCKED_PAUSE_S, _LONGEST_PAUSE_S = 0.00005, 0.02
_CLIENT_FAULTS = (PeerDiedError, ClosedError, MessageError, RingCorruptedError, WaitTimeoutError)
_NAMES = {int(method): name for method, name in METHOD_NAMES.items()}


class GPUServer:
    """Serves a transformers model's heavy modules to runners.

    ``model_or_path`` is a local checkpoint directory or a ready transformers model. ``endpoint`` is
    ``ipc:///path`` or ``tcp://address:port`` (default: ``LLAMA_IPC_PATH`` or a socket in the user's own
    directory). ``dtype`` is ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``;
    ``device`` a torch device. ``threads`` sets torch's threads for the computation, ``kv_limit_bytes`` the K
    and V kept per client, ``reply_limit_bytes`` the largest result a request may ask for, ``shm`` and
    ``wait`` are those of :func:`listen`, ``progress`` is called with a line per phase of loading.

    The model is loaded by the constructor; the endpoint is bound by :meth:`serve`, which blocks, or
    :meth:`start`, which returns. Raises :class:`ModelNotFoundError`, :class:`ModelError`,
    :class:`ConfigError`, :class:`EndpointError`, and when binding :class:`EndpointBusyError`.
    """

    def __init__(
        self,
        model_or_path: nn.Module | str | os.PathLike[str],
        endpoint: str | None = None,
        device: str | torch.device | None = None,
        dtype: str = "auto",
        max_chunk_bytes: int | None = None,
        max_chunks: int | None = None,
        max_clients: int = 16,
        threads: int | None = None,
        kv_limit_bytes: int = MAX_KV_BYTES,
        reply_limit_bytes: int = MAX_REPLY_BYTES,
        shm: bool = True,
        large: str = "tile",
        wait: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        for name, value in (("threads", threads), ("max_clients", max_clients)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is too small; give 1 or more")
        for name, nbytes in (("kv_limit_bytes", kv_limit_bytes), ("reply_limit_bytes", reply_limit_bytes)):
            if nbytes < 0:
                raise ConfigError(f"{name}={nbytes} is negative; give a number of bytes")
        self.endpoint = endpoint or config.default_endpoint()
        check_endpoint(self.endpoint)
        self._listen_options: dict[str, Any] = {
            "max_chunk_bytes": config.max_chunk_bytes() if max_chunk_bytes is None else max_chunk_bytes,
            "max_chunks": config.max_chunks() if max_chunks is None else max_chunks,
            "max_clients": max_clients,
            "shm": shm,
            "large": large,
            "wait": wait,
        }
        self._threads = threads
        self._kv_limit_bytes = kv_limit_bytes
        self._served = load_model(model_or_path, device, dtype, progress)
        self._operators = Operators(self._served, reply_limit_bytes)
        self.telemetry = Telemetry()
        #: By tag: what answers a request, and the telemetry's rows of the method and of its operator.
        self._methods = {tag: (handler, *self._rows(tag)) for tag, handler in self._operators.handlers.items()}
        self._sessions: dict[Any, Session] = {}
        self._past_transfers = sum_transfers(())
        self._clients_seen = self._errors = self._busy_ns = 0
        self._listener: Any = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._pause_s = _BLOCKED_PAUSE_S
        self._failure: BaseException | None = None

    # --- running -------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Serves until :meth:`stop`, or SIGINT or SIGTERM where this is the main thread; then prints the
        statistics.

        The request in hand is finished, then clients are told, channels and the endpoint are closed. A second
        signal does what it did before this call. After :meth:`start` this only waits for the background
        thread.
        """
        with stop_signals(self._request_stop):
            if self._thread is not None:
                while self._thread.is_alive():
                    self._thread.join(_WAIT_S)
                self._thread = None
                if self._failure is not None:
                    raise self._failure
            else:
                self._open()
                self._run()
        self.print_stats()

    def start(self) -> GPUServer:
        """Binds the endpoint, serves in a background thread and returns the server; :meth:`stop` ends it."""
        if self._thread is not None:
            raise ConfigError("the server is running already; stop it before starting it again")
        self._open()
        self._thread = threading.Thread(target=self._run, name="tsqp-server", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends serving after the request in hand; from any thread, a signal handler too, and more than once.

        Waits for the background thread of :meth:`start`, if there is one and this is not it.
        """
        self._request_stop()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = None

    def __enter__(self) -> GPUServer:
        return self if self._thread is not None else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def stats(self) -> dict[str, Any]:
        """Plain numbers: transfers per carrier of all clients, calls, ``operators`` (compute time), errors,
        clients.

        ``seconds`` is the time since the server was made, ``busy_seconds`` the part of it spent on requests.
        """
        channels = [session.channel.stats for session in list(self._sessions.values())]
        return {
            "side": "server",
            "endpoint": self.endpoint,
            "protection": PROTECTION_LINE,
            "clients": len(self._sessions),
            "clients_seen": self._clients_seen,
            "errors": self._errors,
            "busy_seconds": self._busy_ns / 1e9,
            "kv_bytes": sum(session.kv_bytes for session in list(self._sessions.values())),
            **self.telemetry.snapshot(),
            **sum_transfers([self._past_transfers, *channels]),
        }

    def print_stats(self) -> None:
        """Prints :attr:`stats` as tables."""
        print_stats(self.stats, "tsqp server")

    # --- the loop ------------------------------------------------------------------------------------------

    def _request_stop(self) -> None:
        self._stopping = True
        if self._listener is not None:
            self._listener.interrupt()

    def _open(self) -> None:
        self._stopping = False
        if self._served.device.type == "cpu" and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
            log.warning("set OMP_WAIT_POLICY=passive: torch's idle threads starve a runner on the same cores")
        make_default_directory(config.parse_endpoint(self.endpoint))
        self._listener = listen(self.endpoint, **self._listen_options)
        self.endpoint = self._listener.endpoint
        log.info("serving at %s; protection: %s", self.endpoint, PROTECTION_LINE)

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._turn_all(self._listener.wait(_WAIT_S))
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._close()

    def _rows(self, tag: int) -> tuple[list[int], list[int] | None]:
        method = Method(tag)
        operator = METHOD_OPERATORS.get(method)
        return self.telemetry.counter(METHOD_NAMES[method]), None if operator is None else self.telemetry.row(operator)

    def _turn_all(self, ready: list[Any]) -> None:
        """Admits new clients, then answers one request of each client that has one."""
        now = time.perf_counter_ns()
        while (channel := self._listener.accept_nowait()) is not None:
            self._sessions[channel] = Session(channel, self._served.geometry, self._kv_limit_bytes)
            self._clients_seen += 1
            log.info("client connected: %s", channel.peer)
        progress = not ready
        for channel in ready:
            if self._stopping:
                return
            progress |= self._turn(channel, now)
        if progress:
            self._pause_s = _BLOCKED_PAUSE_S
        else:
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _turn(self, channel: Any, ready_ns: int) -> bool:
        """Answers one request of a client, which was seen at ``ready_ns``; False if there is no room for its reply."""
        session = self._sessions.get(channel)
        if session is None:
            return True
        try:
            # Not read before its reply has room: a client that takes no replies must not block the others.
            if not session.room:
                sending = channel.sending
                if not channel.can_send():
                    session.seen_ns = session.seen_ns or ready_ns
                    return sending  # the wait ends when there is room for more of a large reply
                session.room = True
            lease = channel.recv_nowait()
            if lease is None:
                return True  # a large message is announced and still on its way
            begin = time.perf_counter_ns()
            queue_ns = begin - (session.seen_ns or ready_ns)
            session.seen_ns = begin if session.pipelines and channel.poll() else 0
            try:
                self._answer(session, lease.message, begin, queue_ns)
            finally:
                lease.release()
            # The client has its reply: from here on the time is not its.
            self._look_ahead(session, begin)
        except _CLIENT_FAULTS as error:
            self._drop(session, error)
        except Exception as error:
            log.exception("unexpected fault with client %s", channel.peer)
            self._drop(session, error)
        return True

    def _look_ahead(self, session: Session, begin: int) -> None:
        """After a turn: counts its time, and looks whether the next one may come, and already could."""
        end = time.perf_counter_ns()
        self._busy_ns += end - begin
        session.room = session.channel.can_send()
        session.pipelines = session.room and session.channel.poll()
        if session.pipelines and not session.seen_ns:
            session.seen_ns = end

    def _answer(self, session: Session, msg: Any, begin: int, queue_ns: int) -> None:
        """Computes and sends the reply to one request; raises only what ends the client's connection."""
        tag = msg.tag
        session.requests += 1
        try:
            method = self._methods.get(tag)
            if method is None:
                raise RemoteError(f"method {tag} is unknown", Status.UNKNOWN_METHOD)
            tensors, meta = method[0](session, msg)
        except RemoteError as error:
            self._refuse(session, msg, str(error), error.code)
            return
        except Exception as error:  # an operator's own fault must not end the server
            text, status = _operator_fault(error, tag)
            log.exception("method %s failed", _NAMES.get(tag, tag))
            self._refuse(session, msg, text, status)
            return
        compute_ns = time.perf_counter_ns() - begin
        try:
            session.channel.send(
                tensors,
                tag=tag,
                meta=meta,
                request_id=msg.request_id,
                site=msg.site,
                index=msg.index,
                timeout=_REPLY_TIMEOUT_S,
                compute_ns=compute_ns,
                queue_ns=queue_ns,
                transfer=True,  # fresh results: a large one need not be waited for
            )
        except MessageTooLargeError as error:
            self._refuse(session, msg, f"the reply is too large for a message: {error}", Status.LIMIT)
            return
        _, calls, times = method
        calls[0] += 1
        if times is not None:
            times[0] += 1
            times[1] += compute_ns
            times[3] += queue_ns

    def _refuse(self, session: Session, msg: Any, text: str, status: int) -> None:
        session.errors += 1
        self._errors += 1
        session.channel.send(
            (),
            tag=msg.tag,
            meta={"error": text[:MAX_ERROR_CHARS]},
            request_id=msg.request_id,
            status=int(status),
            site=msg.site,
            index=msg.index,
            timeout=_REPLY_TIMEOUT_S,
        )

    def _drop(self, session: Session, reason: BaseException | str) -> None:
        """Ends a client's connection and frees what was kept for it."""
        channel = session.channel
        if self._sessions.pop(channel, None) is None:
            return
        session.drop_cache()
        self._past_transfers = sum_transfers([self._past_transfers, channel.stats])
        log.info("client gone: %s (%s)", channel.peer, reason)
        try:
            channel.close()
        except (TsqpError, OSError) as error:
            log.warning("closing the channel of %s failed: %s", channel.peer, error)

    def _close(self) -> None:
        """Tells clients that wait for a reply, then closes every channel and the endpoint."""
        for session in list(self._sessions.values()):
            self._dismiss(session)
            self._drop(session, "the server stops")
        self._listener.close()

    def _dismiss(self, session: Session) -> None:
        channel = session.channel
        try:
            while channel.can_send() and (lease := channel.recv_nowait(lease=True)) is not None:
                with lease as msg:
                    self._refuse(session, msg, "the server is shutting down", Status.SHUTTING_DOWN)
        except (TsqpError, OSError) as error:
            log.info("client %s left while the server stopped: %s", channel.peer, error)


def _operator_fault(error: Exception, tag: int) -> tuple[str, Status]:
    """The sentence and status for what torch raised; its own text may hold values, so none of it is passed on."""
    name = _NAMES.get(tag, str(tag))
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error))
    )
    if out_of_memory:
        return f"{name}: the server has too little memory; send fewer rows per request", Status.OUT_OF_MEMORY
    return f"{name} failed on the server ({type(error).__name__}); its log has the cause", Status.INTERNAL
