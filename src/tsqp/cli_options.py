"""The options that commands share: type, name of the value and help text of each.

Those of a runner are in :mod:`tsqp.run_options`, which `tsqp run` reads without typer.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .cli_run import shared

_DTYPES = "auto|float32|bfloat16|float16"

Placement = Annotated[str, shared("placement")]
KeepEmbedding = Annotated[bool, shared("keep_embedding")]
Model = Annotated[str | None, shared("model")]
Endpoint = Annotated[str | None, shared("endpoint")]
DemoEndpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="ENDPOINT",
        show_default=False,
        help="Use this running server of the embedded model (tsqp serve --dtype float32) instead of starting one.",
    ),
]
CurveKey = Annotated[str | None, shared("curve_key")]
CurveServer = Annotated[str | None, shared("curve_server")]
CurveClients = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        show_default=False,
        help="Directory of the public keys (*.key) of the clients that may come in. Default: $TSQP_CURVE_CLIENTS.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        show_default=False,
        help="cpu, cuda:0, ... Default: $LLAMA_GPU_DEVICE, else the first GPU, else the CPU.",
    ),
]
ServerDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar=_DTYPES,
        show_default=False,
        help="Precision the model is loaded in. Default: $LLAMA_DTYPE, else auto, the checkpoint's own.",
    ),
]
RunnerDtype = Annotated[str, shared("dtype")]
WireDtype = Annotated[str, shared("wire_dtype")]
MaxChunkBytes = Annotated[
    int | None,
    typer.Option(
        min=64,
        max=1 << 40,
        metavar="BYTES",
        show_default=False,
        help="Size of a ring's slot; a message of this size or more goes over ZeroMQ. "
        "Default: $TSQP_MAX_SHM_CHUNK_BYTES, else 10 MiB.",
    ),
]
MaxChunks = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        metavar="N",
        show_default=False,
        help="Slots per ring. Default: $TSQP_SHM_MAX_CHUNKS, else 10.",
    ),
]
MaxClients = Annotated[int, typer.Option(min=1, metavar="N", help="Runners connected at the same time.")]
Threads = Annotated[int | None, shared("threads")]
KvLimitBytes = Annotated[
    int | None,
    typer.Option(min=0, metavar="BYTES", show_default=False, help="K and V kept per runner at most. Default: 4 GiB."),
]
LimitSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="NAME=NUMBER",
        show_default=False,
        help="What one runner may take, as in --limit unread_bytes=1G; may be given more than once.",
    ),
]
Batching = Annotated[bool, typer.Option(help="Compute requests of several runners together where that is faster.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the layers' MLPs (torch.compile); takes a minute.")]
LinearBackend = Annotated[
    str,
    typer.Option(metavar="auto|torch|onednn", help="How linear modules are computed on a CPU; auto: what is faster."),
]
PackWeights = Annotated[
    bool | None,
    typer.Option(show_default=False, help="oneDNN's own layout of weights. Default: of those no two modules share."),
]
CpuLatencyUs = Annotated[int | None, shared("cpu_latency_us")]
Status = Annotated[
    bool, typer.Option("--status", help="Let your own user ask for the figures of all clients (tsqp top).")
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=65535,
        metavar="PORT",
        show_default=False,
        help="Serve the figures of all clients as Prometheus text on 127.0.0.1, to every user of this machine.",
    ),
]
MaxNewTokens = Annotated[int, shared("max_new_tokens")]
Prompt = Annotated[str, shared("prompt")]
DemoPrompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", show_default=False, help="Text to continue instead of the built-in one."),
]
Sample = Annotated[bool, shared("sample")]
Temperature = Annotated[float | None, shared("temperature")]
Seed = Annotated[int | None, shared("seed")]
Stats = Annotated[bool, shared("stats")]
PerfLog = Annotated[str | None, shared("perf_log")]
TrustedWeights = Annotated[str | None, shared("trusted_weights")]
TrustedDigest = Annotated[str | None, shared("trusted_digest")]
TrustOut = Annotated[str, typer.Option("--out", metavar="FILE", show_default=False, help="The file to write.")]
WithEmbedding = Annotated[bool, typer.Option("--embedding", help="Write the embedding tables, too.")]
Tokens = Annotated[int, typer.Option(min=1, metavar="N", help="Length of the prompt.")]
Repeat = Annotated[int, typer.Option(min=1, metavar="N", help="Timed runs, after one that is not counted.")]
Yes = Annotated[bool, typer.Option("--yes", help="Remove them; without this they are only listed.")]
Timeout = Annotated[
    float, typer.Option(min=0.001, metavar="SECONDS", help="How long connecting and the computation may take together.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]
Echo = Annotated[bool, typer.Option(help="Send tensors through a ring for a second, to another process and back.")]
Interval = Annotated[float, typer.Option(min=0.05, max=86400, metavar="SECONDS", help="Time between two looks.")]
Once = Annotated[bool, typer.Option("--once", help="Show one interval and leave.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one line of JSON per interval instead.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV instead.")]
Logs = Annotated[list[str], typer.Argument(metavar="LOG...", show_default=False, help="Files of --perf-log.")]
Compare = Annotated[bool, typer.Option("--compare", help="Two logs: the first is before, the second after.")]
Top = Annotated[int, typer.Option(min=1, metavar="N", help="How many of the slowest and largest calls are listed.")]
Plot = Annotated[
    str | None,
    typer.Option(metavar="FILE", show_default=False, help="Draw a picture to FILE: .png, .svg, or .html with tables."),
]
Trace = Annotated[
    str | None,
    typer.Option(metavar="FILE", show_default=False, help="Write a timeline to FILE (.json), for ui.perfetto.dev."),
]
ForwardNumber = Annotated[
    int | None,
    typer.Option(
        "--forward", metavar="N", show_default=False, help="Whose timeline --plot draws. Default: the median decode's."
    ),
]
