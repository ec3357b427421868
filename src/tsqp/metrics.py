"""A server's figures as Prometheus text at ``http://127.0.0.1:PORT/metrics``.

Needs ``prometheus_client`` (``pip install 'tsqp[metrics]'``). The port is open on the loopback interface only; any
user of the machine can read it: counts and times, nothing of what was computed. Figures per second and shares are the
reader's to make: ``rate(tsqp_round_trips_total[1m])``, ``rate(tsqp_busy_seconds_total[1m])``.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .errors import ConfigError
from .local_server import LocalServer, listen_loopback, receive, send_all

log = logging.getLogger("tsqp.server")

_MAX_REQUEST_BYTES = 8192
_CARRIERS = ("shm", "zmq")
#: Name, help, and the overview's entry of each figure of the whole server; counters are told by their unit.
_COUNTERS = (
    ("tsqp_round_trips", "Requests answered, refused ones included.", "round_trips"),
    ("tsqp_errors", "Requests refused.", "errors"),
    ("tsqp_joined_requests", "Requests of several clients that were computed together.", "joined_requests"),
    ("tsqp_clients_seen", "Clients that ever connected.", "clients_seen"),
    ("tsqp_busy_seconds", "Time spent on requests.", "busy_seconds"),
    ("tsqp_compute_seconds", "Time in which requests with an operator were computed.", "compute_seconds"),
    ("tsqp_queue_seconds", "Time such requests waited for their turn.", "queue_seconds"),
)
_GAUGES = (
    ("tsqp_clients", "Clients connected.", "clients"),
    ("tsqp_waiting_requests", "Requests that have come and were not begun.", "waiting"),
    ("tsqp_kv_bytes", "K and V kept for clients.", "kv_bytes"),
    ("tsqp_uptime_seconds", "Time since the server was made.", "seconds"),
)
_CLIENT_COUNTERS = (
    ("tsqp_client_round_trips", "Requests of a client answered.", "round_trips"),
    ("tsqp_client_errors", "Requests of a client refused.", "errors"),
)
_CLIENT_GAUGES = (
    ("tsqp_client_waiting_requests", "Requests of a client that have come and were not begun.", "waiting"),
    ("tsqp_client_kv_bytes", "K and V kept for a client.", "kv_bytes"),
    ("tsqp_client_age_seconds", "Time since a client connected.", "age_seconds"),
)


def require_prometheus() -> Any:
    """The package ``prometheus_client``; raises :class:`ConfigError` where it is not installed."""
    try:
        import prometheus_client
        import prometheus_client.core
    except ImportError:
        text = "metrics need the package prometheus_client; install it with: pip install 'tsqp[metrics]'"
        raise ConfigError(text) from None
    return prometheus_client


def check_metrics(port: int) -> None:
    """Raises :class:`ConfigError` where metrics can't be served on ``port``: before a long start-up, not after it."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"metrics_port={port} is no port; give 0 to 65535")
    require_prometheus()


class Figures:
    """A collector of prometheus_client: reads ``overview()`` when it is asked."""

    def __init__(self, overview: Callable[[], Mapping[str, Any]]) -> None:
        self._overview = overview
        self._core = require_prometheus().core

    def collect(self) -> Iterator[Any]:
        """The figures of the moment as metric families."""
        found = self._overview()
        counter, gauge = self._core.CounterMetricFamily, self._core.GaugeMetricFamily
        for name, text, key in _COUNTERS:
            yield counter(name, text, value=found[key])
        for name, text, key in _GAUGES:
            yield gauge(name, text, value=found[key])
        yield from self._by_carrier("tsqp", "", [((), found)])
        yield self._labelled(counter, "tsqp_calls", "Calls per method.", "method", found["calls"])
        seconds = {name: row["seconds"] for name, row in found["operators"].items()}
        yield self._labelled(counter, "tsqp_operator_seconds", "Time computed per operator.", "operator", seconds)
        clients = found["per_client"]
        for make, table in ((counter, _CLIENT_COUNTERS), (gauge, _CLIENT_GAUGES)):
            for name, text, key in table:
                values = {str(client["client"]): client[key] for client in clients}
                yield self._labelled(make, name, text, "client", values)
        by_client = [((str(client["client"]),), client) for client in clients]
        yield from self._by_carrier("tsqp_client", " of a client", by_client)

    def _by_carrier(
        self, prefix: str, whose: str, rows: Sequence[tuple[tuple[str, ...], Mapping[str, Any]]]
    ) -> Iterator[Any]:
        labels = ["client", "carrier"] if whose else ["carrier"]
        for what, text in (("transfers", "Messages"), ("bytes", "Bytes")):
            family = self._core.CounterMetricFamily(
                f"{prefix}_{what}", f"{text}{whose} moved in both directions, by carrier.", labels=labels
            )
            for head, row in rows:
                for carrier in _CARRIERS:
                    family.add_metric([*head, carrier], row[f"{carrier}_{what}"])
            yield family

    @staticmethod
    def _labelled(make: Any, name: str, text: str, label: str, values: Mapping[str, float]) -> Any:
        family = make(name, text, labels=[label])
        for key, value in values.items():
            family.add_metric([key], value)
        return family


class MetricsServer:
    """Serves the figures on ``127.0.0.1:port`` until :meth:`close`; ``port`` 0 is any free one.

    :attr:`port` says which.

    Raises :class:`ConfigError` without prometheus_client, :class:`EndpointBusyError` where the port is taken.
    """

    def __init__(self, port: int, overview: Callable[[], Mapping[str, Any]]) -> None:
        self._client = require_prometheus()
        self._registry = self._client.CollectorRegistry(auto_describe=False)
        self._registry.register(Figures(overview))
        listening = listen_loopback(port)
        self.port: int = listening.getsockname()[1]
        self._server = LocalServer(listening, self._answer, "tsqp-metrics")
        log.info("metrics at http://127.0.0.1:%d/metrics", self.port)

    def close(self) -> None:
        """Ends serving. Idempotent."""
        self._server.close()

    def _answer(self, connection: socket.socket, deadline: float) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            part = receive(connection, 4096, deadline)
            if not part or len(request) > _MAX_REQUEST_BYTES:
                return
            request += part
        status, kind, body = self._page(request)
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        send_all(connection, head.encode() + (b"" if request.startswith(b"HEAD ") else body), deadline)

    def _page(self, request: bytes) -> tuple[str, str, bytes]:
        method, _, rest = request.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return "405 Method Not Allowed", "text/plain", b"only GET is answered\n"
        if path not in (b"/metrics", b"/"):
            return "404 Not Found", "text/plain", b"the figures are at /metrics\n"
        return "200 OK", self._client.CONTENT_TYPE_LATEST, self._client.generate_latest(self._registry)
