"""What the number of slots changes at 1 MB: echoes, which need one, and streams, which fill them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from .echo import verify
from .peers import started, taking_turn
from .peers_tsqp import TsqpSlots
from .report import Samples, figure, size_text
from .setting import Setting, in_turn, median, no_garbage_collection, random_tensor, timed_calls
from .stream import BURST, bandwidth

COUNTS = (1, 2, 4, 8, 16, 32)
NBYTES = 1 << 20
ROUNDS = 4
SECONDS_PER_TURN = 0.2
WARMUP_S = 0.02


def run(setting: Setting, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    tensor, seconds = random_tensor(NBYTES, seed=0), setting.seconds(SECONDS_PER_TURN)
    echoes: dict[int, Samples] = {count: Samples() for count in counts}
    streams: dict[int, list[float]] = {count: [] for count in counts}
    wanted = [functools.partial(TsqpSlots, count=count) for count in counts]
    with started(wanted, setting.server_core) as peers, setting.pinned(), setting.part(ROUNDS * len(peers)):
        for running in in_turn(peers, ROUNDS):
            with taking_turn(running) as taken, no_garbage_collection():
                peer: Any = taken
                count = peer.slots["max_chunks"]
                setting.step(f"{count} slots")
                verify(peer, NBYTES, seed=count)

                def echo(peer: Any = peer) -> None:
                    peer.echo(tensor)

                def burst(peer: Any = peer) -> None:
                    peer.stream(tensor, BURST, lease=False)

                timed_calls(echo, WARMUP_S, [])
                timed_calls(echo, seconds, echoes[count].turn())
                streams[count] += bandwidth(burst, BURST * NBYTES, seconds)
    return {
        "nbytes": NBYTES,
        "counts": list(counts),
        "echo": {str(count): samples.as_json() for count, samples in echoes.items()},
        "stream_gb_per_s": {str(count): median(found) for count, found in streams.items()},
    }


def tables(result: dict[str, Any]) -> list[Table]:
    title = f"Cost over the number of slots, {size_text(result['nbytes'])} messages"
    table = Table(title=title, title_justify="left")
    for column in ("slots", "echo median µs", "echo p99 µs", "stream GB/s"):
        table.add_column(column, justify="right")
    for count, echo in result["echo"].items():
        rate = figure(result["stream_gb_per_s"][count])
        table.add_row(count, figure(echo["median_us"]), figure(echo["p99_us"]), rate)
    return [table]
