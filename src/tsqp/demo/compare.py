"""The demo itself: one prompt through the split model and through stock transformers, compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..client import GPUClient
from ..errors import ConfigError
from ..placement import Placement
from ..protocol import PROTECTION_LINE
from ..split import from_pretrained
from ..telemetry import format_bytes, format_seconds
from . import model_path
from .server_process import ServerProcess

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Generated:
    """One greedy generation: ids int64 [prompt + new], logits float32 [new, vocab], seconds of the whole."""

    ids: torch.Tensor
    logits: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """The split run beside the stock run of one prompt; ``stats`` are the runner's transfer statistics."""

    placement: Placement
    text: str
    prompt_tokens: int
    split: Generated
    stock: Generated
    prefill_trips: int
    total_trips: int
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def new_tokens(self) -> int:
        """Tokens the split model generated."""
        return len(self.split.logits)

    @property
    def tokens_equal(self) -> bool:
        """Whether both runs gave the same tokens."""
        return torch.equal(self.split.ids, self.stock.ids)

    @property
    def max_abs_diff(self) -> float:
        """Largest difference of two logits, over the steps up to the first unequal token."""
        steps = self._comparable_steps()
        return (self.split.logits[:steps] - self.stock.logits[:steps]).abs().max().item()

    @property
    def logit_scale(self) -> float:
        """Largest absolute logit of the stock run."""
        return self.stock.logits.abs().max().item()

    def _comparable_steps(self) -> int:
        """Steps in which both runs had seen the same tokens; later logits answer different questions."""
        steps = min(len(self.split.logits), len(self.stock.logits))
        ends = slice(self.prompt_tokens, self.prompt_tokens + steps)
        unequal = (self.split.ids[ends] != self.stock.ids[ends]).nonzero()
        return int(unequal[0]) + 1 if len(unequal) else steps


def run_demo(
    prompt: str, max_new_tokens: int, placement: Placement, progress: Progress, endpoint: str | None = None
) -> Comparison:
    """Generates with the embedded model, split over a server process, and with stock transformers; compares.

    One thread per process, float32, greedy. ``progress`` gets one line per phase. The server is stopped on
    return and on any exception. With ``endpoint`` it is one that runs already and goes on running; it has to serve the
    embedded model in float32 (ModelError, ConfigError).
    """
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_path(), local_files_only=True)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if endpoint is not None and placement.needs_server:
        progress(f"connecting to {endpoint}")
        with _demo_client(endpoint) as client:
            model = from_pretrained(model_path(), client=client, placement=placement)
            split, trips, stats = _run_split(model, inputs, max_new_tokens, progress)
    elif placement.needs_server:
        with ServerProcess(model_path()) as server:
            progress("starting a server process")
            with server.connect() as client:
                model = from_pretrained(client=client, placement=placement)
                split, trips, stats = _run_split(model, inputs, max_new_tokens, progress)
    else:
        model = from_pretrained(model_path(), placement=placement, dtype="float32")
        split, trips, stats = _run_split(model, inputs, max_new_tokens, progress)
    progress("generating with stock transformers in one process")
    stock = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32, local_files_only=True)
    return Comparison(
        placement=placement,
        text=tokenizer.decode(split.ids, skip_special_tokens=True),
        prompt_tokens=inputs["input_ids"].shape[1],
        split=split,
        stock=_generate(stock, inputs, max_new_tokens),
        prefill_trips=trips[0],
        total_trips=trips[1],
        stats=stats,
    )


def _demo_client(endpoint: str) -> GPUClient:
    client = GPUClient(endpoint)
    try:
        dtype = client.init().dtype
        if dtype != "float32":
            raise ConfigError(
                f"the server at {endpoint} computes in {dtype}, and the demo compares with float32; start it with "
                "tsqp serve --dtype float32"
            )
    except BaseException:
        client.close()
        raise
    return client


def _run_split(
    model: Any, inputs: Any, max_new_tokens: int, progress: Progress
) -> tuple[Generated, tuple[int, int], dict[str, Any]]:
    """A counted prefill, then a counted generation.

    Returns the generation, the round trips (of the prefill, of the generation) and the transfer statistics.
    """
    client = getattr(model, "tsqp_client", None)
    progress("generating with the split model")
    try:
        start = client.round_trips if client else 0
        with torch.no_grad():
            model(**inputs)
        prefilled = client.round_trips if client else 0
        split = _generate(model, inputs, max_new_tokens)
        end = client.round_trips if client else 0
        return split, (prefilled - start, end - prefilled), dict(client.stats) if client else {}
    finally:
        model.close()


def _generate(model: Any, inputs: Any, max_new_tokens: int) -> Generated:
    start = time.perf_counter()
    out = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - start
    return Generated(out.sequences[0], torch.cat([step.float() for step in out.logits]), seconds)


def print_comparison(result: Comparison, console: Console) -> None:
    """Prints what the demo showed, one fact a line."""

    def line(label: str, text: str) -> None:
        console.print(f"{label:<14}{text}", highlight=False, markup=False, soft_wrap=True)

    console.print(result.text, highlight=False, markup=False, style="bold", soft_wrap=True)
    console.print()
    verdict = "equal to" if result.tokens_equal else "DIFFERENT from"
    line("tokens", f"{result.new_tokens} new, {verdict} those of stock transformers in one process")
    relative = result.max_abs_diff / result.logit_scale
    line("logits", f"max abs difference {result.max_abs_diff:.1e}, {relative:.1e} of the logit scale")
    steps = result.new_tokens - 1
    per_token = f"{(result.total_trips - result.prefill_trips) / steps:g} per token" if steps else "no token after it"
    line("round trips", f"{result.prefill_trips} for the prefill of {result.prompt_tokens} tokens, {per_token}")
    stats = result.stats
    nbytes = {key: stats.get(f"{key}_bytes", 0) for key in ("shm", "zmq")}
    total = sum(nbytes.values()) or 1
    for key, label in (("shm", "ring"), ("zmq", "ZeroMQ")):
        count = stats.get(f"{key}_transfers", 0)
        line(
            label,
            f"{count} messages, {format_bytes(nbytes[key])} ({100 * nbytes[key] / total:.1f}% of the bytes)",
        )
    line("transport", str(stats.get("transport", "none")))
    line("placement", f"{result.placement}: {result.placement.summary}")
    per = [format_seconds(run.seconds / len(run.logits)) for run in (result.split, result.stock)]
    line("time", f"{per[0]} per token split, {per[1]} in one process (one thread each)")
    console.print(f"protection: {PROTECTION_LINE}", highlight=False, markup=False, soft_wrap=True)
