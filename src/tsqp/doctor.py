"""``tsqp doctor``: what of this machine helps or hinders tsqp, and what to do about it.

A check is a function of a :class:`~tsqp.doctor_machine.Machine` that returns one finding. It leaves nothing behind,
touches nothing of other users, and asks after no process by its id, which inside Gramine can hang for ever. A check
that fails itself is a finding, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.text import Text

from . import __version__
from .doctor_machine import NOTE, OK, PROBLEM, Finding, Machine, several

Check = Callable[[Machine], Finding]

#: Name, module and function of every check, in the order they run; modules load when their turn comes, since what
#: they need may be what is broken.
CHECKS = (
    ("packages", "doctor_software", "packages"),
    ("cpu", "doctor_cpu", "cpu"),
    ("cores", "doctor_cpu", "cores"),
    ("threads", "doctor_cpu", "threads"),
    ("futex", "doctor_cpu", "futex"),
    ("waking", "doctor_wake", "waking"),
    ("shared_memory", "doctor_memory", "shared_memory"),
    ("leftover_segments", "doctor_memory", "leftover_segments"),
    ("page_lock", "doctor_memory", "page_lock"),
    ("large_pages", "doctor_memory", "large_pages"),
    ("torch", "doctor_software", "torch_build"),
    ("zeromq", "doctor_software", "zeromq"),
    ("unix_sockets", "doctor_software", "unix_sockets"),
    ("descriptors", "doctor_software", "descriptors"),
    ("enclave", "doctor_enclave", "enclave"),
)
ECHO = ("echo", "doctor_echo", "echo")
_STYLES = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}
_INDENT = 10


def examine(
    machine: Machine, *, echo: bool = True, checks: Sequence[tuple[str, str, str]] = CHECKS
) -> Iterator[Finding]:
    """The findings of the checks on ``machine``, one after the other; ``echo``: with the echo through a ring."""
    for name, module, function in (*checks, *((ECHO,) if echo else ())):
        yield _guarded(name, module, function, machine)


def _guarded(name: str, module: str, function: str, machine: Machine) -> Finding:
    try:
        check: Check = getattr(import_module(f".{module}", __package__), function)
        return check(machine)
    except Exception as error:  # noqa: BLE001 - whatever is broken here is what the doctor was called for
        text = " ".join(str(error).split())
        told = f"This check failed itself: {type(error).__name__}: {text}."
        return Finding(name, PROBLEM, told, "Repair what it names; if it names nothing of yours, report it.")


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether there is no problem among them."""
    return all(finding.state != PROBLEM for finding in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Plain data: ``tsqp`` (version), ``healthy``, ``problems``, ``notes``, ``findings``."""
    states = [finding.state for finding in findings]
    return {
        "tsqp": __version__,
        "healthy": healthy(findings),
        "problems": states.count(PROBLEM),
        "notes": states.count(NOTE),
        "findings": [finding.as_json() for finding in findings],
    }


def print_finding(console: Console, finding: Finding) -> None:
    """One finding as a paragraph, and what to do as another."""
    head = Text(f"{finding.state:<{_INDENT}}", _STYLES[finding.state])
    console.print(Text.assemble(head, (finding.name, "bold")), soft_wrap=True)
    width = max(20, console.width - _INDENT)
    for text in (finding.found, f"-> {finding.advice}" if finding.advice else ""):
        for line in wrap(text, width, break_long_words=False, break_on_hyphens=False):
            console.print(Text(" " * _INDENT + line), soft_wrap=True)


def summary(findings: Sequence[Finding]) -> str:
    """One line for all of them."""
    counts = {state: sum(finding.state == state for finding in findings) for state in (PROBLEM, NOTE)}
    told = [several(count, state) for state, count in counts.items()]
    return f"{len(findings)} checks: {', '.join(told)}"
