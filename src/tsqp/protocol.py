"""The remote procedure calls: methods, status codes, limits, names of modules.

A call is one request message and one reply message that carry the same request id; the message's tag is the
method. Both ends use this module, so that the server's check of a request and the client's check of the reply
follow the same rules. Nothing here knows a transport.

==================  ====================================  ==========================  ====================
method              meta                                  tensors of the request      tensors of the reply
==================  ====================================  ==========================  ====================
INIT                -                                     -                           see ``model_info``
EMBEDDING           ``{"module": str, "dtype": str}``     ids int64 [..]              [.., out]
BATCH_LINEAR        ``{"layer": int, "modules": [str]}``  h [.., in]                  one [.., out_i] each
                    (without ``layer``: full names)
MATMUL              -                                     a, b as in torch.matmul     a @ b
LM_HEAD             -                                     h [.., in]                  [.., vocab]
ATTENTION_SCORES    ``{"layer": int, "keep": int,         q [B, H, Q, D],             [B, H, Q, S], or
                    "drop": int, "reorder": bool,         k, v [B, Hkv, N, D],        [B, H, Q, keys]
                    "keys": int}``,                       batch_index int64 [B]
                    all but ``layer`` optional            where ``reorder``
ATTENTION_VALUES    ``{"layer": int}``                    probs [B, H, Q, up to S]    [B, H, Q, D]
FUSED_ATTENTION,    ``{"layer": int, "slot": int, ...}``  h [B, N, hidden], more      [B, N, hidden]
FUSED_LAYER         see ``fused_requests``                (see ``fused_requests``)
FUSED_MLP           ``{"layer": int}``                    h [B, N, hidden]            [B, N, hidden]
DROP_CACHE, PING    -                                     -                           -
STATS               -                                     -                           - (numbers in meta)
==================  ====================================  ==========================  ====================

Floating tensors of one request have one wire dtype, and the reply has the same. An error reply has a status
other than OK, no tensors, and ``meta["error"]``: one sentence.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .errors import ConfigError


class Method(enum.IntEnum):
    """What a request asks for; the tag of its message. 16 and above are the fused operators."""

    INIT = 1
    EMBEDDING = 2
    BATCH_LINEAR = 3
    MATMUL = 4
    LM_HEAD = 5
    ATTENTION_SCORES = 6
    ATTENTION_VALUES = 7
    PING = 8
    STATS = 9
    DROP_CACHE = 10
    FUSED_ATTENTION = 16
    FUSED_MLP = 17
    FUSED_LAYER = 18


class Status(enum.IntEnum):
    """How a request went; the status of a reply, and ``RemoteError.code``."""

    OK = 0
    BAD_REQUEST = 1
    UNKNOWN_METHOD = 2
    UNKNOWN_MODULE = 3
    BAD_SHAPE = 4
    BAD_DTYPE = 5
    OUT_OF_MEMORY = 6
    LIMIT = 7
    INTERNAL = 8
    SHUTTING_DOWN = 9


#: Names of the methods in statistics.
METHOD_NAMES = {
    Method.INIT: "Init",
    Method.EMBEDDING: "Embedding",
    Method.BATCH_LINEAR: "BatchLinear",
    Method.MATMUL: "Matmul",
    Method.LM_HEAD: "LMHead",
    Method.ATTENTION_SCORES: "AttentionScores",
    Method.ATTENTION_VALUES: "AttentionValues",
    Method.PING: "Ping",
    Method.STATS: "Stats",
    Method.DROP_CACHE: "DropCache",
    Method.FUSED_ATTENTION: "FusedAttention",
    Method.FUSED_MLP: "FusedMLP",
    Method.FUSED_LAYER: "FusedLayer",
}
#: The operator (see ``telemetry``) whose time a method counts as.
METHOD_OPERATORS = {
    Method.EMBEDDING: "gpu_embedding",
    Method.BATCH_LINEAR: "gpu_linear",
    Method.MATMUL: "gpu_matmul",
    Method.LM_HEAD: "gpu_lm_head",
    Method.ATTENTION_SCORES: "gpu_matmul",
    Method.ATTENTION_VALUES: "gpu_matmul",
    Method.FUSED_ATTENTION: "gpu_fused_attention",
    Method.FUSED_MLP: "gpu_fused_mlp",
    Method.FUSED_LAYER: "gpu_fused_layer",
}
#: The dtypes activations may have on the wire, and a served model may have.
FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}

PROTECTION_LINE = "none — activations are visible to the GPU host"
MAX_MODULES_PER_CALL = 64
MAX_RANK = 8
#: Default cap on the tensors of one reply, in bytes.
MAX_REPLY_BYTES = 2 << 30
#: Default cap on the K and V kept for one client, in bytes.
MAX_KV_BYTES = 4 << 30
MAX_ERROR_CHARS = 500

_LAYER_NAME = re.compile(r"(.+?)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ModuleInfo:
    """One module of the served model that can be called by name.

    ``kind`` is ``linear`` or ``embedding``; for an embedding ``in_features`` is the number of its rows.
    """

    kind: str
    in_features: int
    out_features: int
    bias: bool = False


@dataclass(frozen=True)
class AttentionGeometry:
    """What the shapes of Q, K and V depend on: counts of layers, query heads and kv heads, and elements per head."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


