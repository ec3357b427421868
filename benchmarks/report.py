"""Tables of echo times, and the file they are kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NOTHING = "-"


@dataclass
class Samples:
    """Durations in nanoseconds."""

    ns: list[int] = field(default_factory=list)

    def quantile_us(self, share: float) -> float:
        """Nearest-rank quantile in microseconds."""
        ordered = sorted(self.ns)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] / 1000

    @property
    def median_us(self) -> float:
        return self.quantile_us(0.5)

    @property
    def p99_us(self) -> float:
        return self.quantile_us(0.99)

    def as_json(self) -> dict[str, Any]:
        return {
            "median_us": round(self.median_us, 3),
            "p99_us": round(self.p99_us, 3),
            "max_us": round(max(self.ns) / 1000, 3),
            "count": len(self.ns),
        }


def size_text(nbytes: int) -> str:
    """64 -> '64 B', 1024 -> '1 KB', 5 << 20 -> '5 MB'."""
    for unit, factor in (("MB", 1 << 20), ("KB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:g} {unit}"
    return f"{nbytes} B"


def figure(value: float) -> str:
    if value < 100:
        return f"{value:.1f}"
    return f"{value:.0f}"


def ratio_text(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _table(result: Result, title: str, text: Callable[[str, int], str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for nbytes in result.sizes:
        table.add_column(size_text(nbytes), justify="right")
    for key in result.cells:
        table.add_row(result.titles[key], *(text(key, nbytes) for nbytes in result.sizes))
    return table


def _ratio_table(result: Result, base: str) -> Table:
    def text(key: str, nbytes: int) -> str:
        mine, theirs = result.median_us(key, nbytes), result.median_us(base, nbytes)
        return NOTHING if mine is None or not theirs else ratio_text(mine / theirs)

    return _table(result, f"Medians as multiples of: {result.titles[base]}", text)


def print_result(result: Result, console: Console, bases: Sequence[str]) -> None:
    """Medians and 99th percentiles in µs, then the medians as multiples of each of `bases`."""

    def text_of(quantile: Callable[[Cell], float]) -> Callable[[str, int], str]:
        def text(key: str, nbytes: int) -> str:
            cell = result.cells[key].get(nbytes)
            return number_text(quantile(cell)) if cell and cell.samples_ns else NOTHING

        return text

    where = "ends pinned to two cores" if result.pinned else "ends not pinned"
    console.print(_table(result, f"Echo of one float32 tensor, median µs ({where})", text_of(lambda c: c.median_us)))
    console.print(_table(result, "99th percentile µs", text_of(lambda c: c.p99_us)))
    for base in bases:
        if base in result.cells:
            console.print(_ratio_table(result, base))
    for title, reason in result.skipped.items():
        console.print(f"[yellow]SKIPPED {title}: {reason}[/yellow]")


def as_json(result: Result) -> Mapping[str, Any]:
    cells = {
        key: {
            str(nbytes): {
                "median_us": round(cell.median_us, 3),
                "p99_us": round(cell.p99_us, 3),
                "samples": len(cell.samples_ns),
            }
            for nbytes, cell in by_size.items()
            if cell.samples_ns
        }
        for key, by_size in result.cells.items()
    }
    return {
        "benchmark": "transport: echo of one float32 tensor, private memory to private memory",
        "machine": result.machine,
        "pinned": result.pinned,
        "seconds_per_cell": result.seconds_per_cell,
        "sizes_bytes": result.sizes,
        "titles": result.titles,
        "cells": cells,
        "skipped": result.skipped,
    }


def save(result: Result, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(result), indent=1, ensure_ascii=False) + "\n")
