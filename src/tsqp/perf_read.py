"""Reads performance logs: tsqp's own (table, CSV, JSON Lines) and the ten-column text log of the system before it.

    log = read_log("zmq_performance.log")
    log.rows[0].method, log.rows[0].total_ms, log.header["model"], log.bad

What the file is, is seen from its contents, not from its name. Columns are found by the titles above them, so that
their order and number may differ; a table without titles is taken for the ten columns of the old log. A line that is
neither a row nor a part of a header or summary is counted (``bad``) and left out: a log of a process that was killed
ends in the middle of a line.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import ConfigError

TABLE, CSV, JSONL = "table", "csv", "jsonl"
#: A line that is longer is no line of a log.
MAX_LINE_BYTES = 1 << 16
#: Lines that may stand above the titles.
MAX_LINES_ABOVE = 1000
#: No call takes or moves so many ms, KB or MB/s: a line that says so is no row.
MAX_FIGURE = 1e12
#: Bad lines of which the numbers are kept.
MAX_BAD_NOTED = 20


class Row(NamedTuple):
    """A round trip; what is None was not in the log. Durations in ms, KB of 1024 bytes, MB of 1024 KB.

    See :mod:`tsqp.perf_log` for what each field is.
    """

    id: int
    method: str
    serialize_ms: float
    send_ms: float
    recv_ms: float
    deserialize_ms: float
    total_ms: float
    sent_kb: float
    recv_kb: float
    throughput_mb_s: float
    carrier: str | None = None
    layer: int | None = None
    placement: str | None = None
    compute_ms: float | None = None
    queue_ms: float | None = None
    wait_ms: float | None = None
    forward: int | None = None
    start_ms: float | None = None
    status: int | None = None

    @property
    def kb(self) -> float:
        """KB of request and reply."""
        return self.sent_kb + self.recv_kb

    @property
    def carriers(self) -> tuple[str, str] | None:
        """What carried the request and the reply: ``shm``, ``tile`` or ``zmq``."""
        if self.carrier is None:
            return None
        request, _, reply = self.carrier.partition(">")
        return request, reply or request


@dataclass
class Log:
    """What was in a file.

    ``header`` and ``summary`` are its own words (texts; numbers in the summary of JSON Lines). ``bad`` counts lines
    that are no rows and should be, ``bad_lines`` are the first of their numbers, from 1. ``complete``: it has a
    summary, so nothing is missing at its end.
    """

    path: str
    format: str = TABLE
    header: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    bad: int = 0
    bad_lines: list[int] = field(default_factory=list)
    complete: bool = False
    #: Titles of a table or CSV were seen: without them, and without a row, this is no log.
    titled: bool = False

    def note_bad(self, line: int) -> None:
        """A line that should be a row and is none."""
        self.bad += 1
        if len(self.bad_lines) < MAX_BAD_NOTED:
            self.bad_lines.append(line)


def read_log(path: str | os.PathLike[str]) -> Log:
    """The log in a file. Raises :class:`ConfigError` where it can't be read, is empty, or is something else."""
    log = Log(os.fspath(path))
    try:
        with open(path, "rb") as file:
            _read(log, _lines(file))
    except OSError as error:
        raise ConfigError(f"{log.path} can't be read: {error.strerror}; give a performance log") from error
    if not log.rows:
        raise ConfigError(_why_nothing(log))
    return log


def _why_nothing(log: Log) -> str:
    if log.titled or log.header.get("format") or (log.complete and not log.bad):
        return f"{log.path} is a performance log without a round trip; log a client that makes calls"
    if log.bad:
        return f"{log.path} is no performance log: none of its {log.bad} lines is a row; give a file of --perf-log"
    return f"{log.path} is empty; give a file that --perf-log wrote"


def _lines(file: Any) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank; one that is too long comes as text that is no row."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, "\N{REPLACEMENT CHARACTER}"
            continue
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", "replace").strip()
        if text:
            yield number, text


def _read(log: Log, lines: Iterable[tuple[int, str]]) -> None:
    parse: Callable[[int, str], Row | None] | None = None
    table = _Table(log)
    for number, text in lines:
        if parse is None:
            if text.startswith("{"):
                log.format, parse = JSONL, _Json(log).row
            elif not text.startswith("#"):
                parse = table.row
        try:
            if text.startswith("#") or parse is None:
                table.comment(text)
                continue
            row = parse(number, text)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            log.note_bad(number)
            continue
        if row is not None:
            log.rows.append(row)
    table.finish()


# --- JSON Lines ---------------------------------------------------------------------------------------------


class _Json:
    def __init__(self, log: Log) -> None:
        self._log = log

    def row(self, _: int, text: str) -> Row | None:
        """The row in a line; None for a header or summary. Raises what ``json.loads`` and :func:`make_row` raise."""
        entry = json.loads(text)
        if not isinstance(entry, dict):
            raise ValueError("no object")
        for name, place in (("header", self._log.header), ("summary", self._log.summary)):
            if set(entry) == {name} and isinstance(entry[name], dict):
                place.update(entry[name])
                self._log.complete |= name == "summary"
                return None
        return make_row(entry)


# --- tables and CSV -----------------------------------------------------------------------------------------


