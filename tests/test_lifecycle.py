"""How things end and begin again: leftovers, forks, exits in any order, spawned processes, restarts, dead clients."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import lives
import msgpack
import peers
import pytest
import torch
import zmq
from carriers import CARRIERS
from kills import NOTICED_WITHIN_S, SLACK_S
from patience import until
from peers import PATIENCE_S, Peer
from rpc_support import HEAD_DIM, KV_HEADS, LAYERS, server_of, serving, tiny_model

import tsqp
from tsqp import ShmRingBuffer
from tsqp import handshake as hs
from tsqp.errors import ClosedError, PeerDiedError, RingUsageError

OPTIONS = CARRIERS["ring"].listen_options
StartPeer = Callable[..., Peer]


def socket_of(endpoint: str) -> Path:
    return Path(urlsplit(endpoint).path)


def within_a_second(condition: Callable[[], bool], since: float) -> None:
    """Waits for it; the promise is a second, and a busy machine may take a little longer."""
    while not condition():
        assert time.monotonic() - since < NOTICED_WITHIN_S + SLACK_S
        time.sleep(0.01)


def mapped_segments(pid: int | str = "self") -> int:
    """How many segments a process maps, whether they still have a name or not."""
    return sum("/tsqp-" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


# --- what a killed server leaves --------------------------------------------------------------------------------


@pytest.fixture
def leftover(endpoint: str, start_peer: StartPeer, shm_directory: Path) -> Path:
    """The segment of a handshake during which the server was killed; its socket is left too."""
    server = start_peer(peers.channel_end, "server", endpoint, OPTIONS)
    assert server.hear() == "made"
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(endpoint)
        hello = {"protocol": hs.PROTOCOL, "shm": True, "futex": False}
        dealer.send_multipart([hs.envelope(hs.HELLO), msgpack.packb(hello)])
        assert hs.open_envelope(dealer.recv_multipart()[0])[0] == hs.WELCOME
        server.kill()
    (path,) = shm_directory.iterdir()
    return path


def clean(*arguments: str) -> str:
    command = [sys.executable, "-m", "tsqp", "clean", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_clean_shows_first_and_removes_when_told(leftover, endpoint):
    with ShmRingBuffer(4096, 4) as mine:
        listed = clean()
        assert leftover.name in listed
        assert mine.name not in listed
        assert leftover.exists()
        clean("--yes")
        assert not leftover.exists()
        assert Path(leftover.parent, mine.name).exists()
    socket_of(endpoint).unlink()


def test_the_next_server_reaps_the_segment_and_takes_the_socket_over(leftover, endpoint):
    with tsqp.listen(endpoint, **OPTIONS) as listener:
        assert not leftover.exists()
        with tsqp.connect(endpoint, PATIENCE_S) as client, listener.accept(PATIENCE_S) as server:
            client.send([], request_id=5)
            assert server.recv(PATIENCE_S).request_id == 5
    assert not socket_of(endpoint).exists()


# --- forks ------------------------------------------------------------------------------------------------------


def test_a_forked_child_leaves_the_listener_alone(endpoint):
    """It can't accept, and neither its close nor its exit ends what is the parent's."""
    with tsqp.listen(endpoint, **OPTIONS) as listener:
        with tsqp.connect(endpoint, PATIENCE_S) as client, listener.accept(PATIENCE_S) as server:
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    for use in (lambda: listener.accept(5), lambda: listener.wait(5), listener.accept_nowait):
                        with pytest.raises(RingUsageError, match="fork"):
                            use()
                    server.close()
                    listener.close()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert socket_of(endpoint).exists()
            client.send([], request_id=6)
            assert server.recv(PATIENCE_S).request_id == 6
        with tsqp.connect(endpoint, PATIENCE_S), listener.accept(PATIENCE_S):
            pass


def test_a_forked_child_keeps_nothing_of_its_parent_alive(endpoint, start_peer):
    """A server that was killed is dead for its clients, though a child it forked lives on with all its descriptors."""
    server = start_peer(peers.channel_end, "server", endpoint, OPTIONS)
    assert server.hear() == "made"
    with tsqp.connect(endpoint, PATIENCE_S) as client:
        server.ask("accept")
        child = server.ask("fork_and_sleep")
        try:
            killed_at = time.monotonic()
            server.kill()
            with pytest.raises(PeerDiedError):
                client.recv(PATIENCE_S)
            assert time.monotonic() - killed_at < NOTICED_WITHIN_S + SLACK_S
        finally:
            os.kill(child, 9)
    socket_of(endpoint).unlink()


# --- the end of a program ---------------------------------------------------------------------------------------


@pytest.mark.watchdog(120)
def test_programs_may_end_in_any_way_and_order(endpoint, tmp_path, shm_directory):
    """No crash, no hang, no complaint of the interpreter, the program's own exit status, nothing left behind."""
    random = Random(7)
    programs, expected = [], []
    for name, (ending, status) in lives.ENDINGS.items():
        programs.append(lives.OPEN_EVERYTHING.format(endpoint=f"{endpoint}{len(programs)}") + ending)
        expected.append((name, status))
    for _ in range(8):
        dropped = random.sample(lives.NAMES, random.randrange(1, len(lives.NAMES) + 1))
        closable = {"listener", "client", "server", "writer", "reader"}
        closed = {name for name in closable if random.random() < 0.5}
        drops = [f"{name}.close()" if name in closed else f"del {name}" for name in dropped]
        programs.append(lives.OPEN_EVERYTHING.format(endpoint=f"{endpoint}{len(programs)}") + "\n".join(drops))
        expected.append((", ".join(drops), 0))
    directory = tmp_path / "errors"
    directory.mkdir()
    for (name, status), (got, errors) in zip(expected, lives.run_programs(programs, str(directory)), strict=True):
        assert got == status, f"{name}: status {got}\n{errors}"
        if name not in ("an exception", "Ctrl-C"):
            assert errors == "", f"{name}: {errors}"
        else:
            assert "Exception ignored" not in errors
            assert "Fatal" not in errors
    # Only those that had no chance to clean up leave something, and the next start removes it.
    left = list(socket_of(endpoint).parent.iterdir())
    assert {path.name for path in left} == killed_sockets(endpoint, expected)
    for path in left:
        tsqp.listen(f"ipc://{path}", **OPTIONS).close()
    assert not any(shm_directory.iterdir())


