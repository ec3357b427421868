"""The documentation says what is there: names, commands, variables; and its examples run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer.main
from commands import environment, serving, short_directory, wait_for

import tsqp
from tsqp.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LIMIT_S = 100.0
_FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: The first line of an example that is a program of its own.
_FILE = re.compile(r"# (\w+\.py)\n")


def _text(name: str) -> str:
    return (DOCS / name).read_text()


def _variables() -> set[str]:
    """The environment variables that tsqp reads."""
    found = set()
    for path in [*(ROOT / "src" / "tsqp").rglob("*.py"), *(ROOT / "csrc").glob("*.[ch]")]:
        found |= set(re.findall(r'"((?:TSQP|LLAMA)_[A-Z_]+)"', path.read_text()))
    return found


def _options(name: str) -> list[str]:
    """Arguments of ``def name`` that have a default, in any module of tsqp."""
    for path in (ROOT / "src" / "tsqp").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return [argument.arg for argument in node.args.kwonlyargs]
    raise AssertionError(f"tsqp has no function {name}")


# --- what is named -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tsqp.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    pages = [page.read_text() for page in (DOCS / "api").glob("*.rst")]
    directive = re.compile(rf"^\.\. (auto\w+|py:\w+):: tsqp\.{name}(\(\))?$", re.MULTILINE)
    assert any(directive.search(page) for page in pages), f"docs/api does not document tsqp.{name}"


def test_every_command_has_a_section_and_none_else() -> None:
    sections = re.findall(r"^```\{command-options\} (\w+)$", _text("cli.md"), re.MULTILINE)
    assert sorted(sections) == sorted(["tsqp", *typer.main.get_command(app).commands])


def test_every_variable_is_in_the_settings() -> None:
    assert len(_variables()) >= 10, "the search finds them"
    page = _text("settings.md")
    missing = [name for name in sorted(_variables()) if f"`{name}`" not in page]
    assert not missing, f"docs/settings.md does not name {missing}"


@pytest.mark.parametrize("function", ["listen", "connect"])
def test_every_option_of_a_connection_is_on_its_page(function: str) -> None:
    page = _text("transport.md")
    missing = [name for name in _options(function) if name not in page]
    assert not missing, f"docs/transport.md does not name {missing} of {function}()"


@pytest.mark.parametrize("struct", ["segment_header", "end_words", "entry", "message_header", "tensor_desc"])
def test_the_wire_format_is_that_of_the_core(struct: str) -> None:
    page = _text("wire-format.md")
    table = page.partition(f"`struct tsqp_{struct}`")[2].partition("\n\n|")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)`", table, re.MULTILINE)
    assert [(int(offset), int(nbytes), field) for offset, nbytes, field in rows] == _fields(struct)


def _fields(struct: str) -> list[tuple[int, int, str]]:
    """Offset, bytes and name of each field of a struct of layout.h but its padding."""
    header = (ROOT / "csrc" / "layout.h").read_text()
    body = header.partition(f"struct tsqp_{struct} {{\n")[2].partition("\n};")[0]
    sizes = {"TSQP_ENDS": 2, "TSQP_MAX_NDIM": 8, "": 1}
    found, offset = [], 0
    for kind, field, count in re.findall(r"^    (u?int\d+_t|struct \w+) (\w+)(?:\[(.+)])?;", body, re.MULTILINE):
        if field == "pad1":  # the rest of the page
            break
        nbytes = 64 if kind == "struct tsqp_end_words" else int(re.sub(r"\D", "", kind)) // 8
        nbytes *= sizes[count] if count in sizes else int(count)
        if not field.startswith("pad"):
            found.append((offset, nbytes, field))
        offset += nbytes
    return found


# --- the examples --------------------------------------------------------------------------------------------------


def _programs(page: str) -> tuple[dict[str, str], str]:
    """The page's examples: those that are files, by name, and the others as one program."""
    files, steps = {}, []
    for code in _FENCE.findall(_text(page)):
        name = _FILE.match(code)
        if name:
            files[name[1]] = code
        else:
            steps.append(code)
    assert steps
    return files, "\n".join(steps)


@contextmanager
def _running(path: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(path)], cwd=path.parent, env=environment(**env), stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _run(path: Path, **env: str) -> str:
    """What a program printed; it has to end well. One thread: the machine is shared with the other end."""
    env = {"OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=path.parent,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.watchdog(120)
def test_the_quick_start_runs() -> None:
    files, steps = _programs("quickstart.md")
    assert not files
    with short_directory() as directory, serving(directory) as served:
        (directory / "steps.py").write_text(steps)
        out = _run(directory / "steps.py", LLAMA_IPC_PATH=str(served.socket))
        assert "round trips," in out
        difference, scale = re.search(r"largest difference (\S+) of (\S+)", out).groups()
        assert float(difference) <= 0.02 * float(scale)
    assert "client gone" in served.outcome.err


@pytest.mark.watchdog(120)
def test_the_transport_page_runs() -> None:
    files, steps = _programs("transport.md")
    assert sorted(files) == ["echo_server.py", "ring_child.py"]
    with short_directory() as directory:
        place = "/tmp/tsqp-docs"  # as the page has it; here a directory of this test's own
        for name, code in {**files, "steps.py": steps}.items():
            (directory / name).write_text(code.replace(place, str(directory)))
        with _running(directory / "echo_server.py") as server:
            out = _run(directory / "steps.py")
            wait_for(lambda: server.poll() is not None, "the end of the echo server")
            assert server.returncode == 0, server.communicate()[1]
    assert out.startswith("shm+ipc\n")
    assert out.endswith("closed\n")