_TITLE = re.compile(r"[A-Za-z]+ ?\([^)]*\)|[A-Za-z]+")
_RULE = re.compile(r"[-=+|*_\s]+")
_FACT = re.compile(r"#+\s*([^:]+):\s*(.*)")
_BY_TITLE = {
    "id": "id",
    "method": "method",
    "serialize(ms)": "serialize_ms",
    "send(ms)": "send_ms",
    "recv(ms)": "recv_ms",
    "deserialize(ms)": "deserialize_ms",
    "total(ms)": "total_ms",
    "sent(kb)": "sent_kb",
    "recv(kb)": "recv_kb",
    "throughput(mb/s)": "throughput_mb_s",
    "carrier": "carrier",
    "layer": "layer",
    "placement": "placement",
    "compute(ms)": "compute_ms",
    "queue(ms)": "queue_ms",
    "wait(ms)": "wait_ms",
    "forward": "forward",
    "start(ms)": "start_ms",
    "status": "status",
}
OLD_COLUMNS = tuple(_BY_TITLE.values())[:10]


class _Table:
    """Lines of a table or of CSV, from the top."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._columns: Sequence[str | None] | None = None
        self._above: list[tuple[int, str]] = []  # lines above the titles, if there are any
        self._ended = False

    def comment(self, text: str) -> None:
        """A line of tsqp's own header or summary."""
        log = self._log
        if text.lstrip("# ").upper().startswith("SUMMARY"):
            log.complete = True
        elif fact := _FACT.fullmatch(text):
            place = log.summary if log.complete else log.header
            place[fact[1].strip()] = fact[2]

    def row(self, number: int, text: str) -> Row | None:
        """The row in a line; None for what is none and needs to be none. Raises what :func:`make_row` raises."""
        if _RULE.fullmatch(text):
            return None
        if self._take_titles(text):
            return None
        if text.lstrip("= -*").upper().startswith("SUMMARY"):
            self._log.complete = self._ended = True
            return None
        if self._ended:
            return None  # the old log's summary, to its end
        cells = self._cells(text)
        try:
            return make_row(dict(zip(self._columns or OLD_COLUMNS, cells, strict=True)))
        except (ValueError, TypeError, KeyError):
            above = self._columns is None and len(self._above) < MAX_LINES_ABOVE
            if above and not (cells and cells[0].isdigit()):
                self._above.append((number, text))
                return None
            raise

    def _take_titles(self, text: str) -> bool:
        lower = text.lower()
        if "method" not in lower or "(ms)" not in lower.replace(" ", ""):
            return False
        log = self._log
        log.format = CSV if "," in text else TABLE
        parts = next(csv.reader([text])) if log.format == CSV else _TITLE.findall(text)
        self._columns = [_BY_TITLE.get(part.replace(" ", "").lower()) for part in parts]
        self._ended = False
        log.titled = True
        for _, above in self._above:  # the old log's header
            name, colon, value = above.partition(":")
            if colon and above.isprintable():
                log.header[name.strip()] = value.strip()
        self._above.clear()
        return True

    def _cells(self, text: str) -> list[str]:
        if self._log.format == CSV:
            return [cell.strip() for cell in next(csv.reader([text]))]
        return text.strip("|").replace("|", " ").split()

    def finish(self) -> None:
        """No titles came: what would have stood above them is no part of a log."""
        for number, _ in self._above:
            self._log.note_bad(number)


# --- one row ------------------------------------------------------------------------------------------------

_NUMBERS = ("serialize_ms", "send_ms", "recv_ms", "deserialize_ms", "total_ms", "sent_kb", "recv_kb", "throughput_mb_s")
_MORE_NUMBERS = ("compute_ms", "queue_ms", "wait_ms", "start_ms")
_COUNTS = ("layer", "forward", "status")
_TEXTS = ("carrier", "placement")
_WAYS = ("shm", "zmq", "tile")
_CARRIERS = frozenset([*_WAYS, *(f"{one}>{other}" for one in _WAYS for other in _WAYS if one != other)])
MAX_NAME_CHARS = 64


def make_row(entry: Mapping[str | None, Any]) -> Row:
    """A row from values by the names of :class:`Row`, numbers or their texts. Raises ``KeyError`` where one of the ten
    columns every log has is missing, ``ValueError`` or ``TypeError`` for what is no value of its column.
    """
    more: dict[str, Any] = {name: _number(entry[name]) for name in _MORE_NUMBERS if not _absent(entry.get(name))}
    more |= {name: _count(entry[name]) for name in _COUNTS if not _absent(entry.get(name))}
    more |= {name: _name(entry[name]) for name in _TEXTS if not _absent(entry.get(name))}
    if more.get("carrier", "shm") not in _CARRIERS:
        raise ValueError("no carrier")
    number = _count(entry["id"])
    if number < 0:
        raise ValueError("a negative id")
    numbers: dict[str, Any] = {name: _number(entry[name]) for name in _NUMBERS}
    return Row(id=number, method=_name(entry["method"]), **numbers, **more)


def _absent(value: Any) -> bool:
    return value is None or value in ("", "-")


def _number(value: Any) -> float:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise TypeError("no number")
    number = float(value)
    if not 0 <= number <= MAX_FIGURE:  # nor NaN
        raise ValueError("no duration or amount")
    return number


def _count(value: Any) -> int:
    if not isinstance(value, (str, int)) or isinstance(value, bool) or len(str(value)) > 20:
        raise TypeError("no whole number")
    return int(value)


def _name(value: Any) -> str:
    """Names are shown: nothing in them may reach a terminal that does more than stand there."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARS or not value.isprintable():
        raise ValueError("no name")
    return value
