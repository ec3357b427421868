"""Embeddings that stay in the runner (``keep_embedding``), so that token ids are never sent.

The table of an embedding comes from the first of these that has it: the trusted parameters; the safetensors files
of the runner's own checkpoint directory, of which only this one tensor is read; the server, which is asked for the
rows of all ids in order before there is a prompt. It is kept in the runner's dtype: 128256 x 2048 values of
bfloat16, as in LLaMA-3.2-1B, are 501 MiB.

No confidentiality by itself: the server gets the hidden states of the first layer, and whoever knows the table
finds the token of each row by comparing; it computes the logits, too.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from .client import GPUClient
from .errors import ModelError, UnplacedParameterError
from .model_info import InitInfo
from .placement import Placement

#: Said where ``--keep-embedding`` is used.
NOTE = "token ids stay in the runner; the server sees hidden states and logits, from which tokens can be told"
#: A larger table is refused before any memory is taken for it.
MAX_TABLE_BYTES = 16 << 30
#: Rows are read, or asked for, so many bytes at a time.
_CHUNK_BYTES = 4 << 20
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20

_log = logging.getLogger("tsqp")


def modules_of(
    model: PreTrainedModel, info: InitInfo, placement: Placement, inside: tuple[str, ...]
) -> dict[str, nn.Embedding]:
    """The embeddings that stay in the runner, by full name: all that are not ``inside`` of what the server runs whole.

    Empty where the placement has them on the server. Raises :class:`~tsqp.errors.ModelError` where the server's
    model has another one in the place, as then it serves another model.
    """
    if not placement.keeps_embedding:
        return {}
    kept = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not name.startswith(inside)
    }
    for name, module in kept.items():
        served, sizes = info.modules.get(name), (module.num_embeddings, module.embedding_dim)
        found = None if served is None else (served.in_features, served.out_features)
        if served is None or served.kind != "embedding" or found != sizes:
            here, there = (f"{size[0]}x{size[1]}" if size else "missing" for size in (sizes, found))
            raise ModelError(f"the server does not serve this model: embedding {name} is {here} here and {there} there")
    return kept


def tables(
    model: PreTrainedModel,
    client: GPUClient,
    trusted: Mapping[str, Tensor],
    kept: Mapping[str, nn.Embedding],
    path: str | os.PathLike[str] | None = None,
    pinned: bool = False,
) -> dict[str, Tensor]:
    """The weights [num_embeddings, embedding_dim] of the ``kept`` embeddings that ``trusted`` does not hold, by
    parameter name, in private memory and each module's dtype.

    A module with a forward of its own (a scaled embedding) keeps it, unless its rows come from the server: these
    are scaled already, and a plain embedding takes its place. ``pinned``: ``trusted`` is a file's, pinned by its hash,
    and a table that it lacks may come from nowhere else. Raises :class:`~tsqp.errors.ModelError` for a table
    that can't be had and :class:`~tsqp.errors.UnplacedParameterError` for a module whose rows the server can't
    tell.
    """
    found: dict[str, Tensor] = {}
    for name, module in kept.items():
        key = f"{name}.weight"
        if pinned and key not in trusted:
            raise ModelError(
                f"the file of trusted weights holds no {key}, which keep_embedding needs; make it with "
                "'tsqp trust --embedding'"
            )
        table = None if key in trusted or path is None else _of_checkpoint(Path(path), _aliases(model, key), module)
        if key in trusted or table is not None:
            origin = "the trusted parameters" if table is None else "the checkpoint"
            _compute_buffers(model, module)
        else:
            origin = "the server"
            table = _of_server(client, name, module)
            _make_plain(model, name, module)
        if table is not None:
            found[key] = table
        _log.info(
            "embedding %s stays in the runner: %dx%d, from %s",
            name,
            module.num_embeddings,
            module.embedding_dim,
            origin,
        )
    return found


# --- from the runner's checkpoint ---------------------------------------------------------------------------


def _aliases(model: PreTrainedModel, key: str) -> tuple[str, ...]:
    """The names a checkpoint may have for the parameter: with and without the prefix of the base model."""
    prefix = f"{model.base_model_prefix}."
    return (key, key.removeprefix(prefix) if key.startswith(prefix) else prefix + key)


def _of_checkpoint(path: Path, names: tuple[str, ...], module: nn.Embedding) -> Tensor | None:
    """The table in the checkpoint's safetensors; None where these are not there, do not hold it or hold it packed.

    Copied in chunks: what safetensors returns may be the file's own pages, which the host can change.
    """
    try:
        for file, name in _places(path, names):
            with safe_open(file, framework="pt", device="cpu") as weights:
                if name not in weights.keys():  # noqa: SIM118  (no mapping)
                    continue
                rows = weights.get_slice(name)
                shape = list(rows.get_shape())
                if shape != list(module.weight.shape):
                    raise ModelError(
                        f"the checkpoint in {path} holds {name} of shape {shape}; "
                        f"this model's is {list(module.weight.shape)}"
                    )
                if not rows[0:1].is_floating_point():
                    return None
                table = _empty_table(module)
                for first, last in _chunks(module, module.weight.element_size()):
                    table[first:last] = rows[first:last]
                return table
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"the embedding in the checkpoint {path} can't be read ({type(error).__name__})") from error
    return None


def _places(path: Path, names: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """Files of the checkpoint that may hold a parameter, each with the name it would have there."""
    if (path / _WEIGHTS).is_file():
        for name in names:
            yield path / _WEIGHTS, name
    elif (path / _INDEX).is_file():
        if (path / _INDEX).stat().st_size > _MAX_INDEX_BYTES:
            raise ModelError(f"{path / _INDEX} is over {_MAX_INDEX_BYTES} bytes; is it an index?")
        shards = json.loads((path / _INDEX).read_bytes())["weight_map"]
        for name in names:
            if name in shards:
                yield path / Path(shards[name]).name, name


# --- from the server ----------------------------------------------------------------------------------------


def _of_server(client: GPUClient, name: str, module: nn.Embedding) -> Tensor:
    """What the server's module returns for every id, asked for in the order of the ids, chunk by chunk."""
    if not _is_a_table(module):
        raise UnplacedParameterError(
            f"{name} needs more than ids, so that the server can't tell its rows; give the path of a checkpoint "
            "with weights, or use a placement without keep_embedding"
        )
    table = _empty_table(module)
    for first, last in _chunks(module, client.wire_itemsize):
        table[first:last] = client.embedding(torch.arange(first, last), module=name)
    return table


