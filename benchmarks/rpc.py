"""Round trips of a remote linear call whose server computes nothing: q, k and v of one token, 2048 wide."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import nn

import tsqp

from . import machine
from .peers import Peer, WrongAnswerError, shm_shortage, started, taking_turn
from .peers_tsqp import CONNECT_S, DEFAULT_CHUNK_BYTES, DEFAULT_CHUNKS, END, Tsqp
from .report import Samples, figure
from .setting import Setting, in_turn, no_garbage_collection, timed_calls

HIDDEN, HEADS, KV_HEADS = 2048, 32, 8
NAMES = ("q_proj", "k_proj", "v_proj")
OUTS = (HIDDEN, HIDDEN * KV_HEADS // HEADS, HIDDEN * KV_HEADS // HEADS)
ROUNDS = 8
SECONDS_PER_TURN = 0.4
WARMUP_S = 0.05


def stub_model(dtype: torch.dtype) -> nn.Module:
    """A LLaMA of one layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def compute_nothing(server: tsqp.GPUServer, dtype: torch.dtype, begun: Callable[[], None] | None = None) -> None:
    """In the place where the server calls ``F.linear`` for q, k and v, results of one token that are there already.

    ``begun`` is called where the first of them would be computed.
    """
    for name, module in server._served.modules.items():
        if name.rpartition(".")[2] in NAMES:
            result = torch.randn(1, 1, module.info.out_features, dtype=dtype)
            module.call = lambda x, result=result: result
            if begun is not None and name.endswith(NAMES[0]):
                module.call = lambda x, result=result, begun=begun: begun() or result


class RpcPeer(Peer):
    """A :class:`tsqp.GPUServer` of :func:`stub_model` and a :class:`tsqp.GPUClient`, in float32."""

    key = "rpc-float32"
    title = "batch_linear, float32"
    dtype = torch.float32

    @classmethod
    def unavailable(cls) -> str | None:
        return shm_shortage(2 * DEFAULT_CHUNKS * DEFAULT_CHUNK_BYTES)

    def address(self) -> Any:
        self._mine, self._theirs = multiprocessing.Pipe()
        self.stack.callback(self._mine.close)
        return super().address(), self.dtype, self._theirs

    def started(self) -> None:
        self._theirs.close()

    @staticmethod
    def serve(address: Any, ready: Callable[[], None], begun: Callable[[], None] | None = None) -> None:
        endpoint, dtype, orders = address
        server = tsqp.GPUServer(stub_model(dtype), endpoint, device="cpu")
        compute_nothing(server, dtype, begun)
        with server.start():
            ready()
            machine.pin_beside_me("tsqp-server")  # not the I/O thread: it stays free, as with the other peers
            orders.poll(None)  # until the client says so, or is gone

    def connect(self, address: Any) -> None:
        self._client = self.stack.enter_context(tsqp.GPUClient(address[0], connect_timeout=CONNECT_S))
        self._client.init()  # now the server has accepted, and may be stopped
        self._h = torch.randn(1, 1, HIDDEN, dtype=self.dtype)

    def call(self) -> list[torch.Tensor]:
        """One round trip: a token's hidden state there, its q, k and v back."""
        return self._client.batch_linear(0, NAMES, self._h)

    def send_end(self) -> None:
        self._mine.send("end")


class RpcHalf(RpcPeer):
    """The same in bfloat16."""

    key = "rpc-bfloat16"
    title = "batch_linear, bfloat16"
    dtype = torch.bfloat16


class BareChannel(Tsqp):
    """The same tensors as :class:`RpcPeer`'s over a channel, without methods, modules or checks of them."""

    key = "channel-float32"
    title = "the same tensors over a bare channel"

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        replies = [torch.randn(1, 1, out) for out in OUTS]
        with tsqp.listen(address[0]) as listener:
            ready()
            channel = listener.accept(timeout=CONNECT_S)
            while True:
                with channel.lease() as message:
                    if message.tag == END:
                        return
                    channel.send(replies)

    def connect(self, address: Any) -> None:
        super().connect(address)
        self._h = torch.randn(1, 1, HIDDEN)

    def call(self) -> list[torch.Tensor]:
        """One round trip."""
        self.channel.send([self._h])
        return self.channel.recv().tensors


CONTESTANTS = (RpcPeer, RpcHalf, BareChannel)


def check(peer: Any) -> None:
    """Raises WrongAnswerError unless the results have the shapes of q, k and v."""
    shapes = [tuple(result.shape) for result in peer.call()]
    if shapes != [(1, 1, out) for out in OUTS]:
        raise WrongAnswerError(f"{peer.title} returned tensors of shapes {shapes}")


def run(setting: Setting) -> dict[str, Any]:
    samples = {peer.key: Samples() for peer in CONTESTANTS}
    seconds = setting.seconds(SECONDS_PER_TURN)
    with started(CONTESTANTS, setting.server_core) as peers, setting.pinned():
        for running in peers:
            with taking_turn(running) as peer:
                check(peer)
        with setting.part(ROUNDS * len(peers)):
            for running in in_turn(peers, ROUNDS):
                setting.step(running.peer.title)
                with taking_turn(running) as peer, no_garbage_collection():
                    timed_calls(peer.call, setting.seconds(WARMUP_S), [])
                    timed_calls(peer.call, seconds, samples[peer.key].turn())
    return {
        "outputs": OUTS,
        "titles": {peer.key: peer.title for peer in CONTESTANTS},
        "round_trips": {key: found.as_json() for key, found in samples.items()},
    }


def tables(result: dict[str, Any]) -> list[Table]:
    title = f"Round trip of one token of {HIDDEN} to {len(OUTS)} outputs {OUTS}, server computing nothing, µs"
    table = Table(title=title, title_justify="left")
    for column in ("", "median", "p99"):
        table.add_column(column, justify="left" if not column else "right")
    for key, found in result["round_trips"].items():
        table.add_row(result["titles"][key], figure(found["median_us"]), figure(found["p99_us"]))
    return [table]
