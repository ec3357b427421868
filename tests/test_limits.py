"""Limits of one client: the error is its own, and names the limit; what is another's stays the other's."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import zmq
from carriers import CARRIERS
from hostile_peers import _mapped_at
from peers import PATIENCE_S
from rpc_support import GEOMETRY, HEAD_DIM, HIDDEN, ask, client_of, gated_model, run_all, serving, tiny_model, until
from wire_bytes import check_numbered, numbered

import tsqp
from tsqp import handshake as hs
from tsqp._ring import Segment
from tsqp.admission import BURST_S, LINGER_S, OWN_LINGER_S, Admission, Hello
from tsqp.connections import Connection, Connections, oldest_of_most
from tsqp.cuda import _CALLS_PER_REPLACEMENT, Graphs
from tsqp.errors import ClosedError, ConfigError, PeerDiedError
from tsqp.limits import Limits
from tsqp.monitor import Events
from tsqp.protocol import MAX_ERROR_CHARS, Method, Status

LAYER = Method.FUSED_LAYER
#: Five positions, and their rotary tables.
H = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(3))
CONTEXT = [torch.ones(1, 5, HEAD_DIM), torch.zeros(1, 5, HEAD_DIM)]
FIRST = {"layer": 0, "slot": 0, "set": ["cos", "sin"], "new": True}


# --- the options ------------------------------------------------------------------------------------------------


def test_limits_are_read_from_text():
    changed = Limits().changed(["kv_bytes=2G", "sequences=7", "unread_bytes=3MiB"])
    assert (changed.kv_bytes, changed.sequences, changed.unread_bytes) == (2 << 30, 7, 3 << 20)
    assert changed.reply_bytes == Limits().reply_bytes


@pytest.mark.parametrize("text", ["kv_bytes", "kv_bytes=", "kv=1", "kv_bytes=-1", "kv_bytes=1X", "=1", "kv_bytes=1.5"])
def test_what_is_no_limit_is_an_error(text):
    with pytest.raises(ConfigError, match=r"is no limit; write name=number"):
        Limits().changed([text])


@pytest.mark.parametrize(("name", "value"), [("kv_bytes", -1), ("handshakes", 0), ("graphs", True)])
def test_a_senseless_limit_is_an_error(name, value):
    with pytest.raises(ConfigError, match=f"the limit {name}="):
        Limits(**{name: value})


def test_a_limit_that_is_given_by_itself_wins(tmp_path):
    with serving(tiny_model(), tmp_path, limits=Limits(kv_bytes=5, reply_bytes=6), reply_limit_bytes=7) as server:
        assert (server.limits.kv_bytes, server.limits.reply_bytes) == (5, 7)


# --- each limit, with another client beside ---------------------------------------------------------------------


def fused(channel, number: int, **more):
    """A layer of a forward that keeps K and V in a sequence of this number."""
    return ask(channel, LAYER, [H, *CONTEXT], {**FIRST, "seq": number, **more})


def refused(reply, *words: str) -> None:
    assert reply.status == Status.LIMIT
    for word in words:
        assert word in reply.meta["error"]


@pytest.fixture
def limited(tmp_path):
    limits = Limits(sequences=3, kv_bytes=200_000, reply_bytes=4_000_000, unread_messages=20)
    with serving(tiny_model(), tmp_path, limits=limits) as server:
        yield server


def test_sequences_of_a_client(limited):
    with tsqp.connect(limited.endpoint) as greedy, tsqp.connect(limited.endpoint) as other:
        for number in range(3):
            assert fused(greedy, number).status == 0
        refused(fused(greedy, 3), "limit of 3 sequences", "drop some of its caches")
        assert fused(greedy, 2).status == 0  # one it has
        for number in range(3):
            assert fused(other, number).status == 0
        assert fused(greedy, 3, free=[0]).status == 0


def test_k_and_v_of_a_client(limited):
    with tsqp.connect(limited.endpoint) as greedy, tsqp.connect(limited.endpoint) as other:
        k = torch.zeros(1, 2, 1000, 16)
        refused(ask(greedy, Method.ATTENTION_SCORES, [torch.zeros(1, 4, 1, 16), k, k], {"layer": 0}), "K/V limit")
        assert fused(other, 0).status == 0
        assert fused(greedy, 0).status == 0


def test_unread_requests_of_a_client(tmp_path):
    """Without shared memory nothing else bounds them. The server computes for somebody else meanwhile."""
    model = gated_model()
    with (
        serving(model, tmp_path, limits=Limits(unread_messages=20)) as server,
        client_of(server) as busy,
        tsqp.connect(server.endpoint, shm=False) as greedy,
    ):

        def fill() -> None:
            assert model.lm_head.entered.wait(PATIENCE_S)
            for number in range(21):  # the last one is too many
                greedy.send([], tag=Method.PING, request_id=number, timeout=PATIENCE_S)
            with pytest.raises(ClosedError, match="more than 20 unread messages were under way"):
                greedy.recv(PATIENCE_S)
            model.lm_head.gate.set()

        h = torch.randn(1, HIDDEN)
        found = []
        run_all(lambda: found.append(busy.lm_head(h)), fill)
        torch.testing.assert_close(found[0], torch.nn.functional.linear(h, model.lm_head.weight))
        until(lambda: server.stats["clients"] == 1)


def test_requests_in_a_row_that_are_refused(tmp_path):
    with (
        serving(tiny_model(), tmp_path, limits=Limits(refused=3)) as server,
        tsqp.connect(server.endpoint) as wrong,
        tsqp.connect(server.endpoint) as other,
    ):
        for _ in range(2):  # one that is right begins the count anew
            for _ in range(2):
                assert ask(wrong, 77).status == Status.UNKNOWN_METHOD
            assert ask(wrong, Method.PING).status == 0
        errors = [ask(wrong, 77).meta["error"] for _ in range(3)]
        assert [error.startswith("method 77 is unknown") for error in errors] == [True] * 3
        assert ["3 of its requests in a row were refused" in error for error in errors] == [False, False, True]
        with pytest.raises(ClosedError):
            ask(wrong, Method.PING)
        assert ask(other, Method.PING).status == 0
        assert server.stats["errors"] == 7
        until(lambda: server.stats["clients"] == 1)


def test_a_long_error_leaves_room_for_the_end_of_the_connection(tmp_path):
    names = ["no such linear module " * 40] * 50
    with (
        serving(tiny_model(), tmp_path, limits=Limits(refused=1)) as server,
        tsqp.connect(server.endpoint) as wrong,
    ):
        reply = ask(wrong, Method.BATCH_LINEAR, [torch.zeros(1, HIDDEN)], {"layer": 0, "names": names})
        assert reply.meta["error"].endswith("this connection ends: 1 of its requests in a row were refused")
        assert len(reply.meta["error"]) <= MAX_ERROR_CHARS


# --- who gets in ------------------------------------------------------------------------------------------------


class Knock:
    """A handshake under way, of somebody, for so long."""

    def __init__(self, who: str, began: float) -> None:
        self.peer, self.began = ("process", who), began


def hello_of(who: str, number: int) -> Hello:
    return Hello(bytes([number]), number, hs.Hello(1, True, True), ("process", who), float(number))


def test_turns_go_round_among_peers():
    admission = Admission()
    for number, who in enumerate("aaabac"):
        admission.hellos[bytes([number])] = hello_of(who, number)
    order = [hello.peer[1] for hello in admission.in_turn([Knock("b", 0)])]
    assert order == ["a", "c", "a", "b", "a", "a"]


def test_who_lingers_or_has_most_gives_way():
    admission, now = Admission(), 100.0
    fresh = [Knock("a", now), Knock("b", now), Knock("b", now), Knock("b", now)]
    assert admission.gives_way([], ("process", "a"), now) is None
    assert admission.gives_way(fresh, ("process", "c"), now) is fresh[1]
    assert admission.gives_way(fresh, ("process", "b"), now) is None
    assert admission.gives_way(fresh, ("process", "b"), now + LINGER_S + 0.1) is None
    assert admission.gives_way(fresh, ("process", "b"), now + OWN_LINGER_S + 0.1) is fresh[1]
    assert admission.gives_way(fresh[:2], ("process", "c"), now + LINGER_S + 0.1) is fresh[0]
    assert admission.gives_way(fresh[:2], ("process", "c"), now) is None


def test_the_time_that_segments_take_is_rationed():
    admission, peer = Admission(), ("address", "127.0.0.1")
    spent = 0
    while admission.may_spend(peer, 50.0):
        admission.spend(peer, 0.1, 50.0)
        spent += 1
    assert spent == round(BURST_S / 0.1)
    assert admission.may_spend(("address", "127.0.0.2"), 50.0)
    assert admission.may_spend(peer, 52.0)
    admission.forget(50.0 + 100)
    assert len(admission._spent) == 0


def test_the_time_that_others_have_of_the_core_is_not_charged(endpoint, monkeypatch):
    """A segment of an honest client's may take long on a busy machine."""
    create = Segment.create

    def slow(*options):
        time.sleep(0.2)
        return create(*options)

    monkeypatch.setattr("tsqp.admission.BURST_S", 0.1)
    monkeypatch.setattr("tsqp.door.Segment", SimpleNamespace(create=slow))
    with tsqp.listen(endpoint, max_chunk_bytes=1 << 16, max_chunks=2) as listener:
        for _ in range(3):
            with tsqp.connect(endpoint, PATIENCE_S) as client, listener.accept(PATIENCE_S):
                assert client.transport == "shm+ipc"
        assert listener._hub._door._admission.may_spend(("process", os.getpid()), time.monotonic())


