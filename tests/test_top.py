"""What a server tells about all its clients: counted against what the clients themselves did, and who may ask."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Outcome, finish, start, tsqp, tsqp_here
from commands import serving as serving_process
from rpc_support import HIDDEN, PATIENCE_S, Gated, client_of, gated_model, serving, tiny_model, until

import tsqp as library
from tsqp.config import parse_endpoint
from tsqp.errors import ConfigError, ConnectError, EndpointBusyError, EndpointError, ProtocolError, WaitTimeoutError
from tsqp.overview import rates
from tsqp.server_status import ask_status, serve_status, status_path

H = torch.zeros(2, HIDDEN)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    with serving(tiny_model(), tmp_path, status=True) as running:
        yield running


def asked(server: Any, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The server's answer, as soon as it meets the condition: a reply is counted after it was sent."""
    found: dict[str, Any] = {}

    def met() -> bool:
        found.clear()
        found.update(ask_status(server.endpoint, PATIENCE_S))
        return condition(found)

    until(met)
    return found


# --- the figures


def test_figures_are_those_the_clients_counted_themselves(server: Any) -> None:
    with client_of(server) as one, client_of(server) as two:
        for _ in range(5):
            one.batch_linear(0, ["q_proj"], H)
        two.lm_head(torch.zeros(3000, HIDDEN))  # tiles: more than a slot
        trips = one.round_trips + two.round_trips
        found = asked(server, lambda found: found["round_trips"] == trips)
        assert found["clients"] == found["clients_seen"] == 2
        assert found["endpoint"] == server.endpoint
        own = [one.stats, two.stats]
        for name in ("shm_bytes", "zmq_bytes", "shm_transfers", "zmq_transfers"):
            assert found[name] == sum(stats[name] for stats in own)
            assert [client[name] for client in found["per_client"]] == [stats[name] for stats in own]
        assert [client["round_trips"] for client in found["per_client"]] == [one.round_trips, two.round_trips]
        assert found["received_bytes"] == sum(stats["sent_bytes"] for stats in own)
        ages = [client["age_seconds"] for client in found["per_client"]]
        assert found["seconds"] > ages[0] > ages[1] > 0
        assert found["busy_seconds"] >= found["compute_seconds"] > 0


def test_a_client_that_left_stays_in_the_sums(server: Any) -> None:
    with client_of(server) as client:
        client.batch_linear(0, ["q_proj"], H)
        trips, moved = client.round_trips, client.stats["shm_bytes"]
    found = asked(server, lambda found: found["clients"] == 0)
    assert found["per_client"] == []
    assert (found["round_trips"], found["shm_bytes"], found["clients_seen"]) == (trips, moved, 1)


def test_kv_and_errors_are_the_clients_own(server: Any) -> None:
    with client_of(server) as one, client_of(server) as two:
        q, kv = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
        one.attention_scores(0, q, kv, kv)
        with pytest.raises(library.errors.RemoteError):
            two.attention_values(1, torch.zeros(1, 4, 3, 3))
        found = asked(server, lambda found: found["errors"] == 1)
        assert [client["errors"] for client in found["per_client"]] == [0, 1]
        assert [client["kv_bytes"] > 0 for client in found["per_client"]] == [True, False]
        assert found["kv_bytes"] == one.server_stats()["kv_bytes"]


@pytest.mark.parametrize("shm", [True, False])
def test_waiting_requests_are_counted_while_the_server_computes(tmp_path: Path, shm: bool) -> None:
    model = gated_model()
    head: Gated = model.lm_head
    with serving(model, tmp_path, status=True, batching=False) as server, client_of(server, shm=shm) as client:
        client.init()
        calls = [client.submit.lm_head(H) for _ in range(4)]
        assert head.entered.wait(PATIENCE_S)
        found = asked(server, lambda found: found["waiting"] == 3)
        assert [one["waiting"] for one in found["per_client"]] == [3]
        head.gate.set()
        for call in calls:
            call.result()
        assert asked(server, lambda found: found["round_trips"] == client.round_trips)["waiting"] == 0


