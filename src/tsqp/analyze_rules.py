"""What to try, by rules on the figures of an :class:`~tsqp.analyze.Analysis`: each names the figure that triggered it.

A rule says what usually helps where that figure is high, not what will; measure again, and ``tsqp analyze --compare``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .analyze import Analysis, Stats, only_zmq

#: Share of all time in which tensors are written to slots and copied out.
MAX_COPYING_SHARE = 0.30
#: A model of 16 layers makes 34 with placement ``fused``, 66 with ``linear`` and 98 with ``ops``.
MAX_ROUND_TRIPS_PER_TOKEN = 40
#: Share of all bytes that go over ZeroMQ.
MAX_ZMQ_SHARE = 0.50
#: Share of all time that is neither computing nor copying: the way there and back, and waking up.
MAX_WAIT_SHARE = 0.40
#: Share of all time in which the server computes.
MAX_COMPUTE_SHARE = 0.50
#: Share of all time that requests wait for their turn at the server.
MAX_QUEUE_SHARE = 0.20
#: Share of all time spent waiting for a free slot, or in ZeroMQ's send.
MAX_SEND_SHARE = 0.20
#: p99 by p50 of one method's calls, where there are enough of them to speak of.
MAX_TAIL_RATIO = 20.0
MIN_CALLS_FOR_TAIL = 200
#: Share of all time in Recv, in a log that does not say what Recv is made of.
MAX_OPAQUE_RECV_SHARE = 0.50


@dataclass(frozen=True)
class Recommendation:
    """``figure`` is over ``limit``: what to try is ``advice``. ``rule`` is the rule's name."""

    rule: str
    measured: str
    figure: float
    limit: float
    advice: str

    def __str__(self) -> str:
        return f"{self.measured}: {self.advice}"