def test_a_descriptor_that_is_no_connection_is_left_alone():
    """libzmq tells of a connection that was there; the number may be a file's when that is heard."""
    connections = Connections()
    with open(os.devnull) as file:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            connections.accepted(file.fileno(), deadline=0.0, ended=lambda fd: False)
        assert not len(connections)
        assert len(os.listdir("/proc/self/fd")) == before


def test_what_came_over_an_earlier_connection_ends_no_later_one():
    """A goodbye may be taken when its descriptor is another connection's already."""
    connections = Connections()
    connections._open[7] = made = Connection(7, 0, ("process", 1), 10.0)
    connections.end_at(7, b"a", 1.0)  # who said nothing yet
    assert connections.heeded(7)
    connections.spoke(7, b"b", "", 10.0)
    connections.claim(7, b"a")
    connections.end_at(7, b"a", 1.0)
    assert (connections.heeded(7), made.deadline) == (True, 10.0)
    connections.end_at(7, b"b", 1.0)
    assert (connections.heeded(7), made.deadline) == (False, 1.0)
    connections.end_at(8, b"b", 1.0)
    assert not connections.heeded(8)


def test_a_connection_that_ended_before_it_was_looked_at_is_not_mistaken_for_the_next():
    """With the same descriptor: whose process it is, and which socket, would be the other's."""
    connections, (ours, theirs) = Connections(), socket.socketpair()
    with ours, theirs:
        asked = []

        def ended(fd: int, answers: list[bool]) -> bool:
            asked.append(fd)
            return answers[len(asked) - 1]

        for answers in ([True], [False, True]):  # before the look, and while it was looked at
            asked.clear()
            connections.accepted(ours.fileno(), 10.0, partial(ended, answers=answers))
            assert len(asked) == len(answers)
            assert not len(connections)
        asked.clear()
        connections.accepted(ours.fileno(), 10.0, partial(ended, answers=[False, False]))
        assert len(connections) == 1


