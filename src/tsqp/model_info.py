"""The reply to Init: what the runner has to know of the served model, packed by the server, checked by the
runner.

The reply's first tensor is a JSON document as uint8 (a message's meta is too small for the module names of a
large model); then follows one flat tensor per dtype with the trusted parameters one after the other, since a
message holds fewer tensors than a large model has norms. JSON because it carries no code and no types beyond
its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ProtocolError
from .layout import ATTENTION_IMPLEMENTATIONS, NOT_FUSED, FusedLayout, FusedModule
from .protocol import FLOAT_DTYPES, MAX_RANK, AttentionGeometry, ModuleInfo, ModuleTable

MAX_DOCUMENT_BYTES = 16 << 20
#: Cap on the parameters that travel to the runner, in bytes over all of them.
MAX_TRUSTED_BYTES = 16 << 20
#: dtypes a trusted parameter or buffer may have.
TRUSTED_DTYPES = {
    **FLOAT_DTYPES,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
TRUSTED_NAMES = {dtype: name for name, dtype in TRUSTED_DTYPES.items()}
_MAX_NAME_CHARS = 256
#: How deep a config may be nested: far below what ends in a RecursionError wherever it is copied or compared.
_MAX_DEPTH = 32
_MAX_MODULES = 1 << 20
_MAX_FEATURES = 1 << 31
_MAX_LAYERS = 1 << 16
#: Config entries that name code or the server's paths: never sent, never believed.
PRIVATE_CONFIG_KEYS = ("auto_map", "custom_pipelines", "_name_or_path", "trust_remote_code")


@dataclass(frozen=True)
class InitInfo:
    """What :meth:`GPUClient.init` returns; every field was checked.

    ``config`` and ``generation_config`` are ``to_dict()`` of transformers' own, without entries that name
    code. ``dtype`` is the served model's dtype by name. ``trusted`` maps the names of norm weights and of
    every other parameter or persistent buffer no linear or embedding module owns to private tensors.
    ``modules`` maps the full names of the modules that may be called to :class:`ModuleInfo`; ``embedding``
    and ``lm_head`` are the names of the model's own input and output embedding ("" where it has none).
    ``tied``: these two share their weight. ``server``: versions, device and protection line of the server,
    each a string. ``fused``: what the server can run whole.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    dtype: str
    trusted: dict[str, torch.Tensor]
    modules: dict[str, ModuleInfo]
    embedding: str
    lm_head: str
    tied: bool
    geometry: AttentionGeometry
    server: dict[str, str]
    fused: FusedLayout = NOT_FUSED

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch knows it."""
        return FLOAT_DTYPES[self.dtype]

    def table(self) -> ModuleTable:
        """The modules by full name and by layer."""
        return ModuleTable(self.modules, self.geometry.layers)


def pack(info: InitInfo) -> list[torch.Tensor]:
    """The tensors of the Init reply."""
    by_dtype: dict[str, list[torch.Tensor]] = {}
    trusted = []
    for name, tensor in info.trusted.items():
        dtype = TRUSTED_NAMES[tensor.dtype]
        by_dtype.setdefault(dtype, []).append(tensor.detach().reshape(-1).cpu())
        trusted.append([name, dtype, list(tensor.shape)])
    document = {
        "config": info.config,
        "generation_config": info.generation_config,
        "dtype": info.dtype,
        "trusted": trusted,
        "trusted_dtypes": list(by_dtype),
        "modules": {n: [m.kind, m.in_features, m.out_features, m.bias] for n, m in info.modules.items()},
        "embedding": info.embedding,
        "lm_head": info.lm_head,
        "tied": info.tied,
        "geometry": [
            info.geometry.layers,
            info.geometry.heads,
            info.geometry.kv_heads,
            info.geometry.head_dim,
        ],
        "server": info.server,
        "fused": _pack_fused(info.fused),
    }
    text = bytearray(json.dumps(document).encode())
    return [torch.frombuffer(text, dtype=torch.uint8), *(torch.cat(parts) for parts in by_dtype.values())]


def unpack(tensors: Sequence[torch.Tensor]) -> InitInfo:
    """Checks and unpacks the tensors of an Init reply; raises :class:`ProtocolError` naming a fault."""
    if not tensors or tensors[0].dtype != torch.uint8 or tensors[0].dim() != 1:
        raise ProtocolError("the server's Init reply holds no document")
    if tensors[0].numel() > MAX_DOCUMENT_BYTES:
        raise ProtocolError(f"the server's Init document is over {MAX_DOCUMENT_BYTES} bytes")
    try:
        document = json.loads(tensors[0].numpy().tobytes())
    except (ValueError, RecursionError):
        raise ProtocolError("the server's Init document is no valid JSON") from None
    reader = _Reader(document)
    geometry = _unpack_geometry(reader.list("geometry"))
    modules = _unpack_modules(reader.dict("modules"))
    server = {_name(k): str(v)[:_MAX_NAME_CHARS] for k, v in reader.dict("server").items()}
    dtype = reader.text("dtype")
    if dtype not in FLOAT_DTYPES:
        raise ProtocolError(f"the server's model has a dtype other than {', '.join(FLOAT_DTYPES)}")
    for key, kind in (("embedding", "embedding"), ("lm_head", "linear")):
        name = reader.text(key)
        if name and (name not in modules or modules[name].kind != kind):
            raise ProtocolError(f"the server's Init reply names a {key} that is none of its modules")
    trusted = _unpack_trusted(reader.list("trusted"), reader.list("trusted_dtypes"), tensors[1:])
    for name in trusted:
        # Where the runner keeps such a module (an embedding), it is not the server that decides where its values
        # come from.
        if name.rpartition(".")[0] in modules:
            raise ProtocolError(f"the server's Init reply sends {name}, which belongs to a module it serves")
    return InitInfo(
        config=_without_code(reader.dict("config")),
        generation_config=_without_code(reader.dict("generation_config")),
        dtype=dtype,
        trusted=trusted,
        modules=modules,
        embedding=reader.text("embedding"),
        lm_head=reader.text("lm_head"),
        tied=bool(reader.value("tied", bool)),
        geometry=geometry,
        server=server,
        fused=_unpack_fused(_Reader(reader.dict("fused")), geometry.layers),
    )


def plain_config(config: Any) -> dict[str, Any]:
    """A transformers config as plain JSON types, defaults included, without entries that name code or local paths."""
    return without_private_keys(json.loads(config.to_json_string(use_diff=False)))


def without_private_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as plain JSON types, without entries that name code or local paths, at any depth."""
    return _without_code(json.loads(json.dumps(config, default=str)))


