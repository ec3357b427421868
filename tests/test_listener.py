"""Listening and connecting: many clients, limits, fairness, hostile and broken peers, endpoints, leftovers."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgpack
import peers
import pytest
import zmq
from carriers import CARRIERS, CHUNK, COUNT, LARGE, SMALL, Background, Carrier, pass_on, recv_numbered, send_numbered
from peers import PATIENCE_S, Peer
from wire_bytes import check_numbered, numbered

import tsqp
from tsqp import handshake as hs
from tsqp import hub, segments
from tsqp.config import parse_endpoint
from tsqp.errors import (
    ClosedError,
    ConfigError,
    ConnectError,
    EndpointBusyError,
    EndpointError,
    PeerDiedError,
    ProtocolError,
    SegmentError,
    SegmentGeometryError,
    SharedMemoryFullError,
    WaitTimeoutError,
)
from tsqp.listener import Listener
from tsqp.transport import Channel

StartPeer = Callable[..., Peer]


@pytest.fixture(params=["ring", "zmq-ipc", "zmq-tcp"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


@pytest.fixture
def listener(carrier: Carrier, endpoint: str) -> Iterator[Listener]:
    with tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options) as made:
        yield made


def path_of(endpoint: str) -> Path:
    return Path(urlsplit(endpoint).path)


@contextmanager
def client_of(listener: Listener, carrier: Carrier) -> Iterator[tuple[Channel, Channel]]:
    """A connected client and the server's channel to it."""
    with (
        tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options) as client,
        listener.accept(PATIENCE_S) as server,
    ):
        yield client, server


def assert_works(client: Channel, server: Channel) -> None:
    for number, nbytes in enumerate([SMALL, LARGE]):
        message = pass_on(client, server, [numbered(number, nbytes)], request_id=number)
        check_numbered(message, number, nbytes)


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
        threading.Timer(0.1, peer.kill).start()
        assert listener.wait(PATIENCE_S) == [server]
        with pytest.raises(PeerDiedError):
            server.recv_nowait()


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


def test_a_client_that_comes_and_goes_leaves_nothing(listener, carrier, shm_directory):
    for number in range(20):
        with client_of(listener, carrier) as both:
            assert_works(*both)
        del both
        if number == 4:
            before = len(os.listdir("/proc/self/fd"))
    assert not any(shm_directory.iterdir())
    assert len(os.listdir("/proc/self/fd")) <= before + 5


# --- peers that are broken or hostile -------------------------------------------------------------------------


def raw_socket(listener: Listener) -> socket.socket:
    parsed = parse_endpoint(listener.endpoint)
    family = socket.AF_UNIX if parsed.scheme == "ipc" else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.connect(parsed.path if parsed.scheme == "ipc" else (parsed.host, parsed.port))
    return sock


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\xff" * 10_000,
        bytes(10_000),
        # A ZMTP 3.0 greeting, then a frame that claims 2^62 bytes.
        b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 32) + b"\x02" + struct.pack(">Q", 1 << 62) + b"x" * 100,
        b"",
    ],
    ids=["http", "ones", "zeros", "huge frame", "nothing"],
)
def test_garbage_on_the_socket_disturbs_nobody(listener, carrier, garbage):
    with client_of(listener, carrier) as both:
        for _ in range(5):
            with raw_socket(listener) as sock:
                sock.sendall(garbage)
                assert_works(*both)
        with client_of(listener, carrier) as late:
            assert_works(*late)


