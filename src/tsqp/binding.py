"""An endpoint's socket: bound never over a live server, always over what a killed one left; used if one may."""

from __future__ import annotations

import errno
import os
import socket
import stat

import zmq

from .config import Endpoint, parse_endpoint
from .enclave import check_listening
from .errors import AuthenticationError, ConnectError, EndpointBusyError, EndpointError


def _refuse_busy(endpoint: Endpoint) -> None:
    """libzmq silently takes over an ipc path in use, so look first; a socket nobody serves is removed."""
    try:
        if not stat.S_ISSOCK(os.stat(endpoint.path).st_mode):
            raise EndpointError(f"{endpoint.path} exists and is no socket; choose another path or remove it")
    except FileNotFoundError:
        return
    except OSError as error:
        raise EndpointError(f"{endpoint.text} can't be used: {error.strerror}; choose another endpoint") from None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(endpoint.path)
        except ConnectionRefusedError:
            _unlink(endpoint)
            return
        except OSError as error:
            raise EndpointBusyError(error.errno, f"{endpoint.text} can't be probed: {error.strerror}") from None
    raise _busy(endpoint)


def _unlink(endpoint: Endpoint) -> None:
    try:
        os.unlink(endpoint.path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise EndpointError(
            f"a socket that nobody serves is in the way at {endpoint.path} and can't be removed: {error.strerror}; "
            "remove it as its owner, or choose another endpoint"
        ) from None


def _busy(endpoint: Endpoint) -> EndpointBusyError:
    text = f"another process listens on {endpoint.text}; stop it or choose another endpoint"
    return EndpointBusyError(errno.EADDRINUSE, text)


def _bind_error(endpoint: Endpoint, error: OSError | zmq.ZMQError) -> EndpointError | EndpointBusyError:
    if error.errno == errno.EADDRINUSE:
        return _busy(endpoint)
    return EndpointError(f"can't listen on {endpoint.text}: {os.strerror(error.errno or 0)}; choose another endpoint")


def check_endpoint(text: str) -> None:
    """Raises :class:`EndpointError` or :class:`EndpointBusyError` where :func:`listen` would: before a long start-up,
    not after it. Binds nothing."""
    check_listening(text)
    endpoint = parse_endpoint(text)
    if endpoint.scheme == "ipc":
        _refuse_busy(endpoint)
    elif endpoint.port:
        family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((endpoint.host.strip("[]"), endpoint.port))
            except OSError as error:
                raise _bind_error(endpoint, error) from None


def bind(router: zmq.Socket, endpoint: Endpoint) -> str:
    """Binds and returns the endpoint with the port that was chosen."""
    if endpoint.scheme == "ipc":
        directory = os.path.dirname(endpoint.path)
        if not os.path.isdir(directory):
            raise EndpointError(f"the directory {directory} of {endpoint.text} does not exist; create it (mode 0700)")
        _refuse_busy(endpoint)
    router.setsockopt(zmq.IPV6, ":" in endpoint.host)
    text = endpoint.text if endpoint.port or endpoint.scheme == "ipc" else f"tcp://{endpoint.host}:*"
    try:
        router.bind(text)
    except zmq.ZMQError as error:
        raise _bind_error(endpoint, error) from None
    if endpoint.scheme == "ipc":
        os.chmod(endpoint.path, 0o600)
        return endpoint.text
    return router.get_string(zmq.LAST_ENDPOINT).rstrip("\0")


def check_permission(endpoint: str) -> None:
    """Raises ConnectError where a socket is there and may not be used, as libzmq would try again, in silence, for ever;
    AuthenticationError where somebody else put it there: it is not even connected to."""
    scheme, _, path = endpoint.partition("://")
    if scheme != "ipc":
        return
    try:
        owner = os.stat(path).st_uid
        allowed = os.access(path, os.R_OK | os.W_OK, effective_ids=os.access in os.supports_effective_ids)
    except PermissionError:
        owner, allowed = os.geteuid(), False
    except OSError:
        return  # no server yet; it may start later
    if owner not in (os.geteuid(), 0):
        raise AuthenticationError(
            f"the socket of {endpoint} belongs to user {owner}, and this is user {os.geteuid()}; run both ends as one "
            "user (a server may be root's)"
        )
    if not allowed:
        raise ConnectError(f"the socket of {endpoint} may not be used by this user; run both ends as one user")
