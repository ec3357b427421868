"""Peak resident memory of a process, from outside it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

#: For /proc/PID/clear_refs, see proc(5): sets the peak to what is resident now.
_RESET_PEAK = "5"


def peak_bytes(pid: int) -> int:
    """The most that was resident at once since the start, or the last :func:`reset_peak`; shared memory it touched
    counts. 0 where /proc does not tell.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")]
    return sizes[0] if sizes else 0


def reset_peak(pid: int) -> bool:
    """Starts the peak anew; False where the kernel does not allow it."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def give_back() -> None:
    """Collects garbage and returns freed memory of this process to the system, as far as the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
