"""What moved and what took how long: counters of both ends, and the tables that show them.

Times are taken as pairs of ``time.perf_counter_ns`` on one end's own clock; no timestamp crosses the border,
only durations do. Counting takes no lock: it is additions to the ints of a list. Two threads that add to the
same operator at the same moment may therefore lose one of the two additions; figures are for reading, not for
billing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .tables import Table

if TYPE_CHECKING:
    from rich.console import Console, Group

    # tracing knows the methods, and with them torch, which who only looks at figures does without
    from .tracing import Recorder

#: Operators with a time of their own: ``gpu_*`` run on the server, ``tee_*`` in the runner.
OPERATORS = (
    "gpu_embedding",
    "gpu_linear",
    "gpu_matmul",
    "gpu_lm_head",
    "gpu_fused_attention",
    "gpu_fused_mlp",
    "gpu_fused_layer",
    "tee_rmsnorm",
    "tee_rotary",
    "tee_softmax",
    "tee_silu",
    "tee_other",
)
#: The counters of a channel that add up over channels.
TRANSFER_COUNTERS = (
    "shm_transfers",
    "zmq_transfers",
    "shm_bytes",
    "zmq_bytes",
    "sent_messages",
    "received_messages",
    "sent_bytes",
    "received_bytes",
)
_MB = 1e6


class Measure:
    """Times one ``with`` block into one operator; made by :meth:`Telemetry.measure`, not reentrant."""

    __slots__ = ("_begin_ns", "_row")

    def __init__(self, row: list[int]) -> None:
        self._row = row
        self._begin_ns = 0

    def __enter__(self) -> Measure:
        self._begin_ns = time.perf_counter_ns()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._row[0] += 1
        self._row[1] += time.perf_counter_ns() - self._begin_ns


class Telemetry:
    """Calls per method and time per operator of one end.

    On the runner a ``gpu_*`` time is the round trip of the call, from its sending until its reply was read; the
    server's compute time and the time the request waited there, both from the reply header, are kept beside it.
    Calls in flight together each count in full. On the server a ``gpu_*`` time is the compute time itself, and
    what a request waited for its turn is kept beside it. ``tee_*`` is always local time.

    Who counts often asks for the row once, by :meth:`row` and :meth:`counter`, and adds to its ints.
    """

    __slots__ = ("_calls", "_rows", "_started_ns", "recorder")

    def __init__(self) -> None:
        #: Where each span is written down, too; see ``GPUClient.trace``.
        self.recorder: Recorder | None = None
        self._rows: dict[str, list[int]] = {name: [0, 0, 0, 0] for name in OPERATORS}
        self._calls: dict[str, list[int]] = {}
        self._started_ns = time.perf_counter_ns()

    def row(self, operator: str) -> list[int]:
        """The row of ``operator`` (one of :data:`OPERATORS`): calls, ns, ns of computing on the server, ns of
        waiting there.

        Raises ``KeyError`` for another name.
        """
        return self._rows[operator]

    def counter(self, method: str) -> list[int]:
        """The row of a remote method: calls."""
        return self._calls.setdefault(method, [0])

    def add(self, operator: str, ns: int, compute_ns: int = 0, queue_ns: int = 0) -> None:
        """Adds one call of ``operator`` (one of :data:`OPERATORS`) that took ``ns``; of that, it took the server
        ``compute_ns``, and ``queue_ns`` passed there before its turn.

        Raises ``KeyError`` for another name.
        """
        row = self._rows[operator]
        row[0] += 1
        row[1] += ns
        row[2] += compute_ns
        row[3] += queue_ns

    def count(self, method: str) -> None:
        """Counts one call of a remote method."""
        self.counter(method)[0] += 1

    def measure(self, operator: str) -> Measure:
        """A context manager that times its block into ``operator``; keep it and enter it again to save its making."""
        return Measure(self._rows[operator])

    def reset(self) -> None:
        """Sets every counter to zero; rows and :class:`Measure` objects handed out before stay valid."""
        for row in [*self._rows.values(), *self._calls.values()]:
            row[:] = [0] * len(row)
        self._started_ns = time.perf_counter_ns()

    def snapshot(self) -> dict[str, Any]:
        """Plain numbers: ``calls`` (method -> count), ``operators`` (name -> calls, seconds, server_seconds,
        queue_seconds), ``seconds``.

        ``seconds`` is the time since the start or the last :meth:`reset`. Operators never used are left out.
        """
        operators = {
            name: {
                "calls": row[0],
                "seconds": row[1] / 1e9,
                "server_seconds": row[2] / 1e9,
                "queue_seconds": row[3] / 1e9,
            }
            for name, row in self._rows.items()
            if row[0]
        }
        return {
            "calls": {method: row[0] for method, row in list(self._calls.items()) if row[0]},
            "operators": operators,
            "seconds": (time.perf_counter_ns() - self._started_ns) / 1e9,
        }


def sum_transfers(channel_stats: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds up the counters of several channels; ``transport`` names each kind once, or says ``none``."""
    total: dict[str, Any] = dict.fromkeys(TRANSFER_COUNTERS, 0)
    kinds: list[str] = []
    for stats in channel_stats:
        for key in TRANSFER_COUNTERS:
            total[key] += stats.get(key, 0)
        for kind in str(stats.get("transport", "")).split(", "):
            if kind and kind != "none" and kind not in kinds:
                kinds.append(kind)
    total["transport"] = ", ".join(kinds) or "none"
    return total


