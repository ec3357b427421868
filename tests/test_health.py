"""A server that answers but can't compute is not healthy, and whoever asks is told so in time."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Outcome, finish, start, tsqp_here
from rpc_support import PATIENCE_S, client_of, endpoint_in, serving, tiny_model
from torch import nn

from tsqp.errors import ConfigError, EndpointError, RemoteError, WaitTimeoutError
from tsqp.health import check_health
from tsqp.protocol import Status


class Engine(nn.Linear):
    """The module that a ping computes, which can be broken."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.fault: Exception | None = None
        self.works = threading.Event()
        self.works.set()
        self.computed = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.works.wait(PATIENCE_S)
        if self.fault is not None:
            raise self.fault
        self.computed += 1
        return super().forward(x)


@pytest.fixture
def engine() -> Engine:
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    attention.k_proj = Engine(attention.k_proj)  # the model's smallest
    attention.k_proj.model = [model]  # in a list: it must not become a module of itself
    return attention.k_proj


@pytest.fixture
def server(engine: Engine, tmp_path: Path) -> Iterator[Any]:
    with serving(engine.model[0], tmp_path) as running:
        yield running
        engine.works.set()


@contextmanager
def hanging(engine: Engine) -> Iterator[None]:
    engine.works.clear()
    try:
        yield
    finally:
        engine.works.set()


def health(endpoint: str, *more: str) -> subprocess.Popen[bytes]:
    return start("health", "--endpoint", endpoint, *more)


# --- the client's ping


def test_ping_computes(server: Any, engine: Engine) -> None:
    with client_of(server) as client:
        before = engine.computed
        assert client.ping() > 0
        assert engine.computed == before + 1


def test_ping_tells_a_server_that_can_not_compute(server: Any, engine: Engine) -> None:
    with client_of(server) as client:
        engine.fault = RuntimeError("CUDA error: unspecified launch failure")
        for _ in range(2):
            with pytest.raises(RemoteError, match="Ping failed on the server") as caught:
                client.ping()
            assert caught.value.code == Status.INTERNAL
        engine.fault = None
        assert client.ping() > 0


def test_ping_tells_a_server_that_computes_for_ever(server: Any, engine: Engine) -> None:
    with client_of(server, timeout=0.2) as client, hanging(engine):
        with pytest.raises(WaitTimeoutError):
            client.ping()
        engine.works.set()
        client.timeout = PATIENCE_S
        assert client.ping() > 0
        assert client.stale_replies == 1


# --- the library's check


def test_check_health_says_what_is_wrong(server: Any, engine: Engine, tmp_path: Path) -> None:
    good = check_health(server.endpoint, PATIENCE_S)
    assert good.healthy
    assert good.error is None
    assert good.seconds is not None
    assert good.seconds > 0
    engine.fault = RuntimeError("no device")
    assert "Ping failed on the server" in (check_health(server.endpoint, PATIENCE_S).error or "")
    engine.fault = None
    with hanging(engine):
        late = check_health(server.endpoint, 3.0)
        assert not late.healthy
        assert "computed nothing within" in (late.error or "")
    assert check_health(server.endpoint, PATIENCE_S).healthy
    nobody = check_health(f"ipc://{tmp_path}/nobody.sock", 0.2)
    assert "no tsqp server answered" in (nobody.error or "")
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="not a positive number"):
            check_health(server.endpoint, timeout)
    with pytest.raises(EndpointError):
        check_health("nowhere", 1.0)


# --- the command


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text.rstrip("\n")


def test_the_command_tells_healthy_from_broken_and_hanging(server: Any, engine: Engine) -> None:
    """The server answers its socket in every case."""
    outcomes = [finish(health(server.endpoint))]
    assert outcomes[0].code == 0, outcomes
    assert one_line(outcomes[0].out).startswith(f"healthy: the server at {server.endpoint} computed and answered in ")
    assert outcomes[0].err == ""
    engine.fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    broken = [finish(process) for process in [health(server.endpoint), health(server.endpoint, "--json")]]
    assert_unhealthy(broken[0], "Ping failed on the server")
    found = json.loads(one_line(broken[1].out))
    assert broken[1].code == 1
    assert (found["endpoint"], found["healthy"], found["seconds"]) == (server.endpoint, False, None)
    assert "Ping failed" in found["error"]
    engine.fault = None
    with hanging(engine):
        assert_unhealthy(finish(health(server.endpoint, "--timeout", "3")), "computed nothing within")


def assert_unhealthy(outcome: Outcome, words: str) -> None:
    assert outcome.code == 1
    assert outcome.out == ""
    assert one_line(outcome.err).startswith("tsqp: unhealthy: the server at ipc://")
    assert words in outcome.err


def test_the_command_in_this_process(server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tsqp_here(capsys, "health", "--endpoint", server.endpoint, "--json")
    assert good.code == 0
    found = json.loads(one_line(good.out))
    assert found["healthy"] is True
    assert found["seconds"] > 0
    assert found["error"] is None
    nobody = tsqp_here(capsys, "health", "--endpoint", endpoint_in(tmp_path / "no"), "--timeout", "0.2")
    assert_unhealthy(nobody, "no tsqp server answered")
    assert tsqp_here(capsys, "health", "--timeout", "0").code == 2
    wrong = tsqp_here(capsys, "health", "--endpoint", "nowhere")
    assert wrong.code == 1
    assert "neither ipc:///path nor tcp://address:port" in wrong.err
