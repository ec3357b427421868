"""Bad requests: each has its status and one sentence, and is followed by a good request here and elsewhere."""

from __future__ import annotations

import time

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rpc_support import HIDDEN, PATIENCE_S, VOCAB, ask, client_of, serving, tiny_model, until
from torch import nn

import tsqp
from tsqp.errors import ClosedError, PeerDiedError, RemoteError
from tsqp.protocol import MAX_MODULES_PER_CALL, Method, Status

pytest_plugins = ["rpc_fixtures"]

H = torch.zeros(2, HIDDEN)
IDS = torch.zeros(3, dtype=torch.int64)
Q_PROJ = {"layer": 0, "modules": ["q_proj"]}
EMBED = {"module": "model.embed_tokens", "dtype": "float32"}

# tag, tensors, meta, status, words of the sentence
BAD_REQUESTS = {
    "method 0": (0, [], None, Status.UNKNOWN_METHOD, "method 0 is unknown"),
    "method reserved": (19, [H], None, Status.UNKNOWN_METHOD, "method 19 is unknown"),
    "method huge": (2**32 - 1, [], None, Status.UNKNOWN_METHOD, "is unknown"),
    "meta no msgpack": (Method.BATCH_LINEAR, [H], b"\xc1\xc1", Status.BAD_REQUEST, "meta"),
    "meta no mapping": (Method.BATCH_LINEAR, [H], msgpack.packb([1, 2]), Status.BAD_REQUEST, "meta"),
    "meta cut short": (Method.BATCH_LINEAR, [H], b"\x81\xa5laye", Status.BAD_REQUEST, "meta"),
    "no meta": (Method.BATCH_LINEAR, [H], None, Status.BAD_REQUEST, "'modules' is no list"),
    "modules a string": (Method.BATCH_LINEAR, [H], {"modules": "lm_head"}, Status.BAD_REQUEST, "no list"),
    "no modules": (Method.BATCH_LINEAR, [H], {"modules": []}, Status.BAD_REQUEST, "no list of 1 to"),
    "too many modules": (
        Method.BATCH_LINEAR,
        [H],
        {"layer": 0, "modules": ["q_proj"] * (MAX_MODULES_PER_CALL + 1)},
        Status.BAD_REQUEST,
        f"1 to {MAX_MODULES_PER_CALL}",
    ),
    "unknown module": (
        Method.BATCH_LINEAR,
        [H],
        {"layer": 0, "modules": ["z_proj"]},
        Status.UNKNOWN_MODULE,
        "layer 0 has no module 'z_proj'; it has mlp.down_proj",
    ),
    "module a number": (Method.BATCH_LINEAR, [H], {"modules": [3]}, Status.UNKNOWN_MODULE, "no module 3"),
    "module a mapping": (Method.BATCH_LINEAR, [H], {"modules": [{}]}, Status.UNKNOWN_MODULE, "a dict"),
    "module an attribute": (
        Method.BATCH_LINEAR,
        [H],
        {"modules": ["__class__"]},
        Status.UNKNOWN_MODULE,
        "no module '__class__'",
    ),
    "module very long": (Method.BATCH_LINEAR, [H], {"modules": ["x" * 9999]}, Status.UNKNOWN_MODULE, "xxx"),
    "embedding as linear": (
        Method.BATCH_LINEAR,
        [H],
        {"modules": ["model.embed_tokens"]},
        Status.UNKNOWN_MODULE,
        "is an embedding, not a linear module",
    ),
    "norm as linear": (Method.BATCH_LINEAR, [H], {"modules": ["model.norm"]}, Status.UNKNOWN_MODULE, "norm"),
    "layer too high": (
        Method.BATCH_LINEAR,
        [H],
        {"layer": 2, "modules": ["q_proj"]},
        Status.UNKNOWN_MODULE,
        "layer 2 does not exist; the model has layers 0 to 1",
    ),
    "layer negative": (
        Method.BATCH_LINEAR,
        [H],
        {"layer": -1, "modules": ["q_proj"]},
        Status.UNKNOWN_MODULE,
        "layer -1",
    ),
    "layer a bool": (
        Method.BATCH_LINEAR,
        [H],
        {"layer": True, "modules": ["q_proj"]},
        Status.UNKNOWN_MODULE,
        "layer True",
    ),
    "modules of two widths": (
        Method.BATCH_LINEAR,
        [H],
        {"layer": 0, "modules": ["q_proj", "down_proj"]},
        Status.BAD_SHAPE,
        "[64, 96] features",
    ),
    "no tensor": (Method.BATCH_LINEAR, [], Q_PROJ, Status.BAD_REQUEST, "holds 0 tensors, expected 1"),
    "two tensors": (Method.BATCH_LINEAR, [H, H], Q_PROJ, Status.BAD_REQUEST, "holds 2 tensors"),
    "wrong width": (
        Method.BATCH_LINEAR,
        [torch.zeros(2, 63)],
        Q_PROJ,
        Status.BAD_SHAPE,
        "input of model.layers.0.self_attn.q_proj has shape [2, 63], expected [.., 64]",
    ),
    "scalar": (Method.BATCH_LINEAR, [torch.tensor(1.0)], Q_PROJ, Status.BAD_SHAPE, "has shape []"),
    "integers": (Method.BATCH_LINEAR, [H.int()], Q_PROJ, Status.BAD_DTYPE, "activations are torch.int32"),
    "float64": (Method.BATCH_LINEAR, [H.double()], Q_PROJ, Status.BAD_DTYPE, "torch.float64"),
    "result too large": (
        Method.BATCH_LINEAR,
        [torch.zeros(5000, HIDDEN)],
        {"layer": 0, "modules": ["q_proj"] * 64},
        Status.LIMIT,
        "the limit is 4000000",
    ),
    "lm_head width": (Method.LM_HEAD, [torch.zeros(1, 8)], None, Status.BAD_SHAPE, "expected [.., 64]"),
    "lm_head too large": (Method.LM_HEAD, [torch.zeros(4000, HIDDEN)], None, Status.LIMIT, "4096000 bytes"),
    "ids of int32": (Method.EMBEDDING, [IDS.int()], EMBED, Status.BAD_DTYPE, "send torch.int64"),
    "ids too high": (Method.EMBEDDING, [IDS + VOCAB], EMBED, Status.BAD_REQUEST, "outside 0..255"),
    "ids negative": (Method.EMBEDDING, [IDS - 1], EMBED, Status.BAD_REQUEST, "outside 0..255"),
    "ids too many": (
        Method.EMBEDDING,
        [torch.zeros(20_000, dtype=torch.int64)],
        EMBED,
        Status.LIMIT,
        "the limit is",
    ),
    "ids of rank 8": (Method.EMBEDDING, [IDS.view((1,) * 7 + (3,))], EMBED, Status.BAD_SHAPE, "9 dimensions"),
    "embedding unknown": (
        Method.EMBEDDING,
        [IDS],
        {**EMBED, "module": "lm_head"},
        Status.UNKNOWN_MODULE,
        "no embedding 'lm_head'",
    ),
    "embedding dtype": (Method.EMBEDDING, [IDS], {**EMBED, "dtype": "int8"}, Status.BAD_DTYPE, "'int8'"),
    "embedding dtype a list": (Method.EMBEDDING, [IDS], {**EMBED, "dtype": [1]}, Status.BAD_DTYPE, "a list"),
    "matmul one operand": (Method.MATMUL, [H], None, Status.BAD_REQUEST, "expected 2"),
    "matmul inner": (Method.MATMUL, [H, H], None, Status.BAD_SHAPE, "inner dimensions 64 and 2 differ"),
    "matmul scalar": (Method.MATMUL, [H, torch.tensor(1.0)], None, Status.BAD_SHAPE, "scalar"),
    "matmul batch": (
        Method.MATMUL,
        [torch.zeros(2, 3, 4), torch.zeros(3, 4, 5)],
        None,
        Status.BAD_SHAPE,
        "do not broadcast",
    ),
    "matmul dtypes": (Method.MATMUL, [H, H.t().half()], None, Status.BAD_DTYPE, "send one dtype"),
    "matmul large result": (
        Method.MATMUL,
        [torch.zeros(2000, 1), torch.zeros(1, 2000)],
        None,
        Status.LIMIT,
        "16000000 bytes",
    ),
    "matmul large operand once broadcast": (
        Method.MATMUL,
        [torch.zeros(100, 1, 1, 900), torch.zeros(100, 900, 1)],
        None,
        Status.LIMIT,
        "36000000 bytes",
    ),
    "scores unknown layer": (
        Method.ATTENTION_SCORES,
        [H, H, H],
        {"layer": 9},
        Status.UNKNOWN_MODULE,
        "layer 9 does not exist",
    ),
    "scores no layer": (Method.ATTENTION_SCORES, [H, H, H], {}, Status.UNKNOWN_MODULE, "layer None"),
    "scores keep a string": (
        Method.ATTENTION_SCORES,
        [H, H, H],
        {"layer": 0, "keep": "all"},
        Status.BAD_REQUEST,
        "'keep' is 'all'",
    ),
    "scores drop negative": (
        Method.ATTENTION_SCORES,
        [H, H, H],
        {"layer": 0, "drop": -3},
        Status.BAD_REQUEST,
        "'drop' is -3",
    ),
    "scores keys a list": (
        Method.ATTENTION_SCORES,
        [H, H, H],
        {"layer": 0, "keys": [1]},
        Status.BAD_REQUEST,
        "'keys' is a list",
    ),
    "scores keys negative": (
        Method.ATTENTION_SCORES,
        [H, H, H],
        {"layer": 0, "keys": -1},
        Status.BAD_REQUEST,
        "'keys' is -1",
    ),
    **{
        f"scores keys {keys}": (
            Method.ATTENTION_SCORES,
            [torch.zeros(1, 4, 1, 16), *[torch.zeros(1, 2, 3, 16)] * 2],
            {"layer": 0, "keep": 0, "keys": keys},
            Status.BAD_REQUEST,
            f"'keys' is {keys} but the layer holds 3 positions",
        )
        for keys in (0, 4, 2**63)
    },
    "scores keys with a keep that is not held": (
        Method.ATTENTION_SCORES,
        [torch.zeros(1, 4, 1, 16), *[torch.zeros(1, 2, 3, 16)] * 2],
        {"layer": 0, "keep": 10**9, "keys": 5},
        Status.BAD_REQUEST,
        "keep=1000000000",
    ),
    "scores without index": (
        Method.ATTENTION_SCORES,
        [H, H, H],
        {"layer": 0, "reorder": True},
        Status.BAD_REQUEST,
        "expected 4",
    ),
    "scores dtypes": (Method.ATTENTION_SCORES, [H, H.half(), H], {"layer": 0}, Status.BAD_DTYPE, "one dtype"),
    "scores index dtype": (
        Method.ATTENTION_SCORES,
        [torch.zeros(1, 4, 1, 16), *[torch.zeros(1, 2, 1, 16)] * 2, torch.zeros(1, dtype=torch.int32)],
        {"layer": 0, "reorder": True},
        Status.BAD_DTYPE,
        "batch_index is torch.int32",
    ),
    "scores index without cache": (
        Method.ATTENTION_SCORES,
        [torch.zeros(1, 4, 1, 16), *[torch.zeros(1, 2, 1, 16)] * 2, torch.zeros(1, dtype=torch.int64)],
        {"layer": 0, "reorder": True},
        Status.BAD_REQUEST,
        "layer 0 holds no K and V",
    ),
    "values without cache": (
        Method.ATTENTION_VALUES,
        [torch.zeros(1, 4, 1, 1)],
        {"layer": 0},
        Status.BAD_REQUEST,
        "layer 0 holds no V",
    ),
    "ping with a tensor": (Method.PING, [H], None, Status.BAD_REQUEST, "holds 1 tensors, expected 0"),
    "init with a tensor": (Method.INIT, [H], None, Status.BAD_REQUEST, "expected 0"),
}


