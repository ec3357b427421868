"""Endpoints: which can work, who may have them, what is left of them."""

from __future__ import annotations

import socket
import stat
import time
from collections.abc import Callable

import peers
import pytest
from carriers import CARRIERS, Background, Carrier
from ends import assert_works, client_of, path_of
from peers import PATIENCE_S, Peer

import tsqp
from tsqp.config import parse_endpoint
from tsqp.errors import (
    ConnectError,
    EndpointBusyError,
    EndpointError,
)
from tsqp.transport import Channel

StartPeer = Callable[..., Peer]


@pytest.fixture(params=["ring", "zmq-ipc", "zmq-tcp"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        ("", "neither ipc:///path nor tcp://address:port"),
        ("/tmp/a.sock", "neither ipc"),
        ("udp://127.0.0.1:5", "neither ipc"),
        ("inproc://x", "neither ipc"),
        ("ipc://", "neither ipc"),
        ("ipc://a.sock", "relative path; give an absolute one"),
        ("ipc://@abstract", "relative path"),
        ("ipc:///" + "x" * 107, "has 108 bytes but a socket address holds 107; use a shorter path"),
        ("ipc:///" + "ä" * 54, "has 109 bytes"),
        ("tcp://localhost:5555", "names a host; give a numeric address"),
        ("tcp://*:5555", "names a host"),
        ("tcp://127.0.0.1", "no port between 0 and 65535"),
        ("tcp://127.0.0.1:", "no port"),
        ("tcp://127.0.0.1:65536", "no port"),
        ("tcp://127.0.0.1:-1", "no port"),
        ("tcp://127.0.0.1:http", "no port"),
        ("tcp://:5555", "names a host"),
    ],
)
def test_an_endpoint_that_cannot_work_is_refused_with_the_fix(endpoint, text):
    for use in (tsqp.listen, tsqp.connect):
        with pytest.raises(EndpointError, match=text):
            use(endpoint)


def test_the_longest_path_works(endpoint, carrier):
    directory = path_of(endpoint).parent
    longest = f"ipc://{directory}/" + "x" * (107 - len(str(directory)) - 1)
    with tsqp.listen(longest, **CARRIERS["ring"].listen_options) as listener, client_of(listener, carrier) as both:
        assert_works(*both)


def test_a_missing_directory_and_a_path_that_is_no_socket_are_told(tmp_path):
    with pytest.raises(EndpointError, match=f"the directory {tmp_path}/none of .* does not exist; create it"):
        tsqp.listen(f"ipc://{tmp_path}/none/s")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(EndpointError, match="exists and is no socket; choose another path"):
        tsqp.listen(f"ipc://{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_busy_endpoint_is_refused_and_its_server_undisturbed(listener, carrier):
    with client_of(listener, carrier) as both:
        for _ in range(3):
            with pytest.raises(EndpointBusyError, match=r"another process listens on \S+; stop it or choose another"):
                tsqp.listen(listener.endpoint, **carrier.listen_options)
        assert_works(*both)
        with client_of(listener, carrier) as late:
            assert_works(*late)


def test_the_socket_file_is_private_and_removed(endpoint):
    path = path_of(endpoint)
    with tsqp.listen(endpoint, **CARRIERS["ring"].listen_options) as listener:
        info = path.stat()
        assert stat.S_ISSOCK(info.st_mode)
        assert stat.S_IMODE(info.st_mode) == 0o600
        listener.close()
        assert not path.exists()
        listener.close()
    with tsqp.listen(endpoint, **CARRIERS["ring"].listen_options):  # at once again
        assert path.exists()


def test_a_stale_socket_file_is_taken_over(endpoint, carrier):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path_of(endpoint)))
    with tsqp.listen(endpoint, **carrier.listen_options) as listener, client_of(listener, carrier) as both:
        assert_works(*both)


def test_the_socket_of_a_killed_server_is_taken_over(endpoint, carrier, start_peer):
    peer = start_peer(peers.channel_end, "server", endpoint, CARRIERS["ring"].listen_options)
    assert peer.hear() == "made"
    peer.kill()
    assert path_of(endpoint).exists()
    with pytest.raises(ConnectError):
        tsqp.connect(endpoint, 0.2)
    with tsqp.listen(endpoint, **carrier.listen_options) as listener, client_of(listener, carrier) as both:
        assert_works(*both)


def test_port_0_is_any_free_port():
    with tsqp.listen("tcp://127.0.0.1:0", shm=False) as one, tsqp.listen("tcp://127.0.0.1:0", shm=False) as other:
        assert one.endpoint != other.endpoint
        assert parse_endpoint(one.endpoint).port > 0


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_no_server_is_an_error_with_what_to_do(endpoint, scheme):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        nobody = endpoint if scheme == "ipc" else f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        for timeout in (0, 0.3):
            with pytest.raises(
                ConnectError, match=f"no tsqp server answered at {nobody} within {timeout} s; start one"
            ):
                tsqp.connect(nobody, timeout)


def test_something_that_is_no_server_is_an_error():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(ConnectError, match="no tsqp server answered"):
            tsqp.connect(f"tcp://127.0.0.1:{sock.getsockname()[1]}", 0.5)


def test_the_client_may_come_before_the_server(endpoint, carrier):
    connected: list[Channel] = []
    connecting = Background()
    connecting.start(lambda: connected.append(tsqp.connect(endpoint, PATIENCE_S, **carrier.connect_options)))
    time.sleep(0.3)
    with tsqp.listen(endpoint, **carrier.listen_options) as listener, listener.accept(PATIENCE_S) as server:
        connecting.join()
        with connected[0] as client:
            assert_works(client, server)
