"""Rounds of the inference benchmark: stock and one split model in turn, and what the split's counters say of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import tsqp
from tsqp.tracing import Recorder

from . import baselines, memory
from .inference_ends import End, Ends
from .inference_model import Timed
from .setting import median

TIMEOUT_S = 300.0
#: What a split model's client counts.
COUNTERS = ("round_trips", "shm_transfers", "zmq_transfers", "shm_bytes", "zmq_bytes")


@dataclass(frozen=True)
class Contestant:
    """A split model: one of tsqp's placements, or a baseline."""

    key: str
    title: str
    make: Callable[[Ends], Any]


def contestants(placements: Sequence[str], baseline_keys: Sequence[str]) -> list[Contestant]:
    """Those to be measured, in the order of the tables."""

    def split(placement: str) -> Callable[[Ends], Any]:
        return lambda ends: tsqp.from_pretrained(
            None, endpoint=ends.endpoint, placement=placement, timeout=TIMEOUT_S, connect_timeout=60.0
        )

    def baseline(key: str) -> Callable[[Ends], Any]:
        return lambda ends: baselines.connect(key, ends.addresses[key])

    ours = [Contestant(name, name, split(name)) for name in placements]
    return ours + [Contestant(key, baselines.TITLES[key], baseline(key)) for key in baseline_keys]


@contextmanager
def connected(contestant: Contestant, ends: Ends) -> Iterator[tuple[Timed, Any]]:
    """The split model, timed, and its client."""
    model = contestant.make(ends)
    client = model.tsqp_client
    timed = Timed(model, "cpu")
    try:
        yield timed, client
    finally:
        timed.forget()
        model.close()
        client.close()


@dataclass(frozen=True)
class Count:
    """A client's counters, and seconds.

    ``server_s`` is the server's computing as its replies say, ``calls_s`` the time in which a call was under way, one
    or several together. The runner's own operators may be busy meanwhile; what is left of a forward is theirs alone.
    """

    counters: dict[str, int]
    server_s: float
    calls_s: float

    @classmethod
    def of(cls, client: Any) -> Count:
        stats = client.stats
        remote = [row for name, row in stats["operators"].items() if name.startswith("gpu_")]
        return cls(
            {name: stats[name] for name in COUNTERS},
            sum(row["server_seconds"] for row in remote),
            stats["busy_seconds"],
        )

    def __sub__(self, before: Count) -> Count:
        return Count(
            {name: self.counters[name] - before.counters[name] for name in COUNTERS},
            self.server_s - before.server_s,
            self.calls_s - before.calls_s,
        )


@dataclass
class Phase:
    """Prefill or decode: seconds per forward of stock and split, one entry a round, and every forward of the split
    with what was counted in it.
    """

    stock_s: list[float] = field(default_factory=list)
    split_s: list[float] = field(default_factory=list)
    forwards: list[tuple[float, Count]] = field(default_factory=list)

    def add(self, forwards: list[tuple[float, Count]]) -> None:
        """One round of the split."""
        self.split_s.append(median([seconds for seconds, _ in forwards]))
        self.forwards += forwards

    def middle(self, of: Callable[[float, Count], float]) -> float:
        """The median over all forwards of something reckoned from seconds and counts."""
        return median([of(seconds, count) for seconds, count in self.forwards])

    def per_trip_us(self, seconds: Callable[[float, Count], float]) -> float:
        return 1e6 * self.middle(lambda spent_s, count: seconds(spent_s, count) / count.counters["round_trips"])

    def as_json(self) -> dict[str, Any]:
        last = self.forwards[-1][1].counters
        return {
            "stock_ms": median(self.stock_s) * 1e3,
            "split_ms": median(self.split_s) * 1e3,
            "ratio": median([split / stock for split, stock in zip(self.split_s, self.stock_s, strict=True)]),
            **last,
            "ring_share": last["shm_bytes"] / max(1, last["shm_bytes"] + last["zmq_bytes"]),
            **self.parts_ms(),
            "overhead_us_per_trip": self.per_trip_us(lambda spent_s, count: spent_s - count.server_s),
            "call_overhead_us_per_trip": self.per_trip_us(lambda _, count: count.calls_s - count.server_s),
            "stock_s": self.stock_s,
            "split_s": self.split_s,
        }

    def parts_ms(self) -> dict[str, float]:
        """Where the split's time goes: the server's computing, calls but for that, the runner alone."""
        return {
            "server_ms": 1e3 * self.middle(lambda _, count: count.server_s),
            "wire_ms": 1e3 * self.middle(lambda _, count: count.calls_s - count.server_s),
            "runner_ms": 1e3 * self.middle(lambda spent_s, count: spent_s - count.calls_s),
        }


