"""Two results of one benchmark beside each other: every figure before, now, and now as a multiple of before.

    python -m benchmarks.compare old.json new.json
    python -m benchmarks.compare old.json new.json --all         # also percentiles, parts of a time, the machine's own

Figures are matched by where they stand in the results. Where both runs measured a figure in several rounds, a `*` marks
a difference that is larger than the scatter of the rounds: by chance, rounds would lie so far apart in fewer than one
of a hundred comparisons (Mann and Whitney's rank test). It takes at least five rounds on both sides, and it says that
the runs differ, not why: another load of the machine marks figures just so.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tsqp.errors import TsqpError

from .arguments import plain_parser
from .report import NOTHING, figure, size_text

#: The benchmarks that keep results; what else a file calls itself is not compared.
KNOWN = ("transport", "kernels", "inference", "batching")
MOST_BYTES, MOST_LEVELS = 64 << 20, 30
#: By chance the rounds of equal runs lie as far apart as a marked figure's in fewer cases than this.
CHANCE = 0.01
#: Above so many pairs of rounds the normal approximation of the rank test serves.
_EXACT_PAIRS = 400
#: What a result says beside its figures.
_NO_FIGURES = {"machine", "options", "bars", "titles", "rounds", "skipped", "sizes_bytes"}
#: Levels of a result that say nothing a reader needs.
_STRUCTURE = {"parts", "runs", "splits", "cells", "sizes"}
#: What tells the entries of a list apart.
_IDENTITY = ("operator", "shape", "dtype", "threads")


class Unit(NamedTuple):
    """How a figure is named and read. ``less``: whether less is better; None where neither is."""

    name: str
    less: bool | None
    main: bool = True


#: By the end of the name; the first that fits holds. `main` figures are shown without `--all`, too.
UNITS: tuple[tuple[str, Unit], ...] = (
    (r"(?:p99|max|limit)_us", Unit("µs", True, main=False)),
    (r"(?:client|server)_cpu_us_per_message", Unit("µs", True, main=False)),
    (r"(?:server|wire|runner|floor|stock)_ms", Unit("ms", True, main=False)),
    (r"^(?:torch|reused|copy|copy past the caches)", Unit("µs", True, main=False)),
    (r"_us|_us_per_trip|_us_per_message", Unit("µs", True)),
    (r"_ms|^ms", Unit("ms", True)),
    (r"copies_alone_per_s|flops_per_s|bytes_per_s", Unit("/s", False, main=False)),
    (r"gb_per_s", Unit("GB/s", False)),
    (r"_per_s", Unit("/s", False)),
    (r"_percent", Unit("%", True)),
    (r"^ratio|max_over_min", Unit("x", True)),
    (r"times_torch|^gain", Unit("x", False)),
    (r"ring_share", Unit("share", False, main=False)),
    (r"of_bandwidth|of_memory|of_memcpy|of_peak", Unit("share", False)),
    (r"faults_per_message|copied_per_byte_delivered|^round_trips|logit_difference", Unit("", True, main=False)),
    (r"_transfers|_bytes|^peak_bytes", Unit("", None, main=False)),
)
_UNITS = tuple((re.compile(f"(?:{ending})$"), unit) for ending, unit in UNITS)
_NO_UNIT = re.compile(r"^(?:seconds|count)")


class ResultError(TsqpError):
    """A file is no result of a benchmark that could be compared."""


@dataclass(frozen=True)
class Figure:
    """One number of a result, and what its rounds gave where the result tells."""

    value: float
    unit: Unit
    rounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Change:
    """A figure of both results. ``beyond_scatter`` is None where there are too few rounds to tell."""

    key: tuple[str, ...]
    before: Figure
    now: Figure

    @property
    def ratio(self) -> float | None:
        return self.now.value / self.before.value if self.before.value else None

    @property
    def beyond_scatter(self) -> bool | None:
        return differs(self.before.rounds, self.now.rounds)

    @property
    def better(self) -> bool | None:
        """None where the figure is the same, or where neither direction is better."""
        if self.before.value == self.now.value or self.now.unit.less is None:
            return None
        return (self.now.value < self.before.value) is self.now.unit.less


# --- reading --------------------------------------------------------------------------------------------------


def load(path: Path, benchmark: str | None = None) -> dict[str, Any]:
    """A kept result, of ``benchmark`` where that is given; raises :class:`ResultError` for anything else."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ResultError(f"{path} is larger than any result of a benchmark; give a JSON file that one has kept")
        result = json.loads(path.read_text())
    except OSError as error:
        raise ResultError(f"{path} can't be read ({error.strerror}); give a file that a benchmark has kept") from None
    except (ValueError, RecursionError):
        raise ResultError(f"{path} is not JSON, or damaged; give a file that a benchmark has kept") from None
    if _deeper(result, MOST_LEVELS):
        raise ResultError(f"{path} is nested deeper than any result; give a file that a benchmark has kept")
    name = result.get("benchmark") if isinstance(result, dict) else None
    if name not in KNOWN:
        raise ResultError(f"{path} does not say which of {', '.join(KNOWN)} it is of; give a file that one has kept")
    if benchmark is not None and name != benchmark:
        raise ResultError(f"{path} is of the benchmark {name}; give a result of {benchmark} to compare with")
    if not any(figures(result)):
        raise ResultError(f"{path} holds no figures; give a result of a run that measured something")
    return dict(result)


