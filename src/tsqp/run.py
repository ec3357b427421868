"""``tsqp run``, the same as ``python -m tsqp.run``: continues prompts like ``tsqp generate``, in a small process.

For a runner in an enclave, where each imported module is code to be trusted, memory to be paid for and a file to be
measured. Loads neither the server nor the terminal's libraries nor torch's compiler (:mod:`tsqp.lean`), starts no
process, and takes prompts from the standard input or a file: an enclave's arguments are measured, or the host's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from .cli_parts import (
    checkpoint,
    continue_prompt,
    load_tokenizer,
    print_runner_stats,
    sampling_arguments,
    split_model,
)
from .cpu_latency import check_awake, cores_awake
from .errors import ConfigError
from .exits import EXIT_OK, ended, one_line, termination_raises
from .lean import lean_imports, prepare
from .prompts import check_sources, read_prompts
from .run_options import UsageError, parsed, parser

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ABOUT = (
    "Continues prompts with the model a server serves, in a small process: for a runner in an enclave.\n\n"
    "What tsqp generate does, without what only a person at a terminal needs. Prompts come from the standard input,\n"
    "--prompt-file or --prompt; an enclave's arguments are measured, or the host's."
)
EXAMPLE = 'Example: echo "And the king said" | tsqp run --endpoint tcp://127.0.0.1:5555 --threads 2'
#: Options of ``split_model`` that are named as there.
_OF_THE_MODEL: tuple[str, ...] = (
    "placement",
    "keep_embedding",
    "dtype",
    "wire_dtype",
    "threads",
    "perf_log",
    "timeout",
)
_OF_THE_MODEL += ("curve_key", "curve_server", "trusted_weights", "trusted_digest")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and leaves: status 0, 1 for an error, 2 for wrong options, 130 for Ctrl-C, 143 for SIGTERM."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    # The options are not repeated: a prompt may be among them.
    again = "tsqp --debug run with the same options"
    sys.exit(ended(partial(_run, argv), again, debug="--debug" in argv, usage=_usage))


def _run(argv: list[str]) -> int:
    options = parsed(parser("tsqp run", ABOUT, EXAMPLE), argv)
    del options["debug"]
    execute(**options)
    return EXIT_OK


def _usage(error: Exception) -> str | None:
    return one_line(error) if isinstance(error, UsageError) else None


def execute(**options: Any) -> None:
    """The command with its options' values, see :data:`tsqp.run_options.OPTIONS`."""
    path = checkpoint(options["model"])
    sampling = sampling_arguments(options["sample"], options["temperature"], options["seed"])
    sources = (options["prompt"], options["prompt_file"], options["lines"])
    check_sources(*sources)
    prompts = read_prompts(*sources)
    if not options["lines"]:
        prompts = iter([*prompts])  # before seconds of loading, and before a server waits for somebody who types
    check_awake(options["cpu_latency_us"])
    prepare(options["threads"])
    of_model = {name: options[name] for name in _OF_THE_MODEL}
    with (
        termination_raises(),
        _output(options["output"]) as out,
        lean_imports(),
        split_model(path, options["endpoint"], spins=False, **of_model) as split,
    ):
        generation = {"max_new_tokens": options["max_new_tokens"], "seed": options["seed"], **sampling}
        answer = _answerer(split, path, options, out)
        for prompt in prompts:
            answer(prompt, **generation)
        if options["stats"]:
            print_runner_stats(split, plain=True)


def _answerer(split: PreTrainedModel, path: str, options: dict[str, Any], out: TextIO) -> Callable[..., None]:
    """A function that writes a prompt's continuation to ``out``."""
    from .streaming import PromptStreamer

    tokenizer = load_tokenizer(path)
    end = "\0" if options["null"] else "\n"

    def answer(prompt: str, **generation: Any) -> None:
        if options["lines"] and not prompt:
            print(end=end, file=out, flush=True)
            return
        streamer = PromptStreamer(tokenizer, "" if options["answer_only"] else prompt, out, end)
        with cores_awake(options["cpu_latency_us"]):  # not while the next prompt is waited for
            continue_prompt(split, tokenizer, prompt, path, streamer, **generation)

    return answer


@contextmanager
def _output(path: str | None) -> Iterator[TextIO]:
    """The standard output, or a file that is written anew."""
    with ExitStack() as closing:
        out = sys.stdout
        if path is not None:
            try:
                out = closing.enter_context(open(path, "w", encoding="utf-8"))
            except OSError as error:
                raise ConfigError(f"--output {path} can't be written ({error.strerror}); give another file") from error
        yield out


if __name__ == "__main__":
    main()
