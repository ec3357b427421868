"""Everything a report's picture shows, worked out from logs and not yet drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .analyze import only_zmq
from .perf_read import Log
from .report_calls import Bars, Forward, believable, by_phase, choose_forward, forwards_of, plain, stage_bars
from .report_spread import MAX_POINTS, Histogram, Throughput, histogram, throughput
from .report_timeline import Timeline, timeline_of, timeline_of_calls

_MAX_TITLE_CHARS = 60


@dataclass(frozen=True)
class Report:
    """The panels' data. ``timeline`` is None where the log does not say when calls began; ``notes`` say what is
    missing or left out, a sentence each.
    """

    title: str
    subtitle: str
    bars: list[Bars]
    timeline: Timeline | None
    throughput: Throughput
    histogram: Histogram
    notes: list[str]


def report_of(logs: Sequence[Log], forward: int | None = None) -> Report:
    """The report on ``logs``, each of which has a row at least.

    ``forward``: the number of the forward, of the first log, whose timeline is shown; None: the median decode step.
    Raises :class:`~tsqp.errors.ConfigError` where that one is not there.
    """
    logs, unbelievable = believable(logs)
    phases = by_phase(forwards_of(logs))
    chosen = choose_forward(phases, forward)
    timeline = timeline_of_calls(logs[0].rows) if chosen is None else timeline_of(*chosen)
    bars, rates = stage_bars(logs, phases), throughput(logs)
    return Report(
        title="Where the time goes: " + ", ".join(plain(Path(log.path).name, _MAX_TITLE_CHARS) for log in logs[:3]),
        subtitle=_subtitle(logs),
        bars=bars,
        timeline=timeline,
        throughput=rates,
        histogram=histogram(logs),
        notes=[*_missing(logs, phases, timeline, bars), *_left_out(logs, phases, timeline, rates, unbelievable)],
    )


def _subtitle(logs: Sequence[Log]) -> str:
    """What the logs say of model, placement and transport, and how many calls they hold."""
    header = {name.lower(): str(value) for name, value in logs[0].header.items()}
    named = (("", "model"), ("placement ", "placement"), ("", "transport"))
    words = [word + plain(header[name], _MAX_TITLE_CHARS) for word, name in named if name in header]
    calls = _count(sum(len(log.rows) for log in logs), "round trip")
    return "   |   ".join([*words, calls + (f" in {len(logs)} logs" if len(logs) > 1 else "")])


def _missing(
    logs: Sequence[Log], phases: Mapping[str, Sequence[Forward]], timeline: Timeline | None, bars: Sequence[Bars]
) -> Iterator[str]:
    """Columns the logs do not have, and what is therefore shown another way."""
    rows = [row for log in logs for row in log.rows]
    if not phases:
        yield "No Forward in the log: times are over all calls, not per forward."
    if all(found.by == "method" for found in bars):
        yield "No Layer in the log: times are by method."
    if any(row.compute_ms is None for row in rows):
        yield "No Compute and Queue in the log: waiting for a reply is not told apart from the server's computing."
    if timeline is None:
        yield "No Start in the log: there is no timeline."
    if any(row.carrier is None for log in logs if not only_zmq(log) for row in log.rows):
        yield "No Carrier in the log: throughput is not by carrier."


def _left_out(
    logs: Sequence[Log],
    phases: Mapping[str, Sequence[Forward]],
    timeline: Timeline | None,
    rates: Throughput,
    unbelievable: int,
) -> Iterator[str]:
    outside = sum(row.forward is None for log in logs for row in log.rows) if phases else 0
    if outside:
        yield f"Not in a forward, and therefore not in stages and timeline: {_count(outside, 'call')}."
    if timeline is not None and timeline.left_out:
        yield f"Timeline: the first {_count(timeline.calls, 'call')} of {timeline.calls + timeline.left_out:,}."
    if any(carrier.calls > len(carrier.points) for carrier in rates.carriers):
        yield f"{MAX_POINTS:,} points are drawn of each carrier; medians and histogram are of all calls."
    if unbelievable:
        yield f"Left out because its figures can't be true: {_count(unbelievable, 'call')}."
    bad = sum(log.bad for log in logs)
    if bad:
        yield f"Left out because it is no row: {_count(bad, 'line')}."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