@pytest.fixture
def server(model, tmp_path):
    with serving(model, tmp_path, reply_limit_bytes=4_000_000) as running:
        yield running


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request(model, server, name):
    tag, tensors, meta, status, words = BAD_REQUESTS[name]
    good = torch.randn(2, HIDDEN)
    with (
        tsqp.connect(server.endpoint, timeout=PATIENCE_S) as channel,
        tsqp.connect(server.endpoint, timeout=PATIENCE_S) as other,
    ):
        for attempt in (1, 2):  # the second finds whatever the first left in the server's tables
            reply = ask(channel, tag, tensors, meta, request_id=attempt)
            error = reply.meta["error"]
            assert (reply.status, reply.request_id, reply.tag) == (status, attempt, tag), error
            assert words in error
            assert len(error) < 400
            assert reply.tensors == []
        for connection in (channel, other):
            reply = ask(connection, Method.BATCH_LINEAR, [good], Q_PROJ, request_id=3)
            assert reply.status == Status.OK
            expected = model.model.layers[0].self_attn.q_proj(good)
            torch.testing.assert_close(reply.tensors[0], expected.detach())
    assert server.stats["errors"] == 2


def test_the_client_raises_the_servers_sentence(server):
    with client_of(server) as client:
        with pytest.raises(RemoteError, match=r"has shape \[1, 63\], expected \[\.\., 64\]") as caught:
            client.batch_linear(0, ["q_proj"], torch.zeros(1, 63))
        assert caught.value.code == Status.BAD_SHAPE
        assert client.errors == 1
        assert client.batch_linear(0, ["q_proj"], torch.zeros(1, 64))[0].shape == (1, 64)


