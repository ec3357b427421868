"""Check of how long a sleeping core takes to wake: most of what a round trip costs beside a server that computes."""

from __future__ import annotations

import os
import statistics
import threading
import time
from typing import Any

from .cpu_latency import DEVICE
from .doctor_machine import NOTE, OK, Finding, Machine

_IDLE = "/sys/devices/system/cpu/cpuidle/current_driver"
_ROUNDS = 25
#: How long the sleeper sleeps: as a runner does while a layer is computed.
_NAP_S = 0.003
#: A core that wakes in less costs a round trip little.
_SLOW_US = 20.0


def waking(machine: Machine) -> Finding:
    """How long a thread takes to wake another one, and what there is against it where that is long."""
    if machine.in_gramine:
        return Finding("waking", OK, "Not measured: what cores do while an enclave waits is the host's business.")
    driver = machine.read(_IDLE).strip() or "none"
    figures: dict[str, Any] = {
        "cpuidle": driver,
        "microseconds": None,
        "writable": os.access(machine.path(DEVICE), os.W_OK),
    }
    if machine.cores < 2:
        return Finding("waking", OK, "Not measured: there is one core, and who waits gives it away.", figures=figures)
    took = wake_us()
    figures["microseconds"] = round(took, 1)
    told = f"A thread that slept for {1000 * _NAP_S:g} ms is awake after {took:.0f} us (idle states: {driver})"
    if took <= _SLOW_US:
        return Finding("waking", OK, f"{told}.", figures=figures)
    use = "tsqp serve --cpu-latency-us 0, in a runner tsqp.CpuLatency(0)"
    if driver == "none":
        advice = (
            "In a virtual machine have the host poll (kvm.halt_poll_ns), load cpuidle_haltpoll, or boot with idle=poll."
        )
    elif figures["writable"]:
        advice = f"Keep cores awake while there is work: {use}."
    elif machine.exists(DEVICE):
        advice = f"Let a group write {DEVICE} (a udev rule), or run as root; then: {use}."
    else:
        advice = f"Pass {DEVICE} into the container (docker: --device), or ask on the host: {use}."
    return Finding("waking", NOTE, f"{told}; each round trip behind a longer computation pays that.", advice, figures)


def wake_us() -> float:
    """Microseconds, the median, from writing a byte to a pipe until a thread that slept in it runs."""
    there, back = os.pipe(), os.pipe()
    woke = 0

    def sleeper() -> None:
        nonlocal woke
        while os.read(there[0], 1) == b"x":
            woke = time.perf_counter_ns()
            os.write(back[1], b"x")

    thread = threading.Thread(target=sleeper, name="tsqp-doctor", daemon=True)
    thread.start()
    took = []
    try:
        for _ in range(_ROUNDS):
            end = time.perf_counter() + _NAP_S
            while time.perf_counter() < end:
                pass  # this core works, the other one may sleep
            begin = time.perf_counter_ns()
            os.write(there[1], b"x")
            os.read(back[0], 1)
            took.append((woke - begin) / 1000)
    finally:
        os.write(there[1], b".")
        thread.join()
        for end_of_pipe in (*there, *back):
            os.close(end_of_pipe)
    return statistics.median(took)
