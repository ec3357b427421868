"""The server: one loop that answers every connected runner.

One thread serves all clients, one request per client and turn, so that none can starve another
(:mod:`tsqp.answering`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import torch
from torch import nn

from . import config, curve, descriptors
from .answering import Answering
from .compiling import compile_mlps
from .cpu_latency import WhileBusy
from .cuda import CudaWork, current
from .errors import (
    ConfigError,
)
from .limits import Limits, limited
from .linear_backends import choose_backends
from .listener import check_endpoint, listen
from .loading import Progress, load_model
from .local_server import LocalServer
from .metrics import MetricsServer, check_metrics
from .overview import overview
from .protocol import (
    PROTECTION_LINE,
)
from .server_attention import AttentionOperators
from .server_fused import FusedOperators
from .server_ops import Operators
from .server_status import serve_status
from .serving import make_default_directory, stop_signals
from .sessions import Session
from .telemetry import Telemetry, print_stats

log = logging.getLogger("tsqp.server")

#: How long the loop waits at most before it looks at its stop flag by itself.
_WAIT_S = 0.2
#: The first and the longest pause while every client with a request takes no replies.
_BLOCKED_PAUSE_S, _LONGEST_PAUSE_S = 0.00005, 0.02


class GPUServer:
    """Serves a transformers model's heavy modules to runners.

    ``model_or_path`` is a local checkpoint directory or a ready transformers model. ``endpoint`` is
    ``ipc:///path`` or ``tcp://address:port`` (default: ``LLAMA_IPC_PATH`` or a socket in the user's own
    directory). ``dtype`` is ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``;
    ``device`` a torch device. ``threads`` sets torch's threads for the computation, ``limits`` what one client may take
    (:class:`Limits`; ``kv_limit_bytes`` and ``reply_limit_bytes`` are two of them, given by themselves), ``shm`` and
    ``wait`` are those of :func:`listen`. ``batching`` lets requests of several clients for the same linear modules be
    computed as one where that was measured to be faster. ``compile`` compiles the layers' MLPs with ``torch.compile``
    (True: inductor; or a backend's name), for ``fused`` and ``layer``. ``linear_backend`` says how linear modules are
    computed on a CPU: ``torch``, ``onednn``, or ``auto``, whichever is measured to be faster. With oneDNN, weights may
    be *packed*, laid out as its kernels read them: those of a loaded checkpoint are, instead of their plain form; with
    ``pack_weights=True`` also a ready model's and those that modules share, which takes their memory a second time;
    with False none. ``progress`` is called with a line per phase of loading. ``status`` lets the server's own
    user ask it about all its clients (``tsqp top``), by a socket file beside the endpoint; ``metrics_port`` serves the
    same figures as Prometheus text on 127.0.0.1, to every user of the machine (0: a free one, see the attribute).
    ``cpu_latency_us`` keeps this kernel's cores from idle states that take longer to leave while clients ask for
    something, and a second more (:class:`CpuLatency`).
    ``curve_key`` and ``curve_clients``: the server's secret-key file and the directory of the clients' public keys, see
    :func:`listen`.

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
        kv_limit_bytes: int | None = None,
        reply_limit_bytes: int | None = None,
        shm: bool = True,
        large: str = "tile",
        wait: str = "auto",
        batching: bool = True,
        compile: bool | str = False,
        linear_backend: str = "auto",
        pack_weights: bool | None = None,
        progress: Progress | None = None,
        status: bool = False,
        metrics_port: int | None = None,
        limits: Limits | None = None,
        curve_key: curve.PathLike | None = None,
        curve_clients: curve.PathLike | None = None,
        cpu_latency_us: int | None = None,
    ) -> None:
        for name, value in (("threads", threads), ("max_clients", max_clients)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is too small; give 1 or more")
        self.limits = limited(limits or Limits(), kv_limit_bytes, reply_limit_bytes)
        if metrics_port is not None:
            check_metrics(metrics_port)
        self._awake = None if cpu_latency_us is None else WhileBusy(cpu_latency_us)
        self.endpoint = endpoint or config.default_endpoint()
        curve.check_reach(config.parse_endpoint(self.endpoint), curve.server_keys(curve_key, curve_clients))
        check_endpoint(self.endpoint)
        self._status, self.metrics_port = status, metrics_port
        self._doors: list[LocalServer | MetricsServer] = []
        self._listen_options: dict[str, Any] = {
            "max_chunk_bytes": config.max_chunk_bytes() if max_chunk_bytes is None else max_chunk_bytes,
            "max_chunks": config.max_chunks() if max_chunks is None else max_chunks,
            "max_clients": max_clients,
            "shm": shm,
            "large": large,
            "wait": wait,
            "max_inbox_bytes": self.limits.unread_bytes,
            "max_inbox_messages": self.limits.unread_messages,
            "max_message_bytes": self.limits.message_bytes,
            "max_handshakes": self.limits.handshakes,
            "curve_key": curve_key,
            "curve_clients": curve_clients,
        }
        self._threads = threads
        self._served = load_model(model_or_path, device, dtype, progress)
        self._linear_ways = choose_backends(
            self._served,
            linear_backend,
            pack=pack_weights,
            owned=not isinstance(model_or_path, nn.Module),
            threads=threads,
            compiled=bool(compile),
        )
        if compile:
            compile_mlps(self._served, "inductor" if compile is True else compile)
        self._operators = Operators(self._served, self.limits)
        handlers = self._operators.handlers
        for part in (AttentionOperators, FusedOperators):
            handlers = handlers | part(self._served, self._operators).handlers
        self.telemetry = Telemetry()
        cuda = CudaWork(self._served.device) if self._served.device.type == "cuda" else None
        self._answering = Answering(self._operators, handlers, self.telemetry, batching, cuda)
        self._clients_seen = 0
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
        if self._thread is None:
            self._stopping = False  # before signals come here: one may come at once
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
        self._stopping = False
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

        ``seconds`` is the time since the server was made, ``busy_seconds`` the part of it spent on requests;
        ``joined_requests`` of several clients were computed together; ``linear_modules`` counts the linear modules by
        the way they are computed: ``torch``, ``onednn``, ``onednn_packed``.
        """
        answering = self._answering
        sessions = list(answering.sessions.values())
        return {
            "side": "server",
            "endpoint": self.endpoint,
            "protection": PROTECTION_LINE,
            "clients": len(sessions),
            "clients_seen": self._clients_seen,
            "errors": answering.errors,
            "joined_requests": answering.joined,
            "busy_seconds": answering.busy_ns / 1e9,
            "page_locked_clients": sum(bool(session.page_lock and session.page_lock.pinned) for session in sessions),
            "linear_modules": dict(self._linear_ways),
            "kv_bytes": sum(session.kv_bytes for session in sessions),
            **self.telemetry.snapshot(),
            **answering.transfers(),
        }

    def overview(self) -> dict[str, Any]:
        """What ``tsqp top`` and the metrics show: numbers of all clients and of each, see ``tsqp.overview``."""
        return {
            "endpoint": self.endpoint,
            "clients_seen": self._clients_seen,
            **overview(self._answering, self.telemetry),
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
        if self._served.device.type == "cuda":
            with torch.inference_mode(), current(self._served.device):
                self._operators.warm_up()
        if self._served.device.type == "cpu" and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
            log.warning("set OMP_WAIT_POLICY=passive: torch's idle threads starve a runner on the same cores")
        make_default_directory(config.parse_endpoint(self.endpoint))
        descriptors.raise_limit()
        self._listener = listen(self.endpoint, **self._listen_options)
        self.endpoint = self._listener.endpoint
        try:
            self._open_doors()
        except BaseException:
            self._close()
            raise
        log.info("serving at %s; protection: %s", self.endpoint, PROTECTION_LINE)

    def _open_doors(self) -> None:
        if self._status:
            self._doors.append(serve_status(self.endpoint, self.overview))
        if self.metrics_port is not None:
            metrics = MetricsServer(self.metrics_port, self.overview)
            self._doors.append(metrics)
            self.metrics_port = metrics.port

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode(), current(self._served.device):
                while not self._stopping:
                    ready = self._listener.wait(_WAIT_S)
                    if self._awake is not None:  # clients that take no replies are nothing to be awake for
                        self._awake.tell(bool(ready) and self._pause_s == _BLOCKED_PAUSE_S)
                    self._turn_all(ready)
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._close()

    def _turn_all(self, ready: list[Any]) -> None:
        """Admits new clients, then answers one request of each client that has one."""
        while (channel := self._listener.accept_nowait()) is not None:
            self._answering.admit(Session(channel, self._served.geometry, self.limits))
            self._clients_seen += 1
            log.info("client connected: %s", channel.peer)
        if self._answering.serve(ready, self._is_stopping):
            self._pause_s = _BLOCKED_PAUSE_S
        else:
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _is_stopping(self) -> bool:
        return self._stopping

    def _close(self) -> None:
        if self._awake is not None:
            self._awake.close()
        while self._doors:
            self._doors.pop().close()
        self._answering.dismiss_all()
        self._listener.close()
