"""``tsqp bench``: the benchmarks, with their own options; each one's ``--help`` says what it measures, and how."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec

import typer

from .cli_parts import status
from .config import without_keys
from .enclave import check_outside
from .errors import TsqpError

#: Module of ``tsqp.benchmarks`` -> what it is for.
BENCHMARKS = {
    "transport": "Tensors to another process and back: tsqp beside other ways, streams, many clients, idling.",
    "kernels": "The runner's operators against torch, and against a copy of the same bytes.",
    "inference": "A split model against stock transformers in one process: prefill and decode.",
    "batching": "What computing the requests of several clients together gains.",
    "paired": "Whether one way to move a tensor is faster than another, in short turns of both.",
    "compare": "Two results that were kept, figure by figure.",
}

#: Those that start no other process.
ALONE = ("kernels", "compare")

app = typer.Typer(
    help="Measures tsqp on this machine. Figures are kept as JSON with pictures beside it, and compared with earlier "
    "ones by --against. Each benchmark has options of its own: tsqp bench transport --help.",
    epilog="Start with [bold]tsqp bench transport --quick[/].",
    rich_markup_mode="rich",
)


def run_benchmark(name: str, arguments: list[str]) -> int:
    """Runs one benchmark with its own options in this process; returns its exit status.

    Raises :class:`~tsqp.errors.TsqpError` where this installation has no benchmarks, and inside Gramine for one that
    can't run there.
    """
    if find_spec("tsqp.benchmarks") is None:
        raise TsqpError(
            "this installation of tsqp has no benchmarks, which a complete one has; install tsqp anew from a wheel or "
            "a checkout"
        )
    if name not in ALONE:
        check_outside(f"tsqp bench {name}", "it starts processes, each of which would be an enclave of its own")
    with status("loading torch"):
        module = importlib.import_module(f"tsqp.benchmarks.{name}")
    with without_keys():  # a benchmark talks to itself
        return int(module.main(arguments, f"tsqp bench {name}"))


def _command(name: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        raise typer.Exit(run_benchmark(name, context.args))

    return command


for _name, _about in BENCHMARKS.items():
    # All options, --help among them, are the benchmark's own to read.
    app.command(
        _name,
        help=_about,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )(_command(_name))
