"""Stands for CUDA where there is no GPU: a driver built of ``c/fake_cuda.c``, and one that only remembers."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "c" / "fake_cuda.c"
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")
LOG_BYTES = 1 << 20


def build(directory: Path, *defines: str) -> str:
    """The library's path; skips the test where there is no C compiler."""
    compiler = os.environ.get("CC", "").split() or [name for name in ("gcc", "cc", "clang") if shutil.which(name)][:1]
    if not compiler:
        pytest.skip("no C compiler here")
    library = directory / f"libfakecuda{''.join(defines)}.so"
    command = [*compiler, *FLAGS, *defines, str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True, timeout=60)
    return str(library)


def calls(library: str) -> list[str]:
    """What was called since this was asked last."""
    text = ctypes.create_string_buffer(LOG_BYTES)
    tell = ctypes.CDLL(library).fake_calls
    tell.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
    tell(text, LOG_BYTES)
    return text.value.decode().splitlines()


class RecordingDriver:
    """Stands for the CUDA driver and torch.cuda: remembers what is registered, refuses where told to."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.registered: dict[int, int] = {}
        self.log: list[str] = []

    def register(self, address, nbytes):
        if self.error:
            return self.error
        self.registered[address] = nbytes
        self.log.append("register")
        return 0

    def unregister(self, address):
        del self.registered[address]
        self.log.append("unregister")
        return 0

    def error_name(self, error):
        return f"CUDA_ERROR_{error}"

    def synchronize(self, device=None):
        self.log.append("synchronize")

    def current_stream(self, device=None):
        return f"stream of {device}"

    def record(self, stream):
        self.log.append(f"record {stream}")

    def Event(self):  # noqa: N802
        return self
