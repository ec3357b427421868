"""What the client makes of replies: late ones, wrong ones, hostile ones."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from rpc_support import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    PATIENCE_S,
    VOCAB,
    LyingServer,
    client_of,
    endpoint_in,
    serving,
    tiny_model,
)
from torch import nn

from tsqp import model_info
from tsqp.client import GPUClient
from tsqp.errors import ConfigError, ProtocolError, RemoteError, WaitTimeoutError
from tsqp.loading import load_model
from tsqp.protocol import Method, Status

H = torch.zeros(2, HIDDEN)
RIGHT = torch.zeros(2, VOCAB)


class Gated(nn.Linear):
    """Waits for its gate."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = threading.Event()

    def forward(self, x):
        assert self.gate.wait(PATIENCE_S)
        return super().forward(x)


def test_a_late_reply_is_dropped_and_the_connection_stays_usable(tmp_path):
    model = tiny_model()
    model.lm_head = Gated(HIDDEN, VOCAB, bias=False)
    with serving(model, tmp_path) as server, client_of(server) as client:
        client.init()
        client.timeout = 0.2
        for _ in range(2):
            with pytest.raises(WaitTimeoutError):
                client.lm_head(torch.ones(3, HIDDEN))
        model.lm_head.gate.set()
        client.timeout = PATIENCE_S
        h = torch.randn(2, HIDDEN)
        expected = model.model.layers[0].self_attn.q_proj(h).detach()
        torch.testing.assert_close(client.batch_linear(0, ["q_proj"], h)[0], expected)
        assert client.stale_replies == 2
        torch.testing.assert_close(client.lm_head(h), model.lm_head(h).detach())
        assert client.stats["stale_replies"] == 2
        assert client.round_trips == 3