def shown(value: object, limit: int = 80) -> str:
    """``repr`` of something a peer sent, cut to ``limit`` characters, for an error sentence."""
    if isinstance(value, (str, bytes)):
        value = value[:limit]
    elif not isinstance(value, (int, float, bool, type(None))):
        return f"a {type(value).__name__}"
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class ModuleTable:
    """The modules that may be named in a request, by full name and by layer.

    The layers are the numbered children ``0 .. layer_count-1`` of one container (``model.layers`` in most
    families). Within a layer a module has its relative name (``self_attn.q_proj``) and, where no other module
    of the layer ends in the same word, that last word alone (``q_proj``).
    """

    def __init__(self, modules: Mapping[str, ModuleInfo], layer_count: int) -> None:
        self.modules = dict(modules)
        self.layer_count = layer_count
        self._layers = _names_by_layer(self.modules, layer_count)

    def resolve(self, names: Sequence[object], layer: object = None) -> tuple[str, ...]:
        """Full names of linear modules: ``names`` are relative to ``layer``, or full names where it is None.

        Raises :class:`ConfigError` naming what does not exist. ``names`` and ``layer`` may come from a peer.
        """
        if layer is None:
            return tuple(self._linear(name, name) for name in names)
        self.check_layer(layer)
        known = self._layers.get(layer, {})  # type: ignore[call-overload]
        full = []
        for name in names:
            target = known.get(name) if isinstance(name, str) else None
            if target is None:
                choices = ", ".join(sorted(rel for rel in known if "." in rel)) or "no linear modules"
                raise ConfigError(f"layer {layer} has no module {shown(name)}; it has {choices}")
            full.append(self._linear(target, name))
        return tuple(full)

    def check_layer(self, layer: object) -> None:
        """Raises :class:`ConfigError` unless ``layer`` is a layer's number."""
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < self.layer_count:
            raise ConfigError(f"layer {shown(layer)} does not exist; the model has layers 0 to {self.layer_count - 1}")

    def embedding(self, name: object) -> str:
        """``name`` if it is an embedding's full name; raises :class:`ConfigError` otherwise."""
        info = self.modules.get(name) if isinstance(name, str) else None
        if info is None or info.kind != "embedding":
            raise ConfigError(f"the model has no embedding {shown(name)}")
        return name  # type: ignore[return-value]

    def _linear(self, full: object, asked: object) -> str:
        info = self.modules.get(full) if isinstance(full, str) else None
        if info is None:
            raise ConfigError(f"the model has no module {shown(asked)}; give the full name of a linear module")
        if info.kind != "linear":
            raise ConfigError(f"module {shown(asked)} is an {info.kind}, not a linear module")
        return full  # type: ignore[return-value]


def _names_by_layer(modules: Iterable[str], layer_count: int) -> dict[int, dict[str, str]]:
    """Per layer: relative name or unique last word -> full name, for the container that holds all layers."""
    containers: dict[str, dict[int, dict[str, str]]] = {}
    for full in modules:
        match = _LAYER_NAME.fullmatch(full)
        if match and int(match[2]) < layer_count:
            containers.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = full
    if not containers:
        return {}
    layers = max(containers.values(), key=lambda found: sum(map(len, found.values())))
    for names in layers.values():
        by_word: dict[str, list[str]] = {}
        for relative, full in names.items():
            by_word.setdefault(relative.rpartition(".")[2], []).append(full)
        for word, found in by_word.items():
            if len(found) == 1:
                names.setdefault(word, found[0])
    return layers


def broadcast_shape(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The common shape of ``a`` and ``b`` by the usual rules; raises :class:`ConfigError` where there is none."""
    rank = max(len(a), len(b))
    left, right = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
    shape = []
    for x, y in zip(left, right, strict=True):
        if x != y and 1 not in (x, y):
            raise ConfigError(f"batch dimensions {list(a)} and {list(b)} do not broadcast")
        shape.append(y if x == 1 else x)
    return tuple(shape)


def matmul_shape(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """Shape of ``torch.matmul`` of shapes ``a`` and ``b``; raises :class:`ConfigError` if they do not fit."""
    if not a or not b:
        raise ConfigError("matmul takes tensors of at least one dimension, not a scalar")
    inner = b[-2] if len(b) > 1 else b[0]
    if a[-1] != inner:
        raise ConfigError(f"matmul of shapes {list(a)} and {list(b)}: inner dimensions {a[-1]} and {inner} differ")
    return broadcast_shape(a[:-2], b[:-2]) + tuple(a[-2:-1]) + (tuple(b[-1:]) if len(b) > 1 else ())


def matmul_elements(a: Sequence[int], b: Sequence[int], result: Sequence[int]) -> int:
    """The most elements any tensor of the computation has: the result, or an operand expanded to the result's
    batch.

    An expanded operand may be materialised by the library, and can be far larger than result and operands
    alike.
    """
    batch = math.prod(broadcast_shape(a[:-2], b[:-2]))
    return max(math.prod(result), batch * math.prod(a[-2:]), batch * math.prod(b[-2:]))