def test_metas_without_number_do_not_fill_the_server(server):
    """Distinct valid metas are more than the server remembers; every one is answered."""
    with tsqp.connect(server.endpoint, timeout=PATIENCE_S) as channel:
        for number in range(5000):
            meta = {"layer": number % 2, "modules": ["q_proj"], "noise": number}
            assert ask(channel, Method.BATCH_LINEAR, [H], meta, number + 1).status == Status.OK
        assert ask(channel, Method.BATCH_LINEAR, [H], {**Q_PROJ, "noise": "x" * 5000}, 9999).status == Status.OK
        (session,) = server._answering.sessions.values()
        assert 0 < len(session.targets) <= 4096
        assert max(len(meta) for _, meta in session.targets) <= 1024


class Failing(nn.Linear):
    """Raises ``fault`` where there is one."""

    fault: Exception | None = None

    def forward(self, x):
        if self.fault is not None:
            raise self.fault
        return super().forward(x)


FAULTS = [
    (RuntimeError("values are 3.14159, 2.71828"), Status.INTERNAL, "LMHead failed on the server"),
    (IndexError("secret 12345"), Status.INTERNAL, "IndexError"),
    (MemoryError(), Status.OUT_OF_MEMORY, "too little memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), Status.OUT_OF_MEMORY, "too little"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 3.14"), Status.OUT_OF_MEMORY, "too little memory"),
]


