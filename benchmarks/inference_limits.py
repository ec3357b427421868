"""The least time a forward can take: its FLOPs and bytes over what the device was seen to do in this run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from tsqp.linear_backends import ONEDNN, PACKED, TORCH, working_products

from .inference_model import SIZES, Spec

#: Seconds spent on each peak, and calls at least; the best of all calls counts.
PEAK_S = 0.3
_CALLS = 4
#: Rows, inner size and columns of the matmul, and bytes to read: too many for a cache, but for the tiny model.
_MATMUL = {"cpu": (1024, 2048, 8192), "cuda": (8192, 8192, 8192), "tiny": (256, 256, 256)}
_BANDWIDTH_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30, "tiny": 16 << 20}
_LINK_BYTES = 256 << 20


@dataclass(frozen=True)
class Peaks:
    """``link_bytes_per_s``: between host and device, page-locked; None where they are one."""

    flops_per_s: float
    bytes_per_s: float
    link_bytes_per_s: float | None

    def better(self, other: Peaks) -> Peaks:
        """The higher of each: what was measured while the machine had other work is no peak."""
        link = None
        if self.link_bytes_per_s is not None and other.link_bytes_per_s is not None:
            link = max(self.link_bytes_per_s, other.link_bytes_per_s)
        return Peaks(max(self.flops_per_s, other.flops_per_s), max(self.bytes_per_s, other.bytes_per_s), link)

    def as_json(self) -> dict[str, float | None]:
        return asdict(self)


def measure_peaks(spec: Spec) -> Peaks:
    """The best matmul, and the best read or copy of memory too large for a cache, in this process."""
    device = torch.device(spec.device)
    kind = "tiny" if spec.size == "tiny" else device.type
    rows, inner, columns = _MATMUL[kind]
    a = torch.randn(rows, inner, device=device).to(spec.torch_dtype)
    b = torch.randn(columns, inner, device=device).to(spec.torch_dtype)
    matmul_s = min(_best(partial(product, a), device) for product in _products(b))
    source = torch.ones(_BANDWIDTH_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    reads = source.nbytes / _best(source.sum, device)
    copies = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    link = None
    if device.type == "cuda":
        pinned = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(pinned, device=device)
        link = pinned.nbytes / _best(lambda: there.copy_(pinned, non_blocking=True), device)
    return Peaks(2 * rows * inner * columns / matmul_s, max(reads, copies), link)


def _products(weight: torch.Tensor) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The ways a server may multiply by a weight."""
    columns, inner = weight.shape
    linear = torch.nn.Linear(inner, columns, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    ways = (TORCH, ONEDNN, PACKED) if weight.device.type == "cpu" else (TORCH,)
    return list(working_products(linear, ways).values())


def _best(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest call."""
    best, end, calls = float("inf"), time.perf_counter() + PEAK_S, 0
    while calls < _CALLS or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
        calls += 1
    return best


@dataclass(frozen=True)
class Work:
    """What a forward can't do without: FLOPs, and bytes of memory read or written once."""

    flops: float
    nbytes: float

    def floor_s(self, peaks: Peaks) -> float:
        return max(self.flops / peaks.flops_per_s, self.nbytes / peaks.bytes_per_s)


def work(spec: Spec, new: int, context: int) -> Work:
    """Of ``new`` tokens after ``context`` cached ones, logits of the last only; attention counted as causal.

    Bytes are those of the weights and of K and V, each once; activations could stay in a cache.
    """
    size = SIZES[spec.size]
    hidden, heads = size["hidden_size"], size["num_attention_heads"] * size["head_dim"]
    kv = size["num_key_value_heads"] * size["head_dim"]
    weights = spec.layers * hidden * (2 * heads + 2 * kv + 3 * size["intermediate_size"])
    head = hidden * size["vocab_size"]
    pairs = new * context + new * (new + 1) // 2
    flops = 2 * new * weights + 2 * head + spec.layers * 4 * heads * pairs
    elements = weights + head + spec.layers * 2 * kv * (context + new)
    return Work(flops, elements * spec.torch_dtype.itemsize)
