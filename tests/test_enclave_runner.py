"""The runner within the limits of Gramine (tests/enclave): it works there, what can't work is refused with the reason,
and the death of either end is noticed. The server is outside, a process as users start it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import environment, wait_for
from enclave.harness import HERE, Inside, Started, kill_all, python, require_profile, run_inside

import tsqp
from tsqp.demo import PROMPT
from tsqp.errors import ClosedError, PeerDiedError
from tsqp.placement import PLACEMENTS

pytestmark = pytest.mark.watchdog(180)
require_profile()

RUNNER = str(HERE / "runner.py")
PATIENCE_S = 30.0
#: tsqp promises one second; a machine that is busy with other things may take longer.
NOTICED_WITHIN_S = 5.0
SLOT, SLOTS = 1 << 20, 4
#: What may be refused to a runner that keeps to the rules: it, or a library, tries and does without. Nothing else is.
#: fcntl: locks on the segment; flock: the performance log's; prctl: names of threads; clone3: the C library then
#: uses clone; connect: the C library asks for nscd; openat: a library reads boot_id.
HARMLESS = {"fcntl", "flock", "prctl", "clone3", "connect", "openat", "getrusage"}


@pytest.fixture(autouse=True)
def _runners_end_with_their_test() -> Iterator[None]:
    yield
    kill_all()


def shm() -> Path:
    """The directory of this run's segments, which is /dev/shm inside."""
    return Path(os.environ["TSQP_SHM_DIR"])


def segments() -> list[str]:
    return [name for name in os.listdir(shm()) if name.startswith("tsqp")]


def start_runner(what: str, *arguments: Any, **env: str) -> Started:
    return Started(python(RUNNER, what, json.dumps(arguments)), shm(), **env)


def lines_of(ended: Inside) -> list[dict[str, Any]]:
    """What a runner told; it has to have ended well, and within the rules."""
    assert ended.code == 0, ended
    assert set(ended.refused) <= HARMLESS, ended.refused
    return [json.loads(line) for line in ended.out.splitlines()]


def next_line(started: Started) -> dict[str, Any]:
    assert started.process.stdout is not None
    line = started.process.stdout.readline()
    assert line, started.finish()
    return json.loads(line)


@dataclass
class Outside:
    """A ``tsqp serve`` process of the embedded model on the host."""

    process: subprocess.Popen[bytes]
    endpoint: str


@contextmanager
def serving(directory: Path) -> Iterator[Outside]:
    log = directory / "server.log"
    command = ("serve", "--endpoint", "tcp://127.0.0.1:0", "--dtype", "float32", "--threads", "1")
    with open(log, "wb") as said:
        process = subprocess.Popen(python("-m", "tsqp", *command), env=environment(), stdout=said, stderr=said)
    try:
        wait_for(lambda: "serving at" in log.read_text() or process.poll() is not None, "the start of the server")
        found = re.search(r"serving at (tcp://\S+);", log.read_text())
        assert found, log.read_text()
        yield Outside(process, found[1])
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    with serving(tmp_path_factory.mktemp("server")) as outside:
        yield outside


# --- it works ---------------------------------------------------------------------------------------------------


def test_every_placement_generates_what_stock_transformers_does(server: Outside) -> None:
    told = lines_of(start_runner("generate_everywhere", server.endpoint, list(PLACEMENTS)).finish())
    stock, split = told[0], {line["placement"]: line for line in told[1:]}
    assert set(split) == set(PLACEMENTS)
    assert len(stock["greedy"]) > 12
    assert stock["greedy"] != stock["sampled"]
    for placement, line in split.items():
        for name in ("greedy", "sampled", "beams", "streamed"):
            assert line[name] == stock[name], (placement, name)
        if placement == "local":
            continue
        stats = line["stats"]
        assert stats["transport"] == "shm+tcp"
        assert stats["shm_transfers"] > 100
        assert stats["shm_bytes"] > 10_000
        assert (stats["zmq_transfers"], stats["zmq_bytes"]) == (0, 0)
        assert line["rows"] > stats["shm_transfers"] / 2 - 5  # one a round trip, and a header
    wait_for(lambda: segments() == [], "the end of the runner's segments")


