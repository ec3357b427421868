"""What the commands are made of: finding the checkpoint, opening a split model, showing progress.

Importing this module loads neither torch nor transformers, nor rich: `tsqp run` does without that.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config
from .cpu_latency import cores_awake
from .curve import check_reach, client_keys
from .enclave import check_connecting, check_outside
from .errors import ConfigError, ModelError, ModelNotFoundError
from .exits import one_line
from .placement import Placement, get_placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: How long a command waits for a server to answer; one that is up answers at once, even when it is busy.
_CONNECT_TIMEOUT_S = 5.0
#: The options of commands that open a split model, by their names in :data:`tsqp.run_options.OPTIONS`.
SPLIT_OPTIONS = (
    *("placement", "keep_embedding", "model", "endpoint", "dtype", "wire_dtype", "threads", "cpu_latency_us", "stats"),
    *("perf_log", "trusted_weights", "trusted_digest", "curve_key", "curve_server"),
)
#: Shows a line of text about what is going on.
Tell = Callable[[str], None]


def usage_text(error: Any, text: str, argv: Sequence[str]) -> str:
    """The text of a usage error without words of a prompt.

    Where the command takes a prompt, a word in a wrong place may belong to it (``--prompt`` left out, quotes
    forgotten), so that no word that is no option is repeated.
    """
    command = getattr(getattr(error, "ctx", None), "command", None)
    if not any(parameter.name == "prompt" for parameter in getattr(command, "params", ())):
        return text
    if "extra argument" in text:
        return "Got unexpected extra arguments; a prompt goes behind --prompt, in quotes"
    values = {value for word in argv for value in (word, word.partition("=")[2]) if value and value[:1] != "-"}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(repr(value), "the value")
    return text


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
def opened_split(
    *, model: str | None, endpoint: str | None, cpu_latency_us: int | None, stats: bool, **options: Any
) -> Iterator[tuple[PreTrainedModel, str]]:
    """The split model that :data:`SPLIT_OPTIONS` describe and its checkpoint's path; its statistics at the end."""
    path = checkpoint(model)
    with cores_awake(cpu_latency_us), split_model(path, endpoint, **options) as split:
        yield split, path
        if stats:
            print_runner_stats(split)


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
    trusted_weights: str | None = None,
    trusted_digest: str | None = None,
    timeout: float | None = None,
    spins: bool = True,
    curve_key: str | None = None,
    curve_server: str | None = None,
) -> Iterator[PreTrainedModel]:
    """The model of the checkpoint ``path``, split over the server at ``endpoint``; closed on the way out.

    ``timeout``: seconds one call of the server may take; None: what the library waits. ``spins``: whether the terminal
    shows what is going on. The others are options of :func:`tsqp.from_pretrained`.
    """
    chosen = get_placement(placement, keep_embedding)
    if perf_log is not None and not chosen.needs_server:
        raise ConfigError(f"--perf-log has nothing to log with placement {placement}; leave one of them out")
    where = endpoint or config.default_endpoint()
    endpoint_at = config.parse_endpoint(where)
    if chosen.needs_server:
        check_connecting(endpoint_at)
        check_reach(endpoint_at, client_keys(curve_key, curve_server))  # before torch takes seconds to load
    with status("loading torch and transformers", spins=spins) as tell:
        import torch

        from .protocol import FLOAT_DTYPES
        from .split import from_pretrained

        if dtype not in ("auto", *FLOAT_DTYPES):
            raise ConfigError(f"--dtype {dtype!r} is unknown; give auto, {', '.join(FLOAT_DTYPES)}")
        quiet_progress_bars()
        if threads is not None and threads != torch.get_num_threads():  # setting it starts torch's second pool
            torch.set_num_threads(threads)
        tell(f"connecting to {where}" if chosen.needs_server else f"loading {path}")
        options: dict[str, Any] = {"connect_timeout": _CONNECT_TIMEOUT_S} if chosen.needs_server else {}
        if timeout is not None and chosen.needs_server:
            options["timeout"] = timeout
        if perf_log is not None:
            options["perf_log"] = perf_log
        trust = {"trusted_weights": trusted_weights, "trusted_digest": trusted_digest}
        options.update({name: value for name, value in trust.items() if value is not None})
        if chosen.needs_server:
            options.update(curve_key=curve_key, curve_server=curve_server)
        model = from_pretrained(path, where, chosen, wire_dtype, dtype, **options)
    if keep_embedding and chosen.needs_server:
        from .kept_embedding import NOTE

        _print_line(f"note: {NOTE}")
    try:
        yield model
    finally:
        model.close()


def check_demo(placement: str, endpoint: str | None, keep_embedding: bool = False) -> Placement:
    """The demo's placement; ConfigError or EndpointError where it can't be shown here, before torch is loaded."""
    chosen = get_placement(placement, keep_embedding)
    if endpoint is not None:
        if not chosen.needs_server:
            raise ConfigError(f"--endpoint has no effect on placement {placement}; leave one of them out")
        check_connecting(endpoint)
    elif chosen.needs_server:
        why = "it starts a server process, which would be an enclave of its own"
        instead = "start tsqp serve --dtype float32 on the host and give --endpoint tcp://127.0.0.1:PORT"
        check_outside("tsqp demo without --endpoint", why, instead)
    return chosen


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
        raise ConfigError("the prompt is empty and this tokenizer adds no start token; give at least one word")
    vocabulary = model.config.get_text_config().vocab_size
    if int(ids.max()) >= vocabulary:
        raise ModelError(
            f"the tokenizer in {path} gives a token beyond the {vocabulary} that the model knows; "
            "give --model with the checkpoint that is served"
        )


def continue_prompt(
    model: PreTrainedModel, tokenizer: Any, prompt: str, path: str, streamer: Any, **arguments: Any
) -> None:
    """Has the model continue ``prompt``; the text goes to ``streamer`` as it comes.

    ``path`` is the checkpoint's; ``arguments`` are those of ``generate()``, and ``seed``. Raises
    :class:`~tsqp.errors.ConfigError` for an empty prompt.
    """
    import torch

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    check_prompt(inputs["input_ids"], model, path)
    seed = arguments.pop("seed", None)
    if seed is not None:
        torch.manual_seed(seed)
    model.generate(**inputs, streamer=streamer, **arguments)


def print_runner_stats(model: PreTrainedModel, plain: bool = False) -> None:
    """The runner's statistics, on the standard error: the standard output is the command's result.

    ``plain``: as text, without loading rich.
    """
    from .telemetry import plain_stats, print_stats

    title = "statistics of the runner"
    if model.tsqp_client is None:
        print("no statistics: with placement local no tensor travels", file=sys.stderr)
    elif plain:
        print(plain_stats(model.tsqp_client.stats, title), file=sys.stderr)
    else:
        from rich.console import Console

        print_stats(model.tsqp_client.stats, title, Console(stderr=True))


@contextmanager
def status(text: str, plain: bool = False, spins: bool = True) -> Iterator[Tell]:
    """A spinner on the standard error, with a text that the yielded function replaces.

    Where the standard error is no terminal, or without ``spins``: nothing, or with ``plain`` one line for each text.
    """
    if spins and sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status(text) as spinner:
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
