"""One-way stream of 1 MB messages beside what one core's memcpy moves at that size."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from .peers import started, taking_turn
from .peers_tsqp import Tsqp
from .report import figure, size_text
from .setting import Setting, in_turn, median, no_garbage_collection, random_tensor

NBYTES = 1 << 20
BURST = 256
ROUNDS = 8
SECONDS_PER_TURN = 0.4
MEMCPY, RECV, LEASE = "memcpy", "recv", "lease"
TITLES = {
    MEMCPY: "memcpy of one core, warm buffers",
    RECV: "tsqp, received into private memory",
    LEASE: "tsqp, received as a lease (read in the slot)",
}


def bandwidth(call: Callable[[], Any], nbytes: int, seconds: float) -> list[float]:
    """GB/s of each `call`, which moves `nbytes`, for `seconds`."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        found.append(nbytes / (time.perf_counter() - begin) / 1e9)
    return found


def memcpy_burst(nbytes: int, count: int) -> Callable[[], None]:
    """Copies the same `nbytes` to the same place `count` times."""
    source = np.random.default_rng(0).random(nbytes // 4, dtype=np.float32)
    target = np.empty_like(source)

    def burst() -> None:
        for _ in range(count):
            np.copyto(target, source)

    return burst


def run(setting: Setting) -> dict[str, Any]:
    tensor = random_tensor(NBYTES, seed=0)
    samples: dict[str, list[list[float]]] = {key: [] for key in TITLES}
    copy, seconds = memcpy_burst(NBYTES, BURST), setting.seconds(SECONDS_PER_TURN)
    with started([Tsqp], setting.server_core) as peers, setting.pinned(), setting.part(ROUNDS * len(TITLES)):
        (running,) = peers
        for key in in_turn(list(TITLES), ROUNDS):
            setting.step(TITLES[key])
            with no_garbage_collection():
                if key == MEMCPY:
                    samples[key].append(bandwidth(copy, BURST * NBYTES, seconds))
                    continue
                with taking_turn(running) as peer:

                    def burst(peer: Any = peer, lease: bool = key == LEASE) -> None:
                        peer.stream(tensor, BURST, lease)

                    burst()
                    samples[key].append(bandwidth(burst, BURST * NBYTES, seconds))
    figures = {key: median([rate for turn in found for rate in turn]) for key, found in samples.items()}
    turns = {key: [median(turn) for turn in found] for key, found in samples.items()}
    return {
        "nbytes": NBYTES,
        "messages_per_burst": BURST,
        "titles": TITLES,
        "gb_per_s": figures,
        "of_memcpy": {key: figures[key] / figures[MEMCPY] for key in (RECV, LEASE)},
        "bursts": {key: sum(map(len, found)) for key, found in samples.items()},
        "rounds": {"gb_per_s": turns, "of_memcpy": {key: _shares(turns[key], turns[MEMCPY]) for key in (RECV, LEASE)}},
    }


def _shares(ways: list[float], copies: list[float]) -> list[float]:
    return [way / copy for way, copy in zip(ways, copies, strict=True)]


def tables(result: dict[str, Any]) -> list[Table]:
    table = Table(title=f"One-way stream of {size_text(result['nbytes'])} messages", title_justify="left")
    for column in ("", "GB/s", "of memcpy"):
        table.add_column(column, justify="left" if not column else "right")
    for key, value in result["gb_per_s"].items():
        share = result["of_memcpy"].get(key)
        table.add_row(result["titles"][key], figure(value), "" if share is None else f"{share:.2f}")
    return [table]
