"""What a runner needs of this machine, asked of the Python that is to run in the enclave: files, and nothing else.

gramine-manifest has variables of this kind of its own, but they describe the Python that gramine-manifest runs with.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Where things are inside: the same on every machine, so that a manifest tells nothing of a developer's home.
INSIDE = "/tsqp"
SITE, LIBRARIES, PYTHON_HOME = f"{INSIDE}/site", f"{INSIDE}/lib", f"{INSIDE}/python"
#: Parts of the standard library that no runner imports; site-packages may lie in it.
_STDLIB_WITHOUT = re.compile(
    r"site-packages|dist-packages|test|idlelib|turtledemo|tkinter|ensurepip|lib2to3|pydoc_data|lib-dynload|config-.*"
)
#: Of its compiled modules, those of terminals, windows, data bases and tests: they would bring their libraries.
_DYNLOAD_WITHOUT = re.compile(r"(_tkinter|readline|_curses\w*|nis|_g?dbm|ossaudiodev|_test\w*|_xx\w*|xx\w*)\..*")
#: Parts of packages that are for compiling and testing.
_PACKAGE_WITHOUT = {"torch": {"include", "share", "test"}, "numpy": {"tests", "f2py"}, "sympy": {"benchmarks"}}
#: What Gramine's runtime directory has, in its own versions.
_GRAMINE_HAS = re.compile(
    r"(ld-linux-x86-64|libc|libm|libmvec|libdl|libpthread|librt|libutil|libresolv|libanl|libthread_db|libBrokenLocale"
    r"|libnss_\w+)\.so\.\d+"
)
_LDD = re.compile(r"^\s*(?P<soname>\S+) => (?P<path>/.+) \(0x[0-9a-f]+\)$")
_LDD_AT_ONCE = 100


class InventoryError(Exception):
    """Something is missing or can't be written into a manifest; the text says what and what to do."""


def checked(path: Path | str) -> str:
    """``path`` as it may stand in a TOML string. Raises :class:`InventoryError`."""
    text = str(path)
    if re.search(r'["\\\t\n=]', text):
        raise InventoryError(f"the path {text!r} can't stand in a manifest; move it to a plain one")
    return text


# --- Python -------------------------------------------------------------------------------------------------------


def python() -> dict[str, str]:
    """The interpreter and its standard library: ``NAME`` outside, ``NAME_inside`` inside, and what to trust of it."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    inside = f"{PYTHON_HOME}/{sys.platlibdir}/{stdlib.name}"
    trusted = [_uri(entry) for entry in sorted(stdlib.iterdir()) if not _STDLIB_WITHOUT.fullmatch(entry.name)]
    trusted += map(checked, compiled_modules())
    return {
        "python": checked(Path(sys.executable).resolve()),
        "stdlib": checked(stdlib),
        "stdlib_inside": inside,
        "stdlib_trusted": "\n".join(trusted),
    }


def compiled_modules() -> list[Path]:
    """The standard library's compiled modules that a runner may import."""
    directory = Path(sysconfig.get_config_var("DESTSHARED") or Path(sysconfig.get_path("stdlib")) / "lib-dynload")
    return sorted(path for path in directory.glob("*.so") if not _DYNLOAD_WITHOUT.fullmatch(path.name))


def _uri(path: Path) -> str:
    """As a trusted file: a directory, with all that is in it, ends in a slash."""
    return checked(f"{path}/" if path.is_dir() else path)


# --- packages -----------------------------------------------------------------------------------------------------


def distributions(name: str) -> dict[str, importlib.metadata.Distribution]:
    """The distribution, and what it requires without extras, and so on; by normalised name."""
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = [name]
    while wanted:
        key = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if key in found:
            continue
        try:
            found[key] = importlib.metadata.distribution(key)
        except importlib.metadata.PackageNotFoundError:
            raise InventoryError(
                f"{sys.executable} has no package {key}; make PYTHON=... names the one that has tsqp installed"
            ) from None
        for text in found[key].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
    return found


