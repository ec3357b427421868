"""Manifests of gramine/ as its Makefile makes them, for the tests: options, variables, rendered and parsed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

GRAMINE = Path(__file__).parent.parent / "gramine"
sys.path.insert(0, str(GRAMINE))

import check  # noqa: E402
import inventory  # noqa: E402
import manifest  # noqa: E402
import syntax  # noqa: E402

DIGEST = "sha256:" + "0" * 64
#: A prompt that is hard to write down.
QUOTES = "He said: \"Go\\home\", 'and' {{ went }}\n\tüß\x7f\N{GRINNING FACE}"
KINDS = ("runner", "local")
PKGLIBDIR = Path("/opt/a-gramine/lib")
_OPTION = re.compile(r"^([A-Z_]+) \?=[ \t]*(.*)$", re.MULTILINE)


def defaults() -> dict[str, str]:
    """The Makefile's options."""
    return dict(_OPTION.findall((GRAMINE / "Makefile").read_text()))


def template(kind: str) -> str:
    return (GRAMINE / f"{kind}.manifest.template").read_text()


@dataclass(frozen=True)
class Rendered:
    """A manifest: its variables, its text, and what is in it."""

    values: dict[str, str]
    text: str
    tables: dict[str, Any]

    @property
    def mounts(self) -> list[dict[str, str]]:
        return self.tables["fs"]["mounts"]

    @property
    def trusted(self) -> list[str]:
        return self.tables["sgx"]["trusted_files"]

    @property
    def allowed(self) -> list[str]:
        return self.tables["sgx"]["allowed_files"]

    @property
    def argv(self) -> list[str]:
        return self.tables["loader"]["argv"]

    @property
    def env(self) -> dict[str, str]:
        return self.tables["loader"]["env"]

    def option(self, name: str) -> str:
        """The value of an option among the arguments."""
        return self.argv[self.argv.index(name) + 1]

    def mount(self, path: str) -> dict[str, str]:
        return next(mount for mount in self.mounts if mount["path"] == path)


def definitions(kind: str, **options: str) -> dict[str, str]:
    """The variables. What does not depend on options is asked of this machine once: it takes seconds."""
    with patch.multiple(inventory, distributions=_distributions, packages=lambda _: _packages()):
        return manifest.definitions(kind, {**defaults(), **options})


_distributions = cache(inventory.distributions)


@cache
def _packages(packages: Callable[..., dict[str, Path]] = inventory.packages) -> dict[str, Path]:
    return packages(_distributions("tsqp"))


def rendered(kind: str, **options: str) -> Rendered:
    """As gramine-manifest renders it, with a Gramine in :data:`PKGLIBDIR`."""
    values = definitions(kind, **options)
    text = check.render(template(kind), values, check.environment(PKGLIBDIR))
    return Rendered(values, text, check.parse(text))


def files_for_options(tmp_path: Path) -> dict[str, str]:
    """A file for each option that wants one."""
    made = {}
    for name in ("PROMPT_FILE", "CURVE_KEY", "CURVE_SERVER", "TRUSTED_WEIGHTS"):
        (tmp_path / name).write_text("x")
        made[name] = str(tmp_path / name)
    return {**made, "TRUSTED_DIGEST": DIGEST}


def make(*arguments: str, cwd: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the Makefile from another directory, with this Python."""
    env = {"PATH": os.environ["PATH"] if path is None else path, "HOME": str(cwd)}
    command = ["make", "-s", "-f", str(GRAMINE / "Makefile"), f"PYTHON={sys.executable}", f"OUT={cwd}", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100, check=False)


__all__ = [
    "DIGEST",
    "GRAMINE",
    "KINDS",
    "PKGLIBDIR",
    "QUOTES",
    "Rendered",
    "check",
    "definitions",
    "files_for_options",
    "inventory",
    "make",
    "manifest",
    "rendered",
    "syntax",
    "template",
]
