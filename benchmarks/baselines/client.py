"""The runner's end of a baseline: a client, stand-ins for the heavy modules that call it, and such an attention.

Nothing of :mod:`tsqp.split` is used, so that what it learns to do (tiles, calls in flight together, its own operators)
does not change what is compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zmq
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tsqp import building, model_info
from tsqp.model_info import InitInfo
from tsqp.placement import SIBLINGS
from tsqp.remote import SiblingGroup
from tsqp.telemetry import Telemetry

from .wires import Wire, client_wire

#: The name under which transformers knows the baselines' attention.
ATTENTION_NAME = "benchmarks_matmul"
_ATTRIBUTE = "baseline_client"
_TIMEOUT_MS = 300_000


class BaselineError(RuntimeError):
    """The baseline's server answered with an error."""


class BaselineClient:
    """Every method is one request and its reply."""

    def __init__(self, key: str, address: tuple[Any, ...]) -> None:
        self.telemetry = Telemetry()
        self.round_trips = 0
        self._calls_ns = 0
        self._context = zmq.Context()
        socket = self._context.socket(zmq.REQ)
        socket.setsockopt(zmq.RCVTIMEO, _TIMEOUT_MS)
        self._wire: Wire = client_wire(key, address, socket)

    def init(self) -> InitInfo:
        """The description of the served model."""
        return model_info.unpack(self._ask("init", (), None))

    def modules(self, operator: str, names: Sequence[str], x: Tensor) -> list[Tensor]:
        """``x`` through each of the served modules of these full names."""
        return self._ask("modules", (x,), operator, names=list(names))

    def module(self, operator: str, name: str, x: Tensor) -> Tensor:
        """``x`` through one of them."""
        return self.modules(operator, (name,), x)[0]

    def matmul(self, a: Tensor, b: Tensor, transposed: bool = False) -> Tensor:
        """``a @ b``, or ``a @ b.mT``; both travel whole."""
        return self._ask("matmul", (a, b), "gpu_matmul", transposed=transposed)[0]

    def _ask(self, method: str, tensors: Sequence[Tensor], operator: str | None, **more: Any) -> list[Tensor]:
        begin = time.perf_counter_ns()
        self._wire.send({"method": method, **more}, tensors)
        head, replies = self._wire.recv()
        if "error" in head:
            raise BaselineError(f"the baseline's server could not answer {method}: {head['error']}")
        self.round_trips += 1
        if operator is not None:
            spent = time.perf_counter_ns() - begin
            self._calls_ns += spent
            self.telemetry.add(operator, spent, head["compute_ns"])
        return replies

    @property
    def stats(self) -> dict[str, Any]:
        """As :attr:`tsqp.GPUClient.stats`, as far as the benchmark looks at it."""
        names = ("shm_transfers", "shm_bytes", "zmq_transfers", "zmq_bytes")
        counters = {name: getattr(self._wire, name) for name in names}
        busy = {"busy_seconds": self._calls_ns / 1e9}
        return {"round_trips": self.round_trips, **counters, **busy, **self.telemetry.snapshot()}

    def close(self) -> None:
        self._wire.close()
        self._context.term()


class Remote(nn.Module):
    """Stands for a module of the server."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._call = call

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)


def connect(key: str, address: tuple[str, Path, Path] | tuple[str]) -> Any:
    """A split transformers model over the baseline ``key``, with ``tsqp_client`` and ``close()``."""
    client = BaselineClient(key, address)
    try:
        info = client.init()
        model: Any = building.build_skeleton(None, info, info.torch_dtype, ATTENTION_NAME)
        _place(model, client, info.lm_head)
        building.fill_trusted(model, info.trusted)
        building.remake_computed(model)
        building.refuse_unusable(model)
    except BaseException:
        client.close()
        raise
    model.tsqp_client, model.close = client, client.close
    return model


def _place(model: nn.Module, client: BaselineClient, lm_head: str) -> None:
    """Puts stand-ins in the place of embeddings and linear modules; siblings share a call."""
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    heavy = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    for name, module in heavy.items():
        parent, _, leaf = name.rpartition(".")
        family = [f"{parent}.{other}" for group in SIBLINGS if leaf in group for other in group]
        if name in calls:
            pass  # with its siblings
        elif isinstance(module, nn.Embedding) or name == lm_head:
            calls[name] = partial(client.module, "gpu_lm_head" if name == lm_head else "gpu_embedding", name)
        elif family:
            siblings = SiblingGroup(family, partial(client.modules, "gpu_linear", family))
            calls.update({member: partial(siblings.take, member) for member in family})
        else:
            calls[name] = partial(client.module, "gpu_linear", name)
        model.get_submodule(parent)._modules[leaf] = Remote(calls[name])
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "num_key_value_groups"):
            setattr(module, _ATTRIBUTE, client)


def matmul_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention, its two matmuls asked of the server.

    ``query`` is [B, H, Q, D], ``key`` and ``value`` [B, Hkv, S, D]; returns [B, Q, H, D] and the probabilities
    [B, H, Q, S]. The queries of the heads that share a kv head are stacked, which spares repeating K and V.
    """
    client: BaselineClient = getattr(module, _ATTRIBUTE)
    batch, heads, queries, dim = query.shape
    stacked = (batch, key.shape[1], heads // key.shape[1] * queries)
    scores = client.matmul(query.reshape(*stacked, dim), key, transposed=True).view(batch, heads, queries, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, :, : key.shape[2]]
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    out = client.matmul(probs.reshape(*stacked, -1), value).view(batch, heads, queries, dim)
    return out.transpose(1, 2).contiguous(), probs


def _mask(*args: Any, **kwargs: Any) -> Tensor:
    """transformers' eager mask, never left out."""
    kwargs["allow_is_bidirectional_skip"] = False
    return eager_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION_NAME, matmul_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)