def end_all(connections: Connections, process: int, count: int, **after: bytes) -> int:
    """How many of a process's connections that end are let be; ``after``: what they were before that."""
    let_be = 0
    for fd in range(count):
        if connections._in_vain.left(("process", process), time.monotonic()) >= 1.0:
            let_be += 1
        connections._open[fd] = Connection(fd, 0, ("process", process), 10.0)
        if "client" in after:
            connections.spoke(fd, after["client"], "", 10.0)
            connections.keep(fd, after["client"])
        if "cut_off" in after:
            connections.end_at(fd, after["cut_off"], 10.0, in_vain=True)
        connections.ended(fd)
    return let_be


def test_connections_in_vain_are_counted(monkeypatch):
    monkeypatch.setattr("tsqp.connections.IN_VAIN", 10.0)
    monkeypatch.setattr("tsqp.connections.IN_VAIN_PER_S", 0.0)
    connections = Connections()
    assert end_all(connections, 1, 30) == 10
    assert end_all(connections, 2, 30, client=b"x") == 30  # clients that went
    assert end_all(connections, 3, 30, client=b"x", cut_off=b"x") == 10  # clients that were cut off
    assert end_all(Connections(rationed=False), 1, 30) == 30


def test_events_are_looked_at_ahead():
    """The end of a connection that is reported behind others is known before they are taken."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as writer, context.socket(zmq.PAIR) as reader:
        writer.bind("inproc://events")
        reader.connect("inproc://events")
        events = Events(reader)

        def tell(event: int, fd: int) -> None:
            writer.send_multipart([struct.pack("=Hi", event, fd), b""])

        assert events.next() is None
        assert not events.ended(7)
        for event, fd in ((zmq.EVENT_ACCEPTED, 7), (zmq.EVENT_ACCEPTED, 8), (zmq.EVENT_DISCONNECTED, 7)):
            tell(event, fd)
        assert events.next() == (zmq.EVENT_ACCEPTED, 7)
        assert (events.ended(7), events.ended(8)) == (True, False)
        tell(zmq.EVENT_ACCEPTED, 7)
        tell(zmq.EVENT_DISCONNECTED, 7)
        assert events.next() == (zmq.EVENT_ACCEPTED, 8)
        assert events.next() == (zmq.EVENT_DISCONNECTED, 7)
        assert events.ended(7)  # the second one
        assert events.next() == (zmq.EVENT_ACCEPTED, 7)
        assert events.next() == (zmq.EVENT_DISCONNECTED, 7)
        assert not events.ended(7)
        assert events.next() is None


def test_of_too_many_connections_the_oldest_of_whoever_has_most_are_ended(monkeypatch):
    """First those that are to go anyway, then silent ones, and one that waits for its answer last."""
    monkeypatch.setattr(Connections, "_cut", lambda self, connection: self._open.pop(connection.fd))
    connections, order = Connections(), "aabaac"
    for fd, who in enumerate(order):
        connections._open[fd] = Connection(fd, 0, ("process", who), 10.0)
    connections.claim(5, b"last")
    connections.end_at(5, b"last", 10.0)
    connections.spoke(0, b"first", "", 10.0)
    monkeypatch.setattr("tsqp.connections.MAX_STRANGERS", 3)
    connections.look(1.0)
    assert sorted(connections._open) == [0, 2, 4]  # c's was to go; 1 and 3 are a's older ones that are silent
    connections.keep(0, b"first")
    connections.look(11.0)
    assert sorted(connections._open) == [0]


def test_the_oldest_of_most():
    assert oldest_of_most([], lambda each: each) is None
    assert oldest_of_most("abcbc", lambda each: each) == "b"


def test_a_descriptor_that_changed_hands_is_not_shut_down():
    """The connection is known by its socket, not by the number that it had."""
    connections, (ours, theirs) = Connections(), socket.socketpair()
    connections.accepted(ours.fileno(), deadline=0.0, ended=lambda fd: False)
    others = socket.socketpair()
    number = ours.fileno()
    os.dup2(others[0].fileno(), number)  # closes ours, and is somebody else's now
    connections.look(1.0)
    others[0].sendall(b"still open")
    assert others[1].recv(100) == b"still open"
    assert not len(connections)
    connections.accepted(number, deadline=0.0, ended=lambda fd: False)
    connections.look(1.0)
    assert others[1].recv(100) == b""
    for sock in (ours, theirs, *others):
        sock.close()


# --- CUDA graphs ------------------------------------------------------------------------------------------------


class Client:
    """Somebody graphs are made for."""


def run_often(graphs: Graphs, client: Client, keys, times: int = 4) -> None:
    x = torch.ones(1)
    for key in keys:
        for _ in range(times):
            assert torch.equal(graphs.run(key, lambda x: x + 1, x, 1, client), x + 1)


def test_a_client_that_makes_shapes_up_loses_its_own_graphs():
    graphs = Graphs(lambda function, x: function, share=8)
    honest, greedy = Client(), Client()
    run_often(graphs, honest, ["a", "b"])
    run_often(graphs, greedy, range(5000))
    assert {"a", "b"} <= set(graphs._graphs)
    assert len(graphs._graphs) <= 10
    run_often(graphs, honest, ["c"])
    assert "c" in graphs._graphs


def test_to_replace_graphs_is_rationed_and_the_least_used_one_goes():
    made = []
    graphs = Graphs(lambda function, x: made.append(1) or function, share=2)
    client = Client()
    run_often(graphs, client, ["a", "b", "a"])
    before = len(made)
    run_often(graphs, client, range(_CALLS_PER_REPLACEMENT // 2))  # 4 calls each
    assert before == 2
    assert 1 <= len(made) - before <= 3
    run_often(graphs, client, ["d"], _CALLS_PER_REPLACEMENT + 4)
    assert "d" in graphs._graphs
    assert "b" not in graphs._graphs


def test_what_is_left_of_clients_that_went_goes_first(monkeypatch):
    monkeypatch.setattr(tsqp.cuda, "_MAX_GRAPHS", 6)
    graphs = Graphs(lambda function, x: function, share=4)
    gone, here, late = Client(), Client(), Client()
    run_often(graphs, here, "ab")
    run_often(graphs, gone, "cdef")
    del gone
    run_often(graphs, late, "g")
    assert set(graphs._graphs) == set("abdefg")


# --- what is another's ------------------------------------------------------------------------------------------


def test_numbers_of_sequences_and_contexts_are_a_clients_own(tmp_path):
    """Whatever number it names, a client reaches nothing of another's; and frees nothing of it."""
    with (
        serving(tiny_model(), tmp_path) as server,
        tsqp.connect(server.endpoint) as victim,
        tsqp.connect(server.endpoint) as thief,
    ):
        assert fused(victim, 5).status == 0
        step = {"layer": 0, "slot": 0, "seq": 5}
        reply = ask(thief, LAYER, [H], step)
        assert reply.status == Status.BAD_REQUEST
        assert "slot 0 holds nothing" in reply.meta["error"]
        reply = ask(thief, LAYER, [H, *CONTEXT], {**step, "set": ["cos", "sin"]})
        assert "sequence 5 holds no K and V" in reply.meta["error"]
        reply = ask(thief, LAYER, [H, *CONTEXT], {**step, "set": ["cos", "sin"], "seq": 6, "from": 5})
        assert "sequence 5 holds no K and V" in reply.meta["error"]
        ask(thief, LAYER, [H, *CONTEXT], {**step, "set": ["cos", "sin"], "seq": 7, "new": True, "free": [5]})
        ask(thief, Method.DROP_CACHE)
        assert ask(victim, LAYER, [H], step).status == 0
        assert ask(thief, Method.STATS).meta["kv_bytes"] == 0
        assert ask(victim, Method.STATS).meta["kv_bytes"] > 0


