"""The performance log: one row per round trip of a client, as a table, as CSV or as JSON Lines.

    client = tsqp.GPUClient(endpoint, perf_log="zmq_performance.log")

The file's ending says how it is written: ``.csv``, ``.jsonl`` (or ``.json``, ``.ndjson``), anything else is a table.
``tsqp analyze`` and :mod:`tsqp.perf_read` read all of them. No prompt, token or tensor value is in it.

==================  ==================================================================================================
column              what it is
==================  ==================================================================================================
ID                  the request's id
Method              what was asked for, by the names of :mod:`tsqp.protocol`
Serialize(ms)       writing header, descriptors and tensors of the request into a slot (or ZeroMQ frames)
Send(ms)            waiting for a slot, publishing it and waking the server; ZeroMQ's own send
Recv(ms)            from then until the reply is there: Compute + Queue + Wait
Deserialize(ms)     checking the reply and copying its tensors to private memory
Total(ms)           the four together
Sent(KB), Recv(KB)  bytes of request and reply on the wire; KB is 1024 bytes
Throughput(MB/s)    both together by Total; MB is 1024 KB
Carrier             ``shm`` (a slot), ``tile`` (several slots), ``zmq``, or ``request>reply`` where they differ
Layer, Placement    ``-`` where there is none: a call that belongs to no layer, or was made outside a split model
Compute(ms)         how long the server says it computed
Queue(ms)           how long the request waited there for its turn, as the server says
Wait(ms)            what is left of Recv: the way there and back, waking up, the server's reading and writing
Forward             the number of the model's forward it belongs to; ``-`` outside of one
Start(ms)           when it began, from the log's start
Status              of the reply; 0 is OK
==================  ==================================================================================================

The server is not trusted: Compute and Queue are its own word, cut to what fits into Recv. Round trips that were in
flight together each count in full. One forward of a client is logged at a time: threads that use several models on one
client share its number.

Rows are noted in C when a reply is settled, and a thread makes them text (in C, without the GIL) and hands them to the
operating system twice a second: a process that is killed loses the last second at most.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import platform
import re
import stat
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from . import __version__
from ._perf import RoundTrips
from .errors import ConfigError

#: Seconds between two writes.
INTERVAL_S = 0.5
#: Rows kept in memory at most; at 10 us a round trip they are written before half of it is used.
CAPACITY = 1 << 17
#: How long the end of a client waits for the last rows to be written.
PATIENCE_S = 5.0

_logger = logging.getLogger("tsqp")
_LAYER_NAME = re.compile(r".+?\.(\d+)\..+")


@dataclass(frozen=True)
class Column:
    """A column: its title, its name in JSON and in :class:`tsqp.perf_read.Row`, and its width in a table."""

    title: str
    key: str
    width: int


COLUMNS = (
    Column("ID", "id", 9),
    Column("Method", "method", 15),
    Column("Serialize(ms)", "serialize_ms", 13),
    Column("Send(ms)", "send_ms", 11),
    Column("Recv(ms)", "recv_ms", 11),
    Column("Deserialize(ms)", "deserialize_ms", 15),
    Column("Total(ms)", "total_ms", 11),
    Column("Sent(KB)", "sent_kb", 13),
    Column("Recv(KB)", "recv_kb", 13),
    Column("Throughput(MB/s)", "throughput_mb_s", 16),
    Column("Carrier", "carrier", 8),
    Column("Layer", "layer", 5),
    Column("Placement", "placement", 9),
    Column("Compute(ms)", "compute_ms", 11),
    Column("Queue(ms)", "queue_ms", 11),
    Column("Wait(ms)", "wait_ms", 11),
    Column("Forward", "forward", 7),
    Column("Start(ms)", "start_ms", 13),
    Column("Status", "status", 6),
)
TABLE, CSV, JSONL = "table", "csv", "jsonl"
_ENDINGS = {".csv": CSV, ".jsonl": JSONL, ".json": JSONL, ".ndjson": JSONL}
UNITS = "KB = 1024 bytes, MB = 1024 KB; Total = Serialize + Send + Recv + Deserialize; Recv = Compute + Queue + Wait"


def format_of(path: str | os.PathLike[str]) -> str:
    """``table``, ``csv`` or ``jsonl``, by the file's ending."""
    return _ENDINGS.get(Path(path).suffix.lower(), TABLE)


def site_of(site: Any) -> tuple[str, int | None]:
    """Method and layer of a call's :class:`~tsqp.calls.Site`; the layer is None where the call has none."""
    from .protocol import METHOD_NAMES, Method

    method = METHOD_NAMES[Method(site.method)]
    if site.layer is not None:
        return method, int(site.layer)
    meta = msgpack.unpackb(site.meta) if site.meta else {}
    layers = {found and found[1] for found in map(_LAYER_NAME.fullmatch, meta.get("modules", ()))}
    only = layers.pop() if len(layers) == 1 else None
    return method, None if only is None else int(only)


