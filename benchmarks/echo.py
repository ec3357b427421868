"""Round trips of one float32 tensor, private memory to private memory: times, CPU time, page faults and copies.

The peers take turns in short slices, several rounds for each size, so that noise hits all alike; a server is stopped
while it is not its turn. An echo is two messages: one to the server and one back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from .peers import Peer, Running, WrongAnswerError, started, taking_turn
from .report import Samples, cell_table, ratio_table, size_text
from .setting import Setting, in_turn, no_garbage_collection, random_tensor, timed_calls
from .usage import Usage, usage

ROUNDS = 5
WARMUP_S = 0.02
WARMUP_TRIPS = 20
MESSAGES_PER_ECHO = 2
TABLES = (
    ("median_us", "median µs"),
    ("p99_us", "99th percentile µs"),
    ("cpu_us_per_message", "CPU time per message, both processes together, µs"),
    ("faults_per_message", "minor page faults per message, both processes together"),
    ("copied_per_byte_delivered", "bytes copied per byte delivered (how: `copies` in the JSON)"),
)


@dataclass
class Cell:
    """Echoes of one peer at one size, and what they cost each process."""

    samples: Samples = field(default_factory=Samples)
    client: Usage = field(default_factory=Usage)
    server: Usage = field(default_factory=Usage)

    def as_json(self) -> dict[str, Any]:
        messages = MESSAGES_PER_ECHO * len(self.samples.ns)
        both = self.client + self.server
        return {
            **self.samples.as_json(),
            "cpu_us_per_message": both.cpu_ns / 1000 / messages,
            "client_cpu_us_per_message": self.client.cpu_ns / 1000 / messages,
            "server_cpu_us_per_message": self.server.cpu_ns / 1000 / messages,
            "faults_per_message": both.minor_faults / messages,
        }


def verify(peer: Peer, nbytes: int, seed: int) -> None:
    """One echo of data this peer has not seen; raises WrongAnswerError unless it comes back as it was."""
    tensor = random_tensor(nbytes, seed)
    result = peer.echo(tensor)
    if result.shape != tensor.shape or not torch.equal(result, tensor):
        raise WrongAnswerError(f"{peer.title} returned something else than the {size_text(nbytes)} it was sent")


def warm_up(peer: Peer, tensor: torch.Tensor) -> None:
    """The first trips after a pause find cold caches and waits that have unlearnt to spin."""
    end = time.perf_counter() + WARMUP_S
    for _ in range(WARMUP_TRIPS):
        peer.echo(tensor)
        if time.perf_counter() > end:
            return


def take_turn(running: Running, tensor: torch.Tensor, seconds: float, cell: Cell) -> None:
    with taking_turn(running) as peer:
        warm_up(peer, tensor)
        with no_garbage_collection():
            mine, theirs = usage(), _server_usage(running)
            timed_calls(lambda: peer.echo(tensor), seconds, cell.samples.turn())
            cell.client += usage() - mine
            cell.server += _server_usage(running) - theirs


def _server_usage(running: Running) -> Usage:
    return Usage() if running.pid is None else usage(running.pid)


def run_all(
    setting: Setting, peers: Sequence[Running], sizes: Sequence[int], seconds: float
) -> dict[str, dict[int, Cell]]:
    """All cells; within a size the peers take turns, each round in another order."""
    cells = {running.peer.key: {nbytes: Cell() for nbytes in sizes} for running in peers}
    with setting.part(len(sizes) * ROUNDS * len(peers)):
        for nbytes in sizes:
            tensor = random_tensor(nbytes, seed=0)
            for number, running in enumerate(peers):
                with taking_turn(running) as peer:
                    verify(peer, nbytes, seed=number + 1)
            for running in in_turn(peers, ROUNDS):
                setting.step(f"{size_text(nbytes):>6}  {running.peer.title}")
                take_turn(running, tensor, seconds / ROUNDS, cells[running.peer.key][nbytes])
    return cells


def run(setting: Setting, wanted: Sequence[type[Peer]], sizes: Sequence[int], seconds: float) -> dict[str, Any]:
    """Echoes of `wanted` at `sizes`, `seconds` for each cell."""
    skipped: dict[str, str] = {}
    with started(wanted, setting.server_core, skipped) as peers, setting.pinned():
        cells = run_all(setting, peers, sizes, seconds)
    kinds = {peer.key: peer for peer in wanted}
    return {
        "sizes_bytes": list(sizes),
        "seconds_per_cell": seconds,
        "titles": {key: kinds[key].title for key in cells},
        "cells": {key: _cells_as_json(kinds[key], by_size) for key, by_size in cells.items()},
        "copies": {key: _copies_as_json(kinds[key], sizes) for key in cells},
        "skipped": skipped,
    }


def _cells_as_json(peer: type[Peer], by_size: dict[int, Cell]) -> dict[str, dict[str, Any]]:
    found = {}
    for nbytes, cell in by_size.items():
        copies = peer.copies(nbytes)
        per_byte = None if copies is None else copies.per_byte_delivered
        found[str(nbytes)] = {**cell.as_json(), "copied_per_byte_delivered": per_byte}
    return found


def _copies_as_json(peer: type[Peer], sizes: Sequence[int]) -> dict[str, Any]:
    """How the copies were counted."""
    found = {}
    for nbytes in sizes:
        copies = peer.copies(nbytes)
        if copies is not None:
            request, reply = (copies.request_in, copies.request_out), (copies.reply_in, copies.reply_out)
            found[str(nbytes)] = {"request_in_out": request, "reply_in_out": reply, "why": copies.why}
    return found


def tables(result: dict[str, Any], bases: Sequence[str] = ("tsqp", "copies")) -> list[Table]:
    shown = [cell_table(result, f"Echo of one float32 tensor: {title}", name) for name, title in TABLES]
    return shown + [ratio_table(result, base) for base in bases if base in result["cells"]]
