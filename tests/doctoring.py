"""Machines made of files for the doctor to look at, and what every finding has to have."""

from __future__ import annotations

import json
from pathlib import Path

from tsqp.doctor_machine import OK, Finding, Machine


def machine(root: Path, files: dict[str, str] | None = None, affinity: int = 8, **environ: str) -> Machine:
    """A machine of these files; a name that ends in a slash is a directory."""
    for name, text in (files or {}).items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_text(text)
    return Machine(root, environ, affinity)


def check(finding: Finding, state: str, *words: str) -> None:
    """The finding is this, says these words, and has an advice where there is something to do."""
    assert finding.state == state, finding
    for word in words:
        assert word in finding.found + " " + finding.advice, finding
    assert finding.found.endswith((".", ")")), finding
    assert bool(finding.advice) == (state != OK), finding
    json.dumps(finding.as_json())
