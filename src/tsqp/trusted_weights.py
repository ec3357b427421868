"""What a runner knows of its model without asking the server: a file made at a trusted place, pinned by its hash.

Without such a file a runner believes the server's Init reply. With it the model is built from the file alone (config,
generation config, module sizes, norms and whatever else the runner computes with), and the Init reply is only
compared with it, before any prompt: what differs raises :class:`~tsqp.errors.UntrustedServerError`. What the server
computes is not checked by this.

The file's document is that of an Init reply (:mod:`tsqp.model_info`) with a format version, its tensors are what that
reply calls trusted, and embedding tables. :mod:`tsqp.trusted_making` writes it, :mod:`tsqp.trusted_file` reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from . import building, config, model_info
from .errors import ConfigError, ModelError, ProtocolError, UntrustedServerError
from .model_info import InitInfo
from .trusted_file import read_pinned

#: Config entries that say nothing of what is computed: versions, the class that was saved, the dtype it was loaded in.
_INCIDENTAL = frozenset(("transformers_version", "architectures", "dtype", "torch_dtype", *building.FOREIGN_ENTRIES))
_MAX_LISTED = 4
_MAX_SHOWN_CHARS = 60


@dataclass(frozen=True)
class TrustedWeights:
    """A file of trusted weights that was read and is the one its digest names.

    ``info`` is what it says of the model; ``info.trusted`` holds its tensors by their state-dict names: what the
    runner computes with itself and, if the file was made with them, the embedding tables.
    """

    path: str
    info: InitInfo

    def checked(self, served: InitInfo) -> InitInfo:
        """What to build the model from: all of it from the file, after the server's Init reply agreed with it.

        The reply's are only the dtype it serves in, which modules it can run whole, and its versions. Raises
        :class:`~tsqp.errors.UntrustedServerError` naming what differs.
        """
        found = list(_differences(served, self.info))
        if found:
            raise UntrustedServerError(
                f"the server's model is not that of the trusted weights in {self.path}: {_listed(found)}; no prompt "
                "was sent. Serve the checkpoint that the file was made of, with the same version of transformers"
            )
        return replace(self.info, dtype=served.dtype, server=served.server, fused=served.fused)

    def check_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Refuses a local checkpoint directory whose configs are others; raises :class:`~tsqp.errors.ModelError`."""
        own = model_info.plain_config(building.config_of_path(path))
        found = list(_other_entries("config", own, self.info.config))
        generation = building.generation_config_of_path(path)
        if generation is not None:
            entries = model_info.without_private_keys(generation.to_dict())
            found += _other_entries("generation_config", entries, self.info.generation_config)
        if found:
            raise ModelError(
                f"the checkpoint in {path} is not that of the trusted weights in {self.path}: {_listed(found)}; give "
                "the checkpoint that the file was made of, or none"
            )

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuses a loaded model whose config or values are not the file's; raises :class:`~tsqp.errors.ModelError`."""
        found = list(_other_entries("config", model_info.plain_config(model.config), self.info.config))
        state = model.state_dict()
        found += _other_values({name: state[name].cpu() for name in self.info.trusted if name in state}, self.info)
        if found:
            raise ModelError(
                f"this model is not that of the trusted weights in {self.path}: {_listed(found)}; load the checkpoint "
                "that the file was made of"
            )


def from_options(path: Any, digest: str | None) -> TrustedWeights | None:
    """The file of the options ``trusted_weights`` and ``trusted_digest``, or None where neither is given.

    Without ``trusted_digest`` that of ``TSQP_TRUSTED_DIGEST`` counts. A digest without a file is an error, so that
    nobody who can drop an option gets a runner that believes the server. Raises as :func:`load_trusted_weights`.
    """
    wanted = config.trusted_digest() if digest is None else digest
    if path is not None:
        return load_trusted_weights(path, wanted)
    if wanted is not None:
        # Whoever set the variable where it can't be changed relies on it, whatever became of the other arguments.
        what = "TSQP_TRUSTED_DIGEST is set" if digest is None else "trusted_digest is given"
        raise ConfigError(f"{what} without trusted_weights; give the file it is the digest of, too")
    return None


def load_trusted_weights(path: str | os.PathLike[str], digest: str | None) -> TrustedWeights:
    """Reads a file of ``tsqp trust`` and checks it against ``digest``, ``"sha256:HEX"``.

    Raises :class:`~tsqp.errors.ConfigError` for a digest that is missing or malformed,
    :class:`~tsqp.errors.ModelNotFoundError` where there is no file, and :class:`~tsqp.errors.ModelError` for a file
    that is another one than the digest names, or that this tsqp can't read.
    """
    document, tensors = read_pinned(path, digest)
    try:
        info = model_info.unpack([torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)])
    except ProtocolError as error:
        raise ModelError(f"what {path} says of its model can't be used; make it anew with 'tsqp trust'") from error
    return TrustedWeights(os.fspath(path), replace(info, trusted=tensors))


# --- comparing --------------------------------------------------------------------------------------------------------