def killed_sockets(endpoint: str, expected: list[tuple[str, int]]) -> set[str]:
    killed = {"os._exit", "SIGTERM"}
    return {f"{socket_of(endpoint).name}{number}" for number, (name, _) in enumerate(expected) if name in killed}


# --- spawned processes ------------------------------------------------------------------------------------------


def test_handles_and_endpoints_passed_to_spawned_children(endpoint):
    """A ring's handle to its reader, and endpoints to a client and to a server."""
    spawn = multiprocessing.get_context("spawn")
    count = 5
    theirs = f"{endpoint}2"
    with ShmRingBuffer(4096, 4) as ring, tsqp.listen(endpoint, **OPTIONS) as listener:
        children = [
            spawn.Process(target=lives.spawned_reader, args=(ring.handle(), endpoint, count)),
            spawn.Process(target=lives.spawned_server, args=(theirs, count)),
        ]
        for child in children:
            child.start()
        with listener.accept(PATIENCE_S) as reader, tsqp.connect(theirs, PATIENCE_S) as server:
            for number in range(count):
                with ring.acquire_write(PATIENCE_S, 100) as view:
                    view[:] = bytes([number]) * 100
                passed_on = reader.recv(PATIENCE_S)
                assert torch.equal(passed_on.tensors[0], torch.full((100,), number, dtype=torch.uint8))
                server.send([torch.full((3,), number)], request_id=number, timeout=PATIENCE_S)
                assert torch.equal(server.recv(PATIENCE_S).tensors[0], torch.full((3,), number))
            for child in children:
                child.join(PATIENCE_S)
                assert child.exitcode == 0
                child.close()


# --- restarts ---------------------------------------------------------------------------------------------------


def test_a_server_that_dies_in_the_handshake_is_told_at_once(endpoint, start_peer):
    server = start_peer(lives.silent_server, endpoint)
    assert server.hear() == "bound"
    ended: list[float] = []

    def connect() -> None:
        with pytest.raises(PeerDiedError, match=r"died during the handshake: .*; connect again"):
            tsqp.connect(endpoint, PATIENCE_S)
        ended.append(time.monotonic())

    connecting = threading.Thread(target=connect)
    connecting.start()
    assert server.hear() == "hello"
    killed_at = time.monotonic()
    server.kill()
    connecting.join()
    assert ended[0] - killed_at < NOTICED_WITHIN_S + SLACK_S
    with (
        tsqp.listen(endpoint, **OPTIONS) as listener,
        tsqp.connect(endpoint, PATIENCE_S),
        listener.accept(PATIENCE_S),
    ):
        pass


