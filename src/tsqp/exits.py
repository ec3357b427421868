"""How a command ends: exit status, and one sentence on the standard error for whatever went wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import TsqpError

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def one_line(error: BaseException) -> str:
    """The text of an exception on one line, or its class where it has none.

    Of a text that could not be encoded or decoded nothing is quoted: it may be a prompt or an answer.
    """
    if isinstance(error, UnicodeError):
        return f"a text has characters that can't be handled here: {getattr(error, 'reason', 'invalid')}"
    return " ".join(str(error).split()) or type(error).__name__


def ended(
    work: Callable[[], int],
    again: str,
    *,
    debug: bool = False,
    usage: Callable[[Exception], str | None] = lambda error: None,
) -> int:
    """Calls ``work`` and returns the exit status: its own, 1 for an error, 2 for wrong options, 130 for Ctrl-C.

    ``usage`` says what is wrong with the options where an exception means that, else None. ``again`` names the command
    that shows where an unexpected exception came from: one with ``debug``, which lets exceptions through.
    """
    try:
        code = work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left (tsqp generate | head); nobody is there to read a message either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        wrong = usage(error)
        if wrong is None and debug:
            raise
        print(f"tsqp: {wrong or _sentence(error, again)}", file=sys.stderr)
        return EXIT_ERROR if wrong is None else EXIT_USAGE
    return code


def _sentence(error: Exception, again: str) -> str:
    if isinstance(error, TsqpError):
        return one_line(error)
    return f"unexpected {type(error).__name__}: {one_line(error)} ({again} shows where)"


@contextmanager
def termination_raises(error: type[SystemExit] = SystemExit) -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise ``error(128 + signal)``, ``finally`` blocks run."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise error(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Signals that would raise inside the block are delivered at its end.

    An exception in the middle of ``Popen()`` would lose the process that it has just started.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: pending.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for missed in pending:
            signal.raise_signal(missed)