class PerfLog:
    """Writes one client's log. ``round_trips`` is where the client notes them.

    ``facts``: asked for more lines of the header each time something is written, until it has given all it will
    give; for what is known only later, as the model. Raises :class:`ConfigError` where the file can't be written,
    or is being written by another client.
    """

    def __init__(
        self, path: str | os.PathLike[str], facts: Callable[[], Mapping[str, str]], window: int, **header: str
    ) -> None:
        self.path, self.format = os.fspath(path), format_of(path)
        #: Why logging ended early; empty while it goes on.
        self.failure = ""
        self.round_trips = in_style(self.format, window)
        self._facts, self._told = facts, dict[str, str]()
        self._pid = os.getpid()
        self._file = _open(self.path)
        self._closing = self._titled = False
        # A lock and nothing more: a finalizer may run while this very thread waits, and release() needs no other lock.
        self._wake = threading.Lock()
        self._wake.acquire()
        self._write(self._opening({**_versions(), **header}))
        if self.failure:
            os.close(self._file)
            raise ConfigError(f"the performance log {self.path} can't be written: {self.failure}; give another path")
        self._thread = threading.Thread(target=self._run, name="tsqp-perf-log", daemon=True)
        self._thread.start()

    # --- the client's side ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Writes what is left and the summary. May be called more than once, from any thread."""
        self._closing = True
        if self._pid != os.getpid():
            return  # a forked child: rows and file are its parent's
        with suppress(RuntimeError):  # it was released already
            self._wake.release()
        if threading.current_thread() is not self._thread:
            self._thread.join(PATIENCE_S)

    def forward_hooks(self, placement: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """A pre-hook and a hook for a model's forward, so that its round trips are logged as that forward's."""
        number, round_trips = self.round_trips.add_placement(placement), self.round_trips

        def began(*_: Any) -> None:
            round_trips.forward_began(number)

        def ended(*_: Any) -> None:
            round_trips.forward_ended()

        self._told_later("placement", placement)
        return began, ended

    def _told_later(self, name: str, value: str) -> None:
        facts = self._facts
        self._facts = lambda: {**facts(), name: value}

    # --- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            closing = False
            while not closing and not self.failure:
                self._wake.acquire(timeout=INTERVAL_S)
                closing = self._closing  # looked at first: rows may be noted up to the close
                self._flush()
            if not self.failure:
                self._write(self._titles() + self._summary())
        finally:
            self.round_trips.enabled = False
            _unlock(self._file)
            os.close(self._file)

    def _flush(self) -> None:
        self._write(self._news())
        while not self.failure and (text := self.round_trips.drain()):
            self._write(self._titles() + text)

    def _write(self, text: bytes) -> None:
        """Hands text to the operating system; after a failure, nothing more."""
        left = memoryview(text)
        while left and not self.failure:
            try:
                left = left[os.write(self._file, left) :]
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.round_trips.enabled = False
        self.failure = error.strerror or str(error)
        if hasattr(self, "_thread"):
            _logger.warning(
                "the performance log %s ends here (%s); free space and start again, or give another path",
                self.path,
                self.failure,
            )

    # --- what is not a row ---------------------------------------------------------------------------------

    def _opening(self, header: dict[str, str]) -> bytes:
        return self._block("tsqp performance log", {"format": "1", **header, "units": UNITS})

    def _titles(self) -> bytes:
        """The line above the first row, once; what is known by then of model and placement stands before it."""
        if self._titled or self.format == JSONL:
            return b""
        self._titled = True
        if self.format == CSV:
            return (",".join(column.title for column in COLUMNS) + "\n").encode()
        line = " ".join(column.title.rjust(column.width) for column in COLUMNS)
        return f"{line}\n{'-' * len(line)}\n".encode()

    def _news(self) -> bytes:
        """What became known since."""
        facts = dict(self._facts())
        news = {name: value for name, value in facts.items() if self._told.get(name) != value}
        self._told.update(news)
        return self._block("", news) if news else b""

    def _summary(self) -> bytes:
        return self._block("SUMMARY", summary_of(self.round_trips.totals, self.round_trips.dropped))

    def _block(self, title: str, facts: Mapping[str, Any]) -> bytes:
        if self.format == JSONL:
            kind = "summary" if title == "SUMMARY" else "header"
            return (json.dumps({kind: facts}) + "\n").encode()
        lines = [title] if title else []
        lines += [f"{name}: {_one_line(value)}" for name, value in facts.items()]
        return "".join(f"# {line}\n" for line in lines).encode(errors="replace")


def summary_of(totals: Mapping[str, int], dropped: int) -> dict[str, Any]:
    """The figures of a log's end from :attr:`RoundTrips.totals`: counts, ms, KB, MB/s."""
    total_ns = sum(totals[f"{stage}_ns"] for stage in ("serialize", "send", "recv", "deserialize"))
    nbytes = totals["sent_bytes"] + totals["received_bytes"]
    waited_ns = totals["recv_ns"] - totals["compute_ns"] - totals["queue_ns"]
    figures: dict[str, Any] = {
        "round trips": totals["rows"],
        "errors": totals["errors"],
        "forwards": totals["forwards"],
        "rows lost": dropped,
        "elapsed (ms)": totals["elapsed_ns"] / 1e6,
        "Total (ms)": total_ns / 1e6,
    }
    for stage in ("serialize", "send", "recv", "deserialize", "compute", "queue"):
        figures[f"{stage.capitalize()} (ms)"] = totals[f"{stage}_ns"] / 1e6
    figures["Wait (ms)"] = waited_ns / 1e6
    for name, key in (("Sent", "sent"), ("Recv", "received"), ("shm", "shm"), ("tile", "tile"), ("zmq", "zmq")):
        figures[f"{name} (KB)"] = totals[f"{key}_bytes"] / 1024
    figures["Throughput (MB/s)"] = round(nbytes / 2**20 / (total_ns / 1e9), 3) if total_ns else 0.0
    return figures


def model_facts(info: Any) -> dict[str, str]:
    """Header lines about a served model, from :class:`~tsqp.model_info.InitInfo`; none while that is None."""
    if info is None:
        return {}
    architectures = info.config.get("architectures") or [info.config.get("model_type", "unknown")]
    layers, width = info.geometry.layers, info.config.get("hidden_size", "?")
    server = ", ".join(f"{key} {value}" for key, value in sorted(info.server.items()) if key != "protection")
    return {"model": f"{architectures[0]}, {layers} layers, hidden {width}, {info.dtype}", "server": server}


def transport_fact(transport: str) -> str:
    """The header's word for a channel's ``transport``: SHM, IPC or TCP, and how it says it itself."""
    return f"{'SHM' if transport.startswith('shm') else transport.upper()} ({transport})"


def _versions() -> dict[str, str]:
    versions = {"tsqp": __version__, "python": platform.python_version()}
    versions |= {name: str(sys.modules[name].__version__) for name in ("torch", "transformers") if name in sys.modules}
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"versions": ", ".join(f"{name} {version}" for name, version in versions.items()), "started": started}