def test_a_connection_that_nobody_ever_took_is_no_death(endpoint):
    """It lay in the backlog of a server that went before it looked; the next server takes the client."""
    taken: list[tsqp.Channel] = []
    with socket.socket(socket.AF_UNIX) as dying:
        dying.bind(str(socket_of(endpoint)))
        dying.listen(5)
        connecting = threading.Thread(target=lambda: taken.append(tsqp.connect(endpoint, PATIENCE_S)))
        connecting.start()
        accepted, _ = dying.accept()
        accepted.close()
    with tsqp.listen(endpoint, **OPTIONS) as listener, listener.accept(PATIENCE_S) as server_end:
        connecting.join()
        with taken[0] as client:
            for number in range(3):
                server_end.send([], request_id=number)
                assert client.recv(PATIENCE_S).request_id == number
            time.sleep(0.3)
            assert not client.poll()


@pytest.mark.watchdog(120)
def test_a_model_client_comes_back_after_its_server_was_killed(endpoint, start_peer):
    first = start_peer(lives.model_server, endpoint)
    assert first.hear() == "loaded"
    first.say("serve")
    assert first.hear() == "serving"
    hidden = torch.randn(1, 3, 64)
    with tsqp.GPUClient(endpoint) as client:
        before = client.lm_head(hidden)
        killed_at = time.monotonic()
        first.kill()
        for _ in range(2):
            with pytest.raises(PeerDiedError):
                client.lm_head(hidden)
        assert time.monotonic() - killed_at < NOTICED_WITHIN_S + SLACK_S
    with server_of(tiny_model(), endpoint), tsqp.GPUClient(endpoint) as client:
        assert torch.equal(client.lm_head(hidden), before)


# --- dead clients -----------------------------------------------------------------------------------------------


@pytest.fixture
def runner_processes(start_peer: StartPeer) -> Iterator[Callable[[str], list[Peer]]]:
    def start(endpoint: str) -> list[Peer]:
        shape = (1, KV_HEADS, 300, HEAD_DIM)
        started = [start_peer(lives.model_client, endpoint, LAYERS, shape) for _ in range(3)]
        assert [peer.hear() for peer in started] == ["kept"] * 3
        return started

    return start


def test_a_server_forgets_dead_clients_and_frees_their_memory(tmp_path, runner_processes):
    """Segments and what is kept of K and V, within a second of the kill; the others keep theirs."""
    gc.collect()  # what earlier tests left in cycles would go in the middle of the count
    before = mapped_segments()
    with serving(tiny_model(), tmp_path) as server:
        runners = runner_processes(server.endpoint)
        assert server.stats["clients"] == 3
        assert mapped_segments() == before + 3
        whole = server.stats["kv_bytes"]
        assert whole > 0
        for left in (2, 1, 0):
            killed_at = time.monotonic()
            runners.pop().kill()
            within_a_second(lambda left=left: server.stats["clients"] == left, killed_at)
            within_a_second(lambda left=left: mapped_segments() == before + left, killed_at)
            assert server.stats["kv_bytes"] == whole // 3 * left


def test_an_idle_server_process_frees_the_memory_too(endpoint, start_peer, runner_processes):
    """Seen from outside: what the server's process maps."""
    server = start_peer(lives.model_server, endpoint)
    assert server.hear() == "loaded"
    server.say("serve")
    assert server.hear() == "serving"
    before = mapped_segments(server.pid)
    runners = runner_processes(endpoint)
    assert mapped_segments(server.pid) == before + 3
    for runner in runners:
        os.kill(runner.pid, 9)
    killed_at = time.monotonic()
    within_a_second(lambda: mapped_segments(server.pid) == before, killed_at)
    server.say("stop")
    assert server.join() == 0


@pytest.fixture
def small_collections() -> Iterator[None]:
    """The garbage collector looks at what is made from here on only."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_collections")
def test_connections_dropped_in_a_cycle_are_given_back(endpoint):
    """In whatever order the garbage collector takes what belongs to them."""
    with tsqp.listen(endpoint, max_chunk_bytes=1 << 16, max_chunks=2) as listener:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(20):
            cycle = [tsqp.connect(endpoint, PATIENCE_S)]
            cycle.append(cycle)
            with listener.accept(PATIENCE_S) as server:
                cycle[0].send([torch.full((3,), number)])
                assert server.recv(PATIENCE_S).tensors[0].tolist() == [number] * 3
                del cycle
                gc.collect()
                with pytest.raises((PeerDiedError, ClosedError)):
                    server.recv(PATIENCE_S)
        # Those of the last connection's end may still go.
        until(lambda: len(os.listdir("/proc/self/fd")) <= before + 4)
