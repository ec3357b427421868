"""Processes of test_hostile_segment.py: a peer gone bad, and the victims that must stand it.

The bad one connects, or listens, as anybody would, and then hands the mapped segment to ``tests/c/hostile_peer.c``.
"""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHUNK_BYTES, CHUNKS = 4096, 4
PAUSE_NS = 4_000
#: A victim that does nothing for so long has given the connection up, or waits for what will not come.
PATIENCE_NS = 200_000_000
SLICE_NS = 3_000_000_000
#: No meeting takes so long that the bad peer says nothing for this long.
SILENCE_S = 60.0
#: A victim waits this long for one message, and for a sign of sanity from a peer that once was insane.
WAIT_S, SANITY_S = 0.05, 0.1


def build_library(folder: Path) -> Path:
    """Compiles the bad peer; needs the C compiler that the package was built with."""
    sys.path.insert(0, str(HERE / "c"))
    from toolchain import CSRC, WARNINGS, find_compiler, run

    library = folder / "hostile_peer.so"
    sources = [HERE / "c" / "hostile_peer.c", *sorted(CSRC.glob("*.c"))]
    command = [*find_compiler(), "-O2", "-g", "-shared", "-fPIC", *WARNINGS, "-I", str(CSRC)]
    code, output = run([*command, *map(str, sources), "-o", str(library)], {}, 120)
    assert code == 0, output
    return library


class Assault:
    """Waits for the end of what the bad peer does. How long that takes depends on the machine; that it goes on does
    not: it says so after each meeting."""

    def __init__(self, peer: Any) -> None:
        self._peer, self._heard_at = peer, time.monotonic()

    def poll(self, timeout_s: float = 0.0) -> dict[str, int] | None:
        """What it did in all, once it is done."""
        if self._peer._wire.poll(timeout_s):
            said = self._peer.hear()
            if isinstance(said, dict):
                return said
            self._heard_at = time.monotonic()
        assert time.monotonic() - self._heard_at < SILENCE_S, "the assault goes on no more"
        return None


# --- the bad peer ---------------------------------------------------------------------------------------------


class Counts(ctypes.Structure):
    """What it did: struct hostile_counts."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "mutations",
            "flags",
            "header_words",
            "message_words",
            "payload_words",
            "published",
            "taken",
            "woken",
        )
    ]

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name, _ in self._fields_}


def _mapped_at(name: str) -> int:
    """Where this process has the segment in its memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"/{name}" in line:
            return int(line.partition("-")[0], 16)
    raise AssertionError(f"{name} is not mapped")


def _assault(channel: Any, library: Any, end: int, seed: int, mutations: int, counts: Counts) -> None:
    base = ctypes.c_void_p(_mapped_at(channel._segment.name))
    numbers = [ctypes.c_uint64(n) for n in (CHUNK_BYTES, CHUNKS)]
    limits = [ctypes.c_uint64(n) for n in (seed, mutations, PAUSE_NS, PATIENCE_NS, SLICE_NS)]
    library.hostile_run(base, *numbers, ctypes.c_uint(end), *limits, ctypes.byref(counts))


def _meet(wire: Connection, make: Callable[[], Any], path: str, end: int, seed: int, mutations: int) -> None:
    """Assaults one victim after the other, each over a channel that `make` gives, until all mutations are made."""
    from tsqp.errors import TsqpError

    library, counts, meetings = ctypes.CDLL(path), Counts(), 0
    while counts.mutations < mutations:
        try:
            with make() as channel:
                meetings += 1
                _assault(channel, library, end, seed + meetings, mutations, counts)
            wire.send(counts.mutations)
        except TsqpError:
            time.sleep(0.001)  # nobody there at the moment
    wire.send({**counts.as_dict(), "meetings": meetings})


def bad_client(wire: Connection, path: str, endpoint: str, seed: int, mutations: int) -> None:
    import tsqp

    _meet(wire, lambda: tsqp.connect(endpoint, 2.0), path, 1, seed, mutations)


def bad_server(wire: Connection, path: str, endpoint: str, seed: int, mutations: int) -> None:
    import tsqp

    with tsqp.listen(endpoint, CHUNK_BYTES, CHUNKS) as listener:
        wire.send("listening")
        _meet(wire, lambda: listener.accept(2.0), path, 0, seed, mutations)


