"""Where the server's computations lie on the runner's clock.

No timestamp crosses the border between the two: what the server does is known from the durations in its replies. Each
call bounds them: a computation cannot begin before its request was sent, nor end after its reply was there. As
round-trip clock synchronisation does (RFC 5905, section 8), the way there is taken to be as long as the way back;
where several calls were in flight, a computation begins after the one before it and leaves room for those behind it.

The server is not trusted. It may claim any duration; it is cut to what fits into its call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: For files and pages that show computations placed so.
ASSUMPTION = (
    "the server's clock is not known: within each round trip a computation is placed as if the way there took as long "
    "as the way back, after the computation before it and never outside of its round trip"
)


class Flight(NamedTuple):
    """One round trip: when the request was sent and when the reply was there, and the server's durations; any unit."""

    sent: float
    received: float
    compute: float
    queue: float


def place_computations(flights: Sequence[Flight]) -> list[tuple[float, float]]:
    """Begin and end of each flight's computation; ``flights`` in the order in which they were sent.

    Computations do not overlap, as one server computes one client's requests one after the other.
    """
    latest = [0.0] * len(flights)
    until = float("inf")
    for number in range(len(flights) - 1, -1, -1):
        until = latest[number] = min(flights[number].received, until) - flights[number].compute
    placed, busy_until = [], float("-inf")
    for flight, last in zip(flights, latest, strict=True):
        way = max(0, flight.received - flight.sent - flight.compute - flight.queue) / 2
        begin = min(flight.sent + way + flight.queue, last)
        begin = min(max(begin, flight.sent, busy_until), max(flight.received, flight.sent))
        end = max(begin, min(begin + flight.compute, flight.received))
        busy_until = max(busy_until, end)
        placed.append((begin, end))
    return placed
