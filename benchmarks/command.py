"""What the command lines of the benchmarks have in common: options, keeping what was measured, comparing it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tsqp.exits import termination_raises

from . import compare
from .arguments import plain_parser

#: Options that say where things go, not what is measured.
_PLACES = ("json", "against", "before", "trace", "quick", "list_parts", "part")


class Terminated(SystemExit):
    """SIGTERM or SIGHUP; the code is what a shell says of a process that one ended."""

    def __str__(self) -> str:
        return signal.Signals(int(self.code or 0) - 128).name


def make_parser(name: str, doc: str | None, prog: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """A parser with the options all benchmarks have; ``prog`` is what the user typed, if not ``python -m``."""
    parser = plain_parser(name, (doc or "") + epilog, prog)
    add = parser.add_argument
    add("--quick", action="store_true", help="a short run, to see that it works; other options still hold")
    add(
        "--json",
        type=Path,
        default=Path(f"results/{name}.json"),
        metavar="FILE",
        help=f"where the figures are kept (results/{name}.json), with pictures beside it",
    )
    add("--against", type=Path, metavar="OLD.json", help="an earlier result to compare with")
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, quick: Mapping[str, Any], name: str
) -> argparse.Namespace:
    """The options; ``quick`` are the defaults of ``--quick``. What can't be read or written later is refused here."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "--quick" in words:
        parser.set_defaults(**quick)
    options = parser.parse_args(words)
    try:
        options.before = None if options.against is None else compare.load(options.against, name)
        options.json.parent.mkdir(parents=True, exist_ok=True)
    except compare.ResultError as error:
        parser.error(f"--against: {error}")
    except OSError as error:
        parser.error(f"--json {options.json}: the folder can't be made ({error.strerror}); give another file")
    if options.json.is_dir() or not os.access(options.json.parent, os.W_OK):
        parser.error(f"--json {options.json} can't be written; give a file in a folder of yours")
    return options


def told(options: argparse.Namespace) -> dict[str, Any]:
    """The options a result keeps: those that say what was measured."""
    return {name: value for name, value in vars(options).items() if name not in _PLACES}


def save(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result in one piece: what was kept before is there until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def run(
    result: dict[str, Any],
    options: argparse.Namespace,
    console: Console,
    measure: Callable[[], None],
    draw: Callable[[dict[str, Any], Path], list[Path]],
) -> int:
    """Calls ``measure``, which fills ``result``, and keeps, draws and compares what it found; the exit status.

    What a run measured before Ctrl-C, SIGTERM or a failure is kept too; ``interrupted`` in it says why it ended.
    """
    try:
        with termination_raises(Terminated):  # as Ctrl-C: servers are ended, what was measured is kept
            measure()
    except BaseException as error:
        result["interrupted"] = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error)
        if compare.figures(result):
            save(result, options.json)
            print(f"cut short; what was measured until then is kept in {options.json}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130
        raise
    save(result, options.json)
    kept = [options.json, *draw(result, options.json)]
    console.print(f"saved: {', '.join(map(str, kept))}", highlight=False, soft_wrap=True)
    if options.before is not None:
        compare.show(options.before, json.loads(json.dumps(result)), console)
    return 0