def throughput_mb_s(stats: Mapping[str, Any]) -> float:
    """Megabytes (10^6 bytes) moved in both directions per second that this end spent on calls; 0.0 before any call."""
    busy_s = stats.get("busy_seconds", 0.0)
    nbytes = stats.get("shm_bytes", 0) + stats.get("zmq_bytes", 0)
    return nbytes / _MB / busy_s if busy_s > 0 else 0.0


def format_stats(stats: Mapping[str, Any], title: str = "tsqp statistics") -> Group:
    """The tables of a ``stats`` mapping (of :class:`GPUClient` or :class:`GPUServer`) as something rich can print."""
    from rich.console import Group

    return Group(*(table.as_rich() for table in _tables(stats, title)))


def plain_stats(stats: Mapping[str, Any], title: str = "tsqp statistics") -> str:
    """The same tables as plain text, for a process that does without rich."""
    return "\n\n".join(map(str, _tables(stats, title)))


def print_stats(stats: Mapping[str, Any], title: str = "tsqp statistics", console: Console | None = None) -> None:
    """Prints :func:`format_stats` to ``console``, by default the standard output."""
    from rich.console import Console

    (console or Console()).print(format_stats(stats, title))


def format_bytes(nbytes: float) -> str:
    """``nbytes`` with a decimal unit: 999 B, 1.5 kB, 12.0 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def format_seconds(seconds: float) -> str:
    """``seconds`` with a fitting unit: 12.3 us, 4.5 ms, 6.78 s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _tables(stats: Mapping[str, Any], title: str) -> list[Table]:
    tables = [_summary_table(stats, title), _carrier_table(stats)]
    if stats.get("calls"):
        tables.append(_calls_table(stats["calls"]))
    if stats.get("operators"):
        tables.append(_operator_table(stats))
    return tables


def _summary_table(stats: Mapping[str, Any], title: str) -> Table:
    table = Table(title=title, show_header=False)
    table.add_row("transport", str(stats.get("transport", "none")))
    for key, label in (
        ("endpoint", "endpoint"),
        ("protection", "protection"),
        ("clients", "clients now"),
        ("clients_seen", "clients in all"),
        ("round_trips", "round trips"),
        ("errors", "error replies"),
        ("stale_replies", "late replies dropped"),
    ):
        if key in stats:
            table.add_row(label, str(stats[key]))
    table.add_row("RPC calls", str(sum(stats.get("calls", {}).values())))
    table.add_row("time", format_seconds(stats.get("seconds", 0.0)))
    table.add_row("time in calls", format_seconds(stats.get("busy_seconds", 0.0)))
    table.add_row("throughput", f"{throughput_mb_s(stats):.1f} MB/s")
    return table


def _carrier_table(stats: Mapping[str, Any]) -> Table:
    table = Table(title="transfers per carrier")
    for name in ("carrier", "transfers", "share", "bytes", "share of bytes"):
        table.add_column(name, right=name != "carrier")
    carriers = (("shared memory", "shm"), ("ZeroMQ", "zmq"))
    transfers = sum(stats.get(f"{key}_transfers", 0) for _, key in carriers)
    nbytes = sum(stats.get(f"{key}_bytes", 0) for _, key in carriers)
    for label, key in carriers:
        count, size = stats.get(f"{key}_transfers", 0), stats.get(f"{key}_bytes", 0)
        table.add_row(label, str(count), _percent(count, transfers), format_bytes(size), _percent(size, nbytes))
    table.add_row(
        "total",
        str(transfers),
        _percent(transfers, transfers),
        format_bytes(nbytes),
        _percent(nbytes, nbytes),
    )
    return table


def _calls_table(calls: Mapping[str, int]) -> Table:
    table = Table(title="RPC calls per method")
    table.add_column("method")
    table.add_column("calls", right=True)
    for method, count in sorted(calls.items(), key=lambda item: -item[1]):
        table.add_row(method, str(count))
    return table


def _operator_table(stats: Mapping[str, Any]) -> Table:
    operators = stats["operators"]
    shown = [
        (label, key)
        for label, key in (("of it on the server", "server_seconds"), ("queued on the server", "queue_seconds"))
        if any(row.get(key) for row in operators.values())
    ]
    table = Table(title="time per operator")
    table.add_column("operator")
    for name in ("calls", "time", "share", "per call", *(label for label, _ in shown)):
        table.add_column(name, right=True)
    total_s = sum(row["seconds"] for row in operators.values())
    for name, row in operators.items():
        seconds, count = row["seconds"], row["calls"]
        cells = [
            name,
            str(count),
            format_seconds(seconds),
            _percent(seconds, total_s),
            format_seconds(seconds / count),
        ]
        cells += [format_seconds(row[key]) if row.get(key) else "-" for _, key in shown]
        table.add_row(*cells)
    return table
