"""Connections with keys: who gets in, who does not and why, and what travels."""

from __future__ import annotations

import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from carriers import CARRIERS, CHUNK, COUNT, Background, Carrier
from ends import assert_works
from keys import Keys, own_address
from patience import until
from peers import PATIENCE_S
from wire_bytes import numbered

import tsqp
from tsqp import curve
from tsqp import handshake as hs
from tsqp.config import parse_endpoint
from tsqp.errors import (
    AuthenticationError,
    ClosedError,
    ConfigError,
    EndpointError,
    InsecureEndpointError,
    PeerDiedError,
)
from tsqp.listener import Listener
from tsqp.server import GPUServer
from tsqp.transport import Channel

#: What a reader gets whose channel is closed under it; at the server's end it depends on where it waits.
GONE = (ClosedError, PeerDiedError)
BEYOND = [
    "tcp://192.0.2.7:5555",
    "tcp://0.0.0.0:5555",
    "tcp://[::]:5555",
    "tcp://[2001:db8::1]:5555",
    "tcp://10.0.0.1:0",
]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture(params=["ring", "ring-tcp", "zmq-ipc", "zmq-tcp"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


@contextmanager
def server_with(keys: Keys, carrier: Carrier, ipc: str) -> Iterator[Listener]:
    with tsqp.listen(carrier.endpoint(ipc), **carrier.listen_options, **keys.listen) as listener:
        yield listener


@contextmanager
def good_client(listener: Listener, keys: Keys, shm: bool = True) -> Iterator[tuple[Channel, Channel]]:
    with (
        tsqp.connect(listener.endpoint, PATIENCE_S, shm=shm, **keys.connect) as client,
        listener.accept(PATIENCE_S) as server,
    ):
        yield client, server


# --- beyond this host ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", BEYOND)
@pytest.mark.parametrize("use", [tsqp.listen, tsqp.connect])
def test_an_endpoint_beyond_this_host_is_refused_without_keys(use, endpoint):
    with pytest.raises(
        InsecureEndpointError, match=r"reaches beyond this host, .* make keys \(tsqp keygen\)"
    ) as caught:
        use(endpoint)
    assert isinstance(caught.value, EndpointError)


def test_a_server_refuses_it_before_it_loads_a_model():
    with pytest.raises(InsecureEndpointError):
        GPUServer("/nowhere", BEYOND[0])
    with pytest.raises(ConfigError, match="without curve_clients"):
        GPUServer("/nowhere", BEYOND[0], curve_key="/nowhere")


@pytest.mark.parametrize("endpoint", ["ipc:///tmp/s", "tcp://127.0.0.1:1", "tcp://127.8.9.1:1", "tcp://[::1]:1"])
def test_what_stays_on_this_host_needs_none(endpoint):
    curve.check_reach(parse_endpoint(endpoint), None)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_another_address_works_with_keys_and_without_a_ring(keys, family):
    address = own_address(family)
    if address is None:
        pytest.skip("this machine has no address beyond its loopback")
    endpoint = f"tcp://{address}:0" if family == socket.AF_INET else f"tcp://[{address}]:0"
    with (
        tsqp.listen(endpoint, CHUNK, COUNT, **keys.listen) as listener,
        good_client(listener, keys) as (client, server),
    ):
        assert client.transport == server.transport == "tcp"
        assert_works(client, server)
        with pytest.raises(InsecureEndpointError):
            tsqp.connect(listener.endpoint, PATIENCE_S)


def test_all_interfaces_may_be_bound_with_keys(keys):
    with tsqp.listen("tcp://0.0.0.0:0", CHUNK, COUNT, **keys.listen) as listener:
        port = parse_endpoint(listener.endpoint).port
        with (
            tsqp.connect(f"tcp://127.0.0.1:{port}", PATIENCE_S, **keys.connect) as client,
            listener.accept(PATIENCE_S) as server,
        ):
            assert client.transport == server.transport == "tcp"  # it did not offer a ring to whoever may come
            assert_works(client, server)


def test_the_ipv6_loopback_works(endpoint):
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        listener = tsqp.listen("tcp://[::1]:0", CHUNK, COUNT)
    except EndpointError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    with listener, tsqp.connect(listener.endpoint, PATIENCE_S) as client, listener.accept(PATIENCE_S) as server:
        assert_works(client, server)


# --- who gets in --------------------------------------------------------------------------------------------------


def test_two_ends_that_know_each_other_work(keys, carrier, endpoint):
    with (
        server_with(keys, carrier, endpoint) as listener,
        good_client(listener, keys, carrier.shm) as (client, server),
    ):
        assert client.transport == carrier.transport
        assert_works(client, server)


def _unknown_client(keys: Keys) -> dict[str, Any]:
    return keys.connect_as("other")


def _wrong_server(keys: Keys) -> dict[str, Any]:
    return keys.connect_as("client", "other")


def _no_keys(keys: Keys) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("timeout", [PATIENCE_S, None])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (_unknown_client, "refused this client: the public key of curve_key is not among its curve_clients"),
        (_wrong_server, "has other keys than curve_server says, or none"),
        (_no_keys, r"this client has no keys and the server wants some; give both ends keys .* or none"),
    ],
)
def test_a_client_that_does_not_fit_is_refused_with_the_reason(keys, carrier, endpoint, options, reason, timeout):
    with server_with(keys, carrier, endpoint) as listener, good_client(listener, keys, carrier.shm) as both:
        with pytest.raises(AuthenticationError, match=reason):
            tsqp.connect(listener.endpoint, timeout, **options(keys))
        assert listener.accept_nowait() is None
        assert_works(*both)


