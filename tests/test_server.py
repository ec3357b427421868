"""Loading checkpoints, starting and stopping, signals, statistics of the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from rpc_support import (
    GEOMETRY,
    HIDDEN,
    PATIENCE_S,
    VOCAB,
    client_of,
    endpoint_in,
    server_of,
    serving,
    tiny_model,
    until,
)
from torch import nn

from tsqp.client import GPUClient
from tsqp.errors import (
    ClosedError,
    ConfigError,
    EndpointBusyError,
    EndpointError,
    ModelError,
    ModelNotFoundError,
    PeerDiedError,
    RemoteError,
    UnplacedParameterError,
)
from tsqp.protocol import Status
from tsqp.server import GPUServer

H = torch.zeros(2, HIDDEN)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint"
    tiny_model().save_pretrained(path)
    return path


# --- loading
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_a_checkpoint_is_served_in_the_dtype_asked_for(checkpoint, tmp_path, dtype):
    lines: list[str] = []
    with (
        serving(checkpoint, tmp_path, dtype=dtype, device="cpu", progress=lines.append) as server,
        client_of(server) as client,
    ):
        assert client.init().dtype == ("float32" if dtype == "auto" else dtype)
        ids = torch.arange(4)
        expected = tiny_model().model.embed_tokens(ids).detach()
        torch.testing.assert_close(client.embedding(ids).float(), expected, rtol=2**-8, atol=0)
    assert len(lines) == 3
    assert str(checkpoint) in lines[0]


def test_auto_is_the_checkpoints_own_dtype(tmp_path):
    path = tmp_path / "half"
    tiny_model(torch.float16).save_pretrained(path)
    with serving(path, tmp_path, device="cpu") as server, client_of(server) as client:
        assert client.init().dtype == "float16"


def test_a_tied_checkpoint_has_its_lm_head(tmp_path):
    path = tmp_path / "tied"
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(path)
    with serving(path, tmp_path, device="cpu") as server, client_of(server) as client:
        assert client.init().tied
        h = torch.randn(1, HIDDEN)
        torch.testing.assert_close(client.lm_head(h), model.lm_head(h).detach())


def test_paths_without_a_checkpoint(tmp_path):
    endpoint = endpoint_in(tmp_path)
    with pytest.raises(ModelNotFoundError, match="nowhere does not exist; give the directory"):
        GPUServer(tmp_path / "nowhere", endpoint)
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
        GPUServer(str(tmp_path), endpoint)


def test_a_checkpoint_without_weights(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="can't be loaded") as caught:
        GPUServer(checkpoint, endpoint_in(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept_bytes", [0, 5, 1000])
def test_a_checkpoint_with_cut_weights(checkpoint, tmp_path, kept_bytes):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept_bytes])
    with pytest.raises(ModelError, match="can't be loaded") as caught:
        GPUServer(checkpoint, endpoint_in(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_lacks_tensors_names_them(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = checkpoint / "model.safetensors"
    state = load_file(weights)
    del state["model.layers.1.self_attn.q_proj.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights for model\.layers\.1\.self_attn\.q_proj\.weight"):
        GPUServer(checkpoint, endpoint_in(tmp_path))


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-family"}', "[]"])
def test_a_config_that_is_none(checkpoint, tmp_path, text):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ModelError, match="can't be loaded"):
        GPUServer(checkpoint, endpoint_in(tmp_path))


def test_code_in_a_checkpoint_is_not_run(checkpoint, tmp_path):
    config = (checkpoint / "config.json").read_text().replace('"llama"', '"mine"')
    config = config.replace("{", '{"auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},', 1)
    (checkpoint / "config.json").write_text(config)
    (checkpoint / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        GPUServer(checkpoint, endpoint_in(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_large_parameters_nobody_would_hold_are_refused_by_name(tmp_path):
    model = tiny_model()
    model.experts = nn.Parameter(torch.zeros(5 << 20))
    with pytest.raises(UnplacedParameterError, match="the largest are experts"):
        GPUServer(model, endpoint_in(tmp_path))


def test_weights_no_one_can_serve_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"torch\.float64"):
        GPUServer(tiny_model(torch.float64), endpoint_in(tmp_path))
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(ModelError, match="meta device"):
        GPUServer(model, endpoint_in(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"device": "warp:9"}, "device 'warp:9'"),
        ({"threads": 0}, "threads=0"),
        ({"max_clients": 0}, "max_clients=0"),
        ({"kv_limit_bytes": -1}, "kv_limit_bytes=-1"),
    ],
)
def test_options_that_can_not_work(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        GPUServer(tiny_model(), endpoint_in(tmp_path), **options)


def test_a_bad_endpoint_is_told_before_loading(tmp_path):
    with pytest.raises(EndpointError):
        GPUServer(tmp_path / "nowhere", "http://localhost")


# --- starting and stopping
# -----------------------------------------------------------------------------------


def test_start_stop_and_again(tmp_path):
    model = tiny_model()
    server = server_of(model, endpoint_in(tmp_path))
    for _ in range(2):
        assert server.start() is server
        with pytest.raises(ConfigError, match="running already"):
            server.start()
        with client_of(server) as client:
            torch.testing.assert_close(client.lm_head(H), model.lm_head(H).detach())
        server.stop()
        server.stop()
    assert server.stats["clients_seen"] == 2


def test_a_busy_endpoint(tmp_path):
    with serving(tiny_model(), tmp_path) as server:
        with pytest.raises(EndpointBusyError):
            server_of(tiny_model(), server.endpoint).start()
        with client_of(server) as client:
            assert client.ping() > 0


def test_the_default_directory_is_made_and_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("LLAMA_IPC_PATH", raising=False)
    with GPUServer(tiny_model(), **GEOMETRY) as server:
        assert server.endpoint == f"ipc://{tmp_path}/tsqp/server.sock"
        assert (tmp_path / "tsqp").stat().st_mode & 0o777 == 0o700
        with GPUClient() as client:
            assert client.ping() > 0
    (tmp_path / "tsqp").chmod(0o777)
    with pytest.raises(EndpointError, match="mode 0700"):
        GPUServer(tiny_model(), **GEOMETRY).start()


def test_tcp_with_any_port(tmp_path):
    model = tiny_model()
    with server_of(model, "tcp://127.0.0.1:0") as server:
        assert not server.endpoint.endswith(":0")
        for shm in (True, False):
            with client_of(server, shm=shm) as client:
                torch.testing.assert_close(client.lm_head(H), model.lm_head(H).detach())
                assert client.stats["transport"] == ("shm+tcp" if shm else "tcp")
                assert (client.stats["zmq_transfers"] == 0) is shm


def test_stop_from_another_thread_ends_serve_and_prints(tmp_path, capsys):
    server = server_of(tiny_model(), endpoint_in(tmp_path))
    thread = threading.Thread(target=server.serve)
    thread.start()
    until((tmp_path / "rpc.sock").exists)
    with client_of(server) as client:
        client.lm_head(H)
        server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    out = capsys.readouterr().out
    assert "LMHead" in out
    assert "shared memory" in out
    assert "gpu_lm_head" in out


def test_stopping_ends_the_clients_and_the_endpoint(tmp_path):
    server = server_of(tiny_model(), endpoint_in(tmp_path)).start()
    with client_of(server, timeout=5.0) as client:
        client.ping()
        server.stop()
        with pytest.raises((ClosedError, PeerDiedError)):
            client.ping()
    assert not (tmp_path / "rpc.sock").exists()
    assert server.stats["clients"] == 0


def test_stop_finishes_the_request_in_hand_and_refuses_the_next(tmp_path):
    entered, gate = threading.Event(), threading.Event()

    class Slow(nn.Linear):
        def forward(self, x):
            entered.set()
            assert gate.wait(PATIENCE_S)
            return super().forward(x)

    model = tiny_model()
    model.lm_head = Slow(HIDDEN, VOCAB, bias=False)
    server = server_of(model, endpoint_in(tmp_path)).start()
    outcomes: dict[str, object] = {}
    with client_of(server) as first, client_of(server) as second:
        first.init()
        second.init()

        def work(name, call):
            try:
                outcomes[name] = call()
            except (RemoteError, ClosedError) as error:
                outcomes[name] = error

        one = threading.Thread(target=work, args=("in hand", lambda: first.lm_head(H)))
        one.start()
        assert entered.wait(PATIENCE_S)
        two = threading.Thread(target=work, args=("waiting", second.ping))
        two.start()
        until(lambda: second._channel.stats["sent_messages"] == 2)
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        until(lambda: server._stopping)
        gate.set()
        for thread in (one, two, stopper):
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
    assert isinstance(outcomes["in hand"], torch.Tensor)
    assert isinstance(outcomes["waiting"], RemoteError)
    assert outcomes["waiting"].code == Status.SHUTTING_DOWN


LEAVE = """
import os, signal, sys, tsqp
channel = tsqp.connect(sys.argv[1], timeout=10.0)
for number in range(1, 6):
    try:
        channel.send((), tag=8, request_id=number, timeout=0.5)
    except tsqp.errors.WaitTimeoutError:
        break
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
channel.close()
"""


def test_a_signal_that_comes_at_once_ends_the_server(tmp_path, monkeypatch):
    """Before it has begun to open."""

    @contextmanager
    def at_once(request):
        request()
        yield

    monkeypatch.setattr("tsqp.server.stop_signals", at_once)
    server = server_of(tiny_model(), endpoint_in(tmp_path))
    server.serve()
    assert server.stats["clients"] == 0
    with server, client_of(server) as client:  # and it can be started afterwards
        assert client.ping() > 0


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_a_client_that_is_gone_with_a_full_ring_is_forgotten(tmp_path, how):
    with serving(tiny_model(), tmp_path) as server:
        subprocess.run([sys.executable, "-c", LEAVE, server.endpoint, how], timeout=PATIENCE_S, check=False)
        until(lambda: server.stats["clients_seen"] == 1)
        until(lambda: server.stats["clients"] == 0)
        with client_of(server) as client:
            assert client.ping() > 0


def test_threads_are_set_in_the_serving_thread_only(tmp_path):
    here = torch.get_num_threads()
    counts: list[int] = []

    class Counting(nn.Linear):
        def forward(self, x):
            counts.append(torch.get_num_threads())
            return super().forward(x)

    model = tiny_model()
    model.lm_head = Counting(HIDDEN, VOCAB, bias=False)
    with serving(model, tmp_path, threads=2) as server, client_of(server) as client:
        client.lm_head(H)
    assert counts == [2]
    assert torch.get_num_threads() == here


SERVE = """
import sys, torch
torch.set_num_threads(1)
from tsqp.server import GPUServer
server = GPUServer(sys.argv[1], sys.argv[2], device="cpu", max_chunk_bytes=int(sys.argv[3]), max_chunks=4)
print("ready", flush=True)
server.serve()
print("end", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_server_in_order(checkpoint, tmp_path, number):
    endpoint = endpoint_in(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(checkpoint), endpoint, str(GEOMETRY["max_chunk_bytes"])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", "COLUMNS": "120"},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        until((tmp_path / "rpc.sock").exists)
        with GPUClient(endpoint, timeout=PATIENCE_S) as client:
            client.lm_head(H)
            process.send_signal(number)
            out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert out.endswith("end\n")
    assert "gpu_lm_head" in out
    assert "transfers per carrier" in out
    assert "Traceback" not in err
    assert not (tmp_path / "rpc.sock").exists()


# --- statistics
# ----------------------------------------------------------------------------------------------


def test_statistics_of_both_ends_agree(tmp_path):
    with serving(tiny_model(), tmp_path) as server:
        with client_of(server) as client:
            client.embedding(torch.arange(3))
            for _ in range(3):
                client.batch_linear(0, ["q_proj", "k_proj"], H)
            client.matmul(H, H.t())
            client.lm_head(H)
            with pytest.raises(RemoteError):
                client.lm_head(torch.zeros(1, 3))
            mine = client.stats
            until(lambda: server.stats["received_messages"] == mine["sent_messages"])
            theirs = server.stats
        assert mine["calls"] == {"Init": 1, "Embedding": 1, "BatchLinear": 3, "Matmul": 1, "LMHead": 2}
        assert theirs["calls"] == {**mine["calls"], "LMHead": 1}  # the refused one is among the errors
        assert (mine["errors"], theirs["errors"]) == (1, 1)
        assert mine["round_trips"] == 8
        assert mine["transport"] == theirs["transport"]
        assert mine["sent_bytes"] == theirs["received_bytes"]
        assert mine["received_bytes"] == theirs["sent_bytes"]
        assert mine["shm_transfers"] + mine["zmq_transfers"] == 16
        assert mine["shm_bytes"] + mine["zmq_bytes"] == mine["sent_bytes"] + mine["received_bytes"]
        assert set(theirs["operators"]) == {"gpu_embedding", "gpu_linear", "gpu_matmul", "gpu_lm_head"}
        for name, row in theirs["operators"].items():
            assert 0 < row["seconds"] <= mine["operators"][name]["seconds"]
        assert theirs["protection"].startswith("none")
        until(lambda: server.stats["clients"] == 0)
        for key in ("received_messages", "sent_messages", "shm_bytes", "zmq_bytes"):
            assert server.stats[key] == theirs[key]  # what a client moved is counted after it left, too


def test_print_stats(tmp_path, capsys):
    with serving(tiny_model(), tmp_path) as server, client_of(server) as client:
        client.lm_head(H)
        until(lambda: server.stats["calls"].get("LMHead") == 1)  # counted once the reply is sent
        client.print_stats()
        server.print_stats()
    out = capsys.readouterr().out
    assert "tsqp runner" in out
    assert "tsqp server" in out
    assert out.count("LMHead") == 2