def test_after_a_late_scores_call_the_length_has_to_be_said(tmp_path, monkeypatch):
    gate, real = threading.Event(), torch.bmm

    def slow(*args):
        assert gate.wait(PATIENCE_S)
        return real(*args)

    def qkv(count):
        return [torch.randn(1, heads, count, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]

    with serving(tiny_model(), tmp_path) as server, client_of(server) as client:
        client.attention_scores(0, *qkv(4))
        client.timeout = 0.2
        monkeypatch.setattr(torch, "bmm", slow)
        with pytest.raises(WaitTimeoutError):
            client.attention_scores(0, *qkv(1))
        gate.set()
        client.timeout = PATIENCE_S
        with pytest.raises(ConfigError, match="layer 0 is unknown; give keep="):
            client.attention_scores(0, *qkv(1))
        assert client.attention_scores(0, *qkv(1), keep=4).shape == (1, HEADS, 1, 5)
        assert client.attention_scores(0, *qkv(1)).shape == (1, HEADS, 1, 6)


def lying(tmp_path, answer, init=None):
    """A server that lies about everything but Init, or about Init too."""
    return LyingServer(endpoint_in(tmp_path), lambda msg: init if msg.tag == Method.INIT else answer(msg))


WRONG_REPLIES = {
    "shape": ({"tensors": [torch.zeros(2, VOCAB + 1)]}, "expected torch.float32 \\[2, 256\\]"),
    "rank": ({"tensors": [torch.zeros(2, VOCAB, 1)]}, "expected torch.float32 \\[2, 256\\]"),
    "broadcastable shape": ({"tensors": [torch.zeros(1, VOCAB)]}, "replied torch.float32 \\[1, 256\\]"),
    "dtype": ({"tensors": [RIGHT.double()]}, "replied torch.float64"),
    "no tensor": ({}, "holds 0 tensors, expected 1"),
    "two tensors": ({"tensors": [RIGHT, RIGHT]}, "holds 2 tensors, expected 1"),
    "another method": ({"tensors": [RIGHT], "tag": Method.MATMUL}, "answered as method 4"),
    "request never made": ({"tensors": [RIGHT], "request_id": 1000}, "request 1000, which was never made"),
    "request 0": ({"tensors": [RIGHT], "request_id": 0}, "request 0, which was never made"),
    "unreadable error": ({"status": 3, "meta": b"\xc1"}, "unreadable meta"),
    "error no mapping": ({"status": 3, "meta": b"\x01"}, "meta"),
}


@pytest.mark.parametrize("name", WRONG_REPLIES)
def test_a_wrong_reply_is_a_protocol_error_and_never_a_result(tmp_path, name):
    wrong, words = WRONG_REPLIES[name]
    lies = iter([wrong, {"tensors": [RIGHT + 1]}])
    with lying(tmp_path, lambda msg: next(lies)) as server, client_of(server) as client:
        with pytest.raises(ProtocolError, match=words):
            client.lm_head(H)
        assert torch.equal(client.lm_head(H), RIGHT + 1)


def test_every_call_checks_its_reply(tmp_path):
    q, k = torch.zeros(1, HEADS, 1, HEAD_DIM), torch.zeros(1, KV_HEADS, 1, HEAD_DIM)
    calls = [
        lambda client: client.embedding(torch.tensor([1])),
        lambda client: client.batch_linear(0, ["q_proj", "k_proj"], H),
        lambda client: client.linear("lm_head", H),
        lambda client: client.lm_head(H),
        lambda client: client.matmul(H, H.t()),
        lambda client: client.attention_scores(0, q, k, k),
        lambda client: client.attention_values(0, torch.zeros(1, HEADS, 1, 1)),
        lambda client: client.drop_cache(),
        lambda client: client.ping(),
        lambda client: client.server_stats(),
    ]
    answers = {"tensors": [torch.zeros(7, 7)]}
    with lying(tmp_path, lambda msg: answers) as server, client_of(server) as client:
        for call in calls:
            with pytest.raises(ProtocolError, match=r"\[7, 7\]|holds 1 tensors"):
                call(client)


def test_stats_other_than_numbers_are_refused(tmp_path):
    lie = {"meta": {"requests": "many"}}
    with lying(tmp_path, lambda msg: lie) as server, client_of(server) as client:
        for _ in range(2):
            with pytest.raises(ProtocolError, match="other than numbers"):
                client.server_stats()


def test_an_error_text_is_cut_and_cleaned(tmp_path):
    lies = iter(
        [
            {"status": 8, "meta": {"error": "\x1b[2Jred\nline " + "x" * 5000}},
            {"status": 77},
            {"status": 8, "meta": {"error": 5}},
        ]
    )
    with lying(tmp_path, lambda msg: next(lies)) as server, client_of(server) as client:
        with pytest.raises(RemoteError) as caught:
            client.lm_head(H)
        text = str(caught.value)
        assert text.startswith("?[2Jred?line xxx")
        assert len(text) <= 500
        assert caught.value.code == Status.INTERNAL
        with pytest.raises(RemoteError, match="status 77 and gave no reason"):
            client.lm_head(H)
        with pytest.raises(RemoteError, match="status 8 and gave no reason"):
            client.lm_head(H)


def test_a_second_reply_to_one_request_is_a_protocol_error(tmp_path):
    lies = iter([[{"tensors": [RIGHT]}, {"tensors": [RIGHT - 1]}], {"tensors": [RIGHT + 2]}, {"tensors": [RIGHT + 3]}])
    with lying(tmp_path, lambda msg: next(lies)) as server, client_of(server) as client:
        assert torch.equal(client.lm_head(H), RIGHT)
        with pytest.raises(ProtocolError, match="answered request 2, a second time"):
            client.lm_head(H)  # its own reply comes after the surplus one
        assert torch.equal(client.lm_head(H), RIGHT + 3)
        assert client.stale_replies == 1


def test_compute_time_beyond_the_round_trip_is_not_believed(tmp_path):
    with (
        lying(tmp_path, lambda msg: {"tensors": [RIGHT], "compute_ns": 2**63}) as server,
        client_of(server) as client,
    ):
        client.lm_head(H)
        row = client.stats["operators"]["gpu_lm_head"]
        assert row["server_seconds"] <= row["seconds"]


# --- Init
# ----------------------------------------------------------------------------------------------------


def init_reply(change):
    """An Init reply whose document went through ``change``, which may return other bytes."""
    tensors = model_info.pack(load_model(tiny_model()).info)
    document = json.loads(tensors[0].numpy().tobytes())
    changed = change(document)
    data = changed if isinstance(changed, bytes) else json.dumps(document).encode()
    return [torch.frombuffer(bytearray(data), dtype=torch.uint8), *tensors[1:]]


BAD_DOCUMENTS = {
    "no JSON": (lambda d: b"\xff\xfe{", "no valid JSON"),
    "deep": (lambda d: b"[" * 100_000, "no valid JSON"),
    "a list": (lambda d: b"[]", "no JSON object"),
    "no config": (lambda d: d.pop("config") and None, "no valid 'config'"),
    "config a list": (lambda d: d.update(config=[]), "no valid 'config'"),
    "config deep": (lambda d: d["config"].update(x=json.loads("[" * 40 + "]" * 40)), "nested over 32 deep"),
    "config too deep to copy": (
        lambda d: json.dumps(d).replace('"config": {', '"config": {"x": ' + "[" * 600 + "]" * 600 + ",", 1).encode(),
        "nested over 32 deep",
    ),
    "dtype": (lambda d: d.update(dtype="int8"), "dtype other than"),
    "tied a number": (lambda d: d.update(tied=1), "no valid 'tied'"),
    "geometry short": (lambda d: d.update(geometry=[1, 2]), "geometry"),
    "geometry negative": (lambda d: d.update(geometry=[2, 4, -2, 16]), "head count"),
    "geometry float": (lambda d: d.update(geometry=[2, 4, 2, 16.0]), "head count"),
    "geometry uneven": (lambda d: d.update(geometry=[2, 4, 3, 16]), "multiple of its 3 kv heads"),
    "layers huge": (lambda d: d.update(geometry=[10**9, 4, 2, 16]), "number of layers"),
    "module kind": (lambda d: d["modules"].update(x=["eval", 1, 1, False]), "neither linear nor embedding"),
    "module size": (lambda d: d["modules"].update(x=["linear", 1, 2**40, False]), "module size"),
    "module row": (lambda d: d["modules"].update(x=["linear", 1, 2]), "describes a module wrongly"),
    "module name": (lambda d: d["modules"].update({"a\x1b": ["linear", 1, 2, False]}), "unprintable"),
    "module name long": (lambda d: d["modules"].update({"a" * 300: ["linear", 1, 2, False]}), "too long"),
    "lm_head unknown": (lambda d: d.update(lm_head="nowhere"), "a lm_head that is none"),
    "embedding linear": (lambda d: d.update(embedding="lm_head"), "an? embedding that is none"),
    "trusted twice": (lambda d: d["trusted"].append(d["trusted"][0]), "or two of them"),
    "trusted too many": (lambda d: d["trusted"].append(["x", "float32", [64]]), "no values for parameter 'x'"),
    "trusted dtype": (lambda d: d["trusted"].append(["x", "float16", [1]]), "no values for parameter 'x'"),
    "trusted negative": (lambda d: d["trusted"].append(["x", "float32", [-1]]), "impossible shape"),
    "trusted rank": (lambda d: d["trusted"].append(["x", "float32", [1] * 9]), "impossible shape"),
    "trusted row": (lambda d: d["trusted"].append("x"), "describes a parameter wrongly"),
    "trusted too few": (lambda d: d["trusted"].pop() and None, "more values than its document names"),
    "dtypes more": (lambda d: d["trusted_dtypes"].append("int8"), "another number of tensors"),
    "dtypes wrong": (lambda d: d.update(trusted_dtypes=["float16"]), "of another dtype"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_a_bad_init_document_is_refused(tmp_path, name):
    change, words = BAD_DOCUMENTS[name]
    reply = {"tensors": init_reply(change)}
    with lying(tmp_path, lambda msg: {}, init=reply) as server, client_of(server) as client:
        with pytest.raises(ProtocolError, match=words):
            client.init()
        assert client.info is None


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([], "holds no document"),
        ([torch.zeros(4)], "holds no document"),
        ([torch.zeros(2, 2, dtype=torch.uint8)], "holds no document"),
        ([torch.zeros(model_info.MAX_DOCUMENT_BYTES + 1, dtype=torch.uint8)], "is over"),
    ],
)
def test_an_init_reply_without_a_document_is_refused(tensors, words):
    with pytest.raises(ProtocolError, match=words):
        model_info.unpack(tensors)


def test_trusted_parameters_over_the_cap_are_refused():
    document, _ = init_reply(lambda d: None)
    with pytest.raises(ProtocolError, match="trusted parameters are over"):
        model_info.unpack([document, torch.zeros(model_info.MAX_TRUSTED_BYTES // 4 + 1)])


def test_an_init_that_names_code_is_cleaned(tmp_path):
    def evil(document):
        document["config"]["auto_map"] = {"AutoConfig": "evil.Config"}
        document["config"]["nested"] = {"auto_map": 1, "kept": 2}
        document["generation_config"]["trust_remote_code"] = True

    reply = {"tensors": init_reply(evil)}
    with lying(tmp_path, lambda msg: {}, init=reply) as server, client_of(server) as client:
        info = client.init()
        assert "auto_map" not in info.config
        assert info.config["nested"] == {"kept": 2}
        assert "trust_remote_code" not in info.generation_config


def test_a_protection_sees_every_remote_linear(tmp_path):
    class Halving:
        name = "halving"

        def __init__(self):
            self.seen = []

        def conceal(self, site, index, h):
            self.seen.append((site.id, index))
            return h / 2, index

        def reveal(self, site, secret, outs):
            assert (site.id, secret) in self.seen
            return [2 * out for out in outs]

    model, protection = tiny_model(), Halving()
    with serving(model, tmp_path) as server, client_of(server, protection=protection) as client:
        h = torch.randn(1, HIDDEN)
        torch.testing.assert_close(client.lm_head(h), model.lm_head(h).detach())
        assert [len(out) for out in client.batch_linear(0, ["q_proj", "k_proj"], h)] == [1, 1]
        client.linear("lm_head", h)
        calls = [client.submit.lm_head(h * number) for number in (1, 2)]
        for number, call in zip((1, 2), calls, strict=True):
            torch.testing.assert_close(call.result(), number * model.lm_head(h).detach())
        assert client.stats["protection"] == "halving"
    ids = [number for number, _ in protection.seen]
    assert ids[0] == ids[3] == ids[4]
    assert len(set(ids)) == 3
    assert [index for _, index in protection.seen] == [0, 0, 0, 1, 2]


def test_client_options(tmp_path):
    with serving(tiny_model(), tmp_path) as server, GPUClient(server.endpoint, timeout=None) as client:
        assert client.ping() > 0
