"""Leftover segments: what a killed server left in the shared-memory directory, and how it is removed.

A segment is a leftover only if it is ours (same user), its creator's lock on the file is free, and the process
that made it is gone (pid and start time, judged only inside the pid namespace that made it). Nobody else's
segment is ever touched.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from . import _ring
from .errors import SegmentError, SegmentPermissionError


@dataclass(frozen=True)
class Leftover:
    """A segment without an owner; ``started`` is the owner's start in clock ticks after boot."""

    name: str
    nbytes: int
    pid: int
    started: int


def check_directory() -> None:
    """Raises :class:`SegmentError` where no segment can be made in the shared-memory directory."""
    directory = _ring.shm_directory()
    place = f"{directory}, where shared memory is made,"
    fix = "or set TSQP_SHM_DIR, or do without (shm=False)"
    if not os.path.isdir(directory):
        wrong = "is no directory" if os.path.exists(directory) else "does not exist"
        number = errno.ENOTDIR if os.path.exists(directory) else errno.ENOENT
        raise SegmentError(number, f"{place} {wrong}; mount a tmpfs there, {fix}")
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise SegmentPermissionError(errno.EACCES, f"{place} is not writable by this user; change its mode, {fix}")


def leftovers() -> list[Leftover]:
    """The leftovers in the shared-memory directory, by name."""
    directory = Path(_ring.shm_directory())
    found = []
    try:
        names = sorted(entry.name for entry in os.scandir(directory) if entry.name.startswith("tsqp"))
    except OSError:
        return []  # no such directory, or inside an enclave, where it can't be listed: nothing to reap
    for name in names:
        leftover = _judge(directory / name)
        if leftover is not None:
            found.append(leftover)
    return found


def _judge(path: Path) -> Leftover | None:
    try:
        mine = path.lstat().st_uid == os.geteuid()
    except FileNotFoundError:
        return None
    owner = _ring.segment_owner(path.name) if mine else None
    if owner is None:
        return None
    pid, started, namespace, nbytes, locked = owner
    if locked or namespace != _ring.pid_namespace() or _ring.process_start(pid) == started:
        return None
    return Leftover(path.name, nbytes, pid, started)


def reap(found: list[Leftover]) -> int:
    """Removes leftovers that still are; returns how many bytes were freed."""
    directory = Path(_ring.shm_directory())
    freed = 0
    for leftover in found:
        if _judge(directory / leftover.name) == leftover:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(directory / leftover.name)
                freed += leftover.nbytes
    return freed
