"""What the RPC tests share: a tiny model, a server of it, raw requests, a server that lies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from patience import PATIENCE_S, until  # noqa: F401 (until is for those who import this)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tsqp
from tsqp import errors, model_info
from tsqp.client import GPUClient
from tsqp.loading import load_model
from tsqp.protocol import Method
from tsqp.server import GPUServer

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 2, 4, 2, 16, 256
#: Small slots, so that the tests also send what does not fit one.
GEOMETRY = {"max_chunk_bytes": 1 << 18, "max_chunks": 4}


def tiny_model(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A random LLaMA of 2 layers, hidden 64, 4 heads, 2 kv heads, vocabulary 256, always the same."""
    settings = {
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        **changes,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()


def endpoint_in(directory: Any) -> str:
    return f"ipc://{directory}/rpc.sock"


def server_of(model: Any, endpoint: str, **options: Any) -> GPUServer:
    return GPUServer(model, endpoint, **{**GEOMETRY, **options})


@contextmanager
def serving(model: Any, directory: Any, **options: Any) -> Iterator[GPUServer]:
    """A server of ``model`` in a background thread."""
    with server_of(model, endpoint_in(directory), **options) as server:
        yield server


def client_of(server: GPUServer, **options: Any) -> GPUClient:
    return GPUClient(server.endpoint, **{"timeout": PATIENCE_S, **options})


def ask(channel: Any, tag: int, tensors: Any = (), meta: Any = None, request_id: int = 1) -> Any:
    """Sends a raw request and returns the raw reply."""
    channel.send(tensors, tag=tag, meta=meta, request_id=request_id, timeout=PATIENCE_S)
    return channel.recv(timeout=PATIENCE_S)


class Gated(nn.Linear):
    """An LM head that waits for its gate, and notes how many rows each input has."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, VOCAB, bias=False)
        self.gate, self.entered = threading.Event(), threading.Event()
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        self.rows.append(x.shape[0])
        return super().forward(x)


def gated_model() -> LlamaForCausalLM:
    """:func:`tiny_model` with a :class:`Gated` LM head."""
    model = tiny_model()
    model.lm_head = Gated()
    return model


def run_all(*targets: Callable[[], object]) -> None:
    """Runs each in a thread of its own; raises what the first of them raised."""
    faults: list[BaseException] = []

    def guarded(target: Callable[[], object]) -> None:
        try:
            target()
        except BaseException as error:  # noqa: BLE001 - raised by the test's own thread
            faults.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


class LyingServer:
    """Answers requests with whatever ``reply(msg)`` returns: keyword arguments of ``Channel.send``, or
    several.

    Init is answered truthfully unless ``reply`` returns something for it.
    """

    def __init__(self, endpoint: str, reply: Callable[[Any], Any]) -> None:
        self.endpoint = endpoint
        self._reply = reply
        self._truth = model_info.pack(load_model(tiny_model()).info)
        self._listener = tsqp.listen(endpoint, **GEOMETRY)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="lying-server")
        self._thread.start()

    def _run(self) -> None:
        channels: list[Any] = []
        try:
            while not self._stopping:
                while (channel := self._listener.accept_nowait()) is not None:
                    channels.append(channel)
                for ready in self._listener.wait(0.05):
                    try:
                        self._answer(ready, ready.recv(timeout=PATIENCE_S))
                    except (errors.ClosedError, errors.PeerDiedError):
                        channels.remove(ready)
                        ready.close()
        finally:
            for channel in channels:
                channel.close()
            self._listener.close()

    def _answer(self, channel: Any, msg: Any) -> None:
        replies = self._reply(msg)
        if replies is None:
            assert msg.tag == Method.INIT
            replies = {"tensors": self._truth}
        for reply in replies if isinstance(replies, list) else [replies]:
            fields = {"tag": msg.tag, "request_id": msg.request_id, "timeout": PATIENCE_S, **reply}
            channel.send(fields.pop("tensors", ()), **fields)

    def __enter__(self) -> LyingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()