def test_rates_are_differences_over_the_servers_own_time() -> None:
    client = {"client": 7, "age_seconds": 10.0, "round_trips": 100, "errors": 0, "shm_bytes": 5_000_000}
    client |= {"zmq_bytes": 0, "shm_transfers": 200, "zmq_transfers": 0, "sent_messages": 100}
    client |= {"received_messages": 100, "sent_bytes": 1, "received_bytes": 2}
    times = {"seconds": 20.0, "busy_seconds": 1.0, "compute_seconds": 0.5, "queue_seconds": 0.25}
    before = {**client, **times, "per_client": [client]}
    grown = {"round_trips": 140, "shm_bytes": 9_000_000, "zmq_bytes": 1_000_000}
    newest = {**client, **grown, "age_seconds": 14.0}
    young = {**newest, "client": 8, "age_seconds": 2.0}
    more = {"seconds": 24.0, "busy_seconds": 2.0, "compute_seconds": 1.25, "queue_seconds": 0.5}
    after = {**client, **grown, **more, "per_client": [newest, young]}
    found = rates(before, after)
    assert found["interval_seconds"] == 4.0
    assert found["round_trips_per_second"] == 10.0
    assert (found["shm_mb_per_second"], found["zmq_mb_per_second"]) == (1.0, 0.25)
    assert (found["busy_share"], found["wait_share"]) == (0.25, 0.25)
    assert [one["round_trips_per_second"] for one in found["per_client"]] == [10.0, 70.0]
    idle = rates(after, {**after, "seconds": 25.0})
    assert (idle["round_trips_per_second"], idle["busy_share"], idle["wait_share"]) == (0.0, 0.0, None)
    restarted = rates(after, {**before, "seconds": 2.0})
    assert (restarted["round_trips_per_second"], restarted["interval_seconds"]) == (50.0, 2.0)


# --- who may ask, and what may be answered


def test_nobody_is_told_unless_asked_for(tmp_path: Path) -> None:
    with serving(tiny_model(), tmp_path) as server:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["rpc.sock"]
        with pytest.raises(ConnectError, match="does not tell about its clients; start it with: tsqp serve --status"):
            ask_status(server.endpoint, 1.0)
    with pytest.raises(ConnectError, match="no tsqp server listens"):
        ask_status(server.endpoint, 1.0)


def test_the_socket_is_the_users_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    with serving(tiny_model(), tmp_path, status=True) as server:
        path = Path(status_path(parse_endpoint(server.endpoint)))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []


def test_asking_takes_no_clients_place(tmp_path: Path) -> None:
    with serving(tiny_model(), tmp_path, status=True, max_clients=1) as server, client_of(server) as client:
        client.ping()
        for _ in range(3):
            assert ask_status(server.endpoint, PATIENCE_S)["clients"] == 1
        assert client.ping() > 0


def test_a_tcp_server_is_asked_in_the_users_own_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    directory = Path(endpoint.removeprefix("ipc://")).parent
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    with library.GPUServer(tiny_model(), "tcp://127.0.0.1:0", status=True) as server:
        assert ask_status(server.endpoint, PATIENCE_S)["endpoint"] == server.endpoint
        assert stat.S_IMODE((directory / "tsqp").stat().st_mode) == 0o700
    with pytest.raises(ConnectError, match="no tsqp server listens"):
        ask_status(server.endpoint, 1.0)


