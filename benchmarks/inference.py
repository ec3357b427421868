"""Prefill and decode of a split model as a ratio to stock transformers in one process.

    python -m benchmarks.inference --layers 4 --tokens 1024 --dtype float32 --placement linear --placement ops

Builds a random model of LLaMA-3.2-1B's dimensions, the same one (by seed) in this process and in a server process,
and runs stock and split in turn with the same number of threads each, so that noise hits both alike. The ratio is
the median over rounds of split / in-process.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads: see the tuning notes in README

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tsqp

SEED = 20240607
PLACEMENTS = ("linear", "ops", "fused", "layer")
COLUMNS = ("placement", "phase", "stock ms", "split ms", "ratio", "trips", "ring MB", "zmq MB", "Δ logits")


def llama_config(layers: int, positions: int) -> LlamaConfig:
    """LLaMA-3.2-1B's dimensions with `layers` layers."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        num_hidden_layers=layers,
        vocab_size=128256,
        tie_word_embeddings=True,
        max_position_embeddings=max(131072, positions),
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    )


def build_model(layers: int, dtype: str, positions: int) -> LlamaForCausalLM:
    """The random model; equal in every process that calls this with the same arguments."""
    torch.manual_seed(SEED)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM._from_config(llama_config(layers, positions), dtype=getattr(torch, dtype))
    model = skeleton.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


def serve(endpoint: str, layers: int, dtype: str, positions: int, threads: int, ready: Connection) -> None:
    """The server process: ends when its parent says so or is gone."""
    torch.set_num_threads(threads)
    server = tsqp.GPUServer(build_model(layers, dtype, positions), endpoint, device="cpu", dtype=dtype)
    server.start()
    ready.send(server.endpoint)
    try:
        ready.recv()
    except EOFError:
        pass  # the parent died: stop as if it had said so
    server.stop()


@dataclass
class Cell:
    """One placement's rounds: seconds per run of stock and split, in the order they ran."""

    stock_s: list[float] = field(default_factory=list)
    split_s: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(b / a for a, b in zip(self.stock_s, self.split_s, strict=True))

    def as_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "stock_s": self.stock_s, "split_s": self.split_s}


@torch.inference_mode()
def time_prefill(model: Any, ids: torch.Tensor) -> tuple[float, DynamicCache]:
    """Seconds of one prefill as generate() does it: cache on, logits of the last position."""
    cache = DynamicCache(config=model.config)
    begin = time.perf_counter()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - begin, cache


@torch.inference_mode()
def time_decode(model: Any, cache: DynamicCache, steps: int) -> float:
    """Median seconds of one decode step after the prefill in `cache`."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        model(token, past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def snapshot(client: tsqp.GPUClient) -> dict[str, int]:
    """The client's counters."""
    names = ("shm_transfers", "zmq_transfers", "shm_bytes", "zmq_bytes")
    return {"round_trips": client.round_trips, **{name: client.stats[name] for name in names}}


def run_placement(args: argparse.Namespace, stock: Any, endpoint: str, placement: str, tick: Any) -> dict[str, Any]:
    """Interleaves stock and split for one placement."""
    ids = torch.randint(0, 128256, (1, args.tokens), generator=torch.Generator().manual_seed(1))
    prefill, decode = Cell(), Cell()
    counts: dict[str, dict[str, int]] = {}
    split = tsqp.from_pretrained(None, endpoint=endpoint, placement=placement, timeout=300.0)
    try:
        client = split.tsqp_client
        largest = compare_logits(stock, split, ids)
        for _ in range(args.repeat):
            seconds, cache = time_prefill(stock, ids)
            prefill.stock_s.append(seconds)
            decode.stock_s.append(time_decode(stock, cache, args.decode_steps))
            before = snapshot(client)
            seconds, cache = time_prefill(split, ids)
            middle = snapshot(client)
            prefill.split_s.append(seconds)
            decode.split_s.append(time_decode(split, cache, args.decode_steps))
            counts["prefill"] = {key: middle[key] - before[key] for key in before}
            after = snapshot(client)
            counts["decode"] = {key: (after[key] - middle[key]) // args.decode_steps for key in after}
            tick()
        operators = client.stats.get("operators")
    finally:
        split.close()
    return {
        "placement": placement,
        "logit_difference": largest,
        "prefill": prefill.as_dict() | counts["prefill"],
        "decode": decode.as_dict() | counts["decode"],
        "operators": operators,
    }


@torch.inference_mode()
def compare_logits(stock: Any, split: Any, ids: torch.Tensor) -> float:
    """Largest difference of the last logits relative to their scale; also the warm-up of both."""
    want = stock(ids, logits_to_keep=1).logits.float()
    got = split(ids, logits_to_keep=1).logits.float()
    return float((want - got).abs().max() / want.abs().max())


def report(results: list[dict[str, Any]], args: argparse.Namespace, console: Console) -> None:
    """The table people read."""
    table = Table(
        title=f"{args.layers} layers, {args.tokens} tokens, {args.dtype}, {args.threads} threads a side, "
        f"median of {args.repeat}"
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right", no_wrap=True)
    for row in results:
        for phase in ("prefill", "decode"):
            cell = row[phase]
            table.add_row(
                row["placement"],
                phase,
                f"{statistics.median(cell['stock_s']) * 1e3:.1f}",
                f"{statistics.median(cell['split_s']) * 1e3:.1f}",
                f"{cell['ratio']:.3f}",
                str(cell["round_trips"]),
                f"{cell['shm_bytes'] / 1e6:.1f}",
                f"{cell['zmq_bytes'] / 1e6:.1f}",
                f"{row['logit_difference']:.1e}" if phase == "prefill" else "",
            )
    console.print(table)


def run(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Starts the server, runs every placement, stops the server."""
    torch.set_num_threads(args.threads)
    positions = args.tokens + args.decode_steps + 1
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    with tempfile.TemporaryDirectory(prefix="tsqp-bench-") as directory:
        endpoint = f"ipc://{directory}/server.sock"
        arguments = (endpoint, args.layers, args.dtype, positions, args.threads, there)
        server = spawn.Process(target=serve, args=arguments, daemon=True)
        server.start()
        there.close()
        try:
            with console.status("building the model in both processes"):
                stock = build_model(args.layers, args.dtype, positions)
                here.recv()
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task("rounds", total=len(args.placement) * args.repeat)
                return [
                    run_placement(args, stock, endpoint, placement, lambda: progress.advance(task))
                    for placement in args.placement
                ]
        finally:
            here.close()
            server.join(30)
            if server.is_alive():
                server.kill()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="prompt length, and the context of decode")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--placement", action="append", choices=PLACEMENTS, help="may be repeated; default: all")
    parser.add_argument("--decode-steps", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5, help="rounds of stock and split in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads on each side")
    parser.add_argument("--json", type=Path, default=Path("results/inference.json"))
    args = parser.parse_args(argv)
    args.placement = args.placement or list(PLACEMENTS)
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark, prints the table, saves the JSON."""
    args = parse(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log file has no width of its own
    results = run(args, console)
    report(results, args, console)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}
    versions = {"transformers": transformers.__version__, "tsqp": tsqp.__version__}
    options = {key: value for key, value in vars(args).items() if key != "json"}
    args.json.write_text(json.dumps({**machine, **versions, "options": options, "results": results}, indent=1))
    console.print(f"saved {args.json}")


if __name__ == "__main__":
    main()
