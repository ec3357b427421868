"""Compiled MLPs compute what they did, and are given up where compiling fails."""

from __future__ import annotations

import pytest
import torch
from rpc_support import HIDDEN, client_of, endpoint_in, server_of, serving, tiny_model

from tsqp.compiling import _OrEager
from tsqp.errors import ConfigError

compiled = []


@torch.compiler.disable
def recording_backend(graph, examples):
    """A backend that runs the graph as it is, and says that it was asked."""
    compiled.append(graph)
    return graph.forward


@pytest.fixture(scope="module", autouse=True)
def backend():
    torch._dynamo.register_backend(recording_backend, name="tsqp_recording")


def test_compiled_mlps_answer_as_before(tmp_path):
    model = tiny_model()
    inputs = [torch.randn(1, rows, HIDDEN) for rows in (1, 7, 7, 30)]
    expected = [layer.mlp(h).detach() for layer in model.model.layers for h in inputs]
    compiled.clear()
    with serving(model, tmp_path, compile="tsqp_recording") as server, client_of(server) as client:
        found = [client.fused_mlp(layer, h) for layer in range(len(model.model.layers)) for h in inputs]
    assert compiled
    for out, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(out, wanted)


def test_an_unknown_backend_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no backend 'magic'"):
        server_of(tiny_model(), endpoint_in(tmp_path), compile="magic")


def test_a_module_that_fails_compiled_goes_on_by_itself(caplog):
    calls = []

    def broken(x):
        calls.append("compiled")
        raise RuntimeError("no compiler\nand more")

    def eager(x):
        calls.append("eager")
        return x + 1

    call = _OrEager("layers.0.mlp", broken, eager)
    assert call(1) == call(1) == 2
    assert calls == ["compiled", "eager", "eager"]
    assert "layers.0.mlp is not compiled any more (RuntimeError: no compiler)" in caplog.text


def test_a_bad_input_does_not_end_the_compiled_module():
    def strict(x):
        if x < 0:
            raise ValueError(x)
        return x

    call = _OrEager("mlp", strict, strict)
    with pytest.raises(ValueError, match="-1"):
        call(-1)
    assert call._call is strict