class Parity:
    """What stock computes for the prompt, and how far a split model is from it."""

    def __init__(self, stock: End, ids: Tensor, steps: int) -> None:
        self._ids, self._steps = ids, steps
        self.tokens, self._logits = stock.call("logits", ids, steps)

    def compare(self, timed: Timed) -> dict[str, Any]:
        """Feeds the split model stock's tokens, so that one that differs does not make all later ones differ."""
        tokens, logits = timed.logits(self._ids, self._steps, self.tokens)
        return {
            "logit_difference": float((logits - self._logits).abs().max() / self._logits.abs().max()),
            "tokens_equal": int((tokens == self.tokens).sum()),
            "tokens": len(self.tokens),
        }


@dataclass(frozen=True)
class Job:
    """What every contestant of a run does; tsqp's own leave a timeline in ``trace_of(key)`` where that is given."""

    ids: Tensor
    steps: int
    rounds: int
    step: Callable[[str], None]
    trace_of: Callable[[str], Path] | None = None


def measure(contestant: Contestant, ends: Ends, job: Job, parity: Parity) -> dict[str, Any]:
    """Stock and the split model in turn, ``job.rounds`` times, after one pass of both that compares their logits.

    Peaks of memory are of these rounds alone where the kernel lets them be reset.
    """
    prefill, decode = Phase(), Phase()
    tokens = parity.tokens[: job.steps]
    memory.give_back()
    pids = {"runner": os.getpid(), "server": ends.server.pid, "stock": ends.stock.pid}
    with connected(contestant, ends) as (timed, client):
        compared = parity.compare(timed)
        resets = [memory.reset_peak(pid) for pid in pids.values()]
        for number in range(job.rounds):
            job.step(f"{contestant.title}, round {number + 1} of {job.rounds}")
            prefill.stock_s.append(ends.stock.call("prefill", job.ids))
            decode.stock_s.append(median(ends.stock.call("decode", tokens)))
            ends.stock.call("forget")
            measure_split(timed, client, job.ids, tokens, (prefill, decode))
        peaks = {name: memory.peak_bytes(pid) for name, pid in pids.items()}
        if job.trace_of is not None and contestant.key not in baselines.TITLES:
            trace(timed, client, job.ids, tokens[:1], job.trace_of(contestant.key))
    return {
        "title": contestant.title,
        "baseline": contestant.key in baselines.TITLES,
        **compared,
        "prefill": prefill.as_json(),
        "decode": decode.as_json(),
        "peak_bytes": peaks,
        "peaks_were_reset": all(resets),
    }


def measure_split(timed: Timed, client: Any, ids: Tensor, tokens: Tensor, phases: tuple[Phase, Phase]) -> None:
    """One round of the split model."""
    prefill, decode = phases
    prefill.add([counted(client, lambda: timed.prefill(ids))])
    decode.add([counted(client, lambda token=token: timed.decode(token)[0]) for token in tokens.split(1)])
    timed.forget()


def trace(timed: Timed, client: Any, ids: Tensor, tokens: Tensor, path: Path) -> None:
    """Writes the timeline of one more prefill and of a step for each of ``tokens``."""
    recorder = Recorder()
    client.trace(recorder)
    try:
        timed.prefill(ids)
        timed.decode(tokens)
    finally:
        client.trace(None)
        timed.forget()
    path.parent.mkdir(parents=True, exist_ok=True)
    recorder.save(path)


def counted(client: Any, forward: Callable[[], float]) -> tuple[float, Count]:
    """A forward's seconds and what the client counted in it."""
    before = Count.of(client)
    seconds = forward()
    return seconds, Count.of(client) - before


def run(ends: Ends, wanted: Sequence[Contestant], job: Job, found: dict[str, Any]) -> None:
    """All contestants, one after the other, each in turn with stock; added to ``found`` as they come."""
    parity = Parity(ends.stock, job.ids, job.steps)
    for contestant in wanted:
        found[contestant.key] = measure(contestant, ends, job, parity)
