"""Whether one peer's echo is slower than another's: alternating pairs of short turns, and a confidence interval.

    python -m benchmarks.paired tsqp multipart --size 64MB --rounds 60

A machine's speed drifts by more than the difference looked for. The two turns of a round lie beside each other, each
peer first in every second round, so that drift and load hit both; the ratio is taken within each round. The interval
is the bootstrap's of the median ratio: it holds the true one in 95 of 100 runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import machine
from .arguments import plain_parser
from .echo import verify
from .peers import Running, started, taking_turn
from .report import size_text
from .setting import Setting, median, no_garbage_collection, random_tensor, timed_calls
from .transport import parse_size, registry

#: Echoes of a turn; the first is not counted: it finds what the other peer left in the caches.
TRIPS = 4
RESAMPLES = 4000


def turn_us(running: Running, tensor: torch.Tensor) -> float:
    """The median echo of one short turn, in µs."""
    samples: list[int] = []
    with taking_turn(running) as peer, no_garbage_collection():
        timed_calls(lambda: peer.echo(tensor), 0.0, samples, at_least=TRIPS)
    return median(samples[1:]) / 1000


def interval(ratios: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the median of `ratios`."""
    random = Random(seed)
    medians = sorted(median(random.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]


def compare(setting: Setting, keys: Sequence[str], nbytes: int, rounds: int) -> dict[str, Any]:
    """Times of both peers in every round, and the first one's as a share of the second's."""
    kinds = [registry()[key] for key in keys]
    tensor = random_tensor(nbytes, seed=0)
    times: tuple[list[float], list[float]] = ([], [])
    with started(kinds, setting.server_core) as peers, setting.pinned(), setting.part(rounds):
        for number, running in enumerate(peers):
            with taking_turn(running) as peer:
                verify(peer, nbytes, seed=number + 1)
        for number in range(rounds):
            setting.step(f"round {number + 1}")
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                times[which].append(turn_us(peers[which], tensor))
    ratios = [one / other for one, other in zip(*times, strict=True)]
    low, high = interval(ratios)
    return {
        "peers": list(keys),
        "nbytes": nbytes,
        "rounds": rounds,
        "median_us": [median(one) for one in times],
        "best_us": [min(one) for one in times],
        "ratio": median(ratios),
        "ratio_95": [low, high],
        "times_us": times,
    }


def table(result: dict[str, Any]) -> Table:
    one, other = result["peers"]
    shown = Table(title=f"Echo of {size_text(result['nbytes'])}, {result['rounds']} rounds", title_justify="left")
    for column in ("", one, other, f"{one} / {other}", "95% interval"):
        shown.add_column(column, justify="left" if not column else "right")
    low, high = result["ratio_95"]
    shown.add_row(
        "median µs", *(f"{us:.0f}" for us in result["median_us"]), f"{result['ratio']:.3f}", f"{low:.3f}-{high:.3f}"
    )
    best = result["best_us"]
    shown.add_row("best µs", *(f"{us:.0f}" for us in best), f"{best[0] / best[1]:.3f}", "")
    return shown


def verdict(result: dict[str, Any]) -> str:
    """What the interval allows to say."""
    one, other = result["peers"]
    low, high = result["ratio_95"]
    if low > 1:
        return f"{one} is slower than {other}, by {100 * (low - 1):.1f} to {100 * (high - 1):.1f} %"
    if high < 1:
        return f"{one} is faster than {other}, by {100 * (1 - high):.1f} to {100 * (1 - low):.1f} %"
    return f"no difference between {one} and {other} was seen that is larger than noise"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = plain_parser("paired", __doc__, prog)
    known = list(registry())
    parser.add_argument("peers", nargs=2, choices=known, metavar="PEER", help=", ".join(known))
    parser.add_argument("--size", type=parse_size, default=parse_size("64MB"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="where the result is kept")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    result = compare(Setting(machine.two_cores(), 1.0, console), options.peers, options.size, options.rounds)
    console.print(table(result))
    console.print(verdict(result))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine.describe(), **result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
