"""What a server tells whoever runs it about all its clients: counts and times, and nothing of what was computed.

Everything is read from counters the server keeps anyway; whoever reads them costs its clients nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .telemetry import TRANSFER_COUNTERS, Telemetry, sum_transfers

if TYPE_CHECKING:
    from .answering import Answering
    from .sessions import Session

_MB = 1e6
#: The counters of which :func:`rates` makes figures per second, of the server and of each client.
_COUNTERS = ("round_trips", "errors", *TRANSFER_COUNTERS)


def overview(answering: Answering, telemetry: Telemetry) -> dict[str, Any]:
    """Plain numbers of all clients together, and under ``per_client`` of each that is connected, in order.

    ``round_trips`` are the requests answered, refused ones included; ``waiting`` those that have come and were not
    begun (a tiled one counts as the slots it fills). Seconds: ``seconds`` since the server was made; ``busy_seconds``
    spent on requests; of the requests with an operator ``compute_seconds`` they were computed and ``queue_seconds``
    they waited for their turn; all three are added when a request ends.
    """
    sessions, past = answering.all_transfers()
    now = time.perf_counter_ns()
    clients = [_client(session, now) for session in sessions]
    counted = telemetry.snapshot()
    operators = counted["operators"].values()
    return {
        "seconds": counted["seconds"],
        "clients": len(clients),
        "round_trips": sum(counted["calls"].values()) + answering.errors,
        "errors": answering.errors,
        "joined_requests": answering.joined,
        "busy_seconds": answering.busy_ns / 1e9,
        "compute_seconds": sum(row["seconds"] for row in operators),
        "queue_seconds": sum(row["queue_seconds"] for row in operators),
        "waiting": sum(client["waiting"] for client in clients),
        "kv_bytes": sum(client["kv_bytes"] for client in clients),
        **sum_transfers([past, *clients]),
        "calls": counted["calls"],
        "operators": counted["operators"],
        "per_client": clients,
    }


def _client(session: Session, now: int) -> dict[str, Any]:
    channel = session.channel
    return {
        "client": channel.number,
        "peer": channel.peer,
        "age_seconds": (now - session.since_ns) / 1e9,
        "round_trips": session.requests,
        "errors": session.errors,
        "waiting": channel.waiting,
        "kv_bytes": session.kv_bytes,
        **channel.stats,
    }


def rates(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> dict[str, Any]:
    """``after`` with what happened since ``before``, an earlier :func:`overview` of the same server (None: since its
    start): ``interval_seconds``, ``round_trips_per_second``, ``shm_mb_per_second`` and ``zmq_mb_per_second`` (10^6
    bytes, both directions), of all and of each client; ``busy_share`` of the time spent on requests, and
    ``wait_share``: of the time between a request's coming and its result, the part it waited for its turn.

    A request counts when it ends, so one that is longer than the interval shows as all of it. None where a share is of
    nothing.
    """
    past = before or {}
    if past and (after["seconds"] < past["seconds"] or after["round_trips"] < past["round_trips"]):
        past = {}  # the server was started again
    seconds = after["seconds"] - past.get("seconds", 0.0)
    busy = after["busy_seconds"] - past.get("busy_seconds", 0.0)
    compute = after["compute_seconds"] - past.get("compute_seconds", 0.0)
    queue = after["queue_seconds"] - past.get("queue_seconds", 0.0)
    earlier = {client["client"]: client for client in past.get("per_client", ())}
    return {
        **after,
        "interval_seconds": seconds,
        **_per_second(past, after, seconds),
        "busy_share": min(1.0, busy / seconds) if seconds > 0 else None,
        "wait_share": queue / (queue + compute) if queue + compute > 0 else None,
        "per_client": [
            {**client, **_per_second(earlier.get(client["client"], {}), client, min(seconds, client["age_seconds"]))}
            for client in after["per_client"]
        ],
    }


def _per_second(before: Mapping[str, Any], after: Mapping[str, Any], seconds: float) -> dict[str, float]:
    gained = {name: after[name] - before.get(name, 0) for name in _COUNTERS}
    span = seconds if seconds > 0 else float("inf")
    return {
        "round_trips_per_second": gained["round_trips"] / span,
        "shm_mb_per_second": gained["shm_bytes"] / _MB / span,
        "zmq_mb_per_second": gained["zmq_bytes"] / _MB / span,
    }
