"""What can't work inside Gramine: refused, with the reason, before anything is begun (docs: gramine).

Without that it would fail later and worse: libzmq aborts the process that binds a port, ``ipc://`` connects to nothing
in silence, a futex never wakes.
"""

from __future__ import annotations

from .config import Endpoint, parse_endpoint
from .errors import ConfigError, EndpointError
from .handshake import in_gramine

_CONNECT = "use tcp://127.0.0.1:PORT"


def check_connecting(endpoint: str | Endpoint, wait: str = "auto") -> None:
    """Raises :class:`EndpointError` inside Gramine where this way to a server, or to wait for it, can't work."""
    parsed = endpoint if isinstance(endpoint, Endpoint) else parse_endpoint(endpoint)
    if not in_gramine():
        return
    if parsed.scheme == "ipc":
        raise EndpointError(f"ipc:// never reaches the host from inside Gramine; {_CONNECT}")
    check_waiting(wait)


def check_waiting(wait: str) -> None:
    """Raises :class:`EndpointError` inside Gramine for a wait that sleeps until the peer wakes it."""
    if wait == "block" and in_gramine():
        raise EndpointError("wait='block' needs a futex, which never crosses the enclave's border; use auto or poll")


def check_listening(endpoint: str) -> None:
    """Raises :class:`EndpointError` where the endpoint is malformed, and inside Gramine for every endpoint."""
    parsed = parse_endpoint(endpoint)
    if not in_gramine():
        return
    if parsed.scheme == "ipc":
        raise EndpointError(f"ipc:// never reaches the host from inside Gramine; {_CONNECT}, and listen on the host")
    raise EndpointError(
        f"nothing can listen on {endpoint} inside Gramine: libzmq aborts a process that binds, and no segment can "
        "be made; listen on the host and connect from here"
    )


def check_outside(what: str, why: str, instead: str = "run it on the host") -> None:
    """Raises :class:`ConfigError` inside Gramine: ``what`` can't work there."""
    if in_gramine():
        raise ConfigError(f"{what} can't run inside Gramine: {why}; {instead}")
