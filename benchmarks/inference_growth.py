"""How a prefill's time grows with the number of tokens and of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import memory
from .inference_ends import Ends, running
from .inference_limits import Peaks, work
from .inference_measure import Contestant, Phase, connected, counted
from .inference_model import SIZES, Spec, random_ids
from .report import number_of
from .setting import median

TOKENS = (128, 256, 512, 1024, 2048, 4096)
LAYERS = (1, 2, 4, 8)
ROUNDS = 3
#: A size is left out where the one before makes it likely that one forward takes longer than this.
LONGEST_S = 60.0
#: Of the memory that is free, what the scores of a layer may take: they are worked on in tiles, but a mask and a tile
#: not yet measured may be as large as all of them.
_SHARE_OF_MEMORY = 0.5
_COPIES_OF_SCORES = 2
STOCK = "stock"

Cells = dict[str, dict[str, dict[str, float]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which sizes are measured; each is told to ``step`` before."""

    tokens: Sequence[int]
    layers: Sequence[int]
    usual_tokens: int
    step: Callable[[str], None]


def run(spec: Spec, wanted: Sequence[Contestant], plan: Plan) -> dict[str, Any]:
    """Milliseconds and their parts for stock and each contestant, by size; ``skipped`` says what was left out."""
    skipped: dict[str, str] = {}
    found: dict[str, Any] = {
        "dtype": spec.dtype,
        "layers_of_tokens": spec.layers,
        "tokens_of_layers": plan.usual_tokens,
    }
    over_tokens: Cells = {}
    with running(spec, (), skipped) as ends:
        peaks: Peaks = ends.stock.call("peaks")
        for tokens in plan.tokens:
            _all(ends, wanted, spec, tokens, over_tokens, str(tokens), plan, skipped)
        peaks = peaks.better(ends.stock.call("peaks"))
    over_layers: Cells = {}
    for layers in plan.layers:
        deeper = dataclasses.replace(spec, layers=layers)
        with running(deeper, (), skipped) as ends:
            _all(ends, wanted, deeper, plan.usual_tokens, over_layers, str(layers), plan, skipped)
    floors = {
        "tokens": {str(tokens): 1e3 * work(spec, tokens, 0).floor_s(peaks) for tokens in plan.tokens},
        "layers": {
            str(layers): 1e3 * work(dataclasses.replace(spec, layers=layers), plan.usual_tokens, 0).floor_s(peaks)
            for layers in plan.layers
        },
    }
    return {**found, "tokens": over_tokens, "layers": over_layers, "floor_ms": floors, "skipped": skipped}


def _all(
    ends: Ends,
    wanted: Sequence[Contestant],
    spec: Spec,
    tokens: int,
    cells: Cells,
    size: str,
    plan: Plan,
    skipped: dict[str, str],
) -> None:
    """Stock and every contestant at one size."""
    ids = random_ids(spec, tokens)
    text = f"{number_of(spec.layers, 'layer')}, {tokens} tokens"

    def stock_s() -> float:
        seconds: float = ends.stock.call("prefill", ids)
        ends.stock.call("forget")
        return seconds

    plan.step(f"{text}: {STOCK}")
    stock_s()
    stock = [stock_s() for _ in range(ROUNDS)]
    cells.setdefault(STOCK, {})[size] = {"ms": 1e3 * median(stock)}
    for contestant in wanted:
        plan.step(f"{text}: {contestant.title}")
        by_size = cells.setdefault(contestant.key, {})
        reason = too_much(spec, tokens, by_size, cells[STOCK])
        if reason is not None:
            skipped[f"{contestant.key} with {text}"] = reason
            continue
        memory.give_back()
        with connected(contestant, ends) as (timed, client):
            timed.prefill(ids)
            phase = Phase()
            for _ in range(ROUNDS):
                phase.add([counted(client, lambda: timed.prefill(ids))])
        by_size[size] = {"ms": 1e3 * median(phase.split_s), **phase.parts_ms()}


def too_much(
    spec: Spec, tokens: int, measured: dict[str, dict[str, float]], stock: dict[str, dict[str, float]]
) -> str | None:
    """Why this size is left out, or None. ``stock`` has been measured at it, and grows as all do."""
    scores = SIZES[spec.size]["num_attention_heads"] * tokens**2 * spec.torch_dtype.itemsize
    free = available_bytes()
    if free is not None and scores * _COPIES_OF_SCORES > free * _SHARE_OF_MEMORY:
        return f"attention scores of {scores >> 20} MiB are too much for {free >> 20} MiB of free memory"
    if measured:
        last, now = list(measured)[-1], list(stock.values())[-1]["ms"]
        before = measured[last]["ms"] / 1e3
        if before * now / stock[last]["ms"] > LONGEST_S:
            return f"the size before took {before:.0f} s"
    return None


def available_bytes() -> int | None:
    """Memory a process could still have, as the kernel estimates it; None where it does not."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes else None
