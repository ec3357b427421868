"""Client and server together: every method against torch on the same weights, wire dtypes, several users."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from rpc_support import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    PATIENCE_S,
    VOCAB,
    client_of,
    endpoint_in,
    serving,
    tiny_model,
    until,
)
from torch import nn

import tsqp
from tsqp.client import GPUClient
from tsqp.errors import ClosedError, ConfigError, ConnectError
from tsqp.protocol import FLOAT_DTYPES, AttentionGeometry, ModuleInfo

pytest_plugins = ["rpc_fixtures"]

#: The relative error of one rounding to each dtype.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=1e-6)


# --- Init
# ----------------------------------------------------------------------------------------------------


def test_init_describes_the_model(model, client):
    info = client.init()
    assert info.dtype == "float32"
    assert info.geometry == AttentionGeometry(LAYERS, HEADS, KV_HEADS, HEAD_DIM)
    assert info.embedding == "model.embed_tokens"
    assert info.lm_head == "lm_head"
    assert info.tied is False
    assert info.modules["model.layers.1.mlp.down_proj"] == ModuleInfo("linear", 96, HIDDEN, False)
    assert info.modules["model.embed_tokens"] == ModuleInfo("embedding", VOCAB, HIDDEN)
    assert info.config["model_type"] == "llama"
    assert info.config["rope_parameters"] == model.config.rope_parameters
    assert info.generation_config["eos_token_id"] == model.generation_config.eos_token_id
    assert info.server["protection"].startswith("none")
    assert client.init() is info
    assert client.round_trips == 1


def test_init_brings_exactly_the_small_parameters(model, client):
    trusted = client.init().trusted
    expected = {name: value for name, value in model.state_dict().items() if "norm" in name}
    assert trusted.keys() == expected.keys()
    assert len(trusted) == 2 * LAYERS + 1
    for name, value in expected.items():
        assert torch.equal(trusted[name], value)


def test_init_keeps_dtypes_and_biases_and_ties(tmp_path):
    model = tiny_model(torch.bfloat16, attention_bias=True, tie_word_embeddings=True)
    model.model.norm.to(torch.float32)
    model.register_buffer("steps", torch.tensor(7))
    with serving(model, tmp_path) as server, client_of(server) as client:
        info = client.init()
        assert info.dtype == "bfloat16"
        assert info.tied is True
        assert info.modules["model.layers.0.self_attn.q_proj"].bias is True
        assert info.trusted["model.norm.weight"].dtype == torch.float32
        assert info.trusted["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16
        assert torch.equal(info.trusted["steps"], torch.tensor(7))


def test_init_names_no_code_and_no_path(tmp_path):
    model = tiny_model()
    model.config.auto_map = {"AutoModelForCausalLM": "evil.Model"}
    model.config._name_or_path = "/somewhere/private"
    with serving(model, tmp_path) as server, client_of(server) as client:
        assert not {"auto_map", "_name_or_path"} & client.init().config.keys()


# --- the operators
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (1, 0, 2)])
def test_embedding(model, client, shape):
    ids = torch.randint(0, VOCAB, shape)
    assert torch.equal(client.embedding(ids), model.model.embed_tokens(ids))
    assert torch.equal(client.embedding(ids.to(torch.int32)), model.model.embed_tokens(ids))


@pytest.mark.parametrize("lead", [(), (1,), (2, 7), (0,), (3, 0), (2, 1, 1, 1, 1, 1, 2)])
@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("self_attn.o_proj",), ("gate_proj", "mlp.up_proj")])
def test_batch_linear(model, client, lead, names):
    h = torch.randn(*lead, HIDDEN)
    for index, layer in enumerate(model.model.layers):
        before = client.round_trips
        outs = client.batch_linear(index, list(names), h)
        assert client.round_trips - before <= 2  # one, and Init before the first
        for name, out in zip(names, outs, strict=True):
            word = name.rpartition(".")[2]
            module = getattr(layer.self_attn, word, None) or getattr(layer.mlp, word)
            assert close(out, module(h))


def test_linear_by_full_name(model, client):
    h = torch.randn(3, 96)
    assert close(client.linear("model.layers.1.mlp.down_proj", h), model.model.layers[1].mlp.down_proj(h))


def test_lm_head(model, client):
    h = torch.randn(2, 5, HIDDEN)
    assert close(client.lm_head(h), model.lm_head(h))


def test_linear_adds_the_bias(tmp_path):
    model = tiny_model(attention_bias=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
    with serving(model, tmp_path) as server, client_of(server) as client:
        h = torch.randn(2, HIDDEN)
        assert close(client.batch_linear(0, ["q_proj"], h)[0], model.model.layers[0].self_attn.q_proj(h))


MATMUL_SHAPES = [
    ((3, 4), (4, 5)),
    ((4,), (4,)),
    ((4,), (4, 5)),
    ((3, 4), (4,)),
    ((2, 3, 4), (4, 5)),
    ((2, 1, 3, 4), (1, 6, 4, 5)),
    ((6, 3, 4), (2, 1, 4, 5)),
    ((0, 3, 4), (4, 5)),
    ((3, 0), (0, 5)),
]


@pytest.mark.parametrize(("a_shape", "b_shape"), MATMUL_SHAPES)
def test_matmul(client, a_shape, b_shape):
    a, b = torch.randn(a_shape), torch.randn(b_shape)
    assert close(client.matmul(a, b), torch.matmul(a, b))


def test_matmul_refuses_shapes_that_do_not_fit_before_sending(client):
    with pytest.raises(ConfigError, match="inner dimensions 4 and 5"):
        client.matmul(torch.randn(3, 4), torch.randn(5, 6))
    assert client.round_trips == 0


def test_inputs_need_not_be_contiguous_nor_detached(model, client):
    h = torch.randn(HIDDEN, 6).t().requires_grad_()
    out = client.batch_linear(0, ["q_proj"], h)[0]
    assert close(out, model.model.layers[0].self_attn.q_proj(h).detach())
    assert not out.requires_grad


def test_results_are_private_memory(client):
    h = torch.randn(2, HIDDEN)
    first = client.batch_linear(0, ["q_proj"], h)[0]
    kept = first.clone()
    for _ in range(12):
        client.batch_linear(0, ["q_proj"], torch.zeros(2, HIDDEN))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("large", ["zmq", "tile"])
def test_messages_larger_than_a_slot(model, tmp_path, large):
    with serving(model, tmp_path, large=large) as server, client_of(server, large=large) as client:
        h = torch.randn(3000, HIDDEN)
        assert close(client.lm_head(h), model.lm_head(h))
        stats = client.stats
        assert (stats["zmq_transfers"], stats["shm_transfers"]) == ((2, 2) if large == "zmq" else (0, 4))  # with Init
        assert close(client.lm_head(h[:2]), model.lm_head(h[:2]))


def test_a_module_with_its_own_forward_keeps_it(tmp_path):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model()
    plain = model.model.layers[0].mlp.up_proj
    double = Doubling(HIDDEN, 96, bias=False)
    double.weight = plain.weight
    model.model.layers[0].mlp.up_proj = double
    with serving(model, tmp_path) as server, client_of(server) as client:
        h = torch.randn(2, HIDDEN)
        assert close(client.batch_linear(0, ["up_proj"], h)[0], 2 * plain(h))


def test_names_that_do_not_exist_are_refused_before_sending(client):
    client.init()
    h = torch.randn(1, HIDDEN)
    with pytest.raises(ConfigError, match=r"layer 2 does not exist.*0 to 1"):
        client.batch_linear(2, ["q_proj"], h)
    with pytest.raises(ConfigError, match=r"layer 0 has no module 'w_proj'; it has mlp\.down_proj"):
        client.batch_linear(0, ["w_proj"], h)
    with pytest.raises(ConfigError, match="no module 'lm_heads'"):
        client.linear("lm_heads", h)
    with pytest.raises(ConfigError, match="no embedding 'lm_head'"):
        client.embedding(torch.tensor([1]), module="lm_head")
    with pytest.raises(ConfigError, match="floating-point"):
        client.lm_head(torch.ones(1, HIDDEN, dtype=torch.int64))
    assert client.round_trips == 1


# --- dtypes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["auto", *FLOAT_DTYPES])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_linear_keeps_the_stated_error(tmp_path, dtype, wire):
    model = tiny_model(FLOAT_DTYPES[dtype])
    weight = model.lm_head.weight.detach().double()
    with serving(model, tmp_path) as server, client_of(server, wire_dtype=wire) as client:
        h = torch.randn(4, HIDDEN)
        out = client.lm_head(h)
    assert out.dtype == torch.float32  # the caller's
    exact, size = h.double() @ weight.t(), h.double().abs() @ weight.abs().t()
    # The model's own error: input and output rounded, sums of HIDDEN products in at least float32.
    own = ROUNDING[dtype] * (size + exact.abs()) + HIDDEN * ROUNDING["float32"] * size
    u = ROUNDING[dtype if wire == "auto" else wire]
    bound = 1.05 * (own + u * (size + exact.abs()))
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_method_in_every_model_dtype(tmp_path, dtype):
    model = tiny_model(FLOAT_DTYPES[dtype])
    kind = FLOAT_DTYPES[dtype]
    with serving(model, tmp_path) as server, client_of(server) as client, torch.no_grad():
        rows = client.embedding(torch.arange(5))
        assert torch.equal(rows, model.model.embed_tokens(torch.arange(5)))
        tolerance = {"rtol": 8 * ROUNDING[dtype], "atol": 8 * ROUNDING[dtype]}
        out = client.batch_linear(0, ["q_proj"], rows)[0]
        torch.testing.assert_close(out, model.model.layers[0].self_attn.q_proj(rows), **tolerance)
        a, b = torch.randn(2, 3, 4, dtype=kind), torch.randn(2, 4, 5, dtype=kind)
        torch.testing.assert_close(client.matmul(a, b), a @ b, **tolerance)
        q = torch.randn(1, HEADS, 2, HEAD_DIM, dtype=kind)
        k, v = (torch.randn(1, KV_HEADS, 2, HEAD_DIM, dtype=kind) for _ in range(2))
        scores = client.attention_scores(0, q, k, v)
        torch.testing.assert_close(scores, q @ k.repeat_interleave(2, 1).transpose(2, 3), **tolerance)
        probs = torch.rand(1, HEADS, 2, 2, dtype=kind)
        torch.testing.assert_close(client.attention_values(0, probs), probs @ v.repeat_interleave(2, 1), **tolerance)


def test_unknown_wire_dtype_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="wire_dtype 'int8'"):
        GPUClient(endpoint_in(tmp_path), wire_dtype="int8")


# --- several users
# -------------------------------------------------------------------------------------------


def test_threads_may_share_a_client(model, client):
    faults: list[str] = []
    client.init()

    def work(layer: int) -> None:
        for step in range(40):
            h = torch.full((1 + step % 3, HIDDEN), float(step + layer))
            if not close(client.batch_linear(layer, ["q_proj"], h)[0], expected[layer](h).detach()):
                faults.append(f"layer {layer} step {step}")

    expected = [layer.self_attn.q_proj for layer in model.model.layers]
    threads = [threading.Thread(target=work, args=(index % LAYERS,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert client.round_trips == 1 + 4 * 40


def test_clients_are_served_side_by_side(model, server):
    with client_of(server) as one, client_of(server) as two, client_of(server) as three:
        for step in range(5):
            for client in (one, two, three):
                h = torch.full((2, HIDDEN), float(step))
                assert close(client.lm_head(h), model.lm_head(h).detach())
        until(lambda: server.stats["clients"] == 3)
    until(lambda: server.stats["clients"] == 0)
    assert server.stats["clients_seen"] == 3


def test_a_client_that_takes_no_replies_stops_only_itself(model, server):
    from tsqp.protocol import Method

    count = 20
    with tsqp.connect(server.endpoint, timeout=PATIENCE_S) as greedy, client_of(server) as client:
        sender = threading.Thread(
            target=lambda: [
                greedy.send((), tag=Method.PING, request_id=number, timeout=PATIENCE_S)
                for number in range(1, count + 1)
            ]
        )
        sender.start()
        for _ in range(20):
            h = torch.randn(1, HIDDEN)
            assert close(client.lm_head(h), model.lm_head(h).detach())
        replies = [greedy.recv(timeout=PATIENCE_S).request_id for _ in range(count)]
        sender.join()
        assert replies == list(range(1, count + 1))


# --- ping, ends
# ----------------------------------------------------------------------------------------------


def test_ping_and_server_stats(client):
    assert client.ping() > 0
    with pytest.raises(tsqp.errors.RemoteError):
        client.embedding(torch.tensor([VOCAB]))
    numbers = client.server_stats()
    assert numbers["requests"] == 4  # Ping, Init, Embedding, Stats
    assert numbers["errors"] == 1
    assert numbers["kv_bytes"] == 0


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_a_client_nobody_holds_takes_its_connection_with_it(server, how):
    """At once, not when the garbage collector comes: the connection keeps a mapping."""
    gc.disable()
    try:
        client = client_of(server)
        client.submit.lm_head(torch.randn(1, HIDDEN)).result()
        channel = weakref.ref(client._channel)
        if how == "closed":
            client.close()
        del client
        assert channel() is None
    finally:
        gc.enable()
    until(lambda: server.stats["clients"] == 0)


def test_a_closed_client_says_so(client):
    client.close()
    client.close()
    with pytest.raises(ClosedError, match="closed"):
        client.ping()


def test_no_server_is_one_sentence(tmp_path):
    with pytest.raises(ConnectError):
        GPUClient(endpoint_in(tmp_path), connect_timeout=0.2)