@pytest.mark.parametrize("timeout", [PATIENCE_S, None])
def test_a_client_with_keys_does_not_fall_back_to_a_server_without(keys, carrier, endpoint, timeout):
    with tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options) as listener:
        # Which end notices first is a matter of chance; so is which of the two reasons is given.
        with pytest.raises(AuthenticationError, match=r"the server has none|or none; give the public key"):
            tsqp.connect(listener.endpoint, timeout, **keys.connect)
        assert listener.accept_nowait() is None


def test_a_short_timeout_still_names_the_likely_reason(keys, endpoint, monkeypatch):
    """Before it failed so often that there is no doubt."""
    monkeypatch.setattr("tsqp.greeting._TRIES", 1 << 30)
    with (
        server_with(keys, CARRIERS["zmq-ipc"], endpoint) as listener,
        pytest.raises(tsqp.errors.ConnectError, match=r"perhaps it has no keys, or other ones|other keys than"),
    ):
        tsqp.connect(listener.endpoint, 3.0, **_wrong_server(keys))


def test_the_server_may_come_later_with_keys_too(keys, endpoint):
    connected: list[Channel] = []
    connecting = Background()
    connecting.start(lambda: connected.append(tsqp.connect(endpoint, PATIENCE_S, **keys.connect)))
    time.sleep(0.2)
    with server_with(keys, CARRIERS["ring"], endpoint) as listener, listener.accept(PATIENCE_S) as server:
        connecting.join()
        with connected[0] as client:
            assert_works(client, server)


def test_nobody_gets_in_while_nobody_decides(keys):
    """libzmq asks for each key; where nobody answers it must not let the client in."""
    server = curve.server_keys(**keys.listen)
    client = curve.client_keys(**keys.connect)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        router.linger = dealer.linger = 0
        server.apply(router)
        client.apply(dealer)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        dealer.connect(f"tcp://127.0.0.1:{port}")
        dealer.send(b"let me in")
        assert router.poll(500) == 0


