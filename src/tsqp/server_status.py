"""How ``tsqp top`` asks a server about all its clients: a socket file beside the endpoint, for the server's own user.

A client's connection only ever tells that client's own numbers. So this has a door of its own, which is there only
where the server was asked for it (``status=True``), with a mode (0600) that lets nobody in but the user who runs the
server. Whoever connects gets one JSON object, the :func:`~tsqp.overview.overview`, and the end of the connection. It
takes no client's place and no shared memory, and answers while the server computes.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from .config import Endpoint, parse_endpoint, socket_directory
from .errors import ConnectError, ProtocolError, WaitTimeoutError
from .local_server import LocalServer, listen_unix, receive, send_all
from .serving import make_private
from .telemetry import TRANSFER_COUNTERS

#: More than any server's figures take; what claims more is no tsqp server.
_MAX_BYTES = 4 << 20
_MAX_TEXT = 300
_SUFFIX = ".status"
_SHARED: tuple[str, ...] = ("round_trips", "errors", "waiting", "kv_bytes", *TRANSFER_COUNTERS)
_NUMBERS = ("seconds", "clients", "clients_seen", "busy_seconds", "compute_seconds", "queue_seconds", *_SHARED)
_CLIENT_NUMBERS = ("client", "age_seconds", *_SHARED)


def status_path(endpoint: Endpoint) -> str:
    """Where the server of ``endpoint`` tells about itself: beside an ipc socket, else in the user's own directory."""
    if endpoint.scheme == "ipc":
        return endpoint.path + _SUFFIX
    return str(socket_directory() / f"tcp-{endpoint.port}{_SUFFIX}")


def serve_status(endpoint: str, overview: Callable[[], Mapping[str, Any]]) -> LocalServer:
    """Tells ``overview()`` to whoever connects to the status socket of ``endpoint``, until it is closed.

    Raises :class:`EndpointError` and :class:`EndpointBusyError`.
    """
    parsed = parse_endpoint(endpoint)
    if parsed.scheme == "tcp":
        make_private(socket_directory())

    def answer(connection: socket.socket, deadline: float) -> None:
        send_all(connection, json.dumps(overview()).encode(), deadline)

    return LocalServer(listen_unix(status_path(parsed)), answer, "tsqp-status")


def ask_status(endpoint: str, timeout: float) -> dict[str, Any]:
    """The :func:`~tsqp.overview.overview` of the server at ``endpoint``, checked.

    Raises :class:`ConnectError` where there is no server or it does not tell, :class:`WaitTimeoutError`,
    :class:`ProtocolError` for an answer that is none.
    """
    parsed = parse_endpoint(endpoint)
    deadline = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(timeout)
            connection.connect(status_path(parsed))
            data = _read_all(connection, deadline)
        except (FileNotFoundError, ConnectionRefusedError):
            raise ConnectError(_why_nobody(parsed)) from None
        except PermissionError:
            raise ConnectError(f"only the user who runs the server at {endpoint} may ask it; be that user") from None
        except TimeoutError:
            raise WaitTimeoutError(f"the server at {endpoint} told nothing within {timeout:g} s") from None
        except OSError as error:
            text = f"the server at {endpoint} can't be asked: {os.strerror(error.errno or 0)}; is its path right?"
            raise ConnectError(text) from None
    return _checked(data, endpoint)


def _read_all(connection: socket.socket, deadline: float) -> bytes:
    data = bytearray()
    while len(data) <= _MAX_BYTES and (part := receive(connection, 1 << 16, deadline)):
        data += part
    return bytes(data)


def _why_nobody(endpoint: Endpoint) -> str:
    if _listens(endpoint):
        return f"the server at {endpoint.text} does not tell about its clients; start it with: tsqp serve --status"
    return f"no tsqp server listens at {endpoint.text}; start one (tsqp serve --status) or correct the endpoint"


def _listens(endpoint: Endpoint) -> bool:
    family = socket.AF_UNIX if endpoint.scheme == "ipc" else socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    address: Any = endpoint.path if endpoint.scheme == "ipc" else (endpoint.host.strip("[]"), endpoint.port)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(address)
        except OSError:
            return False
    return True


# --- the answer, which may come from anybody ------------------------------------------------------------------


def _checked(data: bytes, endpoint: str) -> dict[str, Any]:
    wrong = ProtocolError(f"what answered at {endpoint} tells no figures of a tsqp server; use one version of tsqp")
    if not data:
        raise ConnectError(f"the server at {endpoint} is stopping, or can't tell its figures: its log says why")
    if len(data) > _MAX_BYTES:
        raise wrong
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise wrong from None
    if not isinstance(found, dict) or not _has(found, _NUMBERS):
        raise wrong
    clients = found.get("per_client")
    if not isinstance(clients, list) or not all(isinstance(c, dict) and _has(c, _CLIENT_NUMBERS) for c in clients):
        raise wrong
    return {key: _cleaned(value) for key, value in found.items()}


def _has(found: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    values = [found.get(name, -1) for name in names]
    return all(type(value) in (int, float) and 0 <= value < math.inf for value in values)


def _cleaned(value: Any) -> Any:
    """The same without anything a terminal would obey."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "?" for c in value[:_MAX_TEXT])
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    return value