def _make_plain(model: PreTrainedModel, name: str, module: nn.Embedding) -> None:
    """Puts a plain embedding in the place of one that computes something else from its weight."""
    if type(module).forward is nn.Embedding.forward:
        return
    weight = torch.empty_like(module.weight, device="meta")
    plain = nn.Embedding(module.num_embeddings, module.embedding_dim, _weight=weight)
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = plain.train(module.training).requires_grad_(False)


def _is_a_table(module: nn.Embedding) -> bool:
    """True where the forward takes nothing but ids, so that a row per id says all of it."""
    return len(inspect.signature(type(module).forward).parameters) == 2


# --- for both -----------------------------------------------------------------------------------------------


def _empty_table(module: nn.Embedding) -> Tensor:
    nbytes = module.num_embeddings * module.embedding_dim * module.weight.element_size()
    sizes = f"{module.num_embeddings}x{module.embedding_dim}"
    if nbytes > MAX_TABLE_BYTES:
        raise ModelError(f"an embedding of {sizes} takes {nbytes} bytes; the runner keeps up to {MAX_TABLE_BYTES}")
    try:
        return torch.empty(module.num_embeddings, module.embedding_dim, dtype=module.weight.dtype)
    except RuntimeError:
        raise ModelError(f"there is no memory for an embedding of {sizes}: it takes {nbytes} bytes") from None


def _chunks(module: nn.Embedding, itemsize: int) -> Iterator[tuple[int, int]]:
    """First and last row of each part of about :data:`_CHUNK_BYTES`."""
    step = max(1, _CHUNK_BYTES // (module.embedding_dim * itemsize))
    for first in range(0, module.num_embeddings, step):
        yield first, min(first + step, module.num_embeddings)


def _compute_buffers(model: PreTrainedModel, module: nn.Embedding) -> None:
    """Gives the buffers of a skeleton's embedding (the scale of a scaled one) their values, as transformers does when
    it loads a checkpoint: by the family's own initialisation of the module, whose weight is still empty here.

    A buffer that this does not set stays without values, which ``building.refuse_unusable`` refuses.
    """
    empty = {leaf: buffer for leaf, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
    if not empty:
        return
    for leaf, buffer in empty.items():
        module._buffers[leaf] = torch.full(buffer.shape, torch.nan, dtype=buffer.dtype, device="cpu")
    with torch.no_grad():
        model._init_weights(module)
    for leaf, buffer in empty.items():
        value = module._buffers[leaf]
        if value is None or bool(value.isnan().any()):
            module._buffers[leaf] = buffer
