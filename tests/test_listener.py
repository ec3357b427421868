"""Listening and connecting: many clients, limits, fairness, options, and how it ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import peers
import pytest
from carriers import CARRIERS, CHUNK, COUNT, LARGE, SMALL, Background, Carrier, recv_numbered, send_numbered
from ends import assert_works, client_of, path_of
from patience import until
from peers import PATIENCE_S, Peer
from wire_bytes import check_numbered, numbered

import tsqp
from tsqp import door, segments
from tsqp.errors import (
    ClosedError,
    ConfigError,
    ConnectError,
    PeerDiedError,
    SegmentGeometryError,
    SharedMemoryFullError,
    WaitTimeoutError,
)
from tsqp.transport import Channel

StartPeer = Callable[..., Peer]


@pytest.fixture(params=["ring", "zmq-ipc", "zmq-tcp"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


# --- many clients ---------------------------------------------------------------------------------------------


def test_several_clients_at_once_each_with_rings_of_its_own(listener, carrier):
    with ExitStack() as stack:
        pairs = [stack.enter_context(client_of(listener, carrier)) for _ in range(5)]
        threads = Background()
        for number, (client, _) in enumerate(pairs):
            threads.start(send_numbered, client, [SMALL + number, LARGE + number] * 20)
        for number, (_, server) in enumerate(pairs):
            recv_numbered(server, [SMALL + number, LARGE + number] * 20)
        threads.join()
        assert len({server.peer for _, server in pairs}) == 5


def test_wait_tells_which_clients_have_something(listener, carrier):
    with ExitStack() as stack:
        pairs = [stack.enter_context(client_of(listener, carrier)) for _ in range(4)]
        assert listener.wait(0.05) == []
        pairs[2][0].send([], request_id=1)
        assert listener.wait(PATIENCE_S) == [pairs[2][1]]
        assert listener.wait(PATIENCE_S) == [pairs[2][1]]  # until it is taken
        pairs[2][1].recv(PATIENCE_S)
        assert listener.wait(0.05) == []
        pairs[0][0].close()
        assert listener.wait(PATIENCE_S) == [pairs[0][1]]
        with pytest.raises(ClosedError):
            pairs[0][1].recv_nowait()
        pairs[0][1].close()
        assert listener.wait(0.05) == []


@pytest.mark.parametrize("nbytes", [SMALL, LARGE])
def test_a_busy_client_does_not_keep_the_others_from_their_turn(listener, carrier, nbytes):
    """One request per ready client and turn: each gets as many answers as the others, whoever asks faster."""
    with ExitStack() as stack:
        pairs = [stack.enter_context(client_of(listener, carrier)) for _ in range(3)]
        threads = Background()
        for client, _ in pairs:
            threads.start(send_numbered, client, [nbytes] * 60)
        counts = dict.fromkeys((server for _, server in pairs), 0)
        firsts = []
        while min(counts.values()) < 60:
            ready = listener.wait(PATIENCE_S)
            assert len(set(ready)) == len(ready) > 0
            if len(ready) == 3:
                firsts.append(ready[0])
            for server in ready:
                held = server.recv_nowait()
                if held is not None:
                    with held as message:
                        check_numbered(message, counts[server], nbytes)
                    counts[server] += 1
        threads.join()
        assert set(counts.values()) == {60}
        if len(firsts) > 20:
            assert len(set(firsts)) == 3  # the order rotates


def test_wait_wakes_for_a_message_from_another_process(listener, carrier, start_peer):
    peer = start_peer(peers.channel_end, "client", listener.endpoint, carrier.connect_options)
    with listener.accept(PATIENCE_S) as server:
        assert peer.hear() == "made"
        for number in range(5):
            threading.Timer(0.1, peer.say, (("send", [SMALL], number),)).start()
            assert listener.wait(PATIENCE_S) == [server]
            check_numbered(server.recv(0), number, SMALL)
            assert peer.hear() == 1
        killing = threading.Timer(0.1, peer.kill)
        killing.start()
        assert listener.wait(PATIENCE_S) == [server]
        with pytest.raises(PeerDiedError):
            server.recv_nowait()
        killing.join()


def test_wait_wakes_for_a_new_client_and_for_an_interrupt(listener, carrier):
    threading.Timer(0.1, listener.interrupt).start()
    assert listener.wait(PATIENCE_S) == []
    connecting = Background()

    def connect() -> None:
        with tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options) as client:
            assert client.recv(PATIENCE_S).request_id == 3

    connecting.start(connect)
    assert listener.wait(PATIENCE_S) == []
    with listener.accept_nowait() as server:
        server.send([], request_id=3)
        connecting.join()


def test_interrupt_ends_an_accept(listener):
    threading.Timer(0.1, listener.interrupt).start()
    with pytest.raises(WaitTimeoutError):
        listener.accept()


def test_one_thread_may_accept_while_another_waits(listener, carrier):
    accepted: list[Channel] = []
    threads = Background()
    threads.start(lambda: accepted.extend(listener.accept(PATIENCE_S) for _ in range(5)))
    stop = threading.Event()

    def wait() -> None:
        while not stop.is_set():
            listener.wait(0.05)

    threads.start(wait)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options))
            time.sleep(0.05)
        while len(accepted) < 5:
            time.sleep(0.01)
        stop.set()
        threads.join()


def test_one_client_more_than_the_limit_is_refused_until_one_goes(carrier, endpoint):
    with (
        tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options, max_clients=2) as listener,
        client_of(listener, carrier) as first,
    ):
        with client_of(listener, carrier) as second:
            for _ in range(2):
                with pytest.raises(
                    ConnectError, match=r"refused: the server has its limit of 2 clients \(max_clients\)"
                ):
                    tsqp.connect(listener.endpoint, PATIENCE_S)
            assert_works(*first)
            assert_works(*second)
        with client_of(listener, carrier) as third:
            assert_works(*third)


def test_a_client_waits_a_moment_for_a_place_that_is_taken(carrier, endpoint, background, monkeypatch):
    monkeypatch.setattr(door, "_PLACE_S", PATIENCE_S)
    with (
        tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options, max_clients=1) as listener,
        ExitStack() as stack,
    ):
        stack.enter_context(client_of(listener, carrier))

        def leave_once_another_waits() -> None:
            while not listener._hub._hellos:
                time.sleep(0.001)
            stack.close()

        background.start(leave_once_another_waits)
        with client_of(listener, carrier) as second:
            assert_works(*second)
        background.join()


def test_a_client_that_comes_and_goes_leaves_nothing(listener, carrier, shm_directory):
    for number in range(20):
        with client_of(listener, carrier) as both:
            assert_works(*both)
        del both
        if number == 4:
            before = len(os.listdir("/proc/self/fd"))
    assert not any(shm_directory.iterdir())
    until(lambda: len(os.listdir("/proc/self/fd")) <= before + 5)


# --- options and life -----------------------------------------------------------------------------------------


def test_accept_ends_at_its_deadline(listener):
    for timeout in (0, 0.1):
        with pytest.raises(WaitTimeoutError, match="no client connected"):
            listener.accept(timeout)
    assert listener.accept_nowait() is None
    assert listener.wait(0) == []


def test_a_closed_listener_says_so_and_ends_waits(listener):
    outcomes = Background()

    def expect_closed(use: Callable[[], object]) -> None:
        with pytest.raises(ClosedError, match="is closed"):
            use()

    outcomes.start(expect_closed, listener.accept)
    outcomes.start(expect_closed, listener.wait)
    time.sleep(0.1)
    listener.close()
    outcomes.join()
    for use in (listener.accept, listener.accept_nowait, listener.wait):
        expect_closed(use)


def test_closing_the_listener_closes_its_channels_and_tells_the_clients(listener, carrier):
    with client_of(listener, carrier) as (client, server):
        server.send([numbered(0, LARGE)], request_id=0, timeout=PATIENCE_S)
        listener.close()
        assert server.closed
        check_numbered(client.recv(PATIENCE_S), 0, LARGE)
        with pytest.raises(ClosedError):
            client.recv(PATIENCE_S)
    with pytest.raises(ConnectError):
        tsqp.connect(listener.endpoint, 0.2)


@pytest.mark.parametrize("wait", ["auto", "spin", "block", "poll"])
@pytest.mark.parametrize("end", ["listen", "connect", "both"])
def test_every_way_of_waiting_works_at_either_end(endpoint, wait, end):
    listen = {"wait": wait} if end != "connect" else {}
    connect = {"wait": wait} if end != "listen" else {}
    with (
        tsqp.listen(endpoint, CHUNK, COUNT, **listen) as listener,
        tsqp.connect(endpoint, PATIENCE_S, **connect) as client,
        listener.accept(PATIENCE_S) as server,
    ):
        threads = Background()

        def echo() -> None:
            for _ in range(40):
                assert listener.wait(PATIENCE_S) == [server]
                with server.recv_nowait() as message:
                    server.send(message.tensors, request_id=message.request_id, timeout=PATIENCE_S)

        threads.start(echo)
        for number in range(40):
            if number % 10 == 0:
                time.sleep(0.05)  # long enough for the server to block
            client.send([numbered(number, SMALL)], request_id=number, timeout=PATIENCE_S)
            check_numbered(client.recv(PATIENCE_S), number, SMALL)
        threads.join()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"wait": "sleep"}, ConfigError),
        ({"large": "pigeon"}, ConfigError),
        ({"max_chunk_bytes": -1}, ConfigError),
        ({"max_chunk_bytes": 0}, ConfigError),
        ({"max_chunk_bytes": 63}, SegmentGeometryError),
        ({"max_chunks": 0}, ConfigError),
        ({"max_chunks": 1025}, SegmentGeometryError),
        ({"max_chunks": 2.5}, ConfigError),
        ({"shm_name": "passwd"}, ConfigError),
    ],
)
def test_an_option_that_cannot_work_is_refused(endpoint, options, error, shm_directory):
    with pytest.raises(error):
        tsqp.listen(endpoint, **options)
    assert not path_of(endpoint).exists()
    assert not any(shm_directory.iterdir())


def test_a_senseless_wait_of_the_client_is_refused(listener):
    with pytest.raises(ConfigError, match="wait='sleep'"):
        tsqp.connect(listener.endpoint, PATIENCE_S, wait="sleep")


def test_geometry_comes_from_the_environment(endpoint, monkeypatch):
    monkeypatch.setenv("TSQP_MAX_SHM_CHUNK_BYTES", "8192")
    monkeypatch.setenv("TSQP_SHM_MAX_CHUNKS", "3")
    with tsqp.listen(endpoint) as listener, client_of(listener, CARRIERS["ring"]) as (client, server):
        assert (client.threshold, server.threshold) == (8192, 8192)
        assert client.can_send(3)
        assert not client.can_send(4)
    monkeypatch.setenv("TSQP_SHM_MAX_CHUNKS", "three")
    with pytest.raises(ConfigError, match="TSQP_SHM_MAX_CHUNKS='three' is not a whole number"):
        tsqp.listen(endpoint)


def test_a_segment_that_does_not_fit_is_an_error_at_once(endpoint, shm_directory):
    info = os.statvfs(shm_directory)
    total = info.f_blocks * info.f_frsize
    if not 0 < total < 1 << 45:
        pytest.skip(f"{shm_directory} is on a file system without a limit")
    with pytest.raises(SharedMemoryFullError, match="bytes free"):
        tsqp.listen(endpoint, max_chunk_bytes=total, max_chunks=4)
    assert not path_of(endpoint).exists()


def test_a_server_that_can_make_no_segment_refuses_with_the_reason(endpoint, monkeypatch, tmp_path):
    with tsqp.listen(endpoint, **CARRIERS["ring"].listen_options) as listener:
        monkeypatch.setenv("TSQP_SHM_DIR", str(tmp_path / "gone"))
        with pytest.raises(ConnectError, match="the server could not make a segment"):
            tsqp.connect(endpoint, PATIENCE_S)
        monkeypatch.undo()
        with client_of(listener, CARRIERS["ring"]) as both:
            assert_works(*both)


def test_listening_reaps_what_killed_servers_left(endpoint, start_peer, shm_directory):
    left = start_peer(peers.hold_segment)
    name = left.hear()
    alive = start_peer(peers.hold_segment)
    alive_name = alive.hear()
    left.kill()
    assert [leftover.name for leftover in segments.leftovers()] == [name]
    with tsqp.listen(endpoint, **CARRIERS["ring"].listen_options):
        assert [entry.name for entry in shm_directory.iterdir()] == [alive_name]
    (shm_directory / alive_name).unlink()


def test_a_close_that_was_interrupted_can_be_called_again(endpoint, monkeypatch):
    with tsqp.listen(endpoint, 1 << 16, 2) as listener:
        close = listener._hub.close

        def interrupt():
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(listener._hub, "close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            listener.close()
        assert listener._hub.close == close
        listener.close()
        assert not listener._hub._thread.is_alive()
        with tsqp.listen(endpoint, 1 << 16, 2):
            pass
