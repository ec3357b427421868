"""The command line: ``tsqp serve``, ``generate``, ``run``, ``prefill``, ``demo``, ``health``,
``top``, ``doctor``, ``analyze``, ``clean``, ``trust``, ``keygen``, ``bench``.

Commands only turn options into calls of the library. Heavy modules are imported inside the commands, so
that ``tsqp --help`` answers at once. Every failure leaves through :func:`main` as one sentence on the
standard error and a non-zero exit status.
"""

from __future__ import annotations

import os

# libgomp reads this when torch loads it. By default the worker threads of one process spin on the cores that
# the process at the other end needs, which halves the speed of both.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys
from functools import partial
from json import dumps
from typing import Annotated, Any

import typer
from rich.console import Console

from . import __version__, cli_bench, cli_keys, cli_run, cli_trust, config
from . import cli_options as options
from .cli_parts import (
    SPLIT_OPTIONS,
    check_demo,
    checkpoint,
    continue_prompt,
    load_tokenizer,
    opened_split,
    quiet_progress_bars,
    sampling_arguments,
    show_log,
    status,
    usage_text,
)
from .enclave import check_listening, check_outside
from .errors import ConfigError, TsqpError
from .exits import EXIT_ERROR, EXIT_OK, ended, termination_raises
from .report_files import report_files