def test_commands(server: Outside) -> None:
    at = ("--endpoint", server.endpoint)
    sampled = ("generate", *at, "--prompt", "Blessed are", "--max-new-tokens", "8", "--sample", "--seed", "5")
    lines = [
        ["demo", *at, "--max-new-tokens", "8"],
        [*sampled, "--placement", "linear", "--threads", "1", "--stats", "--perf-log", "/tmp/a.log"],
        [*sampled, "--placement", "local"],
        ["prefill", *at, "--tokens", "64", "--repeat", "2", "--placement", "layer", "--wire-dtype", "bfloat16"],
        ["analyze", "/tmp/a.log", "--json"],
        ["health", *at, "--json"],
    ]
    told = lines_of(start_runner("commands", lines, TSQP_THREADS="1").finish())
    assert [line["code"] for line in told] == [0] * len(lines), told
    demo, split, alone, prefill, analyze, health = (line["out"] for line in told)
    assert demo.startswith(PROMPT)
    assert "8 new, equal to those of stock transformers" in demo
    assert re.search(r"^ZeroMQ +0 messages, 0 B", demo, re.MULTILINE)
    assert re.search(r"^transport +shm\+tcp$", demo, re.MULTILINE)
    assert split == alone
    assert split.startswith("Blessed are")
    assert re.search(r"shared memory [^\n]* 100\.0%", told[1]["err"]), told[1]["err"]
    assert "64 tokens, placement layer" in prefill
    assert "ZeroMQ        0 messages" in prefill
    assert json.loads(analyze)
    assert json.loads(health)["healthy"] is True


def test_doctor_recognises_gramine() -> None:
    ended = run_inside(python("-m", "tsqp", "doctor", "--json"), shm())
    assert ended.code == 0, ended
    assert set(ended.refused) <= HARMLESS
    found = {finding["name"]: finding for finding in json.loads(ended.out)["findings"]}
    assert "inside of Gramine, without attestation" in found["enclave"]["found"]
    assert "tsqp health" in found["echo"]["advice"]
    assert "untrusted_shm" in found["shared_memory"]["advice"]
    assert not [finding for finding in found.values() if "failed itself" in finding["found"]]


# --- channels and rings -----------------------------------------------------------------------------------------


def echo_for(listener: Any, clients: int) -> None:
    """Sends back what each of so many clients sends, one client after the other."""
    for _ in range(clients):
        with listener.accept(PATIENCE_S) as channel, suppress(ClosedError, PeerDiedError):
            while True:
                message = channel.recv(PATIENCE_S)
                channel.send(message.tensors, tag=message.tag, timeout=PATIENCE_S)


#: Options of ``connect`` -> whether messages of this end that are larger than a slot go over ZeroMQ, and small ones.
WAYS: list[tuple[dict[str, Any], bool, bool]] = [
    ({}, True, False),
    ({"large": "tile"}, False, False),
    ({"large": "auto", "threshold": "auto"}, False, False),
    ({"threshold": 4096, "wait": "poll", "spin_us": 0.0}, True, False),
    ({"wait": "spin"}, True, False),
    ({"shm": False}, True, True),
]
SIZES = [0, 1000, 100_000, 3 << 20]


def test_channels_in_every_way() -> None:
    with tsqp.listen("tcp://127.0.0.1:0", SLOT, SLOTS) as listener:
        thread = threading.Thread(target=echo_for, args=(listener, len(WAYS)))
        thread.start()
        ended = start_runner("exchange", listener.endpoint, [way for way, _, _ in WAYS], SIZES).finish()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    told = lines_of(ended)
    each_way = 2 * 3 * len(SIZES)  # sent and received, thrice for each size
    for (way, large_over_zmq, small_over_zmq), line in zip(WAYS, told, strict=True):
        assert line["transport"] == ("tcp" if small_over_zmq else "shm+tcp"), way
        assert line["shm_transfers"] + line["zmq_transfers"] == each_way, (way, line)
        assert not small_over_zmq or line["shm_transfers"] == 0
        assert not large_over_zmq or line["zmq_transfers"] > 0
        # The echo's large answers go over ZeroMQ whatever this end chose.
        assert small_over_zmq or line["shm_transfers"] >= each_way // 2


def test_a_bare_ring_is_attached_to() -> None:
    count = 200
    there, back = (tsqp.ShmRingBuffer(4096, 4, wait="poll") for _ in range(2))
    with there, back:
        handles = [[*ring.handle()[:3], ring.handle().session.hex()] for ring in (there, back)]
        started = start_runner("ring", *handles, count)
        for number in range(count):
            data = number.to_bytes(4, "little") * (1 + number % 1000)
            with there.acquire_write(PATIENCE_S, len(data)) as slot:
                slot[:] = data
            with back.acquire_read(PATIENCE_S) as slot:
                assert bytes(slot) == data
        assert lines_of(started.finish()) == [{"copied": count}]


# --- what can't work --------------------------------------------------------------------------------------------