# --- victims --------------------------------------------------------------------------------------------------


class Victim:
    """Counts what happens to it. Anything but a message or one of tsqp's own errors is a wrong."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrongs: list[str] = []
        self.stopped = threading.Event()
        self.rss_before = self._peak_rss()

    @staticmethod
    def _peak_rss() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def report(self) -> dict[str, Any]:
        return {"outcomes": dict(self.outcomes), "wrongs": self.wrongs, "grown": self._peak_rss() - self.rss_before}

    def look_at(self, message: Any) -> None:
        """Touches every byte. Only one that came in tiles is longer than a slot."""
        import torch

        total = sum(tensor.numel() * tensor.element_size() for tensor in message.tensors)
        assert total <= message.nbytes, f"{total} bytes of tensors in a message of {message.nbytes}"
        for tensor in message.tensors:
            if tensor.numel():
                tensor.clone().reshape(-1).view(torch.uint8).max()
        assert isinstance(message.meta, dict)

    def work(self, channel: Any, turn: Callable[[Any, int], None]) -> None:
        """Takes turns until the channel is over, or insane without a good message for a while."""
        from tsqp.errors import ClosedError, PeerDiedError, RingCorruptedError, TsqpError, WaitTimeoutError

        number, insane, good_at = 0, False, time.monotonic()
        try:
            while not self.stopped.is_set():
                number += 1
                try:
                    turn(channel, number)
                    self.outcomes["messages"] += 1
                    good_at = time.monotonic()
                    continue
                except TsqpError as error:
                    self.outcomes[type(error).__name__] += 1
                    insane = insane or not isinstance(error, WaitTimeoutError)
                    if isinstance(error, (ClosedError, PeerDiedError)):
                        break
                    if isinstance(error, RingCorruptedError):
                        time.sleep(0.0002)  # most often the flag is right again by then
                if insane and time.monotonic() - good_at > SANITY_S:
                    break
        except BaseException as error:  # noqa: BLE001 (reported)
            self.wrongs.append(repr(error))
        finally:
            channel.close()
            self.outcomes["connections"] += 1


def victim_server(wire: Connection, endpoint: str) -> None:
    """Echoes every client's messages, each client in a thread: leased ones and copies in turn."""
    import tsqp
    from tsqp.errors import WaitTimeoutError

    victim, threads = Victim(), []

    def echo(channel: Any, number: int) -> None:
        if number % 2:
            with channel.lease(WAIT_S) as message:
                victim.look_at(message)
                channel.send(message.tensors, request_id=message.request_id, timeout=WAIT_S)
        else:
            message = channel.recv(WAIT_S)
            victim.look_at(message)
            channel.send(message.tensors, request_id=message.request_id, timeout=WAIT_S)

    with tsqp.listen(endpoint, CHUNK_BYTES, CHUNKS) as listener:
        wire.send("listening")
        while not wire.poll(0):
            try:
                channel = listener.accept(0.2)
            except WaitTimeoutError:
                continue
            threads.append(threading.Thread(target=victim.work, args=(channel, echo), name="tsqp-victim"))
            threads[-1].start()
        victim.stopped.set()
        for thread in threads:
            thread.join(10)
    wire.send({**victim.report(), "hanging": sum(thread.is_alive() for thread in threads)})


def victim_client(wire: Connection, endpoint: str) -> None:
    """Sends, and receives what comes, over one connection after the other."""
    import torch

    import tsqp
    from tsqp.errors import TsqpError

    victim, tensor = Victim(), torch.arange(100)

    def ask(channel: Any, number: int) -> None:
        channel.send([tensor], request_id=number, timeout=WAIT_S)
        victim.look_at(channel.recv(WAIT_S))

    def listen_to_parent() -> None:
        wire.recv()
        victim.stopped.set()

    listener = threading.Thread(target=listen_to_parent, name="tsqp-parent")
    listener.start()
    while not victim.stopped.is_set():
        try:
            victim.work(tsqp.connect(endpoint, 2.0), ask)
        except TsqpError as error:
            victim.outcomes[f"connect: {type(error).__name__}"] += 1
        except BaseException as error:  # noqa: BLE001 (reported)
            victim.wrongs.append(repr(error))
    listener.join(10)
    wire.send({**victim.report(), "hanging": int(listener.is_alive())})
