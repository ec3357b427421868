"""Requests of several clients computed as one: when that is chosen, and that nobody can tell but by the time."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager

import pytest
import torch
from rpc_support import HIDDEN, PATIENCE_S, client_of, endpoint_in, server_of, serving, tiny_model, until

from tsqp.batching import MAX_JOINED_ROWS, JoinLearner, Linger
from tsqp.errors import RemoteError
from tsqp.protocol import Method, Status

PROJECTIONS = ["q_proj", "k_proj", "v_proj"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@contextmanager
def held_back(server):
    """While this lasts the server is busy with one client's request; what others ask meanwhile waits."""
    busy, go_on = threading.Event(), threading.Event()
    handler, *rows = server._answering._methods[Method.PING]

    def wait_then_answer(session, msg):
        busy.set()
        assert go_on.wait(PATIENCE_S)
        return handler(session, msg)

    server._answering._methods[Method.PING] = (wait_then_answer, *rows)
    with client_of(server) as plug:
        call = plug.submit.ping()
        try:
            assert busy.wait(PATIENCE_S)
            yield
        finally:
            go_on.set()
        call.result()
    server._answering._methods[Method.PING] = (handler, *rows)


def together(server, stack, inputs, ask):
    """One client per input; all requests wait at the server before it looks at any. Returns the handles."""
    clients = [stack.enter_context(client_of(server)) for _ in inputs]
    for client in clients:
        client.init()
    with held_back(server):
        calls = [ask(client, h) for client, h in zip(clients, inputs, strict=True)]
        rings = [session.channel for session in server._answering.sessions.values()]
        until(lambda: sum(channel.poll() for channel in rings) == len(inputs))
    return calls


def ask_projections(client, h):
    return client.submit.batch_linear(1, PROJECTIONS, h)


def test_rows_of_several_clients_are_computed_at_once(model, tmp_path):
    inputs = [torch.randn(*shape, HIDDEN) for shape in ((1, 1), (2, 3), (5,), ())]
    with serving(model, tmp_path) as server, ExitStack() as stack:
        calls = together(server, stack, inputs, ask_projections)
        attention = model.model.layers[1].self_attn
        for h, call in zip(inputs, calls, strict=True):
            for name, out in zip(PROJECTIONS, call.result(), strict=True):
                expected = getattr(attention, name)(h).detach()
                assert out.shape == expected.shape
                torch.testing.assert_close(out, expected)
        # Counted once the reply is sent.
        until(lambda: server.stats["calls"].get("BatchLinear") == len(inputs))
        stats = server.stats
        assert stats["joined_requests"] == len(inputs)
        assert stats["operators"]["gpu_linear"]["calls"] == len(inputs)


def test_lm_heads_are_joined_too(model, tmp_path):
    inputs = [torch.randn(1, 1, HIDDEN) for _ in range(3)]
    with serving(model, tmp_path) as server, ExitStack() as stack:
        calls = together(server, stack, inputs, lambda client, h: client.submit.lm_head(h))
        for h, call in zip(inputs, calls, strict=True):
            torch.testing.assert_close(call.result(), model.lm_head(h).detach())
        assert server.stats["joined_requests"] == 3


def test_different_modules_and_dtypes_stay_apart(model, tmp_path):
    asks = [
        lambda client, h: client.submit.batch_linear(0, ["q_proj"], h),
        lambda client, h: client.submit.batch_linear(1, ["q_proj"], h),
        lambda client, h: client.submit.lm_head(h),
        lambda client, h: client.submit.matmul(h, h.T),
    ]
    h, queue = torch.randn(2, HIDDEN), iter(asks)

    def ask_next(client, h):
        return next(queue)(client, h)

    with serving(model, tmp_path) as server, ExitStack() as stack:
        calls = together(server, stack, [h] * len(asks), ask_next)
        wanted = [layer.self_attn.q_proj(h) for layer in model.model.layers] + [model.lm_head(h), h @ h.T]
        for call, expected in zip(calls, wanted, strict=True):
            out = call.result()
            torch.testing.assert_close(out[0] if isinstance(out, list) else out, expected.detach())
        assert server.stats["joined_requests"] == 0
    with serving(model, tmp_path) as server, ExitStack() as stack:
        narrow = stack.enter_context(client_of(server, wire_dtype="bfloat16"))
        wide = stack.enter_context(client_of(server))
        for client in (narrow, wide):
            client.init()
        with held_back(server):
            calls = [ask_projections(client, h) for client in (narrow, wide)]
        for call in calls:
            torch.testing.assert_close(
                call.result()[0], model.model.layers[1].self_attn.q_proj(h), rtol=0.05, atol=0.05
            )
        assert server.stats["joined_requests"] == 0


