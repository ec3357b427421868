"""A server goes on while it is attacked, over real sockets: clients that are there get right answers, new ones get in,
and nothing is left afterwards."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from benchmarks import abuse
from benchmarks.attackers import ATTACKERS, attack
from carriers import CARRIERS, CHUNK, Carrier
from kills import EchoServer
from patience import until
from peers import PATIENCE_S, Peer
from rpc_support import HIDDEN, client_of, serving, tiny_model
from wire_bytes import check_numbered, numbered

import tsqp
from tsqp import connections, door
from tsqp.errors import ClosedError, TsqpError
from tsqp.limits import Limits
from tsqp.listener import Listener
from tsqp.transport import Channel

StartPeer = Callable[..., Peer]
#: Turns of an attacker that a test waits for, and how many a second there are.
TURNS, RATE = 150, 300.0
#: Memory that may have come: libzmq's queues, the allocator's arenas.
GROWN_BYTES = 256 << 20


@pytest.fixture(params=["ring", "zmq-tcp"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return CARRIERS[request.param]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class PatientServer(EchoServer):
    """Ends the connection of whoever sends rubbish, or takes nothing."""

    def _turn(self, channel: Channel) -> None:
        try:
            super()._turn(channel)
        except TsqpError:
            channel.close()


class Healthy:
    """A client whose messages come back as they were, whatever else goes on."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self._number = channel, 0

    def echo(self, nbytes: int) -> None:
        self._number += 1
        self.channel.send([numbered(self._number, nbytes)], request_id=self._number, timeout=PATIENCE_S)
        check_numbered(self.channel.recv(PATIENCE_S), self._number, nbytes)


@contextmanager
def echoing(listener: Listener) -> Iterator[EchoServer]:
    server = PatientServer(listener)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def served(carrier: Carrier, endpoint: str, **options: int) -> Iterator[Listener]:
    """A listener whose clients get their messages back."""
    given = {**carrier.listen_options, "max_inbox_bytes": 64 << 20, **options}
    with tsqp.listen(carrier.endpoint(endpoint), **given) as listener, echoing(listener):
        yield listener


def begun(start_peer: StartPeer, name: str, listener: Listener, rate: float = RATE) -> Peer:
    attacker = start_peer(attack, name, listener.endpoint, rate)
    assert attacker.hear() == "ready"
    return attacker


def attacked(attacker: Peer, meanwhile: Callable[[], object], turns: float) -> int:
    """Has the attacker act, again and again where this machine lets it act slowly, until it had so many turns; calls
    `meanwhile` as long. Returns how many it had."""
    had = 0
    while had <= turns:
        attacker.say("begin")
        meanwhile()
        attacker.say("enough")
        had += attacker.hear()[0]
    return had


def during(seconds: float, act: Callable[[], object]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        act()


def check_served(listener: Listener, healthy: Healthy, carrier: Carrier) -> None:
    """What must be true while an attack goes on."""

    def echo() -> None:
        healthy.echo(1000)
        healthy.echo(3 * CHUNK)

    during(TURNS / RATE, echo)
    with tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options) as late:
        for _ in range(5):
            Healthy(late).echo(1000)


@pytest.mark.parametrize("name", ATTACKERS)
def test_clients_are_served_while_a_server_is_attacked(endpoint, carrier, start_peer, monkeypatch, shm_directory, name):
    monkeypatch.setattr(door, "HANDSHAKE_TIMEOUT_S", 3.0)
    with (
        served(carrier, endpoint) as listener,
        tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options) as channel,
    ):
        healthy = Healthy(channel)
        for nbytes in (1000, 3 * CHUNK):
            healthy.echo(nbytes)
        hub = listener._hub
        attacker = begun(start_peer, name, listener)
        before, memory, segments = descriptors(), resident_bytes(), len(list(shm_directory.iterdir()))
        attacked(attacker, lambda: check_served(listener, healthy, carrier), TURNS / 3)
        until(lambda: len(hub.clients) == 1 == len(hub.connections), "only the healthy client is left")
        until(lambda: descriptors() <= before + 2, "no descriptor is left")
        until(lambda: len(list(shm_directory.iterdir())) <= segments, "no segment is left")
        assert resident_bytes() - memory < GROWN_BYTES
        until(lambda: not hub._hellos)
        healthy.echo(1000)


def test_connections_without_number_do_not_take_the_descriptors(endpoint, start_peer, monkeypatch):
    carrier, counts = CARRIERS["ring"], [0]
    look = connections.Connections.look
    note = counts.append
    monkeypatch.setattr(connections.Connections, "look", lambda self, *args: note(len(self)) or look(self, *args))
    with served(carrier, endpoint) as listener:
        attacker = begun(start_peer, "open and left", listener, 2000.0)
        before = descriptors()
        attacker.say("begin")
        until(lambda: max(counts) >= connections.MAX_STRANGERS, "there were more than may be")
        for _ in range(50):  # libzmq may accept many before anybody looks at them, but not more and more
            until(lambda: descriptors() < before + 4 * connections.MAX_STRANGERS)
            time.sleep(0.02)
        attacker.say("enough")
        attacker.hear()


