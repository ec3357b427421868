"""What a server is doing now, again and again: clients, round trips, bytes per carrier, what waits.

In a terminal a table that is drawn anew; elsewhere a line, or with ``json`` an object, per interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from json import dumps
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .enclave import check_outside
from .errors import ConfigError
from .overview import rates
from .server_status import ask_status
from .telemetry import format_bytes, format_seconds

_ASK_TIMEOUT_S = 5.0


def watch(endpoint: str, interval: float, once: bool) -> Iterator[dict[str, Any]]:
    """The figures of each interval (see :func:`~tsqp.overview.rates`), the first of them after one interval; with
    ``once`` no more.

    Raises what :func:`~tsqp.server_status.ask_status` does, also when the server goes away.
    """
    if not 0 < interval < 1e6:
        raise ConfigError(f"interval={interval!r} is not a positive number of seconds; give one")
    check_outside("tsqp top", "a server answers it on a Unix socket, and none of the host's is reached from there")
    before = ask_status(endpoint, _ASK_TIMEOUT_S)
    while True:
        time.sleep(interval)
        after = ask_status(endpoint, _ASK_TIMEOUT_S)
        yield rates(before, after)
        if once:
            return
        before = after


def show(endpoint: str, *, interval: float = 1.0, once: bool = False, json: bool = False) -> None:
    """Prints the figures of each interval until Ctrl-C, which is how this ends."""
    console = Console()
    figures = watch(endpoint, interval, once)
    try:
        if json:
            _print_each(figures, dumps)
        elif once:
            console.print(table(next(figures)))
        elif console.is_terminal:
            with Live(Text(f"asking {endpoint}"), console=console, auto_refresh=False) as live:
                for found in figures:
                    live.update(table(found), refresh=True)
        else:
            _print_each(figures, line)
    except KeyboardInterrupt:
        return


def _print_each(figures: Iterator[dict[str, Any]], form: Callable[[dict[str, Any]], str]) -> None:
    for found in figures:
        print(form(found), flush=True)


def line(found: Mapping[str, Any]) -> str:
    """One interval as one line."""
    return (
        f"{found['clients']} clients  {found['round_trips_per_second']:.1f} round trips/s  "
        f"shm {found['shm_mb_per_second']:.1f} MB/s  zmq {found['zmq_mb_per_second']:.1f} MB/s  "
        f"waiting {found['waiting']}  busy {_share(found['busy_share'])}  wait {_share(found['wait_share'])}"
    )


def table(found: Mapping[str, Any]) -> Group:
    """One interval as tables rich can print."""
    head = Table(title=Text(f"tsqp top  {found.get('endpoint', '')}"), show_header=False, title_justify="left")
    head.add_row("up", format_seconds(found["seconds"]))
    head.add_row("clients", f"{found['clients']} now, {found['clients_seen']} in all")
    head.add_row("round trips", f"{found['round_trips_per_second']:.1f}/s, {found['round_trips']} in all")
    for label, carrier in (("shared memory", "shm"), ("ZeroMQ", "zmq")):
        moved = format_bytes(found[f"{carrier}_bytes"])
        head.add_row(label, f"{found[f'{carrier}_mb_per_second']:.1f} MB/s, {moved} in all")
    head.add_row("waiting requests", str(found["waiting"]))
    head.add_row("busy", _share(found["busy_share"]))
    head.add_row("of a request's time waited", _share(found["wait_share"]))
    head.add_row("error replies", str(found["errors"]))
    head.add_row("K and V kept", format_bytes(found["kv_bytes"]))
    return Group(head, _clients_table(found["per_client"]))


def _clients_table(clients: list[Mapping[str, Any]]) -> Table:
    rows = Table(title="clients", title_justify="left")
    rows.add_column("client")
    rows.add_column("over")
    for name in ("trips/s", "shm MB/s", "zmq MB/s", "waits", "trips", "errors", "K and V", "age"):
        rows.add_column(name, justify="right")
    for client in clients:
        rows.add_row(
            str(client["client"]),
            Text(str(client.get("transport", ""))),
            f"{client['round_trips_per_second']:.1f}",
            f"{client['shm_mb_per_second']:.1f}",
            f"{client['zmq_mb_per_second']:.1f}",
            str(client["waiting"]),
            str(client["round_trips"]),
            str(client["errors"]),
            format_bytes(client["kv_bytes"]),
            format_seconds(client["age_seconds"]),
        )
    return rows


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
