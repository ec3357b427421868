"""What the transport promises, beside what a run measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .clients import after_peak
from .report import figure, median_ratio, median_us, size_text

Parts = dict[str, Any]
KB, MB = 1 << 10, 1 << 20
COPY_LIMIT, ICEORYX2, MULTIPART = "copies", "iceoryx2", "multipart"


@dataclass(frozen=True)
class Bar:
    """One promise; ``measured`` is None where the run has no figure for it."""

    text: str
    limit: float
    measured: float | None
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit

    def as_json(self) -> dict[str, Any]:
        return {
            "bar": self.text,
            "limit": self.limit,
            "at_most": self.at_most,
            "measured": self.measured,
            "met": self.met,
        }


def bars(parts: Parts) -> list[Bar]:
    """All promises of the parts that ran."""
    known: dict[str, Callable[[Any], Iterator[Bar]]] = {
        "echo": _echo,
        "stream": _stream,
        "rpc": _rpc,
        "idle": _idle,
        "clients": _clients,
    }
    found = [bar for part, judge in known.items() if part in parts for bar in judge(parts[part])]
    large = parts.get("large") or parts.get("echo")
    return found if large is None else found + list(_large(large))


def _worst(values: Sequence[float | None]) -> float | None:
    """The largest; None where one is missing."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _echo(result: Any) -> Iterator[Bar]:
    small = [nbytes for nbytes in result["sizes_bytes"] if nbytes <= KB]
    yield Bar("echo 64 B-1 KB, µs", 4.0, _worst([median_us(result, "tsqp", nbytes) for nbytes in small]))
    ratios = [median_ratio(result, "tsqp", ICEORYX2, nbytes) for nbytes in small]
    yield Bar("echo 64 B-1 KB, of iceoryx2", 0.5, _worst(ratios))
    for nbytes, limit in ((100 * KB, 1.6), (MB, 1.2), (5 * MB, 1.2)):
        yield Bar(
            f"echo {size_text(nbytes)}, of the copy limit", limit, median_ratio(result, "tsqp", COPY_LIMIT, nbytes)
        )
        yield Bar(f"echo {size_text(nbytes)}, of iceoryx2", 1.0, median_ratio(result, "tsqp", ICEORYX2, nbytes))


def _large(result: Any) -> Iterator[Bar]:
    for nbytes in (15 * MB, 64 * MB):
        ratio = median_ratio(result, "tsqp", MULTIPART, nbytes)
        yield Bar(f"echo {size_text(nbytes)} over ZeroMQ, of plain ZeroMQ multipart", 1.0, ratio)
    for nbytes in (15 * MB, 64 * MB):
        ratio = median_ratio(result, "tsqp-slots", COPY_LIMIT, nbytes)
        yield Bar(f"echo {size_text(nbytes)} in slots that hold it, of the copy limit", 1.3, ratio)


def _stream(result: Any) -> Iterator[Bar]:
    for way, title in (("recv", "into private memory"), ("lease", "as a lease")):
        yield Bar(f"stream of 1 MB {title}, of one core's memcpy", 0.8, result["of_memcpy"][way], at_most=False)


def _rpc(result: Any) -> Iterator[Bar]:
    for key in ("rpc-float32", "rpc-bfloat16"):
        yield Bar(f"RPC with 3 outputs, {result['titles'][key]}, µs", 15.0, result["round_trips"][key]["median_us"])


def _idle(result: Any) -> Iterator[Bar]:
    ours = {key: ends for key, ends in result["idle"].items() if key != "futex"}  # that one is the floor beside them
    longest = [max(ends.items(), key=lambda item: float(item[0])) for ends in ours.values()]
    for side in ("client", "server"):
        shares = [cell[f"{side}_cpu_percent"] for _, cell in longest]
        yield Bar(f"idle {longest[0][0]} s after traffic, {side}'s CPU %", 1.0, _worst(shares))
    for key, ends in ours.items():
        first = _worst([cell["first_message"]["median_us"] for cell in ends.values()])
        text = f"first message after idle, {key}, until it is there, µs (worst median of {len(ends)} lengths)"
        yield Bar(text, 150.0, first)


def _clients(result: Any) -> Iterator[Bar]:
    for nbytes, cells in result["sizes"].items():
        text = f"{min(result['counts'])}-{max(result['counts'])} clients, {size_text(int(nbytes))}"
        yield Bar(f"{text}: throughput from its peak on, of the peak", 0.9, after_peak(cells["of_peak"]), at_most=False)
        yield Bar(f"{text}: max/min share", 1.5, _worst(list(cells["max_over_min"].values())))


def table(found: Sequence[Bar]) -> Table:
    shown = Table(title="Bars", title_justify="left")
    for column in ("bar", "limit", "measured", "met"):
        shown.add_column(column, justify="left" if column == "bar" else "right")
    words = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "not measured"}
    for bar in found:
        measured = "" if bar.measured is None else figure(bar.measured)
        shown.add_row(bar.text, f"{'<=' if bar.at_most else '>='} {bar.limit:g}", measured, words[bar.met])
    return shown
