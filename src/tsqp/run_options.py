"""The options of a runner: one table, which ``tsqp run`` reads with argparse and ``tsqp generate`` with typer.

A new option of ``tsqp run`` is one entry of :data:`OPTIONS`; :func:`tsqp.run.execute` gets its value by its name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import ConfigError
from .placement import PLACEMENTS

_DTYPES = "auto|float32|bfloat16|float16"


class UsageError(ConfigError):
    """Wrong options; the command leaves with status 2."""


@dataclass(frozen=True)
class Option:
    """One option.

    ``kind`` is its value's type; ``bool`` takes none. ``minimum`` is the least that is taken. A ``default`` of
    None means that ``help`` says what holds then.
    """

    help: str
    kind: type = str
    metavar: str = ""
    default: Any = None
    minimum: float | None = None


#: Name -> option, in the order of ``--help``.
OPTIONS: dict[str, Option] = {
    "prompt": Option("The text to continue.", metavar="TEXT"),
    "prompt_file": Option(
        "Read the text to continue from FILE; - and no prompt at all: from the standard input. "
        "One line feed at its end is not part of it.",
        metavar="FILE",
    ),
    "lines": Option(
        "Each line of the file or input is a prompt of its own, continued as soon as it is read, over one connection. "
        "An empty line is answered by an empty one.",
        kind=bool,
        default=False,
    ),
    "null": Option(
        "End each text with a zero byte instead of a line feed: programs can tell where one ends.",
        kind=bool,
        default=False,
    ),
    "answer_only": Option("Print only what was generated, not the prompt before it.", kind=bool, default=False),
    "output": Option("Write the text to FILE instead of the standard output.", metavar="FILE"),
    "max_new_tokens": Option("Tokens to generate at most.", kind=int, metavar="N", default=64, minimum=1),
    "placement": Option(
        "Which operators run on the server. "
        + " ".join(f"{name}: {placement.summary}." for name, placement in PLACEMENTS.items()),
        metavar="|".join(PLACEMENTS),
        default="ops",
    ),
    "keep_embedding": Option(
        "Look tokens up in the runner, whatever the placement: no token id is sent.", kind=bool, default=False
    ),
    "model": Option(
        "Directory of a local transformers checkpoint (config, weights, tokenizer). "
        "Default: $LLAMA_MODEL_PATH, else the embedded demo model.",
        metavar="PATH",
    ),
    "endpoint": Option(
        "Where the server listens: ipc:///path/to.sock or tcp://127.0.0.1:5555. "
        "Default: $LLAMA_IPC_PATH, else a socket in your own runtime directory.",
        metavar="ENDPOINT",
    ),
    "curve_key": Option(
        "This end's secret key (tsqp keygen), to encrypt and authenticate. Default: $TSQP_CURVE_KEY.", metavar="FILE"
    ),
    "curve_server": Option("The public key the server has to have. Default: $TSQP_CURVE_SERVER.", metavar="FILE"),
    "trusted_weights": Option(
        "File of tsqp trust to take config and norms from; what the server says is only compared with it.",
        metavar="FILE",
    ),
    "trusted_digest": Option(
        "What tsqp trust printed for that file. Default: $TSQP_TRUSTED_DIGEST.", metavar="sha256:HEX"
    ),
    "sample": Option("Draw each token at random instead of taking the likeliest.", kind=bool, default=False),
    "temperature": Option(
        "With --sample: below 1 likely tokens come more often, above 1 less often.", kind=float, metavar="T"
    ),
    "seed": Option("Makes --sample repeatable.", kind=int, metavar="N", minimum=0),
    "dtype": Option(
        "Precision in which the runner computes. auto: the server's; placement local: the checkpoint's.",
        metavar=_DTYPES,
        default="auto",
    ),
    "wire_dtype": Option(
        "Precision in which tensors travel; auto is the model's own.", metavar=_DTYPES, default="auto"
    ),
    "threads": Option("CPU threads of torch. Default: torch's choice.", kind=int, metavar="N", minimum=1),
    "cpu_latency_us": Option(
        "Keep cores from idle states that take longer to leave; 0: from halting at all. Needs /dev/cpu_dma_latency.",
        kind=int,
        metavar="N",
        minimum=0,
    ),
    "timeout": Option(
        "How long the server may take for one answer.", kind=float, metavar="SECONDS", default=30.0, minimum=0.001
    ),
    "stats": Option("Print transfer and operator statistics at the end.", kind=bool, default=False),
    "perf_log": Option(
        "Write a row per round trip to FILE: a table, or .csv, .jsonl; tsqp analyze reads it.", metavar="FILE"
    ),
}


def flag(name: str) -> str:
    """How an option is written: ``--max-new-tokens``."""
    return f"--{name.replace('_', '-')}"


class _Parser(argparse.ArgumentParser):
    """Raises what it has to say."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ('{self.prog} --help' lists the options)")


class _Value:
    """Reads and checks the text of one option."""

    def __init__(self, option: Option) -> None:
        self._option = option

    def __call__(self, text: str) -> Any:
        kind, minimum = self._option.kind, self._option.minimum
        try:
            value = kind(text)
        except ValueError:
            known = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"the value is not {known}") from None
        if minimum is not None and not value >= minimum:  # not-a-number is refused too
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum:g}; give {minimum:g} or more")
        return value


def parser(prog: str, about: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of ``tsqp run``; it raises :class:`UsageError`."""
    made = _Parser(
        prog=prog,
        description=about,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, option in OPTIONS.items():
        said = option.help.replace("%", "%%")
        if option.kind is bool:
            made.add_argument(flag(name), action="store_true", help=said)
            continue
        default = "" if option.default is None else f" Default: {option.default}."
        made.add_argument(
            flag(name), type=_Value(option), default=option.default, metavar=option.metavar, help=said + default
        )
    made.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return made


def parsed(made: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """The options' values by name, ``debug`` among them."""
    values, rest = made.parse_known_args(argv)
    if rest:
        # Words that are no options may be a prompt that was not quoted, which does not belong into a log.
        unknown = [word.partition("=")[0] for word in rest if word.startswith("--")]
        made.error(f"No such option: {unknown[0]}" if unknown else f"{len(rest)} words belong to no option")
    return vars(values)