def test_a_segment_has_a_name_of_its_own_for_as_long_as_it_needs_one(endpoint, shm_directory):
    """Random, for the user alone, and gone once both ends are there."""
    listener_options = {"max_chunk_bytes": 4096, "max_chunks": 2}
    names = []
    with tsqp.listen(endpoint, **listener_options) as listener, zmq.Context() as context:
        for _ in range(2):
            with context.socket(zmq.DEALER) as dealer:
                dealer.linger = 0
                dealer.connect(endpoint)
                dealer.send_multipart([hs.envelope(hs.HELLO), hs.pack(hs.Hello(hs.PROTOCOL, True, False))])
                welcome = hs.unpack(hs.Welcome, dealer.recv_multipart()[1])
                (path,) = shm_directory.glob("tsqp*")
                assert path.name == welcome.name
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                assert len(welcome.name) >= len("tsqp-") + 32
                names.append(welcome.name)
            until(lambda: not any(shm_directory.glob("tsqp*")))
        with tsqp.connect(endpoint), listener.accept(PATIENCE_S):
            assert not any(shm_directory.glob("tsqp*"))
    assert names[0] != names[1]


def as_client(context: zmq.Context, endpoint: str, identity: bytes) -> zmq.Socket:
    dealer = context.socket(zmq.DEALER)
    dealer.linger, dealer.rcvtimeo, dealer.routing_id = 0, int(PATIENCE_S * 1000), identity
    dealer.connect(endpoint)
    dealer.send_multipart([hs.envelope(hs.HELLO), hs.pack(hs.Hello(hs.PROTOCOL, False, False))])
    return dealer


