"""Checks of memory: where rings lie, what killed servers left there, page-locking, large pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from pathlib import Path

from . import config
from .doctor_machine import NOTE, OK, PROBLEM, Finding, Machine, binary, several

_MIB = 1 << 20
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs")
_CAP_IPC_LOCK = 14
_TRIED_BYTES = 1 << 16


def ring_bytes() -> int:
    """What one client takes of shared memory with the geometry that is set here."""
    return 2 * config.max_chunks() * config.max_chunk_bytes()


def shared_memory(machine: Machine) -> Finding:
    """Whether segments can be made, and how many clients there is room for."""
    name, directory, need = "shared_memory", machine.shm_directory, ring_bytes()
    without = "or set TSQP_SHM_DIR to another directory"
    if not directory.is_dir():
        wrong = "is no directory" if os.path.lexists(directory) else "does not exist"
        return Finding(name, PROBLEM, f"{directory}, where rings lie, {wrong}.", f"Mount a tmpfs there, {without}.")
    if machine.in_gramine:
        mount = '{ type = "untrusted_shm", path = "/dev/shm", uri = "dev:/dev/shm" }'
        return Finding(
            name,
            NOTE,
            f"{directory} is here, but inside Gramine its size and whether the host sees it can't be told.",
            f"The manifest has to mount it by {mount}; run tsqp doctor on the host for the rest.",
        )
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return Finding(
            name,
            PROBLEM,
            f"This user may not write to {directory}, where rings lie.",
            f"Give it mode 1777 (chmod 1777 {directory}), {without}.",
        )
    return _room(machine, name, directory, need)


def _room(machine: Machine, name: str, directory: Path, need: int) -> Finding:
    free, total = _space(directory)
    figures = {"directory": str(directory), "free_bytes": free, "total_bytes": total, "client_bytes": need}
    left = machine.memory_left()
    told = f"{directory} has {binary(free)} of {binary(total)} free"
    if free < need:
        fits = free // (2 * config.max_chunks()) // _MIB * _MIB
        smaller = f", or set TSQP_MAX_SHM_CHUNK_BYTES to {fits} or less" if fits else ""
        found = f"{told}, and one client takes {binary(need)}."
        advice = f"Make it larger (docker: --shm-size=1g; else: mount -o remount,size=2g {directory}){smaller}."
        return Finding(name, PROBLEM, found, advice, figures)
    if left is not None and left < need:
        found = (
            f"{told}, but this control group may only take {binary(left)} more memory; a client takes {binary(need)}."
        )
        return Finding(name, PROBLEM, found, "Raise the memory limit (docker: --memory).", figures)
    kind = file_system(machine, directory)
    if kind and kind not in _MEMORY_FILE_SYSTEMS:
        found = f"{directory} lies on {kind}, not in memory: what travels through the ring may be written to a disk."
        return Finding(name, NOTE, found, "Use a tmpfs (TSQP_SHM_DIR, or unset it for /dev/shm).", figures)
    found = f"{told}: room for {several(free // need, 'client')} of {binary(need)}."
    return Finding(name, OK, found, figures=figures)


def _space(directory: Path) -> tuple[int, int]:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def file_system(machine: Machine, directory: Path) -> str:
    """The type of the file system ``directory`` lies on, empty where it can't be told."""
    where, kind = "", ""
    target = os.path.realpath(directory)
    for line in machine.read("/proc/self/mounts").splitlines():
        words = line.split()
        if len(words) > 2 and len(words[1]) >= len(where):
            inside = target == words[1] or target.startswith(words[1].rstrip("/") + "/")
            where, kind = (words[1], words[2]) if inside else (where, kind)
    return kind


def leftover_segments(machine: Machine) -> Finding:
    """Whether killed servers left segments behind."""
    name = "leftover_segments"
    if machine.in_gramine:
        return Finding(name, OK, "Not looked for: inside Gramine nobody can tell whose process is alive.")
    from .segments import leftovers

    found = leftovers()
    total = sum(segment.nbytes for segment in found)
    figures = {"count": len(found), "bytes": total, "names": [segment.name for segment in found]}
    if not found:
        return Finding(name, OK, "No killed server of this user left a segment behind.", figures=figures)
    count = several(len(found), "segment")
    text = f"Servers that were killed left {count} of {binary(total)} behind in {machine.shm_directory}."
    return Finding(name, NOTE, text, "Remove them with: tsqp clean --yes (the next server does it, too).", figures)


