"""What a result was measured on, and how processes are kept apart on it."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("tsqp", "torch", "numpy", "pyzmq", "msgpack", "iceoryx2", "transformers", "vllm")
_PR_SET_PDEATHSIG = 1


def cpu_model() -> str:
    """The processor's name, as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """Machine and versions, for a result file."""
    return {
        "cpu": cpu_model(),
        "cores": len(available_cores()),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": list(os.getloadavg()),
        "versions": versions(),
    }


def available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _siblings(core: int) -> set[int]:
    """The hardware threads that share a core with this one."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        text = path.read_text().strip()
    except OSError:
        return {core}
    siblings: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        siblings.update(range(int(first), int(last or first) + 1))
    return siblings


def two_cores() -> tuple[int, int] | None:
    """Two cores for the two ends, of different physical cores where there are; None where there is only one."""
    cores = available_cores()
    if len(cores) < 2 or not hasattr(os, "sched_setaffinity"):
        return None
    others = [core for core in cores[1:] if core not in _siblings(cores[0])]
    return cores[0], (others or cores[1:])[0]


def pin(core: int | None) -> None:
    """Keeps this thread, and what it starts from now on, on one core."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def pin_beside_me(name: str) -> None:
    """Keeps the thread of this name on the calling thread's cores."""
    if hasattr(os, "sched_setaffinity"):
        for thread in threading.enumerate():
            if thread.name == name and thread.native_id is not None:
                os.sched_setaffinity(thread.native_id, os.sched_getaffinity(0))


def die_with_parent() -> None:
    """A server must not outlive a benchmark that was killed, not even a stopped one."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
