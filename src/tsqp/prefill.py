"""Times the prefill of a prompt: the forward that reads all its tokens at once, as generation begins with."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError
from .placement import Placement
from .telemetry import format_bytes, format_seconds

_SEED = 0


@dataclass(frozen=True)
class PrefillRuns:
    """Seconds of each run of ``tokens`` tokens; round trips, messages and bytes (both ways) of one run."""

    tokens: int
    seconds: list[float]
    round_trips: int
    shm_transfers: int = 0
    zmq_transfers: int = 0
    shm_bytes: int = 0
    zmq_bytes: int = 0


def time_prefill(model: Any, tokens: int, repeat: int) -> PrefillRuns:
    """Runs ``model`` on one random prompt ``1 + repeat`` times; the first, uncounted run warms caches up.

    Each run starts from an empty KV cache and computes the logits of the last token only, as ``generate()``
    does. Raises :class:`~tsqp.errors.ConfigError` for more tokens than the model has positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise ConfigError(f"{tokens} tokens asked for, but the model has {positions} positions; ask for at most these")
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    seconds = []
    _prefill(model, ids)
    before = _counters(model)
    for _ in range(repeat):
        start = time.perf_counter()
        _prefill(model, ids)
        seconds.append(time.perf_counter() - start)
    after = _counters(model)
    return PrefillRuns(tokens, seconds, **{name: (after[name] - before[name]) // repeat for name in after})


@torch.no_grad()
def _prefill(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


def _counters(model: Any) -> dict[str, int]:
    names = ("shm_transfers", "zmq_transfers", "shm_bytes", "zmq_bytes")
    client = getattr(model, "tsqp_client", None)
    if client is None:
        return dict.fromkeys(("round_trips", *names), 0)
    stats = client.stats
    return {"round_trips": client.round_trips, **{name: stats[name] for name in names}}


def format_prefill(runs: PrefillRuns, placement: Placement) -> str:
    """The lines ``tsqp prefill`` prints."""
    median, least = statistics.median(runs.seconds), min(runs.seconds)
    total = (runs.shm_bytes + runs.zmq_bytes) or 1
    rows = [
        ("prefill", f"{runs.tokens} tokens, placement {placement}, {len(runs.seconds)} runs"),
        ("median", f"{format_seconds(median)}, {runs.tokens / median:.0f} tokens/s"),
        ("min", f"{format_seconds(least)}, {runs.tokens / least:.0f} tokens/s"),
        ("round trips", f"{runs.round_trips} per prefill"),
    ]
    for label, count, nbytes in (
        ("ring", runs.shm_transfers, runs.shm_bytes),
        ("ZeroMQ", runs.zmq_transfers, runs.zmq_bytes),
    ):
        share = f"{100 * nbytes / total:.1f}% of the bytes"
        rows.append((label, f"{count} messages, {format_bytes(nbytes)} per prefill ({share})"))
    return "\n".join(f"{label:<14}{text}" for label, text in rows)