@pytest.mark.parametrize(("fault", "status", "words"), FAULTS)
def test_a_fault_inside_an_operator_ends_nothing_and_tells_no_values(tmp_path, fault, status, words):
    model = tiny_model()
    head = Failing(HIDDEN, VOCAB, bias=False)
    model.lm_head = head
    with serving(model, tmp_path) as server, client_of(server) as client:
        head.fault = fault
        with pytest.raises(RemoteError, match=words) as caught:
            client.lm_head(H)
        assert caught.value.code == status
        assert not any(secret in str(caught.value) for secret in ("3.14", "2.71", "12345"))
        head.fault = None
        torch.testing.assert_close(client.lm_head(H), head(H).detach())
        with client_of(server) as other:
            torch.testing.assert_close(other.lm_head(H), head(H).detach())


WORDS = ["layer", "modules", "keep", "keys", "drop", "reorder", "module", "dtype", "q_proj", "model.embed_tokens"]
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers(-(2**63), 2**63) | st.floats() | st.sampled_from(WORDS)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner), max_leaves=6
)
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "layer": st.integers(-1, 2),
        "modules": st.lists(st.sampled_from(["q_proj", "o_proj", "down_proj", "lm_head"]), max_size=3),
        "module": st.sampled_from(["model.embed_tokens", "lm_head"]),
        "dtype": st.sampled_from(["float32", "bfloat16", "int64"]),
        "keep": st.integers(-1, 3),
        "keys": st.integers(-1, 3),
        "drop": st.integers(-1, 3),
        "reorder": st.booleans(),
    },
)
METAS = PLAUSIBLE | st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=4)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 16, HIDDEN]), max_size=5) | st.sampled_from(
    [[1, 4, 2, 16], [1, 2, 2, 16], [1, 2, 1, 16], [2, HIDDEN]]
)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float16, torch.int64, torch.bool, torch.float64])
TENSORS = st.lists(st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), SHAPES, DTYPES), max_size=4)


def test_no_request_brings_the_server_out_of_step(model, server):
    """Random requests, half of them plausible: each gets one reply, none an internal error."""
    seen = set()
    with tsqp.connect(server.endpoint, timeout=PATIENCE_S) as channel, client_of(server) as other:

        @settings(
            max_examples=400, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        @given(st.integers(0, 12), TENSORS, METAS)
        def ask_anything(tag, tensors, meta):
            try:
                packed = msgpack.packb(meta)
            except OverflowError:  # an integer msgpack does not know
                return
            reply = ask(channel, tag, tensors, packed)
            assert reply.tag == tag
            assert Status(reply.status) != Status.INTERNAL, reply.meta
            assert (reply.status == Status.OK) != ("error" in reply.meta)
            seen.add((tag, Status(reply.status)))

        ask_anything()
        torch.testing.assert_close(other.lm_head(H), model.lm_head(H).detach())
        assert ask(channel, Method.BATCH_LINEAR, [H], Q_PROJ).status == Status.OK
    assert {status for _, status in seen} >= {
        Status.OK,
        Status.BAD_REQUEST,
        Status.UNKNOWN_METHOD,
        Status.UNKNOWN_MODULE,
        Status.BAD_DTYPE,
    }


@pytest.mark.parametrize("rubbish", [b"", b"rubbish", b"\0" * 128, b"\xff" * 4096])
def test_bytes_that_are_no_message_end_only_their_own_connection(model, server, rubbish):
    with client_of(server) as other, tsqp.connect(server.endpoint, timeout=PATIENCE_S, shm=False) as channel:
        other.ping()
        channel._link.post(rubbish, [], 0, time.monotonic() + PATIENCE_S)
        with pytest.raises((ClosedError, PeerDiedError)):
            channel.recv(timeout=PATIENCE_S)
        torch.testing.assert_close(other.lm_head(H), model.lm_head(H).detach())
        until(lambda: server.stats["clients"] == 1)