# --- keys that come and go ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["removed", "replaced", "directory gone", "directory open to others"])
def test_a_client_whose_key_goes_is_cut_off_while_it_is_busy(keys, carrier, endpoint, how, caplog):
    with server_with(keys, carrier, endpoint) as listener:
        threads, closed = Background(), threading.Event()

        def ask() -> None:
            """Never lets the server find its ring empty for long."""
            with (
                tsqp.connect(listener.endpoint, PATIENCE_S, shm=carrier.shm, **keys.connect) as client,
                suppress(ClosedError),
            ):
                while not closed.is_set():
                    client.send([numbered(1, 100)], timeout=PATIENCE_S)
                    client.recv(PATIENCE_S)
                    asked.append(1)

        asked: list[int] = []
        threads.start(ask)
        with listener.accept(PATIENCE_S) as server:
            ended: list[Channel] = []
            while not ended:
                for channel in listener.wait(PATIENCE_S):
                    try:
                        with channel.recv_nowait() as message:
                            channel.send(message.tensors, timeout=PATIENCE_S)
                    except GONE:
                        ended.append(channel)
                if len(asked) >= 20 and how:
                    _take_away(keys, how)
                    how = ""
            assert ended == [server]
            assert server.closed
        closed.set()
        threads.join()
        assert "its key was removed" in caplog.text
        with pytest.raises(AuthenticationError, match="refused this client"):
            tsqp.connect(listener.endpoint, PATIENCE_S, **keys.connect)
        assert all(channel is server for channel in listener.wait(0))


def _take_away(keys: Keys, how: str) -> None:
    if how == "removed":
        keys.expel("client")
    elif how == "replaced":
        shutil.copy(keys.public("other"), keys.clients / "client.key")
    elif how == "directory gone":
        shutil.rmtree(keys.clients)
    else:
        keys.clients.chmod(0o777)


def test_a_reader_that_waits_hears_of_it(keys, carrier, endpoint):
    with server_with(keys, carrier, endpoint) as listener, good_client(listener, keys, carrier.shm) as (client, server):
        threads = Background()

        def wait_for_the_end(channel: Channel) -> None:
            with pytest.raises(GONE):
                channel.recv(PATIENCE_S)

        for channel in (client, server):
            threads.start(wait_for_the_end, channel)
        keys.expel("client")
        threads.join()


def test_a_client_whose_key_went_cannot_come_back_on_its_old_connection(keys, carrier, endpoint):
    """libzmq asked for its key once, when it connected; the connection may live on."""
    hello = [hs.envelope(hs.HELLO), hs.pack(hs.Hello(hs.PROTOCOL, False, False))]
    with (
        server_with(keys, carrier, endpoint) as listener,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as dealer,
    ):
        dealer.linger = 0
        dealer.rcvtimeo = int(PATIENCE_S * 1000)
        curve.client_keys(**keys.connect).apply(dealer)
        dealer.connect(listener.endpoint)
        dealer.send_multipart(hello)
        assert hs.open_envelope(dealer.recv_multipart()[0])[0] == hs.WELCOME
        keys.expel("client")
        parts = dealer.recv_multipart()
        assert hs.open_envelope(parts[0])[0] == hs.BYE
        assert "was removed from the server's directory" in hs.unpack(hs.Refuse, parts[1]).reason
        dealer.send_multipart(hello)
        assert dealer.poll(1000) == 0  # neither this connection nor a new one is let in, or told anything
        assert not listener._hub.clients


def test_who_has_left_is_forgotten(keys, endpoint):
    with server_with(keys, CARRIERS["zmq-ipc"], endpoint) as listener, good_client(listener, keys, False) as both:
        for _ in range(150):
            with good_client(listener, keys, False):
                pass
        until(lambda: len(listener._hub._lock._came_with) < 80)
        assert_works(*both)
        keys.expel("client")  # and who has not left is remembered
        until(lambda: both[1].closed)


def test_a_key_that_is_added_is_let_in_without_a_restart(keys, carrier, endpoint):
    with server_with(keys, carrier, endpoint) as listener, good_client(listener, keys, carrier.shm) as both:
        with pytest.raises(AuthenticationError):
            tsqp.connect(listener.endpoint, PATIENCE_S, **keys.connect_as("other"))
        keys.admit("other")
        time.sleep(0.01)  # two looks at the directory are not that close together
        with tsqp.connect(listener.endpoint, PATIENCE_S, **keys.connect_as("other")), listener.accept(PATIENCE_S):
            keys.expel("other")
            until(lambda: len(listener._hub.channels) == 1)
        assert_works(*both)