def test_a_fault_of_one_is_nothing_to_the_others(model, tmp_path):
    good = torch.randn(3, HIDDEN)
    with serving(model, tmp_path) as server, ExitStack() as stack:
        calls = together(server, stack, [good, torch.zeros(3, HIDDEN + 1), good], ask_projections)
        with pytest.raises(RemoteError, match=r"has shape \[3, 65\]") as caught:
            calls[1].result()
        assert caught.value.code == Status.BAD_SHAPE
        expected = model.model.layers[1].self_attn.q_proj(good).detach()
        for call in (calls[0], calls[2]):
            torch.testing.assert_close(call.result()[0], expected)
        assert server.stats["joined_requests"] == 2


def test_what_passes_a_limit_together_is_answered_alone(model, tmp_path):
    h = torch.randn(4, HIDDEN)
    outs = sum(getattr(model.model.layers[1].self_attn, name).out_features for name in PROJECTIONS)
    with serving(model, tmp_path, reply_limit_bytes=4 * outs * 4) as server, ExitStack() as stack:
        calls = together(server, stack, [h, h], ask_projections)
        expected = model.model.layers[1].self_attn.q_proj(h).detach()
        for call in calls:
            torch.testing.assert_close(call.result()[0], expected)
        assert server.stats["joined_requests"] == 0
        assert server.stats["errors"] == 0


def test_a_client_that_left_does_not_spoil_the_answer_of_the_others(model, tmp_path):
    h = torch.randn(2, HIDDEN)
    with serving(model, tmp_path) as server, ExitStack() as stack:
        leaving = client_of(server)
        staying = stack.enter_context(client_of(server))
        for client in (leaving, staying):
            client.init()
        with held_back(server):
            ask_projections(leaving, h)
            call = ask_projections(staying, h)
            until(lambda: sum(session.channel.poll() for session in server._answering.sessions.values()) == 2)
            leaving.close()
        expected = model.model.layers[1].self_attn.q_proj(h).detach()
        torch.testing.assert_close(call.result()[0], expected)
        until(lambda: server.stats["clients"] == 1)


def test_joined_is_kept_where_it_is_faster():
    learner = JoinLearner()
    assert learner.pays("w", [1, 1])  # unknown: tried
    learner.observe("w", 2, 110.0)
    assert not learner.pays("w", [1, 1])  # what one costs is not known yet
    learner.observe("w", 1, 100.0)
    assert learner.pays("w", [1, 1])
    assert not learner.pays("w", [1])
    assert not learner.pays("w", [MAX_JOINED_ROWS, 1])


def test_joined_is_given_up_where_it_is_slower_and_tried_again_now_and_then():
    learner = JoinLearner()
    learner.observe("w", 1, 100.0)
    learner.observe("w", 2, 300.0)
    choices = [learner.pays("w", [1, 1]) for _ in range(256)]
    assert choices.count(True) == 4
    for _ in range(40):
        learner.observe("w", 2, 120.0)
    assert [learner.pays("w", [1, 1]) for _ in range(256)].count(False) == 4


def test_targets_without_number_do_not_fill_the_learner():
    learner = JoinLearner()
    for number in range(10_000):
        learner.observe(number, 1, 1.0)
    assert len(learner._costs) <= 4096


def test_a_server_with_one_client_never_joins(model, tmp_path):
    with server_of(model, endpoint_in(tmp_path)) as server, client_of(server) as client:
        calls = [ask_projections(client, torch.randn(1, HIDDEN)) for _ in range(20)]
        for call in calls:
            call.result()
        assert server.stats["joined_requests"] == 0


def test_batching_can_be_turned_off(model, tmp_path):
    h = torch.randn(2, HIDDEN)
    with serving(model, tmp_path, batching=False) as server, ExitStack() as stack:
        calls = together(server, stack, [h, h], ask_projections)
        assert torch.equal(calls[0].result()[0], calls[1].result()[0])
        assert server.stats["joined_requests"] == 0


def test_waiting_for_others_is_given_up_where_nobody_comes_and_tried_now_and_then():
    linger = Linger()
    assert 0 < linger.budget_ns(1e6) <= 1e5
    assert linger.budget_ns(1e12) <= 300_000
    assert linger.budget_ns(0.0) == 0
    for _ in range(20):
        linger.tell(False)
    tries = [bool(linger.budget_ns(1e6)) for _ in range(256)]
    assert tries.count(True) == 4
    for _ in range(10):
        linger.tell(True)
    assert linger.budget_ns(1e6)


def test_a_request_of_a_client_just_answered_is_waited_for(model, tmp_path, monkeypatch):
    """For as long as it takes here: what is tested is that the late one is computed with the first."""
    h = torch.randn(2, HIDDEN)
    monkeypatch.setattr("tsqp.answering._JUST_BEFORE_NS", int(PATIENCE_S * 1e9))
    with (
        serving(model, tmp_path) as server,
        client_of(server) as first,
        client_of(server) as second,
    ):
        server._answering._linger.budget_ns = lambda cost_ns: int(PATIENCE_S * 1e9)
        for client in (first, second):
            client.init()
        early = ask_projections(first, h)
        until(lambda: not any(session.channel.poll() for session in server._answering.sessions.values()))
        late = ask_projections(second, h)
        torch.testing.assert_close(early.result()[0], late.result()[0])
        assert server.stats["joined_requests"] == 2
