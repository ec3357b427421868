"""What the commands are made of: finding the checkpoint, opening a split model, showing progress.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from . import config
from .errors import ConfigError, ModelError, ModelNotFoundError
from .placement import get_placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: How long a command waits for a server to answer; one that is up answers at once, even when it is busy.
_CONNECT_TIMEOUT_S = 5.0
#: Shows a line of text about what is going on.
Tell = Callable[[str], None]


def one_line(error: BaseException) -> str:
    """The text of an exception on one line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def checkpoint(option: str | None) -> str:
    """The checkpoint directory: the option's, the environment's, or the embedded model's.

    Looked at here, before torch takes seconds to load. Raises :class:`~tsqp.errors.ModelNotFoundError`.
    """
    from .demo import model_path

    text = option or config.model_path() or model_path()
    path = Path(text).expanduser()
    if not (path / "config.json").is_file():
        why = "does not exist" if not path.exists() else "holds no config.json"
        raise ModelNotFoundError(f"{text} {why}; give the directory of a local transformers checkpoint")
    return str(path)


def sampling_arguments(sample: bool, temperature: float | None, seed: int | None) -> dict[str, Any]:
    """The arguments of ``generate()`` for the sampling options; ConfigError where they contradict."""
    if not sample:
        given = "--temperature" if temperature is not None else "--seed" if seed is not None else ""
        if given:
            raise ConfigError(f"{given} has no effect on greedy decoding; add --sample or leave it out")
        return {"do_sample": False}
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ConfigError(f"--temperature {temperature:g} is not above 0; for greedy decoding leave out --sample")
    return {"do_sample": True, "temperature": 1.0 if temperature is None else temperature}


@contextmanager
def split_model(
    path: str,
    endpoint: str | None,
    *,
    placement: str,
    dtype: str,
    wire_dtype: str,
    threads: int | None,
    perf_log: str | None = None,
    keep_embedding: bool = False,
) -> Iterator[PreTrainedModel]:
    """The model of the checkpoint ``path``, split over the server at ``endpoint``; closed on the way out."""
    chosen = get_placement(placement, keep_embedding)
    if perf_log is not None and not chosen.needs_server:
        raise ConfigError(f"--perf-log has nothing to log with placement {placement}; leave one of them out")
    where = endpoint or config.default_endpoint()
    config.parse_endpoint(where)
    with status("loading torch and transformers") as tell:
        import torch

        from .protocol import FLOAT_DTYPES
        from .split import from_pretrained

        if dtype not in ("auto", *FLOAT_DTYPES):
            raise ConfigError(f"--dtype {dtype!r} is unknown; give auto, {', '.join(FLOAT_DTYPES)}")
        quiet_progress_bars()
        if threads is not None:
            torch.set_num_threads(threads)
        tell(f"connecting to {where}" if chosen.needs_server else f"loading {path}")
        options: dict[str, Any] = {"connect_timeout": _CONNECT_TIMEOUT_S} if chosen.needs_server else {}
        if perf_log is not None:
            options["perf_log"] = perf_log
        model = from_pretrained(path, where, chosen, wire_dtype, dtype, **options)
    if keep_embedding and chosen.needs_server:
        from .kept_embedding import NOTE

        _print_line(f"note: {NOTE}")
    try:
        yield model
    finally:
        model.close()


def load_tokenizer(path: str) -> Any:
    """The checkpoint's tokenizer; raises :class:`~tsqp.errors.ModelError` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{path} holds no tokenizer that can be loaded ({one_line(error)})") from error


def check_prompt(ids: Any, model: PreTrainedModel, path: str) -> None:
    """Refuses a prompt without tokens, or with tokens the model does not know."""
    if ids.shape[1] == 0:
        raise ConfigError("--prompt is empty and this tokenizer adds no start token; give at least one word")
    vocabulary = model.config.get_text_config().vocab_size
    if int(ids.max()) >= vocabulary:
        raise ModelError(
            f"the tokenizer in {path} gives token {int(ids.max())} but the model knows {vocabulary}; "
            "give --model with the checkpoint that is served"
        )


def print_runner_stats(model: PreTrainedModel) -> None:
    """The runner's statistics, on the standard error: the standard output is the command's result."""
    from .telemetry import print_stats

    if model.tsqp_client is None:
        print("no statistics: with placement local no tensor travels", file=sys.stderr)
    else:
        print_stats(model.tsqp_client.stats, "statistics of the runner", Console(stderr=True))


@contextmanager
def status(text: str, plain: bool = False) -> Iterator[Tell]:
    """A spinner on the standard error, with a text that the yielded function replaces.

    Where the standard error is no terminal: nothing, or with ``plain`` one line for each text.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(text) as spinner:
            yield spinner.update
    else:
        tell = _print_line if plain else _say_nothing
        tell(text)
        yield tell


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    """Where nobody watches."""


def show_log() -> None:
    """Prints what the server logs (its endpoint, clients that come and go) on the standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("tsqp")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def quiet_progress_bars() -> None:
    """Turns off transformers' own bars, which would draw over the spinner."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