def _listed(found: list[str]) -> str:
    more = f" and {len(found) - _MAX_LISTED} more differences" if len(found) > _MAX_LISTED else ""
    return "; ".join(found[:_MAX_LISTED]) + more


def _shown(value: object) -> str:
    """A value of either side for an error's text: printable, and not long."""
    try:
        text = repr(value).encode("ascii", "backslashreplace").decode()
    except RecursionError:
        text = "something nested too deeply"
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def _differences(served: InitInfo, ours: InitInfo) -> Iterator[str]:
    """One sentence for each thing that the server's Init reply says otherwise."""
    yield from _other_entries("config", served.config, ours.config)
    yield from _other_entries("generation_config", served.generation_config, ours.generation_config)
    for what in ("embedding", "lm_head", "tied"):
        theirs, own = getattr(served, what), getattr(ours, what)
        if theirs != own:
            yield f"{what} is {_shown(theirs)}, in the file {_shown(own)}"
    for field in ("layers", "heads", "kv_heads", "head_dim"):
        theirs, own = getattr(served.geometry, field), getattr(ours.geometry, field)
        if theirs != own:
            yield f"geometry.{field} is {theirs}, in the file {own}"
    yield from _other_modules(served, ours)
    yield from _other_layout(served, ours)
    expected = [name for name in ours.trusted if name.rpartition(".")[0] not in ours.modules]
    for name in expected:
        if name not in served.trusted:
            yield f"{name} is missing"
    yield from _other_values(served.trusted, ours)


def _other_entries(where: str, theirs: Any, ours: Any) -> Iterator[str]:
    """Differences of two configs, by the dotted name of the entry."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        theirs, ours = _telling(theirs), _telling(ours)
        for key in sorted({*theirs, *ours}):
            name = f"{where}.{_shown(key)[1:-1]}"
            if key not in theirs:
                yield f"{name} is missing"
            elif key not in ours:
                yield f"{name} is {_shown(theirs[key])}, which the file has not"
            else:
                yield from _other_entries(name, theirs[key], ours[key])
    elif not _same(theirs, ours):
        yield f"{where} is {_shown(theirs)}, in the file {_shown(ours)}"


def _telling(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in _INCIDENTAL and key[:1] != "_"}


def _same(a: Any, b: Any) -> bool:
    """Equality of plain JSON values in which True is not 1."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _other_modules(served: InitInfo, ours: InitInfo) -> Iterator[str]:
    for name in sorted({*served.modules, *ours.modules}):
        theirs, own = served.modules.get(name), ours.modules.get(name)
        if theirs is None:
            yield f"module {name} is missing"
        elif own is None:
            yield f"module {_shown(name)[1:-1]} is not in the file"
        elif theirs != own:
            sizes = [
                f"{m.kind} {m.in_features}x{m.out_features}{' with bias' if m.bias else ''}" for m in (theirs, own)
            ]
            yield f"module {name} is {sizes[0]}, in the file {sizes[1]}"


def _other_layout(served: InitInfo, ours: InitInfo) -> Iterator[str]:
    """What the server claims to run whole has to be what it is; that it runs less is its own affair.

    Where the file says ``why``, it knows the names alone, by the model's structure.
    """
    for what in ("layers", "attention", "mlp"):
        theirs, own = getattr(served.fused, what), getattr(ours.fused, what)
        if ours.fused.why:
            theirs, own = ([module.name for module in modules] for modules in (theirs, own))
        if theirs and theirs != own:
            yield f"the list of fused {what} differs"
    if served.fused.layers and served.fused.hidden != ours.fused.hidden:
        yield f"the hidden size is {served.fused.hidden}, in the file {ours.fused.hidden}"


def _other_values(theirs: Mapping[str, torch.Tensor], ours: InitInfo) -> Iterator[str]:
    """Differences of tensors, bit for bit, after the file's were converted as loading converts them.

    A matrix that the file does not have is left out: the weights of a layer that the server runs whole, of which a
    runner uses none.
    """
    for name, value in theirs.items():
        own = ours.trusted.get(name)
        if own is None:
            if sum(size > 1 for size in value.shape) < 2:
                yield f"{_shown(name)[1:-1]} is not in the file"
        elif own.shape != value.shape or own.is_floating_point() != value.is_floating_point():
            yield (
                f"{name} is {value.dtype} of shape {list(value.shape)}, in the file {own.dtype} of shape "
                f"{list(own.shape)}"
            )
        elif own.is_floating_point() or own.dtype == value.dtype:
            changed = _changed(own.to(value.dtype), value)
            if changed:
                yield f"{name} differs in {changed} of {value.numel()} values"
        else:
            yield f"{name} is {value.dtype}, in the file {own.dtype}"


def _changed(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements of two tensors of one shape and dtype differ in any bit."""
    if not a.numel():
        return 0
    first, second = (x.detach().reshape(-1).contiguous().view(torch.uint8).reshape(x.numel(), -1) for x in (a, b))
    return int((first != second).any(dim=1).sum())
