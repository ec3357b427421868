"""Builds and reads ``c/fake_cuda.c``, a CUDA driver for where there is no GPU."""

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