def page_lock(machine: Machine) -> Finding:
    """Whether a ring can be page-locked, which a CUDA device needs to copy from it without the processor's help."""
    name, need = "page_lock", ring_bytes()
    if machine.in_gramine:
        return Finding(name, OK, "Not needed: only the server's end, outside, is ever page-locked.")
    refused = _cuda_lock()
    if refused is not None:
        told = {"cuda": not refused, "client_bytes": need}
        if not refused:
            return Finding(name, OK, "The CUDA driver page-locks memory of this process.", figures=told)
        advice = "Copies to the GPU are slower without; give the container the host's driver, and see ulimit -l."
        return Finding(name, NOTE, f"The CUDA driver does not page-lock memory ({refused}).", advice, told)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    free = soft == resource.RLIM_INFINITY or _may_lock(machine)
    figures = {"limit_bytes": None if free else soft, "client_bytes": need}
    error = _try_lock()
    advice = (
        "Raise the limit: ulimit -l unlimited, memlock in /etc/security/limits.conf, or docker --ulimit memlock=-1."
    )
    gpu = bool(machine.first("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"))
    use = "only a CUDA device would use it" if not gpu else "without it copies to the GPU are slower"
    if error:
        return Finding(name, NOTE, f"Memory can't be page-locked here ({error}); {use}.", advice, figures)
    if free:
        return Finding(name, OK, "Memory can be page-locked without a limit.", figures=figures)
    text = f"{binary(soft)} can be page-locked and a client's ring has {binary(need)}; {use}."
    return Finding(name, NOTE if gpu and soft < need else OK, text, advice if gpu and soft < need else "", figures)


def _may_lock(machine: Machine) -> bool:
    for line in machine.read("/proc/self/status").splitlines():
        key, _, value = line.partition(":")
        if key == "CapEff":
            return bool(int(value, 16) >> _CAP_IPC_LOCK & 1)
    return False


def _cuda_lock() -> str | None:
    """Has the CUDA driver page-lock a few pages: why that failed, empty if it did not; None without a device."""
    import torch

    if not torch.cuda.is_available():
        return None
    from .cuda import Driver, PageLock

    torch.zeros(1, device="cuda")  # registering needs a context
    with mmap.mmap(-1, _TRIED_BYTES) as pages:
        view = (ctypes.c_char * _TRIED_BYTES).from_buffer(pages)
        try:
            lock = PageLock((ctypes.addressof(view), _TRIED_BYTES), Driver(), torch.cuda.synchronize)
            lock.release()
            return lock.reason
        finally:
            del view  # or the map could not be closed


def _try_lock() -> str:
    """Locks a few pages and lets them go; why that failed, or an empty string."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlock.argtypes = libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    with mmap.mmap(-1, _TRIED_BYTES) as pages:
        view = (ctypes.c_char * _TRIED_BYTES).from_buffer(pages)
        try:
            if libc.mlock(ctypes.addressof(view), _TRIED_BYTES):
                return os.strerror(ctypes.get_errno())
            libc.munlock(ctypes.addressof(view), _TRIED_BYTES)
        finally:
            del view  # or the map could not be closed
    return ""


def large_pages(machine: Machine) -> Finding:
    """Whether results of many megabytes can lie in large pages."""
    name = "large_pages"
    text = machine.read("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = text.partition("[")[2].partition("]")[0]
    figures = {"enabled": chosen or None}
    if chosen != "never":
        told = f"Transparent huge pages are set to {chosen}." if chosen else "This kernel says nothing of huge pages."
        return Finding(name, OK, told, figures=figures)
    return Finding(
        name,
        NOTE,
        "Transparent huge pages are off: memory for large results takes longer to get.",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root).",
        figures,
    )
