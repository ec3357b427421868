"""The short table of a kept inference run.

python -m benchmarks.inference_summary results/gpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .report import figure, number_of


def table(result: dict[str, Any]) -> Table:
    """A row for each split model and dtype: milliseconds beside stock's and the floor."""
    options = result["options"]
    title = (
        f"{options['model']}, {number_of(options['layers'], 'layer')}, {options['tokens']} tokens, {options['device']}"
    )
    shown = Table(title=title, title_justify="left")
    for column in ("dtype", "", "prefill ms", "decode ms"):
        shown.add_column(column, justify="left" if column in ("dtype", "") else "right")
    for dtype, run in result["runs"].items():
        floors = run["floor_ms"]
        shown.add_row(dtype, "floor", figure(floors["prefill"]), figure(floors["decode"]))
        first = next(iter(run["splits"].values()))
        stock = (figure(first[phase]["stock_ms"]) for phase in ("prefill", "decode"))
        shown.add_row(dtype, "stock, in one process", *stock)
        for split in run["splits"].values():
            shown.add_row(dtype, split["title"], *(figure(split[phase]["split_ms"]) for phase in ("prefill", "decode")))
    return shown


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m benchmarks.inference_summary RESULT.json", file=sys.stderr)
        return 2
    result = json.loads(Path(argv[0]).read_text())
    console = Console()
    console.print(table(result))
    judged = [bar for bar in result["bars"] if bar["met"] is not None]
    missed = [bar for bar in judged if not bar["met"]]
    console.print(f"bars met: {len(judged) - len(missed)} of {len(judged)}", highlight=False)
    for bar in missed:
        limit = f"{'<=' if bar['at_most'] else '>='} {bar['limit']:g}"
        console.print(f"missed: {bar['bar']}: {figure(bar['measured'])}, promised {limit}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