def refuse(*_: Any) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_what_a_killed_server_left_is_replaced_and_a_live_one_is_not(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = status_path(parse_endpoint(endpoint))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with monkeypatch.context() as others:
        others.setattr(os, "unlink", refuse)
        with pytest.raises(EndpointError, match="can't be removed: Operation not permitted"):
            serve_status(endpoint, dict)
    door = serve_status(endpoint, dict)
    try:
        with pytest.raises(EndpointBusyError, match="another process listens"):
            serve_status(endpoint, dict)
    finally:
        door.close()
        door.close()
    Path(path).write_text("a file of somebody's")
    with pytest.raises(EndpointError, match="is no socket"):
        serve_status(endpoint, dict)
    assert Path(path).read_text() == "a file of somebody's"
    with pytest.raises(EndpointError, match="107"):
        serve_status(f"ipc:///{'x' * 104}", dict)


def test_a_failed_door_leaves_no_server_behind(tmp_path: Path) -> None:
    (tmp_path / "rpc.sock.status").write_text("")
    with pytest.raises(EndpointError), serving(tiny_model(), tmp_path, status=True):
        pass
    assert not (tmp_path / "rpc.sock").exists()


def test_who_asks_and_does_not_read_holds_up_no_client(server: Any) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(status_path(parse_endpoint(server.endpoint)))
        with client_of(server) as client:
            assert client.ping() > 0
        assert ask_status(server.endpoint, PATIENCE_S)["clients_seen"] == 1


@contextmanager
def answering(endpoint: str, *parts: bytes, pause: float = 0.0) -> Iterator[None]:
    """Something else that listens where a server would tell about itself."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(status_path(parse_endpoint(endpoint)))
        listening.listen(1)

        def run() -> None:
            connection, _ = listening.accept()
            with connection:
                try:
                    for part in parts:
                        connection.sendall(part)
                        time.sleep(pause)
                except OSError:
                    return  # enough was said

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join()
    os.unlink(status_path(parse_endpoint(endpoint)))


GOOD = dict.fromkeys(
    (
        *("seconds", "clients", "clients_seen", "round_trips", "errors", "busy_seconds", "compute_seconds"),
        *("queue_seconds", "waiting", "kv_bytes", "shm_bytes", "zmq_bytes", "shm_transfers", "zmq_transfers"),
        *("sent_messages", "received_messages", "sent_bytes", "received_bytes"),
    ),
    1,
)


@pytest.mark.parametrize(
    "wrong",
    [
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b"[]",
        json.dumps(GOOD).encode(),
        json.dumps({**GOOD, "per_client": [{}]}).encode(),
        json.dumps({**GOOD, "per_client": [], "seconds": -1}).encode(),
        json.dumps({**GOOD, "per_client": [], "seconds": "1"}).encode(),
        json.dumps({**GOOD, "per_client": [], "errors": True}).encode(),
        json.dumps({**GOOD, "per_client": [], "errors": float("nan")}).encode(),
        b" " * (5 << 20),
    ],
)
def test_an_answer_that_is_none_is_refused(endpoint: str, wrong: bytes) -> None:
    with answering(endpoint, wrong), pytest.raises(ProtocolError, match="tells no figures of a tsqp server"):
        ask_status(endpoint, PATIENCE_S)


def test_an_answer_has_a_deadline_and_no_power_over_the_terminal(endpoint: str) -> None:
    with answering(endpoint, *[b" "] * 10, pause=0.1), pytest.raises(WaitTimeoutError, match="told nothing within"):
        ask_status(endpoint, 0.3)
    with answering(endpoint), pytest.raises(ConnectError, match="is stopping"):
        ask_status(endpoint, PATIENCE_S)
    evil = json.dumps({**GOOD, "per_client": [], "endpoint": "\x1b]0;x\x07[bold]", "calls": {"\x1b[2J": 1}}).encode()
    with answering(endpoint, evil):
        found = ask_status(endpoint, PATIENCE_S)
    assert "\x1b" not in found["endpoint"] + "".join(found["calls"])


# --- the command


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text.rstrip("\n")


def test_the_command_shows_what_a_client_does(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with client_of(server) as client:
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                client.batch_linear(0, ["q_proj"], H)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            began, at_begin = client.round_trips, time.perf_counter()
            found = tsqp_here(capsys, "top", "--endpoint", server.endpoint, "--once", "--json", "--interval", "2")
            at_end, ended = time.perf_counter(), client.round_trips
        finally:
            done.set()
            worker.join()
        assert found.code == 0
        told = json.loads(one_line(found.out))
        counted = told["round_trips_per_second"] * told["interval_seconds"]
        assert 0 < counted <= ended - began + 1  # the interval lies inside what was counted here
        assert 2 <= told["interval_seconds"] <= at_end - at_begin
        per_trip = (client.stats["shm_bytes"]) / (2 * client.round_trips) * 2
        assert told["shm_mb_per_second"] == pytest.approx(told["round_trips_per_second"] * per_trip / 1e6, rel=0.2)
        assert told["zmq_mb_per_second"] == 0.0
        assert 0 < told["busy_share"] <= 1
        assert 0 <= told["wait_share"] < 1
        shown = tsqp_here(capsys, "top", "--endpoint", server.endpoint, "--once", "--interval", "0.05").out
        assert "1 now, 1 in all" in shown
        assert f"{client.round_trips} in all" in shown
        assert max(map(len, shown.splitlines())) <= 80


def tells(endpoint: str) -> bool:
    """Whether the server there tells of its clients by now."""
    try:
        return bool(ask_status(endpoint, PATIENCE_S))
    except library.errors.ConnectError:
        return False


def test_the_command_runs_until_the_server_goes_or_ctrl_c(tmp_path: Path, endpoint: str) -> None:
    directory = Path(endpoint.removeprefix("ipc://")).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving_process(directory, "--status", "--metrics-port", str(port)) as served:
        until(lambda: tells(served.endpoint))  # it listens before that
        command = ("top", "--endpoint", served.endpoint, "--interval", "0.2")
        watchers = [start(*command, *more) for more in ((), ("--json",))]
        try:
            for watcher in watchers:
                assert watcher.stdout is not None
                assert watcher.stdout.readline()
            watchers[0].send_signal(signal.SIGINT)
            told = finish(watchers[0])
            assert (told.code, told.err) == (0, "")
            idle = r"0 clients  0\.0 round trips/s  shm 0\.0 MB/s"
            assert all(re.match(idle, line) for line in told.out.splitlines())
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as page:
                assert b"tsqp_clients 0.0" in page.read()
            stopped = served.stop()
            assert stopped.code == 0
            assert f"metrics at http://127.0.0.1:{port}/metrics" in stopped.err
            ended = finish(watchers[1])
        finally:
            for watcher in watchers:
                watcher.kill()
                watcher.wait()
    assert ended.code == 1
    assert_one_sentence(ended, f"server at {served.endpoint}", f"listens at {served.endpoint}")
    assert all(json.loads(line)["clients"] == 0 for line in ended.out.splitlines())
    assert list(directory.iterdir()) == []


def assert_one_sentence(outcome: Outcome, *either: str) -> None:
    assert one_line(outcome.err).startswith("tsqp: ")
    assert any(words in outcome.err for words in either), outcome.err


def test_the_command_without_a_server(endpoint: str) -> None:
    nobody = tsqp("top", "--endpoint", endpoint)
    assert (nobody.code, nobody.out) == (1, "")
    assert_one_sentence(nobody, f"no tsqp server listens at {endpoint}")
    assert tsqp("top", "--interval", "0").code == 2


def read_terminal(ours: int) -> bytes:
    """What is printed next; nothing once the program at the other end has ended."""
    try:
        return os.read(ours, 1 << 16)
    except OSError:
        return b""


def test_the_command_draws_in_a_terminal(server: Any) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "tsqp", "top", "--endpoint", server.endpoint, "--interval", "0.1"]
    watcher = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        drawn = b""
        while drawn.count(b"waiting requests") < 3:
            drawn += os.read(ours, 1 << 16)
        watcher.send_signal(signal.SIGINT)
        while last := read_terminal(ours):
            drawn += last
        assert watcher.wait(PATIENCE_S) == 0
    finally:
        watcher.kill()
        watcher.wait()
        os.close(ours)
    assert b"Traceback" not in drawn
    assert drawn.endswith((b"\x1b[?25h", b"\n"))  # the cursor is shown again


def test_interval_is_checked(server: Any) -> None:
    from tsqp.top import watch

    for interval in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="not a positive number"):
            next(watch(server.endpoint, interval, True))


def test_looking_needs_no_torch() -> None:
    code = "import sys, tsqp.top; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