def test_handshakes_that_are_not_finished_take_neither_places_nor_memory(
    endpoint, start_peer, shm_directory, monkeypatch
):
    """With all but one place taken, and attackers that want it: whoever finishes gets in, at once."""
    carrier = CARRIERS["ring"]
    monkeypatch.setattr("tsqp.admission.WASTE_S", 0.0)  # or who had some is out before the last one came
    with served(carrier, endpoint, max_clients=5) as listener:
        attackers = [begun(start_peer, "half-open", listener, RATE / 4) for _ in range(4)]
        for attacker in attackers:
            attacker.say("begin")
        until(lambda: len(listener._hub.clients) == 4, "the attackers have what they can get")
        channels = []
        for count in range(1, 6):
            channels.append(tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options))
            for channel in channels:
                Healthy(channel).echo(1000)
            assert len(list(shm_directory.iterdir())) <= 4
            assert len([each for each in list(listener._hub.clients.values()) if each.channel]) >= count
        for attacker in attackers:
            attacker.say("enough")
            attacker.hear()
        for channel in channels:
            channel.close()


def test_a_process_that_finishes_no_handshake_has_one_at_a_time(endpoint, start_peer, shm_directory):
    """However many it begins, and none any more once it had some: a segment costs more than all else."""
    carrier = CARRIERS["ring"]
    with served(carrier, endpoint) as listener:
        attacker = begun(start_peer, "half-open", listener)
        attacker.say("begin")
        until(lambda: len(listener._hub.clients) == 1, "the attacker has what it can get")
        most, seen, end = 0, set(), time.monotonic() + 2.0
        while time.monotonic() < end:
            with contextlib.suppress(RuntimeError):  # the listener's thread has just changed it
                most = max(most, len(listener._hub.clients))
                seen |= set(listener._hub.clients)
            time.sleep(0.001)
        assert most == 1
        assert 1 <= len(seen) <= 3
        attacker.say("enough")
        assert attacker.hear()[0] > 100


def test_a_process_cannot_make_connections_in_vain_without_number(endpoint, start_peer, monkeypatch):
    """They are ended as they come, and not listened to. Another process gets in meanwhile, and as often as it likes."""
    carrier = CARRIERS["ring"]
    monkeypatch.setattr(connections, "IN_VAIN", 10.0)
    heard = []
    spoke = connections.Connections.spoke
    monkeypatch.setattr(connections.Connections, "spoke", lambda *args: heard.append(args) or spoke(*args))
    with served(carrier, endpoint) as listener:
        attacker, mine = begun(start_peer, "other version", listener, 1000.0), []

        def come_and_go() -> None:
            with tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options) as channel:
                Healthy(channel).echo(1000)
            mine.append(1)

        turns = attacked(attacker, lambda: during(1.0, come_and_go), 300)
        assert len(heard) - len(mine) < turns / 4


@pytest.mark.parametrize("name", ["half-open", "replay", "flood", "large flood"])
def test_a_server_of_a_model_is_attacked(tmp_path, start_peer, name):
    """Runners get right results, and one that comes later, too."""
    model = tiny_model()
    h = torch.randn(2, HIDDEN)
    expected = torch.nn.functional.linear(h, model.lm_head.weight.detach())
    with serving(model, tmp_path, limits=Limits(unread_bytes=64 << 20)) as server, client_of(server) as runner:
        attacker = begun(start_peer, name, server._listener)

        def check_results() -> None:
            during(TURNS / RATE, lambda: torch.testing.assert_close(runner.lm_head(h), expected))
            with client_of(server) as late:
                torch.testing.assert_close(late.lm_head(h), expected)

        attacked(attacker, check_results, TURNS / 10)
        until(lambda: server.stats["clients"] == 1, "only the runner is left")
        torch.testing.assert_close(runner.lm_head(h), expected)


def test_the_benchmark_sums_up():
    """What was left, what was taken, and a mark below the bar."""
    rows = {
        "alone": [(100.0, 0.5), (200.0, 1.0), (100.0, 0.5)],
        "attacked": [(80.0, 0.5), (190.0, 1.0), (80.0, 0.5)],
        "busy": [(90.0, 0.5)] * 3,
        "share": [0.1] * 3,
        "blows": [200.0] * 3,
    }
    found = abuse.summary(rows)
    assert found["attacked"] == pytest.approx(0.8)
    assert found["taken"] == pytest.approx(0.1)
    assert next(iter(abuse.table({"flood": found}).columns[5].cells)) == "0.800 !"


def test_a_flood_is_cut_off_and_told_why(endpoint, start_peer):
    """By number, where the server does not read; and the healthy client's results go on being its own."""
    carrier = CARRIERS["zmq-ipc"]
    options = {**carrier.listen_options, "max_inbox_messages": 50}
    with (
        tsqp.listen(carrier.endpoint(endpoint), **options) as listener,
        tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options) as flooding,
        listener.accept(PATIENCE_S) as flooded,
        tsqp.connect(listener.endpoint, PATIENCE_S, **carrier.connect_options) as healthy,
        listener.accept(PATIENCE_S) as served_end,
    ):
        for number in range(51):
            flooding.send([torch.ones(3)], request_id=number, timeout=PATIENCE_S)
        with pytest.raises(ClosedError, match="closed the connection: more than 50 unread messages were"):
            flooding.recv(PATIENCE_S)
        assert flooded._link.dead() == "it broke the protocol: more than 50 unread messages were under way"
        healthy.send([numbered(3, 1000)], request_id=3, timeout=PATIENCE_S)
        check_numbered(served_end.recv(PATIENCE_S), 3, 1000)
