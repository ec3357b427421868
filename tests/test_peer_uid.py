"""Unix sockets belong to one user: whoever else comes, or has taken the place of a server, is refused."""

from __future__ import annotations

import logging
import os
import socket

import places
import pytest
from carriers import CARRIERS
from ends import assert_works, client_of, path_of
from peers import PATIENCE_S
from users import as_nobody, needs_root

import tsqp
from tsqp.errors import AuthenticationError, ConnectError
from tsqp.peer_uid import GONE, stranger

OPTIONS = {**CARRIERS["zmq-ipc"].listen_options}

pytest_plugins = ["user_fixtures"]


# --- who is there -------------------------------------------------------------------------------------------------


def test_the_kernel_says_who_is_there():
    one, other = socket.socketpair()
    with one, other:
        for end in (one, other):
            assert stranger(end.fileno()) == ""
        one.send(b"still open")
        assert other.recv(20) == b"still open"
        descriptor = one.fileno()
    assert stranger(descriptor) == GONE
    assert stranger(-1) == GONE


def test_what_is_no_unix_socket_is_nobody_known(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        assert stranger(file.fileno()) == GONE
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert stranger(client.fileno()) != ""


# --- a client of another user -------------------------------------------------------------------------------------


@needs_root
@pytest.mark.usefixtures("open_directory")
def test_a_client_of_another_user_is_refused_and_the_server_goes_on(endpoint, start_peer, caplog):
    caplog.set_level(logging.WARNING, "tsqp")
    with tsqp.listen(endpoint, **OPTIONS) as listener, client_of(listener, CARRIERS["zmq-ipc"]) as both:
        path_of(endpoint).chmod(0o666)  # somebody meant well
        with pytest.raises(
            ConnectError, match="refused: it serves user 0 and root, and this is user 65534; run both ends as one user"
        ):
            as_nobody(start_peer, "connect", endpoint, timeout=PATIENCE_S, shm=False)
        assert listener.accept_nowait() is None
        assert "refused user 65534" in caplog.text
        assert_works(*both)


# --- a server of another user -------------------------------------------------------------------------------------


@needs_root
def test_a_server_of_another_user_is_not_even_connected_to(endpoint, open_directory, start_peer):
    """Somebody has taken the place of a server that does not run."""
    server = start_peer(places.router_of_nobody, str(path_of(endpoint)))
    assert server.hear() == "bound"
    with pytest.raises(AuthenticationError, match=r"the socket of \S+ belongs to user 65534, and this is user 0"):
        tsqp.connect(endpoint, PATIENCE_S)
    server.say("stop")
    assert server.hear() is False
    server.join()
    path_of(endpoint).unlink(missing_ok=True)


@needs_root
def test_a_server_of_another_user_hears_nothing_whoever_owns_the_file(endpoint, open_directory, start_peer):
    server = start_peer(places.router_of_nobody, str(path_of(endpoint)))
    assert server.hear() == "bound"
    os.chown(path_of(endpoint), 0, 0)
    with pytest.raises(AuthenticationError, match=r"the server at \S+ is of user 65534, and this is user 0"):
        tsqp.connect(endpoint, PATIENCE_S)
    server.say("stop")
    assert server.hear() is False
    server.join()
    path_of(endpoint).unlink(missing_ok=True)
