"""Broken and hostile peers, at the socket and in the handshake: errors only, and everybody else is served."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgpack
import peers
import pytest
import zmq
from carriers import CARRIERS, COUNT, SMALL, Background, Carrier
from ends import assert_works, client_of, path_of
from peers import PATIENCE_S, Peer
from wire_bytes import numbered

import tsqp
from tsqp import door, hub
from tsqp import handshake as hs
from tsqp.config import parse_endpoint
from tsqp.errors import (
    ConfigError,
    ConnectError,
    PeerDiedError,
    ProtocolError,
)
from tsqp.frames import received
from tsqp.listener import Listener

StartPeer = Callable[..., Peer]


@pytest.fixture(params=["ring", "zmq-ipc", "zmq-tcp"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


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


class HelloFirst:
    """Stands for the listener's look for a message: hands out a hello before a goodbye, whichever came first."""

    def __init__(self) -> None:
        self.ready: list[list[zmq.Frame]] | None = None

    def __call__(self, router: zmq.Socket) -> list[zmq.Frame] | None:
        if self.ready is None:
            self.ready = [router.recv_multipart(copy=False) for _ in range(2)]
            self.ready.sort(key=len)  # a hello has a body
        return self.ready.pop() if self.ready else received(router)


def test_a_client_that_left_does_not_keep_the_place_of_the_next(carrier, endpoint, monkeypatch):
    with (
        tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options, max_clients=1) as listener,
        raw_dealer(listener.endpoint) as leaving,
        raw_dealer(listener.endpoint) as coming,
    ):
        shake_hands(leaving)
        with listener.accept(PATIENCE_S):
            swapped = HelloFirst()
            monkeypatch.setattr(door, "_PLACE_S", PATIENCE_S)
            monkeypatch.setattr(hub, "received", swapped)
            leaving.send_multipart([hs.envelope(hs.BYE)])
            coming.send_multipart([HELLO, hello()])
            assert coming.poll(int(PATIENCE_S * 1000))
            assert hs.open_envelope(coming.recv_multipart()[0])[0] == hs.WELCOME
            assert swapped.ready == []


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
            rubbish = ((bytes(128), []), (b"", []), (b"TSQM" + bytes(124), [b"x"] * 70))
            for number, (head, frames) in enumerate(rubbish):
                dealer.send_multipart([hs.envelope(hs.MESSAGE, number), head, *frames])
                with pytest.raises(tsqp.errors.MessageError):
                    server.recv(PATIENCE_S)
            codec = tsqp._message.Encoder()
            codec.plan([], b"", 7, 0, 42, 0, 0, 0, 0, 0)
            dealer.send_multipart([hs.envelope(hs.MESSAGE, len(rubbish)), codec.head_bytes(b"")])
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
            for number in range(3000):  # empty messages have a cost too
                dealer.send_multipart([hs.envelope(hs.MESSAGE, number), b""])
            end = time.monotonic() + PATIENCE_S
            while not flooded._link.dead():
                assert time.monotonic() < end
                time.sleep(0.01)
        assert_works(*both)


def test_a_handshake_that_is_never_finished_expires(carrier, endpoint, shm_directory):
    with (
        tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options, max_clients=1) as listener,
        raw_dealer(listener.endpoint) as dealer,
    ):
        dealer.send_multipart([HELLO, hello(shm=True)])
        assert hs.open_envelope(dealer.recv_multipart()[0])[0] == hs.WELCOME
        assert any(shm_directory.iterdir()) == carrier.shm
        (waiting,) = listener._hub.clients.values()
        waiting.deadline = 0.0  # as if its time had passed
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
