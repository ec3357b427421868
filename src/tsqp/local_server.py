"""A thread that answers one connection of this host after the other: for what a server tells whoever runs it.

It shares nothing with the loop that serves clients but the counters it reads. One connection at a time, each with a
deadline: whoever connects and says nothing delays others who want figures, and nobody else.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import stat
import threading
import time
from collections.abc import Callable

from .config import MAX_IPC_PATH_BYTES
from .errors import EndpointBusyError, EndpointError

log = logging.getLogger("tsqp.server")

#: How long one connection may take.
ANSWER_S = 2.0
#: The pause after a connection that could not be accepted: no descriptor is left.
_PAUSE_S = 0.5
_BACKLOG = 8

#: Answers a connection until a deadline in ``time.monotonic`` seconds.
Answer = Callable[[socket.socket, float], None]


class LocalServer:
    """Serves ``listening`` (taken over, and its file removed at the end) with ``answer`` until :meth:`close`."""

    def __init__(self, listening: socket.socket, answer: Answer, name: str) -> None:
        from .channel import close_at_exit  # loads torch, which who only asks does without

        self._socket, self._answer = listening, answer
        self._path = listening.getsockname() if listening.family == socket.AF_UNIX else ""
        self._stop = False
        self._pid = os.getpid()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        close_at_exit(self)

    def close(self) -> None:
        """Ends the thread, after the connection in hand. Idempotent."""
        if self._stop or os.getpid() != self._pid:
            return
        self._stop = True
        self._wake.send(b"x")
        self._thread.join()
        if self._path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        for end in (self._socket, self._wake, self._woken):
            end.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._stop:
                selector.select()
                if self._stop:
                    return
                try:
                    connection, _ = self._socket.accept()
                except BlockingIOError:
                    continue  # whoever connected has left again
                except OSError as error:
                    log.warning("a connection that asks for figures can't be accepted: %s", error.strerror)
                    time.sleep(_PAUSE_S)
                    continue
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(ANSWER_S)
                self._answer(connection, time.monotonic() + ANSWER_S)
            except OSError as error:
                log.debug("a connection that asked for figures ended early: %s", error)
            except Exception:
                log.exception("figures could not be told")


def send_all(connection: socket.socket, data: bytes, deadline: float) -> None:
    """Sends ``data``; raises ``TimeoutError`` at ``deadline``, however slowly the other end takes it."""
    view = memoryview(data)
    while view:
        connection.settimeout(_left(deadline))
        view = view[connection.send(view) :]


def receive(connection: socket.socket, nbytes: int, deadline: float) -> bytes:
    """Up to ``nbytes`` bytes, none at the end; raises ``TimeoutError`` at ``deadline``."""
    connection.settimeout(_left(deadline))
    return connection.recv(nbytes)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the other end took too long")
    return left


def listen_unix(path: str) -> socket.socket:
    """A listening socket at ``path`` that only this user may use; what a killed server left there is replaced.

    Raises :class:`EndpointError` and :class:`EndpointBusyError`.
    """
    if len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
        raise EndpointError(f"{path} is longer than the {MAX_IPC_PATH_BYTES} bytes of a socket address; shorten it")
    _remove_stale(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(path)
        os.chmod(path, 0o600)  # before anybody can connect
        made.listen(_BACKLOG)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise EndpointError(f"can't listen on {path}: {error.strerror}; choose another endpoint") from None
    return made


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise EndpointError(f"{path} exists and is no socket; remove it or choose another endpoint")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            _unlink(path)
            return
        except OSError as error:
            raise EndpointBusyError(error.errno, f"{path} can't be probed: {error.strerror}") from None
    raise EndpointBusyError(errno.EADDRINUSE, f"another process listens on {path}; stop it or choose another endpoint")


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as error:
        raise EndpointError(
            f"{path} can't be removed: {error.strerror}; remove it or choose another endpoint"
        ) from None


def listen_loopback(port: int) -> socket.socket:
    """A listening socket on ``127.0.0.1:port``, 0: any free port. Raises :class:`EndpointBusyError`."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", port))
        made.listen(_BACKLOG)
        made.setblocking(False)
    except OSError as error:
        made.close()
        text = f"can't listen on 127.0.0.1:{port}: {os.strerror(error.errno or 0)}; choose another port"
        raise EndpointBusyError(error.errno, text) from None
    return made
