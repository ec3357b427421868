"""Whether this machine's kernel lets a process say how long its cores may take to wake."""

from __future__ import annotations

import os

from tsqp.cpu_latency import DEVICE


def kernel_may_be_asked() -> bool:
    """By opening the file: what its mode says is not all that counts, in a container."""
    try:
        fd = os.open(DEVICE, os.O_RDWR)
    except OSError:
        return False
    os.close(fd)
    return True