def figures(result: Mapping[str, Any]) -> dict[tuple[str, ...], Figure]:
    """Every figure with a known unit, by where it stands."""
    return dict(_walk(result, (), None, None))


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and mappings lie in each other more than ``levels`` deep."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(one, levels - 1) for one in below)


def _walk(value: Any, key: tuple[str, ...], unit: Unit | None, rounds: Any) -> Iterator[tuple[tuple[str, ...], Figure]]:
    """The figures below ``value``; ``rounds`` mirrors it where an enclosing level keeps what the rounds gave."""
    if isinstance(value, dict):
        for name, below in value.items():
            if name not in _NO_FIGURES:
                mirrored = rounds.get(name) if isinstance(rounds, dict) else None
                kept = value.get("rounds")
                if isinstance(kept, dict) and name in kept:
                    mirrored = kept[name]
                yield from _walk(below, (*key, name), _unit(name) or unit, mirrored or _seconds(value, name))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            if isinstance(below, dict):
                yield from _walk(below, (*key, _identity(below) or str(number + 1)), unit, None)
    elif unit is not None and _is_number(value) and not _NO_UNIT.match(key[-1]):
        several = rounds if isinstance(rounds, list) and all(map(_is_number, rounds)) else ()
        yield key, Figure(float(value), unit, tuple(map(float, several)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unit(name: str) -> Unit | None:
    return next((unit for ending, unit in _UNITS if ending.search(name)), None)


def _identity(entry: Mapping[str, Any]) -> str:
    said = {name: str(entry[name]) for name in _IDENTITY if name in entry}
    if "threads" in said:
        said["threads"] += " thread" if said["threads"] == "1" else " threads"
    return " ".join(said.values())


def _seconds(level: Mapping[str, Any], name: str) -> list[float] | None:
    """The rounds of a forward's milliseconds, or of split / stock, from the seconds that stand beside it."""

    def beside(what: str) -> list[float]:
        listed = level.get(what)
        return listed if isinstance(listed, list) and all(map(_is_number, listed)) else []

    if name == "ratio":
        pairs = zip(beside("split_s"), beside("stock_s"), strict=False)
        return [split / stock for split, stock in pairs if stock]
    return [1e3 * one for one in beside(f"{name[:-3]}_s")] if name.endswith("_ms") else None


# --- judging --------------------------------------------------------------------------------------------------


def differs(before: Sequence[float], now: Sequence[float]) -> bool | None:
    """Whether two sets of rounds lie further apart than chance puts equal ones; None where they are too few to tell.

    The two-sided test of H. B. Mann and D. R. Whitney (1947), exact for few rounds.
    """
    pairs = len(before) * len(now)
    if not pairs or 2 / math.comb(len(before) + len(now), len(now)) >= CHANCE:
        return None
    above = sum((one < other) + 0.5 * (one == other) for one in before for other in now)
    far = max(above, pairs - above)
    if pairs > _EXACT_PAIRS:
        spread = math.sqrt(pairs * (len(before) + len(now) + 1) / 12)
        return math.erfc((far - pairs / 2 - 0.5) / spread / math.sqrt(2)) < CHANCE
    ways = [_orders(len(before), len(now), count) for count in range(pairs + 1)]
    return 2 * sum(ways[math.floor(far) :]) / sum(ways) < CHANCE


@cache
def _orders(ours: int, theirs: int, above: int) -> int:
    """In how many orders of both sets exactly ``above`` pairs have theirs above ours."""
    if above < 0 or above > ours * theirs:
        return 0
    if not ours or not theirs:
        return 1
    return _orders(ours, theirs - 1, above - ours) + _orders(ours - 1, theirs, above)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The figures of both results, in the order of ``now``."""
    old, new = figures(before), figures(now)
    return [Change(key, old[key], one) for key, one in new.items() if key in old]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each thing about machine, options and completeness that differs between the runs."""
    found = []
    for title in ("machine", "options"):
        old, new = (dict(_flat(result.get(title), ())) for result in (before, now))
        for key in [*old, *(key for key in new if key not in old)]:
            if old.get(key) != new.get(key) and "load_average" not in key:
                values = (_said(one.get(key)) for one in (old, new))
                found.append(f"{title} {' '.join(key)}: {next(values)} before, {next(values)} now")
    for word, result in (("earlier", before), ("later", now)):
        if result.get("interrupted"):
            found.append(f"the {word} run was cut short: {result['interrupted']}")
    return found


def _flat(value: Any, key: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _flat(below, (*key, name))
    elif key:
        yield key, value


def _said(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- showing --------------------------------------------------------------------------------------------------


def label(key: Sequence[str]) -> str:
    """Where a figure stands, as a reader says it: sizes as sizes, without levels that only hold others."""
    words = []
    for number, word in enumerate(key):
        sized = word.isdigit() and ("cells" in key[:number] or key[number - 1] == "sizes")
        if word not in _STRUCTURE:
            words.append(size_text(int(word)) if sized else word)
    return " ".join(words)


def show(before: Mapping[str, Any], now: Mapping[str, Any], console: Console, everything: bool = False) -> None:
    """Prints what differs about the runs, the table, and what only one of them has."""
    for line in differences(before, now):
        console.print(Text(line))
    found = [change for change in changes(before, now) if everything or change.now.unit.main]
    table = Table(title=f"{now['benchmark']}, compared", title_justify="left")
    for column in ("figure", "unit", "before", "now", "now / before", ""):
        table.add_column(column, justify="left" if column in ("figure", "unit") else "right", no_wrap=column != "")
    for change in found:
        table.add_row(*_row(change))
    if found:
        console.print(table)
    else:
        console.print("the results have no figure in common")
    console.print(Text(_summary(found)))
    for word, one, other in (("before", before, now), ("now", now, before)):
        _only(word, figures(one), figures(other), console, everything)


def _summary(found: Sequence[Change]) -> str:
    marked = [change for change in found if change.beyond_scatter]
    better, worse = (sum(change.better is way for change in marked) for way in (True, False))
    unknown = sum(change.beyond_scatter is None for change in found)
    return (
        f"{len(found)} figures; * more than the scatter of their rounds: {better} better, {worse} worse; "
        f"{unknown} have too few rounds to tell"
    )


def _row(change: Change) -> tuple[Text | str, ...]:
    ratio, mark = change.ratio, "*" if change.beyond_scatter else ""
    colour = {True: "green", False: "red", None: ""}[change.better] if mark else ""
    shown = Text(NOTHING if ratio is None else f"{ratio:.3f}", style=colour)
    values = (_digits(one.value) for one in (change.before, change.now))
    return Text(label(change.key)), change.now.unit.name, *values, shown, Text(mark, style=colour)


def _digits(value: float) -> str:
    """At least three digits, so that small differences show."""
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else figure(value)


def _only(
    word: str, mine: Mapping[Any, Figure], theirs: Mapping[Any, Figure], console: Console, everything: bool
) -> None:
    alone = [key for key, one in mine.items() if key not in theirs and (everything or one.unit.main)]
    if alone:
        console.print(Text(f"only {word}, {len(alone)} figures: {', '.join(label(key) for key in alone)}"))


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = plain_parser("compare", __doc__, prog)
    parser.add_argument("before", type=Path, metavar="OLD.json")
    parser.add_argument("now", type=Path, metavar="NEW.json")
    parser.add_argument("--all", action="store_true", dest="everything", help="every figure, not only the main ones")
    options = parser.parse_args(argv)
    try:
        before = load(options.before)
        now = load(options.now, before["benchmark"])
    except ResultError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    show(before, now, Console() if sys.stdout.isatty() else Console(width=140), options.everything)
    return 0


if __name__ == "__main__":
    sys.exit(main())
