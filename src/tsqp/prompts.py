"""Where ``tsqp run`` takes prompts from: an argument, a file or the standard input; bounded, and never repeated in an
error's text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

from .errors import ConfigError

#: Of one prompt. Input comes from outside: it decides how much is allocated only up to here.
MAX_PROMPT_BYTES = 16 << 20


def check_sources(prompt: str | None, prompt_file: str | None, lines: bool) -> None:
    """Refuses options that contradict each other, or a file that can't be read, before anything is loaded."""
    if prompt is not None and (prompt_file is not None or lines):
        other = "--prompt-file" if prompt_file is not None else "--lines"
        raise ConfigError(f"--prompt is the whole prompt and {other} reads prompts; give one of them")
    if prompt_file not in (None, "-"):
        with _opened(prompt_file):
            pass


def read_prompts(prompt: str | None, prompt_file: str | None, lines: bool) -> Iterator[str]:
    """The prompts: one, or with ``lines`` each line as soon as it is there.

    Raises :class:`~tsqp.errors.ConfigError` for what can't be read, is no UTF-8 or is too long.
    """
    if prompt is not None:
        yield prompt
        return
    with ExitStack() as closing:
        source = sys.stdin.buffer
        if prompt_file not in (None, "-"):
            source = closing.enter_context(_opened(prompt_file))
        elif sys.stdin.isatty():
            print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
        if not lines:
            yield _text(source.read(MAX_PROMPT_BYTES + 1))
            return
        while line := source.readline(MAX_PROMPT_BYTES + 1):
            yield _text(line)


def _opened(path: str | None) -> BinaryIO:
    assert path is not None
    try:
        return open(os.path.expanduser(path), "rb")
    except OSError as error:
        raise ConfigError(f"--prompt-file {path} can't be read ({error.strerror}); give a readable file") from error


def _text(read: bytes) -> str:
    if len(read) > MAX_PROMPT_BYTES:
        raise ConfigError(f"the prompt is longer than {MAX_PROMPT_BYTES >> 20} MiB; give a shorter one")
    try:
        text = read.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt is not UTF-8 at byte {error.start}; convert it") from None
    return text.removesuffix("\n").removesuffix("\r")