def begin(dealer: zmq.Socket) -> None:
    assert hs.open_envelope(dealer.recv_multipart()[0])[0] == hs.WELCOME
    dealer.send_multipart([hs.envelope(hs.READY), hs.pack(hs.Ready(False, True))])


@pytest.mark.parametrize("name", ["zmq-ipc", "zmq-tcp"])
def test_an_identity_that_is_taken_is_nobody_elses(endpoint, name):
    """A second connection that claims it gets nothing, and changes nothing for the first."""
    carrier = CARRIERS[name]
    with (
        tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options) as listener,
        tsqp.connect(listener.endpoint, **carrier.connect_options) as victim,
        listener.accept(PATIENCE_S) as served,
        zmq.Context() as context,
    ):
        (identity,) = listener._hub.clients
        assert identity[0] == 0  # given by libzmq; one of a client's choice can't begin so
        with as_client(context, listener.endpoint, b"mine") as first:
            begin(first)
            theirs = listener.accept(PATIENCE_S)
            with as_client(context, listener.endpoint, b"mine") as second:
                with pytest.raises(zmq.Again):
                    second.recv_multipart()
                theirs.send([numbered(1, 1000)], request_id=1, timeout=PATIENCE_S)
                assert hs.open_envelope(first.recv_multipart()[0])[0] == hs.MESSAGE
                assert not second.poll(100)
            theirs.close()
        served.send([numbered(2, 1000)], request_id=2, timeout=PATIENCE_S)
        check_numbered(victim.recv(PATIENCE_S), 2, 1000)


