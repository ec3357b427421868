"""Channels between two processes: floods, deaths, stops, signals, forks; the same tests over every carrier."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import peers
import pytest
from carriers import (
    CARRIERS,
    CHUNK,
    COUNT,
    LARGE,
    SMALL,
    Background,
    Carrier,
    pass_on,
    random_sizes,
    recv_numbered,
    send_numbered,
)
from patience import until
from peers import PATIENCE_S, Peer
from wire_bytes import check_numbered, numbered

import tsqp
from tsqp.errors import ClosedError, ConnectError, PeerDiedError, WaitTimeoutError
from tsqp.listener import Listener
from tsqp.transport import Channel

#: A death is noticed at once; this allows for a machine that is busy with other things.
NOTICED_WITHIN_S = 5.0


@dataclass
class Ends:
    """This process's end of a channel, and the process at the other one."""

    channel: Channel
    peer: Peer
    listener: Listener | None


#: `ring-tcp` differs from `ring` only in what the control connection runs on.
@pytest.fixture(params=[name for name in CARRIERS if name != "ring-tcp"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


@pytest.fixture
def connect_peer(carrier: Carrier, endpoint: str, start_peer: Callable[..., Peer]) -> Iterator[Callable[[str], Ends]]:
    """``connect_peer(role)`` starts a process that is ``server`` or ``client`` and connects with it."""
    with ExitStack() as stack:

        def connect(role: str) -> Ends:
            if role == "server":
                peer = start_peer(peers.channel_end, role, carrier.endpoint(endpoint), carrier.listen_options)
                assert peer.hear() == "made"
                address = peer.ask("endpoint")
                channel = stack.enter_context(tsqp.connect(address, PATIENCE_S, **carrier.connect_options))
                assert peer.ask("accept") == carrier.transport
                return Ends(channel, peer, None)
            listener = stack.enter_context(tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options))
            peer = start_peer(peers.channel_end, role, listener.endpoint, carrier.connect_options)
            channel = stack.enter_context(listener.accept(PATIENCE_S))
            assert peer.hear() == "made"
            return Ends(channel, peer, listener)

        yield connect
    path = urlsplit(endpoint).path
    if os.path.exists(path):
        os.unlink(path)  # a killed server can't


@pytest.fixture(params=["server", "client"])
def ends(request: pytest.FixtureRequest, connect_peer: Callable[[str], Ends]) -> Ends:
    """The parameter is what the other process is."""
    return connect_peer(request.param)


# --- more than there is room for ------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [0, 0.1], ids=["small", "mixed"])
def test_a_thousand_requests_before_the_first_reply_is_read(ends, large):
    sizes = random_sizes(1000, 2, large)
    ends.peer.say(("echo", len(sizes)))
    send_numbered(ends.channel, sizes)
    recv_numbered(ends.channel, sizes)
    assert ends.peer.hear() == len(sizes)


def test_a_thousand_messages_each_way_before_the_first_is_read(ends):
    sizes = random_sizes(1000, 3, 0.1)
    ends.peer.say(("send", sizes))
    ends.peer.say(("check", sizes))
    send_numbered(ends.channel, sizes)
    recv_numbered(ends.channel, sizes)
    assert [ends.peer.hear(), ends.peer.hear()] == [len(sizes), len(sizes)]


def test_a_reply_of_more_messages_than_slots(ends):
    for _ in range(3):
        ends.peer.say(("send", [SMALL] * 10 * COUNT))
        time.sleep(0.05)
        recv_numbered(ends.channel, [SMALL] * 10 * COUNT)
        assert ends.peer.hear() == 10 * COUNT


def test_stats_of_both_processes_agree(ends, carrier):
    sizes = [0, SMALL, SMALL, LARGE, CHUNK - 256]
    ends.peer.say(("echo", len(sizes)))
    for number, nbytes in enumerate(sizes):
        ends.channel.send([numbered(number, nbytes)], request_id=number, timeout=PATIENCE_S)
        check_numbered(ends.channel.recv(PATIENCE_S), number, nbytes)
    assert ends.peer.hear() == len(sizes)
    mine, theirs = ends.channel.stats, ends.peer.ask("stats")
    assert mine == theirs  # an echo: each sent what it received
    large = 0 if carrier.large == "tile" else 2 * 2
    assert mine["zmq_transfers"] == (large if carrier.shm else 2 * len(sizes))


# --- death ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wait", "death"), [("recv", "SIGKILL"), ("lease", "SIGKILL"), ("recv_nowait", "SIGKILL"), ("recv", "exit")]
)
def test_messages_of_a_dead_peer_arrive_then_its_death_is_told(ends, carrier, wait, death):
    sizes = [SMALL, SMALL if carrier.large == "tile" else LARGE, 10]
    ends.peer.ask("send", sizes)
    if not carrier.shm:  # what libzmq still has to write when its process dies is lost with it
        until(lambda: ends.channel.poll() and ends.channel.waiting == len(sizes))
    if death == "SIGKILL":
        ends.peer.kill()
    else:
        ends.peer.say(("leave",))
        assert ends.peer.join() == 3
    recv_numbered(ends.channel, sizes)
    for _ in range(2):
        with pytest.raises(PeerDiedError, match="died"):
            receive(ends.channel, wait)
    assert ends.channel.poll()


