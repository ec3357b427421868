"""The parser of a benchmark's command line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from tsqp import cpu_latency
from tsqp.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; the options are in ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ('{self.prog} --help' lists the options)\n")


def plain_parser(name: str, doc: str | None, prog: str | None) -> Parser:
    """A parser whose help is the module's text; ``prog`` is what the user typed, if not ``python -m``."""
    usual = f"python -m benchmarks.{name}"
    return Parser(
        prog=prog or usual,
        description=(doc or "").replace(usual, prog or usual),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def check_awake(parser: argparse.ArgumentParser, us: int | None) -> None:
    """Refuses a limit on waking that can't be had here."""
    try:
        cpu_latency.check_awake(us)
    except ConfigError as error:
        parser.error(f"--cpu-latency-us: {error}")