def test_who_takes_the_identity_of_one_that_left_gets_nothing_of_it(endpoint):
    """Not what was on its way to it, nor its place: it has to shake hands, and has a session of its own."""
    carrier = CARRIERS["zmq-ipc"]
    with (
        tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options) as listener,
        zmq.Context() as context,
    ):
        hub, held, send = listener._hub, [], listener._hub._send
        with as_client(context, endpoint, b"mine") as victim:
            begin(victim)
            served = listener.accept(PATIENCE_S)
            hub._send = lambda link, parts: held.append((link, parts)) or True  # what is posted waits here
            served.send([numbered(1, 1000)], request_id=1, timeout=PATIENCE_S)
            until(lambda: held)
        with pytest.raises(PeerDiedError):
            served.recv(PATIENCE_S)
        with as_client(context, endpoint, b"mine") as thief:
            begin(thief)
            fresh = listener.accept(PATIENCE_S)
            hub._send = send
            hub._outbox.extend(held)
            hub._pipe.ring()
            until(lambda: not hub._outbox)
            assert not thief.poll(200)
            assert fresh is not served
            fresh.send([numbered(2, 1000)], request_id=2, timeout=PATIENCE_S)
            assert hs.open_envelope(thief.recv_multipart()[0])[0] == hs.MESSAGE
            fresh.close()
        served.close()


def test_a_message_over_another_connection_is_not_the_clients(endpoint):
    """As after a take-over the I/O thread has not heard of yet: the descriptor tells."""
    carrier = CARRIERS["zmq-ipc"]
    with (
        tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options) as listener,
        tsqp.connect(endpoint, **carrier.connect_options) as client,
        listener.accept(PATIENCE_S) as served,
    ):
        (record,) = listener._hub.clients.values()
        record.fd += 1000
        client.send([numbered(1, 1000)], request_id=1, timeout=PATIENCE_S)
        with pytest.raises(PeerDiedError):
            served.recv(PATIENCE_S)


def test_results_computed_together_go_to_their_own(tmp_path):
    """Each client's rows are its own number; every answer is of that number alone."""
    model = tiny_model()
    weight = model.lm_head.weight.detach()

    with serving(model, tmp_path) as server:

        def work(number: int) -> None:
            with client_of(server) as client:
                for turn in range(60):
                    h = torch.full((1 + (turn + number) % 3, HIDDEN), float(number))
                    torch.testing.assert_close(client.lm_head(h), torch.nn.functional.linear(h, weight))

        run_all(*(lambda number=number: work(number) for number in range(1, 5)))


# --- room that is taken back ------------------------------------------------------------------------------------


def flag_of(channel, ring: int, entry: int) -> ctypes.c_uint64:
    """The sequence word of a ring's entry, as the hostile client has it mapped; see csrc/layout.h."""
    lines = -(-GEOMETRY["max_chunks"] * 64 // 4096) * 4096
    return ctypes.c_uint64.from_address(_mapped_at(channel._segment.name) + 4096 + ring * lines + 64 * entry)


def test_a_client_that_takes_back_the_room_for_its_reply_is_given_up(tmp_path):
    """The server looked before it took the request; it does not wait now, and serves the others."""
    model = gated_model()
    with (
        serving(model, tmp_path) as server,
        tsqp.connect(server.endpoint) as hostile,
        client_of(server) as healthy,
    ):
        for number in range(GEOMETRY["max_chunks"]):
            assert ask(hostile, Method.PING, request_id=number).status == 0
        word = flag_of(hostile, 1, 0)
        assert word.value == 2  # the server may write there a second time
        hostile.send([torch.zeros(1, HIDDEN)], tag=Method.LM_HEAD, timeout=PATIENCE_S)
        assert model.lm_head.entered.wait(PATIENCE_S)
        word.value = 1  # not read yet, it says now
        model.lm_head.gate.set()
        healthy.ping()
        until(lambda: server.stats["clients"] == 1)
        healthy.ping()