# --- what travels, and what does not ------------------------------------------------------------------------------


class Tap:
    """Passes a TCP connection on and keeps what it saw."""

    def __init__(self, port: int) -> None:
        self.seen = bytearray()
        self._target = ("127.0.0.1", port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._threads = Background()
        self._threads.start(self._run)

    def _run(self) -> None:
        near, _ = self._listening.accept()
        far = socket.create_connection(self._target)
        with near, far:
            back = Background()
            back.start(self._pass_on, far, near)
            self._pass_on(near, far)
            back.join()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.seen += data
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._threads.join()
        self._listening.close()


@pytest.mark.parametrize("with_keys", [True, False])
def test_nothing_can_be_read_on_the_way(keys, with_keys):
    """The same without keys shows that the look would find it."""
    secret = b"the prompt of an enclave" * 4
    listen, connect = (keys.listen, keys.connect) if with_keys else ({}, {})
    with tsqp.listen("tcp://127.0.0.1:0", shm=False, **listen) as listener:
        with closing(Tap(parse_endpoint(listener.endpoint).port)) as tap:
            with tsqp.connect(tap.endpoint, PATIENCE_S, shm=False, **connect) as client:
                server = listener.accept(PATIENCE_S)
                tensor = torch.frombuffer(bytearray(secret), dtype=torch.uint8)
                client.send([tensor], meta={"text": secret.decode()}, timeout=PATIENCE_S)
                message = server.recv(PATIENCE_S)
                assert torch.equal(message.tensors[0], tensor)
                server.send(message.tensors, timeout=PATIENCE_S)
                client.recv(PATIENCE_S)
            server.close()
        assert (secret[:24] in tap.seen) is not with_keys
        assert len(tap.seen) > 3 * len(secret)


def test_secret_keys_show_nowhere(keys, carrier, endpoint, caplog, shm_directory):
    caplog.set_level(logging.DEBUG)
    secrets = [keys.secret_text(name) for name in ("server", "client", "other")]
    told = [repr(curve.server_keys(**keys.listen)), repr(curve.client_keys(**keys.connect))]
    with server_with(keys, carrier, endpoint) as listener, good_client(listener, keys, carrier.shm) as both:
        assert_works(*both)
        for options in (_unknown_client, _wrong_server, _no_keys):
            with pytest.raises(AuthenticationError) as caught:
                tsqp.connect(listener.endpoint, PATIENCE_S, **options(keys))
            told.append(repr(caught.value))
        memory = b"".join(path.read_bytes() for path in shm_directory.iterdir())
    told.append(caplog.text)
    for secret in secrets:
        assert not any(secret in text for text in told)
        assert secret.encode() not in memory
        assert zmq.utils.z85.decode(secret.encode()) not in memory


# --- a flood ------------------------------------------------------------------------------------------------------


def test_a_flood_of_unknown_keys_neither_stops_a_client_nor_fills_the_log(keys, carrier, endpoint, caplog):
    with server_with(keys, carrier, endpoint) as listener, good_client(listener, keys, carrier.shm) as both:
        threads, stop, refused = Background(), threading.Event(), []

        def flood() -> None:
            with zmq.Context() as context:
                while not stop.is_set():
                    with context.socket(zmq.DEALER) as dealer:
                        dealer.linger = 0
                        curve.client_keys(**keys.connect_as("other")).apply(dealer)
                        with dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH) as monitor:
                            dealer.connect(listener.endpoint)
                            refused.append(monitor.poll(int(PATIENCE_S * 1000)))
                            dealer.disable_monitor()

        began = time.monotonic()
        for _ in range(4):
            threads.start(flood)
        try:
            until(lambda: len(refused) > 20)
            for _ in range(20):
                assert_works(*both)
            with good_client(listener, keys, carrier.shm) as late:
                assert_works(*late)
            until(lambda: len(refused) > 200)
        finally:
            stop.set()
            threads.join()
        assert all(refused)
        lines = [record for record in caplog.records if "its key" in record.message]
        assert 1 <= len(lines) <= 3 + (time.monotonic() - began)
        assert len(lines) < len(refused)