IPC = r"EndpointError: ipc:// never reaches the host from inside Gramine; use tcp://127\.0\.0\.1:PORT"
BLOCK = r"EndpointError: wait='block' needs a futex, which never crosses the enclave's border; use auto or poll"
LISTEN = r"EndpointError: nothing can listen on tcp://\S+ inside Gramine: libzmq aborts .*; listen on the host"
RING = r"SegmentError: .*no segment can be made inside Gramine, .* have the process on the host make it"
UNKNOWN = r"ConfigError: TSQP_ENCLAVE='sgx' is unknown; set it to gramine, or unset it"
REFUSED = {
    "connect ipc": IPC,
    "connect block": BLOCK,
    "client ipc": IPC,
    "client default": IPC,
    "client block": BLOCK,
    "model ipc": IPC,
    "model block": BLOCK,
    "listen ipc": IPC,
    "listen tcp": LISTEN,
    "listen tcp without shm": LISTEN,
    "server": LISTEN,
    "ring": RING,
    "ring with a name": RING,
    "ring block": BLOCK,
    "TSQP_ENCLAVE": UNKNOWN,
    "TSQP_ENCLAVE ring": UNKNOWN,
}


def test_what_cant_work_is_refused_with_the_reason() -> None:
    with tsqp.ShmRingBuffer(4096, 4, wait="poll") as ring:
        handle = [*ring.handle()[:3], ring.handle().session.hex()]
        told = {line["name"]: line["error"] for line in lines_of(start_runner("refusals", handle).finish())}
    assert set(told) == set(REFUSED)
    for name, pattern in REFUSED.items():
        assert re.match(pattern, told[name]), (name, told[name])


OUTSIDE = r"can't run inside Gramine: .*; run it on the host"
COMMANDS = {
    "demo": r"demo without --endpoint can't run inside Gramine: .* start tsqp serve",
    "demo --endpoint ipc:///tmp/a.sock": r"ipc:// never reaches the host",
    "serve --endpoint tcp://127.0.0.1:45999": r"nothing can listen on tcp://127\.0\.0\.1:45999 inside Gramine",
    "serve": r"ipc:// never reaches .* listen on the host",
    "generate --prompt x": r"ipc:// never reaches the host",
    "prefill --endpoint ipc:///tmp/a.sock": r"ipc:// never reaches the host",
    "bench transport": OUTSIDE,
    "bench inference": OUTSIDE,
    "bench batching": OUTSIDE,
    "bench paired": OUTSIDE,
    "clean": OUTSIDE,
    "top": OUTSIDE,
}


def test_commands_that_cant_work_are_refused_before_torch_is_loaded() -> None:
    told = lines_of(start_runner("commands", [command.split() for command in COMMANDS]).finish())
    for (command, pattern), line in zip(COMMANDS.items(), told, strict=True):
        assert line["code"] == 1, line
        assert re.match(f"tsqp: .*{pattern}", line["err"]), (command, line["err"])
        assert not line["torch"], command


# --- death ------------------------------------------------------------------------------------------------------


def check_noticed(line: dict[str, Any], killed_at: float) -> None:
    assert "its end of the control connection was closed" in line["died"]
    print(f"noticed after {line['at'] - killed_at:.3f} s")
    assert line["at"] - killed_at < NOTICED_WITHIN_S


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_killed_server_is_noticed_by_a_runner_that_waits_and_one_that_computes(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        waiting = start_runner("wait_for_message", server.endpoint)
        computing = start_runner("generate_on", server.endpoint)
        assert next_line(waiting)["transport"] == "shm+tcp"
        assert len(next_line(computing)["tokens"]) == 16
        time.sleep(0.2)  # past the spinning, into the sleeps
        before, seconds = cpu_seconds(waiting.pid), 1.0
        time.sleep(seconds)
        spent = cpu_seconds(waiting.pid) - before
        killed_at = time.monotonic()
        server.process.kill()
        check_noticed(lines_of(waiting.finish())[-1], killed_at)
        check_noticed(lines_of(computing.finish())[-1], killed_at)
    print(f"waiting took {100 * spent / seconds:.1f} % of a core")
    assert spent < seconds / 2  # it sleeps between its looks
    # A runner inside needs the name, which stays until its end; nobody was left to remove it then.
    assert len(segments()) == 2
    with tsqp.listen("tcp://127.0.0.1:0", SLOT, SLOTS):
        assert segments() == []


def test_a_stopped_end_is_not_dead_and_a_killed_runner_is_dropped(server: Outside) -> None:
    wait_for(lambda: segments() == [], "the end of earlier runners")
    started = start_runner("generate_on", server.endpoint)
    first = next_line(started)["tokens"]
    for pid in (started.pid, server.process.pid):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)  # longer than a death takes to be noticed
        assert len(segments()) == 1
        os.kill(pid, signal.SIGCONT)
        for _ in range(30):  # more than it had told before
            assert next_line(started)["tokens"] == first
    killed_at = time.monotonic()
    os.kill(started.pid, signal.SIGKILL)
    wait_for(lambda: segments() == [], "the end of the killed runner's segment")
    noticed = time.monotonic() - killed_at
    print(f"freed after {noticed:.3f} s")
    assert noticed < NOTICED_WITHIN_S
    assert started.finish().signal == signal.SIGKILL
    with tsqp.GPUClient(server.endpoint, PATIENCE_S) as client:
        assert client.ping() > 0
