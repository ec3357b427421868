"""Places where tsqp can't work: one error of the right class each, which says what to do, and nothing left behind."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import places
import pytest
from carriers import CARRIERS, LARGE, SMALL
from kills import EchoServer
from peers import PATIENCE_S, Peer
from wire_bytes import check_numbered, numbered

import tsqp
from tsqp.descriptors import Reserve
from tsqp.errors import (
    ConnectError,
    EndpointError,
    SegmentError,
    SegmentPermissionError,
    SharedMemoryFullError,
)
from tsqp.transport import Channel

OPTIONS = CARRIERS["ring"].listen_options
StartPeer = Callable[..., Peer]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def directory_of(endpoint: str) -> Path:
    return Path(urlsplit(endpoint).path).parent


def echo(client: Channel, server: Channel, nbytes: int = SMALL) -> None:
    for one, other in ((client, server), (server, client)):
        one.send([numbered(3, nbytes)], request_id=3, timeout=PATIENCE_S)
        check_numbered(other.recv(PATIENCE_S), 3, nbytes)


# --- the segment directory --------------------------------------------------------------------------------------


@pytest.fixture
def small_shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A segment directory of 1 MiB: two clients with the geometry above fit beside each other, three do not."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(tmp_path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"can't mount a small tmpfs here ({done.stderr.strip()})")
    monkeypatch.setenv("TSQP_SHM_DIR", str(tmp_path))
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_segment_directory_is_an_error_of_listen(small_shm, endpoint):
    (small_shm / "other").write_bytes(bytes(1000 << 10))
    with pytest.raises(SharedMemoryFullError) as caught:
        tsqp.listen(endpoint, **OPTIONS)
    info = os.statvfs(small_shm)
    text = str(caught.value)
    for part in (
        str(small_shm),
        f"{info.f_bavail * info.f_frsize} bytes free",
        "--shm-size",
        "TSQP_MAX_SHM_CHUNK_BYTES",
    ):
        assert part in text
    assert [path.name for path in small_shm.iterdir()] == ["other"]
    assert not any(directory_of(endpoint).iterdir())
    with tsqp.listen(endpoint, **{**OPTIONS, "shm": False}) as listener:  # needs none
        assert listener.endpoint == endpoint


def test_a_client_for_whom_there_is_no_memory_is_refused_with_the_reason(small_shm, endpoint):
    """The clients that are there go on, and when one of them leaves there is room again."""
    with (
        tsqp.listen(endpoint, **OPTIONS) as listener,
        tsqp.connect(endpoint, PATIENCE_S) as first,
        listener.accept(PATIENCE_S) as first_served,
    ):
        with tsqp.connect(endpoint, PATIENCE_S) as second, listener.accept(PATIENCE_S) as second_served:
            for _ in range(2):
                with pytest.raises(ConnectError, match=r"refused: the server could not make a segment: .* bytes free"):
                    tsqp.connect(endpoint, PATIENCE_S)
            echo(first, first_served)
            echo(second, second_served)
        del second, second_served
        with tsqp.connect(endpoint, PATIENCE_S) as third, listener.accept(PATIENCE_S) as third_served:
            echo(third, third_served)
        echo(first, first_served)
    assert not any(small_shm.iterdir())


def test_a_missing_segment_directory_is_an_error_of_listen(tmp_path, monkeypatch, endpoint):
    monkeypatch.setenv("TSQP_SHM_DIR", str(tmp_path / "missing"))
    with pytest.raises(
        SegmentError, match=rf"{tmp_path}/missing, .* does not exist; mount a tmpfs there, .*TSQP_SHM_DIR"
    ):
        tsqp.listen(endpoint, **OPTIONS)
    assert not any(directory_of(endpoint).iterdir())
    with tsqp.listen(endpoint, **{**OPTIONS, "shm": False}):
        pass
    (tmp_path / "file").touch()
    monkeypatch.setenv("TSQP_SHM_DIR", str(tmp_path / "file"))
    with pytest.raises(SegmentError, match="is no directory"):
        tsqp.listen(endpoint, **OPTIONS)


# --- no permission ----------------------------------------------------------------------------------------------


@pytest.fixture
def open_directory(endpoint: str, shm_directory: Path) -> Iterator[Path]:
    """Another user may enter the directory of sockets, as that of the run."""
    sockets = directory_of(endpoint)
    for directory in (sockets, sockets.parent):
        directory.chmod(0o755)
    yield sockets
    for directory in (sockets, sockets.parent):
        directory.chmod(0o700)


def outcome_as_nobody(start_peer: StartPeer, function: str, endpoint: str, **options: Any) -> Any:
    return start_peer(places.as_nobody, function, endpoint, options).hear()


@needs_root
def test_a_segment_directory_of_another_user(endpoint, start_peer, shm_directory):
    """The run's own is root's, and private."""
    directory_of(endpoint).parent.chmod(0o755)
    directory_of(endpoint).chmod(0o777)
    try:
        with pytest.raises(
            SegmentPermissionError, match=rf"{shm_directory}, .* not writable by this user; .*TSQP_SHM_DIR"
        ):
            outcome_as_nobody(start_peer, "listen", endpoint, **OPTIONS)
    finally:
        directory_of(endpoint).parent.chmod(0o700)
    assert not any(directory_of(endpoint).iterdir())
    assert not any(shm_directory.iterdir())


@needs_root
def test_a_socket_directory_of_another_user(endpoint, open_directory, start_peer):
    with pytest.raises(EndpointError, match=rf"can't listen on {endpoint}: Permission denied"):
        outcome_as_nobody(start_peer, "listen", endpoint, **{**OPTIONS, "shm": False})
    assert not any(open_directory.iterdir())


@needs_root
def test_a_server_of_another_user(endpoint, open_directory, start_peer):
    """Told at once, not after the timeout; whether the socket or only its directory is private."""
    with tsqp.listen(endpoint, **OPTIONS) as listener:
        for mode in (0o755, 0o700):
            open_directory.chmod(mode)
            with pytest.raises(
                ConnectError, match=r"the socket of \S+ may not be used by this user; run both ends as one"
            ):
                outcome_as_nobody(start_peer, "connect", endpoint, timeout=PATIENCE_S)
        assert listener.accept_nowait() is None


@needs_root
def test_a_segment_of_another_user(start_peer, shm_directory):
    """Over TCP anybody reaches the server, but not its memory; the server forgets the client."""
    shm_directory.chmod(0o755)
    try:
        with tsqp.listen("tcp://127.0.0.1:0", **OPTIONS) as listener:
            with pytest.raises(
                SegmentPermissionError, match="may not be opened by this user; run both ends as one user"
            ):
                outcome_as_nobody(start_peer, "connect", listener.endpoint, timeout=PATIENCE_S)
            with tsqp.connect(listener.endpoint, PATIENCE_S) as client, listener.accept(PATIENCE_S) as server:
                echo(client, server)
                assert len(listener._hub.clients) == 1
                assert not any(shm_directory.iterdir())
    finally:
        shm_directory.chmod(0o700)


# --- no file descriptors ----------------------------------------------------------------------------------------

EXHAUSTED = "DescriptorsExhaustedError: can't {}: it takes {} file descriptors and fewer are left"


def assert_refused_then_works(outcomes: dict[int, str], text: str) -> None:
    """With few descriptors it is the error, from some number on it works; nothing else ever happens."""
    works = [outcome == "works" for outcome in outcomes.values()]
    assert works == sorted(works)
    assert {True, False} == set(works)
    for outcome in outcomes.values():
        assert outcome == "works" or (text in outcome and "ulimit -n" in outcome)


def test_listening_with_few_descriptors(endpoint, start_peer):
    """libzmq would abort the process with some of these numbers."""
    peer = start_peer(places.starved, 128)
    assert peer.hear() == "made"
    before = peer.ask("open_files")
    outcomes = peer.ask("try_listening", endpoint, [*range(12), 20, 31, 32, 33, 48], OPTIONS)
    assert_refused_then_works(outcomes, EXHAUSTED.format(f"listen on {endpoint}", 32))
    assert peer.ask("open_files") == before
    assert not any(directory_of(endpoint).iterdir())


@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
def test_connecting_with_few_descriptors(endpoint, start_peer, nbytes):
    """A large message takes some more; that is told by the send."""
    peer = start_peer(places.starved, 128)
    assert peer.hear() == "made"
    with tsqp.listen(endpoint, **OPTIONS) as listener:
        server = EchoServer(listener)
        outcomes = peer.ask("try_connecting", endpoint, [*range(12), *range(15, 29), 40], nbytes)
        server.stop()
    works = [outcome == "works" for outcome in outcomes.values()]
    assert works == sorted(works)
    assert {True, False} == set(works)
    texts = [EXHAUSTED.format(f"connect to {endpoint}", 16), EXHAUSTED.format("send a large message", 12)]
    assert all(outcome == "works" or outcome.startswith(tuple(texts)) for outcome in outcomes.values())
    assert outcomes[0].startswith(texts[0])


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_a_client_for_whom_there_is_no_descriptor_is_refused(endpoint, start_peer, scheme):
    """The server lives, serves the clients it has, and takes new ones once descriptors are free."""
    peer = start_peer(places.starved, 128)
    assert peer.hear() == "made"
    address = endpoint if scheme == "ipc" else f"tcp://127.0.0.1:{free_port()}"
    peer.ask("listen", address, 4096, 4, 16)
    with tsqp.connect(address, PATIENCE_S) as first:
        peer.ask("accept")
        for spare in (0, 1, 2, 4):
            peer.ask("leave", spare)
            wait_until(peer, refuses=True)
            for _ in range(3):
                with pytest.raises(ConnectError, match=r"refused: .*too few file descriptors left \(ulimit -n\)"):
                    tsqp.connect(address, PATIENCE_S)
            ask(peer, 0, first)
            peer.ask("open_again")
            wait_until(peer, refuses=False)
        with tsqp.connect(address, PATIENCE_S) as second:
            peer.ask("accept")
            ask(peer, 1, second)
            ask(peer, 0, first)
        peer.ask("close")
    assert not any(directory_of(endpoint).iterdir())


def test_the_client_that_takes_the_last_descriptor(endpoint, start_peer):
    """Clients come until one is refused; all before it are served, and when some go others are let in."""
    peer = start_peer(places.starved, 64)
    assert peer.hear() == "made"
    peer.ask("listen", endpoint, 4096, 2, 100)
    clients: list[Channel] = []
    with ExitStack() as stack:
        refusal = ""
        while not refusal:
            try:
                clients.append(stack.enter_context(tsqp.connect(endpoint, PATIENCE_S)))
                peer.ask("accept")
            except ConnectError as error:
                refusal = str(error)
        assert "too few file descriptors left" in refusal
        assert len(clients) > 3
        for number, client in enumerate(clients):
            ask(peer, number, client)
        for number in (0, 1):
            peer.ask("drop", number)
            clients[number].close()
        wait_until(peer, refuses=False)
        with tsqp.connect(endpoint, PATIENCE_S) as late:
            peer.ask("accept")
            ask(peer, len(clients), late)
        peer.ask("close")


def wait_until(peer: Peer, refuses: bool) -> None:
    end = time.monotonic() + PATIENCE_S
    while peer.ask("refuses") != refuses:
        assert time.monotonic() < end
        time.sleep(0.01)


def ask(peer: Peer, number: int, client: Channel) -> None:
    """The client that was accepted as this one is served."""
    peer.say(("echo", number))
    client.send([numbered(number, SMALL)], request_id=number, timeout=PATIENCE_S)
    check_numbered(client.recv(PATIENCE_S), number, SMALL)
    assert peer.hear() is None


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_reserve_that_was_given_up_takes_nothing_to_see_what_is_left(monkeypatch):
    """What it took for a moment a client may need in that moment; the process would be aborted."""
    with open(os.devnull) as source:
        reserve = Reserve(source.fileno())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd"))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, hard))
            reserve.look()
            assert reserve.scarce
            taken, dup = [], os.dup
            monkeypatch.setattr(os, "dup", lambda fd: taken.append(fd) or dup(fd))
            reserve.look()
            assert reserve.scarce
            assert not taken
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 32, hard))
            reserve.look()
            assert not reserve.scarce
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            reserve.close()