def receive(channel: Channel, how: str) -> None:
    """Receives in one of three ways, for at most as long as a death may take to be noticed."""
    if how != "recv_nowait":
        getattr(channel, how)(NOTICED_WITHIN_S)
        return
    end = time.monotonic() + NOTICED_WITHIN_S
    while channel.recv_nowait() is None:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_death_ends_a_wait_without_deadline(ends):
    killer = threading.Timer(0.3, ends.peer.kill)
    killer.start()
    with pytest.raises(PeerDiedError):
        ends.channel.recv()
    killer.join()


def test_death_ends_a_send_to_a_peer_that_reads_nothing(ends):
    ends.peer.stop()
    killer = threading.Timer(0.5, ends.peer.kill)
    killer.start()
    with pytest.raises(PeerDiedError):
        send_numbered(ends.channel, [10 * LARGE] * 10_000)
    killer.join()


def test_a_channel_whose_peer_died_closes_cleanly(ends, shm_directory):
    ends.peer.kill()
    ends.channel.close()
    with pytest.raises(ClosedError):
        ends.channel.recv()
    if ends.listener is not None:
        ends.listener.close()
    assert not any(shm_directory.iterdir())


def test_the_server_goes_on_after_the_death_of_a_client(connect_peer, carrier):
    ends = connect_peer("client")
    ends.peer.kill()
    with pytest.raises(PeerDiedError):
        ends.channel.recv(NOTICED_WITHIN_S)
    ends.channel.close()
    with (
        tsqp.connect(ends.listener.endpoint, PATIENCE_S, **carrier.connect_options) as client,
        ends.listener.accept(PATIENCE_S) as server,
    ):
        check_numbered(pass_on(client, server, [numbered(1, LARGE)], request_id=1), 1, LARGE)


def test_a_client_can_connect_again_after_the_server_was_restarted(connect_peer, carrier, endpoint, start_peer):
    ends = connect_peer("server")
    address = ends.peer.ask("endpoint")
    ends.peer.kill()
    with pytest.raises(PeerDiedError):
        ends.channel.recv(NOTICED_WITHIN_S)
    with pytest.raises(PeerDiedError):
        send_numbered(ends.channel, [SMALL] * 100)
    again = start_peer(peers.channel_end, "server", address, carrier.listen_options)
    assert again.hear() == "made"
    with pytest.raises(PeerDiedError):  # the old channel stays dead
        ends.channel.recv(NOTICED_WITHIN_S)
    with tsqp.connect(address, PATIENCE_S, **carrier.connect_options) as channel:
        again.ask("accept")
        again.say(("echo", 1))
        send_numbered(channel, [LARGE])
        recv_numbered(channel, [LARGE])
        assert again.hear() == 1
        again.ask("close")


# --- stops and signals ----------------------------------------------------------------------------------------


def test_a_stopped_peer_is_waited_for_and_nothing_is_lost(ends):
    ends.peer.stop()
    with pytest.raises(WaitTimeoutError):
        ends.channel.recv(0.7)
    ends.channel.send([numbered(0, SMALL)], request_id=0, timeout=PATIENCE_S)
    ends.peer.go_on()
    assert ends.peer.ask("check", [SMALL]) == 1
    ends.peer.say(("echo", 1))
    send_numbered(ends.channel, [SMALL])
    recv_numbered(ends.channel, [SMALL])
    assert ends.peer.hear() == 1


def test_ctrl_c_ends_a_recv_without_deadline(carrier, endpoint, start_peer):
    with tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options) as listener:
        peer = start_peer(peers.receive_for_ever, listener.endpoint, carrier.connect_options)
        with listener.accept(PATIENCE_S) as server:
            assert peer.hear() == "waiting"
            time.sleep(0.2)
            peer.interrupt()
            assert peer.hear() == "interrupted"
            server.send([numbered(0, SMALL)], request_id=5)
            assert peer.hear() == 5


