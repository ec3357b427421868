"""How long a core may take to wake up, asked of the kernel.

Who waits for milliseconds sleeps, its core halts, and to wake it takes tens to hundreds of microseconds: deep idle
states on bare metal, a way through the hypervisor in a virtual machine. That is most of what a round trip costs beside
a server that computes on every core. Linux keeps cores from halting so deep while a process holds
``/dev/cpu_dma_latency`` open with a limit written to it ("Power Management Quality of Service for CPUs",
Documentation/admin-guide/pm/cpuidle.rst).

The limit holds for every core of this kernel, and costs power: with 0 no core halts at all, each polls instead. In a
virtual machine it is the guest's kernel that is asked, and the host sees those cores busy.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import time
import weakref
from contextlib import AbstractContextManager, nullcontext

from .errors import ConfigError

log = logging.getLogger("tsqp")

DEVICE = "/dev/cpu_dma_latency"
_LARGEST_US = (1 << 31) - 1
#: How long a server goes on holding the limit after its last request.
CALM_S = 1.0

_WHY = {
    errno.ENOENT: f"there is no such file here; into a container pass it (docker: --device {DEVICE})",
    errno.EACCES: "this user may not write it; run as root, or let a group write it (a udev rule)",
    errno.EPERM: f"devices are kept from this process; allow it (systemd: DeviceAllow={DEVICE} w; docker: --device)",
}


class CpuLatency:
    """Keeps the cores of this kernel from idle states that take longer than ``us`` microseconds to leave.

    A context manager for as long as that matters::

        with tsqp.CpuLatency(0):
            model.generate(**inputs)

    0 keeps cores from halting at all (on x86), which is what helps in a virtual machine; on bare metal a few
    microseconds keep the deep states away and cost less power. An object is for one block at a time; several objects
    may hold at once, the kernel takes the lowest. What is held ends with the process at the latest, and is not a
    child's after ``fork``. Raises :class:`~tsqp.errors.ConfigError` for a limit outside 0..2^31-1, and when held where
    the kernel's file is missing or may not be written.
    """

    def __init__(self, us: int) -> None:
        if isinstance(us, bool) or not isinstance(us, int) or not 0 <= us <= _LARGEST_US:
            raise ConfigError(f"a CPU latency of {us!r} us is none; give a whole number from 0 to {_LARGEST_US}")
        self.us = us
        self._fd = -1

    @property
    def held(self) -> bool:
        """Whether the kernel is asked for it now."""
        return self._fd >= 0

    def hold(self) -> None:
        """Asks the kernel; does nothing where that is done already."""
        if self._fd >= 0:
            return
        _holding.add(self)  # before there is something that a child could inherit
        try:
            self._fd = os.open(DEVICE, os.O_WRONLY | os.O_CLOEXEC)
            os.write(self._fd, struct.pack("=i", self.us))
        except BaseException as error:
            self.release()
            if not isinstance(error, OSError):
                raise
            why = _WHY.get(error.errno or 0, f"{error.strerror}; leave the limit out")
            raise ConfigError(f"a CPU latency of {self.us} us can't be asked for by {DEVICE}: {why}") from error

    def release(self) -> None:
        """Lets cores sleep as before; does nothing where nothing is held."""
        fd, self._fd = self._fd, -1
        _holding.discard(self)
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> CpuLatency:
        self.hold()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        fd = getattr(self, "_fd", -1)
        if fd >= 0:
            os.close(fd)


_holding: weakref.WeakSet[CpuLatency] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """A child's copies of the descriptors would hold the limit longer than the parent wants."""
    for latency in list(_holding):
        latency.release()


os.register_at_fork(after_in_child=_leave_to_parent)


def cores_awake(us: int | None) -> AbstractContextManager[object]:
    """A ``with`` block in which no core takes longer than that to wake; None: as the system has it."""
    return nullcontext() if us is None else CpuLatency(us)


def check_awake(us: int | None) -> None:
    """Raises what :func:`cores_awake` would: for whom it is too late to be told when the work begins."""
    with cores_awake(us):
        pass


class WhileBusy:
    """Holds a limit while there is something to do, and for :data:`CALM_S` after it."""

    def __init__(self, us: int) -> None:
        check_awake(us)
        self._latency: CpuLatency | None = CpuLatency(us)
        self._calm_since: float | None = None

    def tell(self, busy: bool) -> None:
        """Whether there is something to do; to be told now and then where there is nothing."""
        latency = self._latency
        if latency is None:
            return
        if busy:
            self._calm_since = None
            if not latency.held:
                self._hold(latency)
        elif latency.held:
            now = time.monotonic()
            if self._calm_since is None:  # what was done took its time: it is calm from now on
                self._calm_since = now
            elif now - self._calm_since >= CALM_S:
                latency.release()

    def _hold(self, latency: CpuLatency) -> None:
        try:
            latency.hold()
        except ConfigError as error:  # it worked when this was made: whoever is served should not pay for that
            log.warning("cores sleep as the system lets them: %s", error)
            self._latency = None

    def close(self) -> None:
        """Lets cores sleep as before."""
        if self._latency is not None:
            self._latency.release()
