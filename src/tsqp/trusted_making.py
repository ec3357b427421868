"""Writes the file that a runner trusts (:mod:`tsqp.trusted_weights`), from a checkpoint, at a place that is trusted.

Only headers and the few tensors that go into the file are read. The model itself is made on the meta device, to learn
its names and sizes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedModel

from . import building, loading, model_info
from .errors import ModelError, ModelNotFoundError
from .layout import FusedLayout, FusedModule, candidates, find_layout
from .model_info import InitInfo
from .protocol import FLOAT_DTYPES
from .trusted_file import FORMAT, METADATA_KEY

_BLOCK_BYTES = 1 << 20
_PLAIN = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def write_trusted_weights(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], embedding: bool = False
) -> str:
    """Writes the trusted weights of a local safetensors checkpoint to ``out`` and returns ``"sha256:HEX"`` of the file.

    The file holds the parameters and persistent buffers that no linear or embedding module owns, as they are stored;
    with ``embedding`` the embedding tables, too; and config, generation config, module table and geometry. The same
    checkpoint and versions give the same bytes. Raises :class:`~tsqp.errors.ModelNotFoundError`,
    :class:`~tsqp.errors.ModelError` and :class:`~tsqp.errors.UnplacedParameterError`; an older ``out`` stays then.
    """
    place = building.require_checkpoint(checkpoint)
    try:
        info = _described(place, embedding)
    except ModelError:
        raise  # one of them is an OSError as well
    except building.CHECKPOINT_FAULTS as error:
        raise ModelError(f"the checkpoint in {place} can't be read: {error}") from error
    return _written(info, Path(out))


def _described(place: Path, embedding: bool) -> InitInfo:
    config = building.config_of_path(place)
    stored = _Stored(place)
    dtype = _dtype(config, stored)
    # Of the implementations, eager makes masks without a look at values, which there are none of.
    model = building.make_empty(config, dtype, "eager")
    model.generation_config = _generation_config(place)
    stored.name_for(model)
    modules = loading.described_modules(model)
    state = model.state_dict()
    layout = _layout(model)
    layers = tuple(module.name for module in layout.layers)
    names = list(loading.runners_own(state, modules, layers))
    trusted = loading.refuse_large({name: stored.tensor(name, state[name]) for name in names})
    info = loading.describe_model(
        model,
        modules,
        trusted=trusted,
        dtype=dtype,
        layout=layout,
        server={},
    )
    tied = info.tied and stored.equal(f"{info.embedding}.weight", f"{info.lm_head}.weight")
    if embedding:
        tables = [f"{name}.weight" for name, module in modules.items() if module.kind == "embedding"]
        twin = {f"{info.embedding}.weight": f"{info.lm_head}.weight"} if tied else {}
        trusted |= {name: stored.tensor(name, state[name], twin.get(name)) for name in tables}
    return replace(info, trusted=trusted, tied=tied)


def _layout(model: PreTrainedModel) -> FusedLayout:
    """The layout that a server finds by a forward; where that needs values (which experts a token goes to), or can't be
    run whole, the names it would have, and ``why``.
    """
    layout = find_layout(model, torch.device("meta"))
    names = candidates(model) if layout.why else []
    if not names:
        return layout
    groups = [tuple(FusedModule(name, 0) for name in group) for group in names]
    whole, attention, mlp = (*groups, (), ())[:3]
    return FusedLayout(model.config.get_text_config().hidden_size, "eager", whole, attention, mlp, layout.why)


def _dtype(config: Any, stored: _Stored) -> torch.dtype:
    """What the checkpoint is loaded in by default: what its config says, else what its first weights are in."""
    said = config.dtype
    dtype = getattr(torch, said, None) if isinstance(said, str) else said
    dtype = dtype if dtype is not None else stored.first_dtype()
    if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES.values():
        raise ModelError(f"the checkpoint's weights are {dtype}; tsqp serves {', '.join(FLOAT_DTYPES)}")
    return dtype


def _generation_config(place: Path) -> GenerationConfig:
    """As loading a model does: from its own file, else what the config says of it."""
    own = building.generation_config_of_path(place)
    if own is not None:
        return own
    return GenerationConfig.from_pretrained(
        place, config_file_name="config.json", _from_model_config=True, local_files_only=True
    )


class _Stored:
    """The tensors of a checkpoint's safetensors files, by the names that the model has for them; each read when asked
    for.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        if (place / _PLAIN).is_file():
            with safe_open(place / _PLAIN, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), _PLAIN)
        elif (place / _INDEX).is_file():
            self._files = json.loads((place / _INDEX).read_text())["weight_map"]
        else:
            raise ModelNotFoundError(f"{place} holds neither {_PLAIN} nor {_INDEX}; give a checkpoint in safetensors")
        self._keys: dict[str, str] = {}

    def name_for(self, model: PreTrainedModel) -> None:
        """Finds the model's names for what is stored: older checkpoints name things differently."""
        self._keys = dict(_renamed(list(self._files), model))

    def tensor(self, name: str, like: torch.Tensor, twin: str | None = None) -> torch.Tensor:
        """The values of ``name``, or of ``twin``, which shares them, in the shape of ``like``."""
        key = self._keys.get(name) or self._keys.get(twin or name)
        if key is None:
            raise ModelError(f"the checkpoint in {self._place} lacks weights for {name}; fetch it again")
        value = self._read(key)
        if value.shape != like.shape:
            raise ModelError(
                f"the checkpoint in {self._place} has {name} of shape {list(value.shape)}; by its config it has "
                f"{list(like.shape)}"
            )
        return value

    def equal(self, name: str, other: str) -> bool:
        """False where both are stored, with other values: loading does not tie these, whatever the config says."""
        keys = self._keys.get(name), self._keys.get(other)
        return None in keys or torch.equal(self._read(str(keys[0])), self._read(str(keys[1])))

    def first_dtype(self) -> torch.dtype | None:
        """The dtype of the first tensor of floating point."""
        dtypes = (self._read(key).dtype for key in self._files)
        return next((dtype for dtype in dtypes if dtype.is_floating_point), None)

    def _read(self, key: str) -> torch.Tensor:
        with safe_open(self._place / Path(self._files[key]).name, framework="pt") as file:
            return file.get_tensor(key)


def _renamed(keys: list[str], model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """The model's name for each stored key, as transformers' own loading finds it (``core_model_loading``).

    A tensor that loading puts together from several stored ones has no name here: these are weights of experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, converter = rename_source_key(key, [], [], prefix, state)
        if name in state and converter is None:
            yield name, key


def _written(info: InitInfo, out: Path) -> str:
    document = json.loads(model_info.pack(replace(info, trusted={}))[0].numpy().tobytes())
    text = json.dumps({"format": FORMAT, **document}, sort_keys=True)
    tensors = {name: info.trusted[name].contiguous() for name in sorted(info.trusted)}
    # Beside its place, then moved there: whoever reads sees the old file or the new one.
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(tensors, part, {METADATA_KEY: text})
        digest = hashlib.sha256()
        with part.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        part.replace(out)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{out} can't be written: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
    return f"sha256:{digest.hexdigest()}"
