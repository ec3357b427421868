"""What ``tsqp doctor`` looks at, and what a check says: nothing here changes anything on the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, NOTE, PROBLEM = "ok", "note", "problem"
_MAX_READ_BYTES = 1 << 20
_WAIT_POLICY = "OMP_WAIT_POLICY"


@dataclass(frozen=True)
class Finding:
    """What one check found: ``state`` is ``ok``, ``note`` (it works, with less than it could have) or ``problem``
    (something will not work); ``found`` is a sentence, ``advice`` what to do about it, empty for ``ok``; ``figures``
    are for programs.
    """

    name: str
    state: str
    found: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data with the same names."""
        return {
            "name": self.name,
            "state": self.state,
            "found": self.found,
            "advice": self.advice,
            "figures": dict(self.figures),
        }


def _environment() -> dict[str, str]:
    """The environment, with the wait policy this process was started with: tsqp's commands set their own."""
    now = dict(os.environ)
    try:
        with open("/proc/self/environ", "rb") as file:
            started = file.read(_MAX_READ_BYTES).split(b"\0")
    except OSError:
        return now
    now.pop(_WAIT_POLICY, None)
    for entry in started:
        key, _, value = entry.decode(errors="replace").partition("=")
        if key == _WAIT_POLICY:
            now[key] = value
    return now


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Machine:
    """The machine as a process sees it: files below ``root``, the environment it was started with, the cores it may
    run on."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=_environment)
    affinity: int = field(default_factory=_cores)

    def path(self, absolute: str) -> Path:
        """Where the file ``absolute`` (``/dev/shm``) lies."""
        return self.root / absolute.lstrip("/")

    def exists(self, absolute: str) -> bool:
        """Whether the file is there."""
        return os.path.exists(self.path(absolute))

    def first(self, *absolute: str) -> str:
        """The first of the files that is there, or an empty string."""
        return next((name for name in absolute if self.exists(name)), "")

    def read(self, absolute: str) -> str:
        """The text of a small file; empty where it can't be read."""
        try:
            with open(self.path(absolute), "rb") as file:
                return file.read(_MAX_READ_BYTES).decode(errors="replace")
        except OSError:
            return ""

    @property
    def in_gramine(self) -> bool:
        """Whether this is the inside of Gramine; the same signs as :func:`tsqp.handshake.in_gramine`."""
        return self.exists("/dev/attestation") or self.environment.get("TSQP_ENCLAVE") == "gramine"

    @property
    def shm_directory(self) -> Path:
        """Where segments are made."""
        given = self.environment.get("TSQP_SHM_DIR")
        return Path(given) if given else self.path("/dev/shm")

    def cpu_flags(self) -> frozenset[str]:
        """What the first processor says it can, in the kernel's words."""
        for line in self.read("/proc/cpuinfo").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
        return frozenset()

    def cpu_name(self) -> str:
        """The first processor's name."""
        for line in self.read("/proc/cpuinfo").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
        return "an unnamed processor"

    def cgroup_directories(self, controller: str) -> Iterator[str]:
        """The directories of this process's control group and of those around it: of version 2, then of version 1."""
        for line in self.read("/proc/self/cgroup").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, group = rest.partition(":")
            if controllers and controller not in controllers.split(","):
                continue
            top = f"/sys/fs/cgroup/{controller}" if controllers else "/sys/fs/cgroup"
            parts = [part for part in group.split("/") if part not in ("", ".", "..")]
            for depth in range(len(parts), -1, -1):
                yield "/".join([top, *parts[:depth]])

    def cpu_quota(self) -> float | None:
        """Cores' worth of time the control groups leave this process; None: no limit."""
        found = []
        for directory in self.cgroup_directories("cpu"):
            words = self.read(f"{directory}/cpu.max").split()
            if not words:
                words = [self.read(f"{directory}/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
                found.append(int(words[0]) / int(words[1]))
        return min(found, default=None)

    def memory_left(self) -> int | None:
        """Bytes the control groups still let this process take; None: no limit."""
        found = []
        for directory in self.cgroup_directories("memory"):
            for limit, used in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
                words = [self.read(f"{directory}/memory.{name}").strip() for name in (limit, used)]
                if all(word.isdigit() for word in words) and int(words[0]) < 1 << 60:
                    found.append(max(0, int(words[0]) - int(words[1])))
        return min(found, default=None)

    @property
    def cores(self) -> float:
        """How many cores' worth of time this process can use."""
        quota = self.cpu_quota()
        return float(self.affinity) if quota is None else min(float(self.affinity), quota)


def binary(nbytes: float) -> str:
    """``nbytes`` in the units slots and limits are told in: 512 B, 64 MiB, 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def several(count: int, noun: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