def recommend(found: Analysis) -> list[Recommendation]:
    """What the rules say, in their order."""
    return [advice for rule in _RULES for advice in rule(found)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _share(
    found: Analysis, rule: str, names: tuple[str, ...], limit: float, what: str, advice: str
) -> Iterator[Recommendation]:
    share = found.share(*names)
    if share > limit:
        yield Recommendation(
            rule, f"{what} {_percent(share)} of the time (limit {_percent(limit)})", share, limit, advice
        )


def _errors(found: Analysis) -> Iterator[Recommendation]:
    if found.errors:
        measured = f"{found.errors} of {found.total.count} calls were refused"
        advice = "look at their Status in the log and at the server's messages first"
        yield Recommendation("errors", measured, found.errors, 0, advice)


def _fewer_trips(found: Analysis) -> str:
    """The option that makes fewer round trips than the log has; empty where there is none."""
    if found.placements == ("layer",):
        return ""
    return "--placement layer" if found.placements == ("fused",) else "--placement fused"


def _copying(found: Analysis) -> Iterator[Recommendation]:
    fewer = _fewer_trips(found)
    advice = "send fewer bytes with --wire-dtype bfloat16" + (
        f", or in fewer round trips with {fewer}" if fewer else ""
    )
    names = ("serialize", "deserialize")
    yield from _share(found, "copying", names, MAX_COPYING_SHARE, "Serialize and Deserialize take", advice)


def _round_trips(found: Analysis) -> Iterator[Recommendation]:
    tokens = found.tokens
    if tokens is None or tokens.round_trips <= MAX_ROUND_TRIPS_PER_TOKEN or found.placements == ("layer",):
        return
    about = "about " if tokens.estimated else ""
    measured = f"{about}{tokens.round_trips:.0f} round trips per token (limit {MAX_ROUND_TRIPS_PER_TOKEN})"
    if found.placements == ("fused",):
        advice = "try --placement layer: one round trip per layer and two"
    else:
        advice = "try --placement fused: two round trips per layer and two, or --placement layer: one and two"
    yield Recommendation("round trips", measured, tokens.round_trips, MAX_ROUND_TRIPS_PER_TOKEN, advice)


def _zmq(found: Analysis) -> Iterator[Recommendation]:
    whole = sum(found.carried_kb.values())
    share = found.carried_kb.get("zmq", 0.0) / whole if whole else 0.0
    if share <= MAX_ZMQ_SHARE:
        return
    shared = [row for log in found.logs if not only_zmq(log) for row in log.rows]
    rows = [row for row in shared if row.carriers and "zmq" in row.carriers]
    if not rows:
        advice = "run both ends where they see one /dev/shm (tsqp serve and its clients on one host, no shm=False)"
    else:
        most = max(max(row.sent_kb, row.recv_kb) for row in rows)
        advice = (
            f"raise the threshold (tsqp serve --max-chunk-bytes {_next_power(most * 1024)}: the largest message has "
            f'{most:.0f} KB), or tile them through the ring (large="tile")'
        )
    measured = f"ZeroMQ carries {_percent(share)} of the bytes (limit {_percent(MAX_ZMQ_SHARE)})"
    yield Recommendation("zeromq", measured, share, MAX_ZMQ_SHARE, advice)


def _next_power(nbytes: float) -> int:
    """The power of two above ``nbytes``: a message has to be smaller than a slot."""
    return 1 << int(nbytes).bit_length()


def _waiting(found: Analysis) -> Iterator[Recommendation]:
    fewer = _fewer_trips(found)
    advice = (
        "overlap round trips with client.submit, " + (f"make fewer of them ({fewer}), " if fewer else "") + "and set "
        "OMP_WAIT_POLICY=passive at both ends, so that idle threads do not take the cores that work"
    )
    yield from _share(found, "waiting", ("wait",), MAX_WAIT_SHARE, "Wait (the way there and back) takes", advice)


def _compute(found: Analysis) -> Iterator[Recommendation]:
    advice = "a faster server: tsqp serve --device cuda:0, --dtype bfloat16, more --threads, another --linear-backend"
    yield from _share(found, "compute", ("compute",), MAX_COMPUTE_SHARE, "the server computes for", advice)


def _queue(found: Analysis) -> Iterator[Recommendation]:
    advice = "serve fewer clients at once, keep --batching on, or leave fewer requests in flight (max_in_flight)"
    yield from _share(
        found, "queue", ("queue",), MAX_QUEUE_SHARE, "requests wait for their turn at the server for", advice
    )


def _sending(found: Analysis) -> Iterator[Recommendation]:
    advice = "there is no free slot, or ZeroMQ is slow: more slots (tsqp serve --max-chunks), fewer requests in flight"
    yield from _share(found, "send", ("send",), MAX_SEND_SHARE, "Send takes", advice)


def _tail_ratio(stats: Stats) -> float:
    return stats.p99_ms / stats.p50_ms if stats.p50_ms else 0.0


def _tail(found: Analysis) -> Iterator[Recommendation]:
    often = {name: stats for name, stats in found.methods.items() if stats.count >= MIN_CALLS_FOR_TAIL}
    worst = max(often, key=lambda name: _tail_ratio(often[name]), default=None)
    if worst is None or _tail_ratio(often[worst]) <= MAX_TAIL_RATIO:
        return
    stats = often[worst]
    ratio = _tail_ratio(stats)
    measured = (
        f"the p99 of {worst} is {ratio:.0f} times its p50 ({stats.p99_ms:.3f} and {stats.p50_ms:.3f} ms; "
        f"limit {MAX_TAIL_RATIO:.0f} times)"
    )
    advice = (
        "something else takes the cores now and then: fewer --threads at both ends, or cores of their own (taskset)"
    )
    yield Recommendation("tail", measured, ratio, MAX_TAIL_RATIO, advice)


def _opaque(found: Analysis) -> Iterator[Recommendation]:
    if not found.recv_parts:
        advice = "log with tsqp's own --perf-log, which says how much of it is computing, queueing and waiting"
        what = "Recv, of which this log does not say what it is made of, takes"
        yield from _share(found, "opaque", ("recv",), MAX_OPAQUE_RECV_SHARE, what, advice)


_RULES: tuple[Callable[[Analysis], Iterator[Recommendation]], ...] = (
    _errors,
    _copying,
    _round_trips,
    _zmq,
    _waiting,
    _compute,
    _queue,
    _sending,
    _tail,
    _opaque,
)
