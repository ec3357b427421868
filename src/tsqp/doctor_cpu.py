"""Checks of processors: what they can, how many there are for how many threads, how processes wake each other."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from .doctor_machine import NOTE, OK, PROBLEM, Finding, Machine, several

#: The names people know these by, and the kernel's.
_FEATURES = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX-512 VNNI": "avx512_vnni",
    "AVX-512 bfloat16": "avx512_bf16",
    "AMX": "amx_tile",
    "AMX bfloat16": "amx_bf16",
    "NEON": "asimd",
    "SVE": "sve",
    "bfloat16": "bf16",
}
_X86 = ("x86_64", "AMD64")
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}
_FUTEX_WAKE = 1


def cpu(machine: Machine) -> Finding:
    """What the processor can, and which of the operators' kernels were chosen for it."""
    from . import _kernels

    flags, chosen = machine.cpu_flags(), _kernels.instruction_set()
    can = [name for name, flag in _FEATURES.items() if flag in flags]
    figures = {"name": machine.cpu_name(), "features": can, "kernels": chosen, "architecture": platform.machine()}
    told = f"{machine.cpu_name()}: {', '.join(can) or 'no vector extension known here'}"
    if chosen == "portable" and platform.machine() in _X86:
        return Finding(
            "cpu",
            NOTE,
            f"{told}; the runner's operators use portable code, several times slower than AVX2.",
            "Use a processor with AVX2, or a virtual machine that passes it on (qemu: -cpu host).",
            figures,
        )
    return Finding("cpu", OK, f"{told}; the runner's operators use the {chosen} kernels.", figures=figures)


def cores(machine: Machine) -> Finding:
    """How many cores both ends have together."""
    quota, usable = machine.cpu_quota(), machine.cores
    figures = {"online": os.cpu_count(), "affinity": machine.affinity, "quota": quota, "usable": usable}
    limit = f", of which the control group leaves the time of {quota:g}" if usable < machine.affinity else ""
    told = f"This process may run on {several(machine.affinity, 'core')}{limit}"
    if usable >= 2:
        return Finding("cores", OK, f"{told}.", figures=figures)
    return Finding(
        "cores",
        NOTE,
        f"{told}; runner and server take turns on less than two, and every round trip waits for a switch.",
        "Give the two ends at least two cores (docker: --cpus=2; taskset; a larger machine).",
        figures,
    )


def threads(machine: Machine) -> Finding:
    """Whether torch and the operators use more threads than there are cores, and how idle ones wait."""
    import torch

    given = {name: machine.environment.get(name, "") for name in ("OMP_NUM_THREADS", "TSQP_THREADS")}
    policy = machine.environment.get("OMP_WAIT_POLICY", "")
    usable = max(1, int(machine.cores))
    chosen = {name: int(text) for name, text in given.items() if text.isdigit()}
    chosen.setdefault("OMP_NUM_THREADS", torch.get_num_threads())
    figures = {"torch": chosen["OMP_NUM_THREADS"], "tsqp": chosen.get("TSQP_THREADS"), "wait_policy": policy or None}
    wrong = [f"{name}={text!r}" for name, text in given.items() if text and not text.isdigit()]
    if wrong:
        advice = f"Set it to a number, for example {usable}, or unset it."
        return Finding("threads", PROBLEM, f"{wrong[0]} is no number of threads.", advice, figures)
    over = {name: count for name, count in chosen.items() if count > usable}
    if over:
        which = " and ".join(f"{several(count, 'thread')} ({name})" for name, count in over.items())
        advice = f"Set {' and '.join(f'{name}={usable}' for name in over)} for both ends, or give --threads {usable}."
        text = (
            f"A process here computes with {which} on the time of {several(usable, 'core')}: they wait for each other."
        )
        return Finding("threads", NOTE, text, advice, figures)
    one = several(chosen["OMP_NUM_THREADS"], "thread")
    told = f"A process here computes with {one} on {several(usable, 'core')}"
    if policy.lower() != "passive" and 2 * chosen["OMP_NUM_THREADS"] > usable:
        return Finding(
            "threads",
            NOTE,
            f"{told}, and OMP_WAIT_POLICY is not passive: idle threads of one end spin on the cores of the other.",
            "export OMP_WAIT_POLICY=passive in both processes before torch loads (tsqp's own commands set it).",
            figures,
        )
    return Finding("threads", OK, f"{told}, and two such ends do not starve each other.", figures=figures)


def futex(machine: Machine) -> Finding:
    """Whether one process can wake another."""
    if machine.in_gramine:
        return Finding("futex", OK, "Not used: no futex crosses an enclave's border, waiting is polling there.")
    number = _SYS_FUTEX.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        told = f"On {sys.platform} {platform.machine()} waiting is polling, which takes longer to wake and some CPU."
        return Finding("futex", NOTE, told, "Run both ends on Linux on x86-64 or AArch64.")
    libc = ctypes.CDLL(None, use_errno=True)
    word = ctypes.c_uint32(0)
    if libc.syscall(ctypes.c_long(number), ctypes.byref(word), _FUTEX_WAKE, 1, None, None, 0) >= 0:
        return Finding("futex", OK, "Futexes work: a waiting end sleeps and is woken at once.")
    return Finding(
        "futex",
        PROBLEM,
        f"The futex system call is refused ({os.strerror(ctypes.get_errno())}): a sleeping end is never woken.",
        "Allow futex in the sandbox's system call filter (seccomp), or wait by polling: wait='poll' at both ends.",
    )
