"""Renders a template as gramine-manifest does, with stand-ins for what an installed Gramine knows, and checks it."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from inventory import InventoryError
from syntax import VERSIONS, problems

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

#: Where distributions' packages of Gramine put it. Nothing is read from there.
PKGLIBDIR = Path("/usr/lib/x86_64-linux-gnu/gramine")


def environment(pkglibdir: Path = PKGLIBDIR) -> jinja2.Environment:
    """Jinja as gramine-manifest sets it up: an undefined variable is an error."""
    env = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    env.globals["gramine"] = {
        "libos": pkglibdir / "libsysdb.so",
        "pkglibdir": pkglibdir,
        "runtimedir": lambda libc="glibc": pkglibdir / "runtime" / libc,
    }
    paths = sysconfig.get_paths()
    env.globals["python"] = {name: Path(paths[name]) for name in ("stdlib", "platstdlib", "purelib")}
    env.globals["env"] = os.environ
    return env


def render(template: str, values: Mapping[str, str], env: jinja2.Environment | None = None) -> str:
    """The manifest's text. Raises jinja2.UndefinedError where the template wants what is not there."""
    return (env or environment()).from_string(template).render(**values)


def parse(text: str) -> dict[str, Any]:
    """The manifest as tables. Raises tomllib.TOMLDecodeError."""
    return tomllib.loads(text)


def checked_text(template: str, values: Mapping[str, str]) -> str:
    """The rendered manifest; raises :class:`InventoryError` with everything that Gramine would not take."""
    try:
        text = render(template, values)
        manifest = parse(text)
    except (jinja2.TemplateError, tomllib.TOMLDecodeError) as error:
        raise InventoryError(f"the template does not render: {error}") from None
    wrong = {f"{problem} (Gramine {version})" for version in VERSIONS for problem in problems(manifest, version)}
    if wrong:
        raise InventoryError("; ".join(sorted(wrong)))
    return text