def test_a_signal_with_a_handler_does_not_end_a_recv(ends):
    """PEP 475: the wait goes on after the handler, and still ends in time."""
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        sender = threading.Timer(
            0.2, lambda: [os.kill(os.getpid(), signal.SIGUSR1), time.sleep(0.2), ends.peer.say(("send", [SMALL]))]
        )
        sender.start()
        recv_numbered(ends.channel, [SMALL])
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
    assert ends.peer.hear() == 1


_FORKED = """
import os, sys, tsqp
from tsqp.errors import RingUsageError
options = {options}
with tsqp.listen({endpoint!r}, **options) as listener:
    client = tsqp.connect(listener.endpoint, shm=options["shm"], large=options["large"])
    server = listener.accept(10)
    pid = os.fork()
    if pid == 0:
        for channel in (client, server):
            for use in (lambda: channel.send([]), lambda: channel.recv(5)):
                try:
                    use()
                except RingUsageError as error:
                    assert "inherited by fork" in str(error), error
                else:
                    os._exit(1)
        client.close()
        sys.exit(0)  # runs what is registered at exit: it must not say goodbye for the parent
    assert os.waitpid(pid, 0)[1] == 0
    for one, other in ((client, server), (server, client)):
        one.send([], meta={{"x": 1}}, timeout=10)
        assert other.recv(10).meta == {{"x": 1}}
    client.close()
    server.close()
print("fine")
"""


@pytest.mark.parametrize("carrier", [CARRIERS["ring"], CARRIERS["zmq-tcp"]], ids=["ring", "zmq-tcp"])
def test_a_forked_child_that_exits_leaves_the_channel_alone(carrier, endpoint):
    script = _FORKED.format(options=carrier.listen_options, endpoint=carrier.endpoint(endpoint))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


_FORGETFUL = """
import tsqp
client = tsqp.connect({endpoint!r}, shm={shm})
client.send([], meta={{"last": "words"}})
"""


@pytest.mark.parametrize("carrier", [CARRIERS["ring"], CARRIERS["zmq-ipc"]], ids=["ring", "zmq-ipc"])
def test_a_program_that_ends_without_closing_says_goodbye(carrier, endpoint):
    """Also at the end of the interpreter: what was sent arrives, then ClosedError and not a death."""
    with tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options) as listener:
        script = _FORGETFUL.format(endpoint=listener.endpoint, shm=carrier.shm)
        process = subprocess.Popen([sys.executable, "-c", script])
        with listener.accept(PATIENCE_S) as server:
            assert server.recv(PATIENCE_S).meta == {"last": "words"}
            with pytest.raises(ClosedError):
                server.recv(PATIENCE_S)
        assert process.wait(PATIENCE_S) == 0


def test_a_peer_without_our_shared_memory_uses_zeromq(tmp_path, endpoint, start_peer):
    """As in a container with a /dev/shm of its own."""
    other = {"TSQP_SHM_DIR": str(tmp_path)}
    carrier = CARRIERS["ring"]
    with tsqp.listen(endpoint, **carrier.listen_options) as listener:
        peer = start_peer(peers.channel_end, "client", endpoint, carrier.connect_options, env=other)
        with listener.accept(PATIENCE_S) as server:
            assert peer.hear() == "made"
            assert server.transport == "ipc"
            peer.say(("echo", 2))
            send_numbered(server, [SMALL, LARGE])
            recv_numbered(server, [SMALL, LARGE])
            assert peer.hear() == 2
            assert peer.ask("stats")["shm_transfers"] == server.stats["shm_transfers"] == 0
    assert not any(tmp_path.iterdir())


def test_a_server_killed_while_clients_wait_leaves_no_segment(start_peer, endpoint, shm_directory):
    """The name goes as soon as both ends have the segment mapped."""
    carrier = CARRIERS["ring"]
    peer = start_peer(peers.channel_end, "server", endpoint, carrier.listen_options)
    assert peer.hear() == "made"
    with tsqp.connect(endpoint, PATIENCE_S) as channel:
        peer.ask("accept")
        assert not any(shm_directory.iterdir())
        peer.kill()
        with pytest.raises(PeerDiedError):
            channel.recv(NOTICED_WITHIN_S)
    Path(urlsplit(endpoint).path).unlink()
    with pytest.raises(ConnectError):
        tsqp.connect(endpoint, 0.3)


def test_two_processes_flood_each_other_from_two_threads(ends):
    there, back = random_sizes(500, 12, 0.1), random_sizes(500, 13, 0.1)
    ends.peer.say(("send", back))
    ends.peer.say(("check", there))
    sending = Background()
    sending.start(send_numbered, ends.channel, there)
    recv_numbered(ends.channel, back)
    assert [ends.peer.hear(), ends.peer.hear()] == [len(back), len(there)]
    sending.join()