def is_editable(distribution: importlib.metadata.Distribution) -> bool:
    """True of a checkout that was installed with ``pip install -e``: its files are in several places."""
    url = json.loads(distribution.read_text("direct_url.json") or "{}")
    return bool(url.get("dir_info", {}).get("editable"))


def packages(found: dict[str, importlib.metadata.Distribution]) -> dict[str, Path]:
    """Every directory and module of the distributions, by its name in site-packages.

    Each is mounted by itself. With a mount of all site-packages an optional package would be found, as its directory
    can be listed, and then fail to import, as its files are not trusted.
    """
    places: dict[str, Path] = {}
    for distribution in found.values():
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            if not top.endswith(".pth") and not top.startswith("_editable_"):
                places[top] = Path(str(distribution.locate_file(top))).resolve()
    if is_editable(found["tsqp"]):
        spec = importlib.util.find_spec("tsqp")
        if spec is not None and spec.origin is not None:
            places["tsqp"] = Path(spec.origin).parent
    return dict(sorted(places.items()))


def trusted_of(places: dict[str, Path]) -> Iterator[str]:
    """What is hashed of the packages."""
    for name, path in places.items():
        without = _PACKAGE_WITHOUT.get(name)
        if without is None:
            yield _uri(path)
        else:
            yield from (_uri(entry) for entry in sorted(path.iterdir()) if entry.name not in without)


# --- shared libraries ---------------------------------------------------------------------------------------------


def libraries(places: dict[str, Path]) -> dict[str, Path]:
    """The system's libraries that the interpreter, its modules and the packages are linked to, by soname, without those
    that Gramine brings and those that lie in the packages themselves."""
    own = [path for path in places.values() if path.is_dir()]
    binaries = [Path(sys.executable).resolve(), *compiled_modules()]
    for path in own:
        binaries += (file for file in path.rglob("*.so*") if file.is_file())
    found: dict[str, Path] = {}
    for soname, path in _linked(sorted(binaries)):
        if not _GRAMINE_HAS.fullmatch(soname) and not any(path.is_relative_to(directory) for directory in own):
            found[soname] = path
    return dict(sorted(found.items()))


def _linked(binaries: list[Path]) -> Iterator[tuple[str, Path]]:
    for first in range(0, len(binaries), _LDD_AT_ONCE):
        command = ["ldd", *map(str, binaries[first : first + _LDD_AT_ONCE])]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except FileNotFoundError:
            raise InventoryError("ldd is missing, which tells the libraries to trust; install libc-bin") from None
        for match in filter(None, map(_LDD.match, said.splitlines())):
            yield match["soname"], Path(match["path"]).resolve()


# --- the model ----------------------------------------------------------------------------------------------------

_TEXTS = (".json", ".txt", ".model", ".jinja")
_WEIGHTS = (".safetensors",)


def model_files(directory: Path, weights: bool) -> dict[str, Path]:
    """The checkpoint's files that a runner reads, by name: config, tokenizer, and weights where it computes alone."""
    if not (directory / "config.json").is_file():
        raise InventoryError(f"{directory} has no config.json; make MODEL=... names a checkpoint's directory")
    suffixes = _TEXTS + _WEIGHTS if weights else _TEXTS
    files = {path.name: path.resolve() for path in sorted(directory.iterdir()) if path.suffix in suffixes}
    if weights and not any(name.endswith(_WEIGHTS) for name in files):
        raise InventoryError(f"{directory} has no *.safetensors; a runner that computes alone needs the weights")
    return files


def mounts(files: dict[str, Path], below: str) -> str:
    """Lines of ``path inside<tab>path outside``: a template splits them."""
    return "\n".join(f"{below}/{checked(name)}\t{checked(path)}" for name, path in files.items())


def lines(paths: Iterable[str | Path]) -> str:
    return "\n".join(map(checked, paths))


def total_bytes(files: dict[str, Path]) -> int:
    return sum(os.path.getsize(path) for path in files.values())