def _without_code(value: Any, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise ProtocolError(f"the server's Init document holds a config nested over {_MAX_DEPTH} deep")
    if isinstance(value, dict):
        return {k: _without_code(v, depth + 1) for k, v in value.items() if k not in PRIVATE_CONFIG_KEYS}
    if isinstance(value, list):
        return [_without_code(item, depth + 1) for item in value]
    return value


class _Reader:
    """Typed access to the document; a missing or ill-typed entry is a :class:`ProtocolError` naming it."""

    def __init__(self, document: object) -> None:
        if not isinstance(document, dict):
            raise ProtocolError("the server's Init document is no JSON object")
        self._document = document

    def value(self, key: str, kind: type) -> Any:
        value = self._document.get(key)
        if type(value) is not kind:
            raise ProtocolError(f"the server's Init document has no valid {key!r}")
        return value

    def dict(self, key: str) -> dict[str, Any]:
        return self.value(key, dict)

    def list(self, key: str) -> list[Any]:
        return self.value(key, list)

    def text(self, key: str) -> str:
        text = self.value(key, str)
        return _name(text) if text else ""


def _name(text: object) -> str:
    if not isinstance(text, str) or not 0 < len(text) <= _MAX_NAME_CHARS or not text.isprintable():
        raise ProtocolError("the server's Init document holds a name that is empty, too long or unprintable")
    return text


def _count(value: object, maximum: int, what: str) -> int:
    if type(value) is not int or not 0 < value <= maximum:
        raise ProtocolError(f"the server's Init document has {what} outside 1..{maximum}")
    return value


def _unpack_geometry(row: list[Any]) -> AttentionGeometry:
    if len(row) != 4:
        raise ProtocolError("the server's Init document has no valid attention geometry")
    layers = _count(row[0], _MAX_LAYERS, "a number of layers")
    heads, kv_heads, head_dim = (_count(value, _MAX_FEATURES, "a head count or size") for value in row[1:])
    if heads % kv_heads:
        raise ProtocolError(f"the server's model has {heads} heads, not a multiple of its {kv_heads} kv heads")
    return AttentionGeometry(layers, heads, kv_heads, head_dim)


def _pack_fused(fused: FusedLayout) -> dict[str, Any]:
    groups = {"layers": fused.layers, "attention": fused.attention, "mlp": fused.mlp}
    return {
        "hidden": fused.hidden,
        "implementation": fused.attention_implementation,
        "why": fused.why[:_MAX_NAME_CHARS],
        **{key: [[module.name, module.returns] for module in modules] for key, modules in groups.items()},
    }


def _unpack_fused(reader: _Reader, layers: int) -> FusedLayout:
    groups = []
    for key in ("layers", "attention", "mlp"):
        rows = reader.list(key)
        if len(rows) not in (0, layers):
            raise ProtocolError(f"the server's Init document has {len(rows)} fused {key} of {layers} layers")
        groups.append(tuple(map(_unpack_fused_module, rows)))
    hidden, implementation = reader.value("hidden", int), reader.text("implementation")
    if groups[0]:
        _count(hidden, _MAX_FEATURES, "a hidden size")
        if implementation not in ATTENTION_IMPLEMENTATIONS:
            raise ProtocolError("the server's Init document names an attention implementation that is none")
    whole, attention, mlp = groups
    return FusedLayout(hidden, implementation, whole, attention, mlp, reader.text("why"))


def _unpack_fused_module(row: object) -> FusedModule:
    if type(row) is not list or len(row) != 2 or type(row[1]) is not int or not 0 <= row[1] <= MAX_RANK:
        raise ProtocolError("the server's Init document describes a fused module wrongly")
    return FusedModule(_name(row[0]), row[1])


def _unpack_modules(rows: dict[str, Any]) -> dict[str, ModuleInfo]:
    if len(rows) > _MAX_MODULES:
        raise ProtocolError(f"the server's Init document names over {_MAX_MODULES} modules")
    modules = {}
    for name, row in rows.items():
        if type(row) is not list or len(row) != 4 or type(row[3]) is not bool:
            raise ProtocolError("the server's Init document describes a module wrongly")
        if row[0] not in ("linear", "embedding"):
            raise ProtocolError("the server's Init document has a module that is neither linear nor embedding")
        sizes = [_count(size, _MAX_FEATURES, "a module size") for size in row[1:3]]
        modules[_name(name)] = ModuleInfo(row[0], sizes[0], sizes[1], row[3])
    return modules


def _unpack_trusted(rows: list[Any], dtypes: list[Any], flats: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cuts the flat tensors into named private ones."""
    if sum(flat.nbytes for flat in flats) > MAX_TRUSTED_BYTES:
        raise ProtocolError(f"the server's trusted parameters are over {MAX_TRUSTED_BYTES} bytes")
    if len(dtypes) != len(flats) or len(set(map(str, dtypes))) != len(dtypes):
        raise ProtocolError("the server's Init reply has another number of tensors than its document says")
    rest: dict[str, torch.Tensor] = {}
    for dtype, flat in zip(dtypes, flats, strict=True):
        if not isinstance(dtype, str) or flat.dtype != TRUSTED_DTYPES.get(dtype) or flat.dim() != 1:
            raise ProtocolError("the server's Init reply has a tensor of another dtype than its document says")
        rest[dtype] = flat
    trusted: dict[str, torch.Tensor] = {}
    for row in rows:
        name, dtype, shape = _trusted_row(row)
        count = math.prod(shape)
        if name in trusted or dtype not in rest or count > rest[dtype].numel():
            raise ProtocolError(f"the server's Init reply has no values for parameter {name!r}, or two of them")
        trusted[name] = rest[dtype][:count].reshape(shape).clone()
        rest[dtype] = rest[dtype][count:]
    if any(flat.numel() for flat in rest.values()):
        raise ProtocolError("the server's Init reply holds more values than its document names")
    return trusted


def _trusted_row(row: object) -> tuple[str, str, list[int]]:
    if type(row) is not list or len(row) != 3 or type(row[1]) is not str or type(row[2]) is not list:
        raise ProtocolError("the server's Init document describes a parameter wrongly")
    if len(row[2]) > MAX_RANK or any(type(n) is not int or not 0 <= n <= MAX_TRUSTED_BYTES for n in row[2]):
        raise ProtocolError("the server's Init document gives a parameter an impossible shape")
    return _name(row[0]), row[1], row[2]