app = typer.Typer(
    name="tsqp",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with [bold]tsqp demo[/]: it needs no model, no GPU and no server.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tsqp {__version__}")
        raise typer.Exit


@app.callback()
def _tsqp(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Runs a transformers language model split between a trusted runner and a server that owns the GPU.

    The runner owns the prompt, the sampling and the cheap operators; the server computes the big matrix
    products. Tensors travel through shared memory.
    """


@app.command(epilog="Example: [bold]tsqp serve --model ~/Llama-3.2-1B --device cuda:0 --dtype bfloat16[/]")
def serve(
    *,
    model: options.Model = None,
    endpoint: options.Endpoint = None,
    device: options.Device = None,
    dtype: options.ServerDtype = None,
    max_chunk_bytes: options.MaxChunkBytes = None,
    max_chunks: options.MaxChunks = None,
    max_clients: options.MaxClients = 16,
    threads: options.Threads = None,
    kv_limit_bytes: options.KvLimitBytes = None,
    limit: options.LimitSettings = None,
    batching: options.Batching = True,
    compile_mlps: options.Compile = False,
    linear_backend: options.LinearBackend = "auto",
    pack_weights: options.PackWeights = None,
    status_socket: options.Status = False,
    metrics_port: options.MetricsPort = None,
    cpu_latency_us: options.CpuLatencyUs = None,
    curve_key: options.CurveKey = None,
    curve_clients: options.CurveClients = None,
) -> None:
    """Serves the heavy operators of a model until Ctrl-C or SIGTERM, then prints transfer statistics."""
    path = checkpoint(model)
    where = endpoint or config.default_endpoint()
    check_listening(where)
    with status("loading torch and transformers", plain=True) as tell:
        from .limits import Limits
        from .server import GPUServer

        quiet_progress_bars()
        server = GPUServer(
            path,
            where,
            device=device or config.device(),
            dtype=dtype or config.dtype(),
            max_chunk_bytes=max_chunk_bytes,
            max_chunks=max_chunks,
            max_clients=max_clients,
            threads=threads,
            kv_limit_bytes=kv_limit_bytes,
            limits=Limits().changed(limit or ()),
            batching=batching,
            compile=compile_mlps,
            linear_backend=linear_backend,
            pack_weights=pack_weights,
            progress=tell,
            status=status_socket,
            metrics_port=metrics_port,
            cpu_latency_us=cpu_latency_us,
            curve_key=curve_key,
            curve_clients=curve_clients,
        )
    show_log()
    server.serve()


@app.command(epilog='Example: [bold]tsqp generate --prompt "And the king said" --max-new-tokens 40[/]')
@cli_run.with_options(*SPLIT_OPTIONS)
def generate(
    *,
    prompt: options.Prompt,
    max_new_tokens: options.MaxNewTokens = 64,
    sample: options.Sample = False,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    **split_options: Any,
) -> None:
    """Continues a prompt with the model a server serves, and prints the text as it comes.

    Needs a running [bold]tsqp serve[/] (except with --placement local). --model is the checkpoint that is
    served: the runner reads its config and tokenizer, not its weights.
    """
    sampling = sampling_arguments(sample, temperature, seed)
    with opened_split(**split_options) as (split, path):
        from .streaming import PromptStreamer

        tokenizer = load_tokenizer(path)
        streamer = PromptStreamer(tokenizer, prompt)
        continue_prompt(split, tokenizer, prompt, path, streamer, max_new_tokens=max_new_tokens, seed=seed, **sampling)


@app.command(epilog="Example: [bold]tsqp prefill --tokens 512 --placement linear --repeat 10[/]")
@cli_run.with_options(*SPLIT_OPTIONS)
def prefill(*, tokens: options.Tokens = 1024, repeat: options.Repeat = 5, **split_options: Any) -> None:
    """Times the prefill of a random prompt: seconds, tokens per second, round trips, bytes per carrier.

    Needs a running [bold]tsqp serve[/] (except with --placement local).
    """
    with opened_split(**split_options) as (split, _):
        from .prefill import format_prefill, time_prefill

        with status(f"timing {repeat} prefills of {tokens} tokens"):
            runs = time_prefill(split, tokens, repeat)
        print(format_prefill(runs, split.tsqp_placement))


@app.command(epilog='Example: [bold]tsqp demo --prompt "In the beginning" --placement linear[/]')
def demo(
    *,
    prompt: options.DemoPrompt = None,
    max_new_tokens: options.MaxNewTokens = 48,
    placement: options.Placement = "ops",
    keep_embedding: options.KeepEmbedding = False,
    endpoint: options.DemoEndpoint = None,
) -> None:
    """Shows the whole system at work on the embedded model, with nothing to set up.

    Starts a server process (or uses that at --endpoint), generates text with the split model, then again with stock
    transformers in one process, and compares tokens and logits. Leaves with status 1 if the tokens differ.
    """
    chosen = check_demo(placement, endpoint, keep_embedding)
    from .demo import PROMPT

    with termination_raises():
        with status("loading torch and transformers") as tell:
            from .demo.compare import print_comparison, run_demo

            quiet_progress_bars()
            result = run_demo(PROMPT if prompt is None else prompt, max_new_tokens, chosen, tell, endpoint)
        print_comparison(result, Console())
    if not result.tokens_equal:
        raise TsqpError("the split model's tokens differ from those of stock transformers, which is a fault of tsqp")


@app.command(epilog="Example: [bold]tsqp health --timeout 2 --json[/]")
def health(
    *,
    endpoint: options.Endpoint = None,
    timeout: options.Timeout = 5.0,
    json: options.Json = False,
    curve_key: options.CurveKey = None,
    curve_server: options.CurveServer = None,
) -> None:
    """Asks a running server for a small computation on its device. Leaves with status 0 if it answers, else 1."""
    where = endpoint or config.default_endpoint()
    config.parse_endpoint(where)
    with status("loading torch"):
        from .health import check_health
    found = check_health(where, timeout, curve_key, curve_server)
    if json:
        print(dumps(found.as_json()))
        raise typer.Exit(EXIT_OK if found.healthy else EXIT_ERROR)
    if not found.healthy:
        raise TsqpError(str(found))
    print(found)


@app.command(epilog="Example: [bold]tsqp top --interval 0.5[/]")
def top(
    *,
    endpoint: options.Endpoint = None,
    interval: options.Interval = 1.0,
    once: options.Once = False,
    json: options.JsonLines = False,
) -> None:
    """Shows what a running server does: its clients, round trips and MB per second, what waits. Ctrl-C ends it.

    The server tells only its own user, and only where it was started with [bold]tsqp serve --status[/].
    """
    where = endpoint or config.default_endpoint()
    config.parse_endpoint(where)
    from .top import show

    show(where, interval=interval, once=once, json=json)


@app.command(epilog="Example: [bold]tsqp doctor --json[/]")
def doctor(*, echo: options.Echo = True, json: options.Json = False) -> None:
    """Checks this machine and says what to do: memory, processors, threads, torch, sockets, enclaves, an echo.

    Leaves with status 1 if there is a problem; notes are what works with less than it could have.
    """
    from .doctor import as_json, examine, healthy, print_finding, summary
    from .doctor_machine import Machine

    found, console = [], Console()
    with termination_raises():
        for finding in examine(Machine(), echo=echo):
            found.append(finding)
            if not json:
                print_finding(console, finding)
    print(dumps(as_json(found)) if json else summary(found))
    raise typer.Exit(EXIT_OK if healthy(found) else EXIT_ERROR)


@app.command(epilog="Example: [bold]tsqp analyze zmq_performance.log --plot report.html --trace trace.json[/]")
def analyze(
    *,
    logs: options.Logs,
    compare: options.Compare = False,
    top: options.Top = 10,
    json: options.Json = False,
    csv: options.Csv = False,
    plot: options.Plot = None,
    forward: options.ForwardNumber = None,
    trace: options.Trace = None,
) -> None:
    """Says where the time went, from performance logs (--perf-log): by stage, method and layer, and what to try.

    Reads tables, CSV and JSON Lines, and the ten-column text log of the old system. Several logs count together.
    """
    from .analyze import analyze as figures
    from .analyze_show import print_comparison, print_figures
    from .perf_read import read_log

    if compare and len(logs) != 2:
        raise ConfigError(f"--compare takes two logs, before and after, and {len(logs)} were given; give two")
    if json and csv:
        raise ConfigError("--json and --csv are two formats; give one of them")
    kind = "json" if json else "csv" if csv else "tables"
    write_files = report_files(plot, trace, forward, compare)
    read = [read_log(log) for log in logs]
    if compare:
        print_comparison(read[0], read[1], kind)
        return
    found = figures(read, top)
    write_files(read, found)
    print_figures(found, kind)


@app.command(epilog="Example: [bold]tsqp clean --yes[/]")
def clean(*, yes: options.Yes = False) -> None:
    """Lists, or removes, shared-memory segments that servers left behind when they were killed.

    Only segments of tsqp whose owner is no longer alive are touched.
    """
    from .segments import leftovers, reap

    check_outside("tsqp clean", "nobody can tell there whose process is alive")
    found = leftovers()
    for segment in found:
        print(f"{segment.name}  {segment.nbytes} bytes  of process {segment.pid}, which is gone")
    if not found:
        print("nothing left behind")
    elif yes:
        print(f"removed them: {reap(found)} bytes freed")
    else:
        total = sum(segment.nbytes for segment in found)
        print(f"{len(found)} segments, {total} bytes; remove them with: tsqp clean --yes")


app.command(epilog=cli_trust.EXAMPLE)(cli_trust.trust)
app.add_typer(cli_bench.app, name="bench")
app.command(epilog=cli_keys.EPILOG)(cli_keys.keygen)
cli_run.register(app)


# --- entry --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and leaves: status 0, 1 for an error, 2 for wrong options, 130 for Ctrl-C."""
    argv = sys.argv[1:] if arguments is None else arguments
    again = "the same command with 'tsqp --debug' in front"  # the words of this one may be a prompt
    usage = partial(_usage, argv)
    sys.exit(ended(partial(_run, argv or ["--help"]), again, debug="--debug" in argv, usage=usage))


def _run(argv: list[str]) -> int:
    """Lets typer parse and call; returns the status of a ``typer.Exit``, else 0."""
    command = typer.main.get_command(app)
    try:
        result = command.main(argv, prog_name="tsqp", standalone_mode=False)
    except typer.Abort:  # what it makes of Ctrl-C
        raise KeyboardInterrupt from None
    return result if isinstance(result, int) else 0


def _usage(argv: list[str], error: Exception) -> str | None:
    """What is wrong with the options, where ``error`` says that."""
    usage = getattr(error, "format_message", None)  # only typer's usage errors have it, whatever their class
    if usage is None:
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "tsqp"
    return f"{usage_text(error, usage(), argv)} ('{command} --help' lists the options)"
