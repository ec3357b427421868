"""``tsqp run`` as ``tsqp --help`` and the documentation see it: the options of :mod:`tsqp.run_options`.

Who types ``tsqp run`` does not come by here: ``tsqp.__main__`` gives that to :mod:`tsqp.run` before typer is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .run_options import OPTIONS, Option, flag


def shared(name: str) -> Any:
    """An option of :data:`~tsqp.run_options.OPTIONS` for typer."""
    option = OPTIONS[name]
    if option.kind is bool:
        return typer.Option(flag(name), help=option.help)
    bounds: dict[str, Any] = {} if option.minimum is None else {"min": option.minimum}
    shown = option.default is not None
    return typer.Option(flag(name), metavar=option.metavar, help=option.help, show_default=shown, **bounds)


def _parameter(name: str, option: Option) -> inspect.Parameter:
    kind: Any = option.kind if option.default is not None else option.kind | None
    annotation = Annotated[kind, shared(name)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command, in the place of its ``**rest``, these options of the table, in the table's order."""
    shared_ones = [_parameter(name, option) for name, option in OPTIONS.items() if name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        _take(command, [*own, *shared_ones])
        return command

    return decorate


def _take(command: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Shows typer these parameters as those of ``command``."""
    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _run(**options: Any) -> None:
    """Continues prompts as [bold]tsqp generate[/] does, in a small process: for a runner in an enclave.

    Loads neither the server's code nor the terminal's libraries nor torch's compiler, starts no process, and takes
    prompts from the standard input, a file or --prompt.
    """
    from .run import execute

    execute(**options)


def register(app: typer.Typer) -> None:
    """Adds the command to those of ``app``."""
    _take(_run, [_parameter(name, option) for name, option in OPTIONS.items()])
    app.command("run", epilog='Example: [bold]echo "And the king said" | tsqp run --threads 2[/]')(_run)