@contextmanager
def raw_dealer(endpoint: str) -> Iterator[zmq.Socket]:
    """A peer that speaks ZeroMQ, and then what it likes."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.connect(endpoint)
        yield sock


def hello(**changes: object) -> bytes:
    return msgpack.packb({"protocol": hs.PROTOCOL, "shm": False, "futex": False, **changes})


HELLO, READY = hs.envelope(hs.HELLO), hs.envelope(hs.READY)
BAD_HANDSHAKES = {
    "one empty frame": [[b""]],
    "no body": [[HELLO]],
    "too many frames": [[HELLO, hello(), b"x"]],
    "unknown kind": [[hs.envelope(99), hello()]],
    "envelope of one byte": [[b"H", hello()]],
    "no msgpack": [[HELLO, b"\xc1"]],
    "no mapping": [[HELLO, b"\x01"]],
    "missing fields": [[HELLO, b"\x80"]],
    "one field more": [[HELLO, hello(more=1)]],
    "wrong type": [[HELLO, hello(shm=1)]],
    "protocol as text": [[HELLO, hello(protocol="1")]],
    "long body": [[HELLO, hello(protocol=1) + bytes(5000)]],
    "deep body": [[HELLO, b"\x91" * 4000]],
    "ready first": [[READY, msgpack.packb({"shm": False, "native": True})]],
    "message first": [[hs.envelope(hs.MESSAGE, 0), bytes(128)]],
    "goodbye first": [[hs.envelope(hs.BYE)]],
    "hello twice": [[HELLO, hello()], [HELLO, hello()]],
    "message before ready": [[HELLO, hello()], [hs.envelope(hs.MESSAGE, 0), bytes(128)]],
    "ready of a wrong type": [[HELLO, hello()], [READY, msgpack.packb({"shm": "no", "native": True})]],
}


@pytest.mark.parametrize("name", BAD_HANDSHAKES)
def test_a_broken_handshake_ends_that_connection_only(listener, carrier, name):
    with client_of(listener, carrier) as both, raw_dealer(listener.endpoint) as dealer:
        for message in BAD_HANDSHAKES[name]:
            dealer.send_multipart(message)
        assert_works(*both)
        assert listener.accept_nowait() is None
        with client_of(listener, carrier) as late:
            assert_works(*late)


def test_another_protocol_is_refused_with_the_reason(listener):
    with raw_dealer(listener.endpoint) as dealer:
        dealer.send_multipart([HELLO, hello(protocol=hs.PROTOCOL + 1)])
        kind, body = dealer.recv_multipart()
    assert hs.open_envelope(kind)[0] == hs.REFUSE
    assert hs.unpack(hs.Refuse, body).reason == (
        f"the server speaks protocol {hs.PROTOCOL}, the client {hs.PROTOCOL + 1}: use one version of tsqp"
    )


def shake_hands(dealer: zmq.Socket) -> None:
    """A handshake without shared memory."""
    dealer.send_multipart([HELLO, hello()])
    assert hs.open_envelope(dealer.recv_multipart()[0])[0] == hs.WELCOME
    dealer.send_multipart([READY, msgpack.packb({"shm": False, "native": True})])


@pytest.mark.parametrize(
    "frames",
    [
        [hs.envelope(hs.MESSAGE, 0)],
        [hs.envelope(hs.HELLO), hello()],
        [READY, msgpack.packb({"shm": False, "native": True})],
        [b"junk"],
    ],
    ids=["no head", "hello again", "ready again", "junk"],
)
def test_a_client_that_breaks_the_protocol_is_cut_off_and_told(listener, carrier, frames):
    with client_of(listener, carrier) as both, raw_dealer(listener.endpoint) as dealer:
        shake_hands(dealer)
        with listener.accept(PATIENCE_S) as cut_off:
            dealer.send_multipart(frames)
            with pytest.raises(PeerDiedError, match="it broke the protocol"):
                cut_off.recv(PATIENCE_S)
            assert dealer.poll(int(PATIENCE_S * 1000))
            assert hs.open_envelope(dealer.recv_multipart()[0])[0] == hs.BYE
        assert_works(*both)


def test_rubbish_in_a_large_message_is_an_error_and_the_next_one_arrives(listener):
    with raw_dealer(listener.endpoint) as dealer:
        shake_hands(dealer)
        with listener.accept(PATIENCE_S) as server:
            for head, frames in ((bytes(128), []), (b"", []), (b"TSQM" + bytes(124), [b"x"] * 70)):
                dealer.send_multipart([hs.envelope(hs.MESSAGE, 0), head, *frames])
                with pytest.raises(tsqp.errors.MessageError):
                    server.recv(PATIENCE_S)
            codec = tsqp._message.Codec()
            codec.plan([], b"", 7, 0, 42, 0, 0, 0, 0, 0)
            dealer.send_multipart([hs.envelope(hs.MESSAGE, 0), codec.head_bytes(b"")])
            assert server.recv(PATIENCE_S).request_id == 42


def test_a_client_that_floods_is_cut_off(carrier, endpoint):
    options = {**carrier.listen_options, "max_inbox_bytes": 1 << 20}
    with (
        tsqp.listen(carrier.endpoint(endpoint), **options) as listener,
        client_of(listener, carrier) as both,
        raw_dealer(listener.endpoint) as dealer,
    ):
        shake_hands(dealer)
        with listener.accept(PATIENCE_S) as flooded:
            for _ in range(3000):  # empty messages have a cost too
                dealer.send_multipart([hs.envelope(hs.MESSAGE, 0), b""])
            end = time.monotonic() + PATIENCE_S
            while not flooded._link.dead():
                assert time.monotonic() < end
                time.sleep(0.01)
        assert_works(*both)


def test_a_handshake_that_is_never_finished_expires(carrier, endpoint, monkeypatch, shm_directory):
    monkeypatch.setattr(hub, "HANDSHAKE_TIMEOUT_S", 0.3)
    with (
        tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options, max_clients=1) as listener,
        raw_dealer(listener.endpoint) as dealer,
    ):
        dealer.send_multipart([HELLO, hello(shm=True)])
        assert hs.open_envelope(dealer.recv_multipart()[0])[0] == hs.WELCOME
        assert any(shm_directory.iterdir()) == carrier.shm
        with pytest.raises(ConnectError, match="limit"):
            tsqp.connect(listener.endpoint, PATIENCE_S)
        time.sleep(0.6)
        with client_of(listener, carrier) as both:  # its place is free again
            assert_works(*both)
            dealer.send_multipart([READY, msgpack.packb({"shm": False, "native": True})])  # too late
            assert dealer.poll(int(PATIENCE_S * 1000))
            assert hs.open_envelope(dealer.recv_multipart()[0])[0] == hs.BYE
            assert_works(*both)
    assert not any(shm_directory.iterdir())


def test_close_does_not_wait_for_a_client_that_takes_nothing(carrier, endpoint, start_peer):
    with tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options) as listener:
        peer = start_peer(peers.channel_end, "client", listener.endpoint, carrier.connect_options)
        server = listener.accept(PATIENCE_S)
        assert peer.hear() == "made"
        peer.stop()
        for number in range(COUNT if carrier.shm else 5000):
            server.send([numbered(number, SMALL)], request_id=number, timeout=PATIENCE_S)
    assert server.closed


# --- a hostile server -----------------------------------------------------------------------------------------


WELCOME = {"protocol": hs.PROTOCOL, "shm": True, "futex": False, "name": "tsqp-none", "session": bytes(16)}
WELCOME |= {"max_chunk_bytes": 4096, "max_chunks": 4}
BAD_WELCOMES = {
    "another protocol": ({"protocol": 2}, ProtocolError, "protocol 2"),
    "a field more": ({"more": 1}, ProtocolError, "other fields"),
    "wrong type": ({"name": b"x"}, ProtocolError, "Welcome.name is no str"),
    "a segment of absurd size": ({"max_chunk_bytes": 1 << 40}, ProtocolError, "a segment of 4 x 2 slots"),
    "a negative size": ({"max_chunk_bytes": -(1 << 40)}, ProtocolError, "a segment of"),
    "no slots": ({"max_chunks": 0}, ProtocolError, "a segment of"),
    "a path as name": ({"name": "../../etc/passwd"}, ConfigError, "invalid name"),
    "a short session": ({"session": b"x"}, ConfigError, "16 bytes"),
}


@pytest.mark.parametrize("name", BAD_WELCOMES)
def test_a_senseless_welcome_is_an_error(endpoint, name):
    changes, error, text = BAD_WELCOMES[name]
    with pytest.raises(error, match=text):
        connect_to(endpoint, hs.WELCOME, {**WELCOME, **changes})


@pytest.mark.parametrize(
    ("kind", "body"),
    [(hs.WELCOME, b"\xc1"), (hs.WELCOME, b""), (hs.MESSAGE, {}), (hs.REFUSE, {"reason": 3}), (99, {}), (hs.BYE, {})],
)
def test_a_senseless_answer_is_an_error(endpoint, kind, body):
    with pytest.raises((ProtocolError, ConnectError)):
        connect_to(endpoint, kind, body)


def test_a_refusal_gives_the_servers_reason(endpoint):
    with pytest.raises(ConnectError, match="refused: because"):
        connect_to(endpoint, hs.REFUSE, {"reason": "because"})


def connect_to(endpoint: str, kind: int, body: object) -> None:
    """Connects to a server that answers HELLO with this."""
    packed = body if isinstance(body, bytes) else msgpack.packb(body)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.bind(endpoint)

        def answer() -> None:
            identity = router.recv_multipart()[0]
            router.send_multipart([identity, hs.envelope(kind), packed])

        answering = Background()
        answering.start(answer)
        try:
            tsqp.connect(endpoint, PATIENCE_S).close()
        finally:
            answering.join()
            path_of(endpoint).unlink(missing_ok=True)


# --- endpoints ------------------------------------------------------------------------------------------------


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


def test_a_missing_directory_is_an_error_at_once(endpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("TSQP_SHM_DIR", str(tmp_path / "gone"))
    with pytest.raises(SegmentError, match="No such file or directory"):
        tsqp.listen(endpoint)


def test_the_fixed_name_goes_to_one_client_at_a_time(endpoint):
    carrier = CARRIERS["ring"]
    with tsqp.listen(endpoint, **carrier.listen_options, shm_name="tsqp-fixed") as listener:
        for _ in range(2):
            with client_of(listener, carrier) as first, client_of(listener, carrier) as second:
                names = [client._tx.segment.name for client in (first[0], second[0])]
                assert names[0] == "tsqp-fixed"
                assert names[1] != "tsqp-fixed"
                assert_works(*first)
                assert_works(*second)


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
