"""What a server needs of its process: a directory for its socket, and signals that end it in order."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from . import config
from .errors import EndpointError


def make_default_directory(endpoint: config.Endpoint) -> None:
    """Makes the directory of default sockets where ``endpoint`` lies in it; see :func:`make_private`."""
    directory = config.socket_directory()
    if endpoint.scheme != "ipc" or os.path.dirname(endpoint.path) != str(directory):
        return
    make_private(directory)


def make_private(directory: Path) -> None:
    """Makes a directory that is this user's alone; refuses one that somebody else put there, and a link to one."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:  # a link to nowhere, or a file
        raise EndpointError(
            f"{directory} can't be made: {error.strerror}; remove it or name another endpoint"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise EndpointError(
            f"{directory} is not a directory of mode 0700 that belongs to you; remove it or name another endpoint"
        )


@contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Lets the first SIGINT or SIGTERM call ``stop``, in the main thread only; restores the handlers in force
    before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