def _one_line(value: Any) -> str:
    """The server's words are in the header: nothing in them may break a line."""
    text = f"{value:.6f}" if isinstance(value, float) else str(value)
    return "".join(char if char.isprintable() else "?" for char in text[:500])


def _open(path: str) -> int:
    """The file, emptied and locked against other writers."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise ConfigError(
            f"the performance log {path!r} can't be written: {error.strerror}; give a path that can be"
        ) from error
    try:
        mode = os.fstat(file).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
            raise ConfigError(f"the performance log {path!r} is no regular file; give a path of its own")
        _lock(file, path)
        if stat.S_ISREG(mode):
            os.ftruncate(file, 0)
    except BaseException:
        os.close(file)
        raise
    return file


def _lock(file: int, path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Other errors: a file system, or an enclave, that knows no locks.
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ConfigError(
                f"the performance log {path!r} is being written by another client; give each a path of its own"
            ) from error


def _unlock(file: int) -> None:
    """A forked child still has the file: closing it here would leave it locked."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


def _table(window: int) -> RoundTrips:
    prefixes = ["", *[" "] * (len(COLUMNS) - 1)]
    return RoundTrips(CAPACITY, window, prefixes, [column.width for column in COLUMNS], "-", "\n", "", 4, site_of)


def _csv(window: int) -> RoundTrips:
    prefixes = ["", *[","] * (len(COLUMNS) - 1)]
    return RoundTrips(CAPACITY, window, prefixes, [0] * len(COLUMNS), "", "\n", "", 6, site_of)


def _jsonl(window: int) -> RoundTrips:
    prefixes = [f'{"{" if number == 0 else ","}"{column.key}":' for number, column in enumerate(COLUMNS)]
    return RoundTrips(CAPACITY, window, prefixes, [0] * len(COLUMNS), "null", "}\n", '"', 6, site_of)


_STYLES: dict[str, Callable[[int], RoundTrips]] = {TABLE: _table, CSV: _csv, JSONL: _jsonl}


def in_style(name: str, window: int) -> RoundTrips:
    """Where round trips are noted, with lines as in a ``table``, ``csv`` or ``jsonl`` file."""
    return _STYLES[name](window)
