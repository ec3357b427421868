"""A transformers model without its heavy weights: the family's own class on the meta device, then filled in.

The config comes from a local checkpoint directory (then only its ``config.json`` is read) or, where there is
none, from the server's Init reply. What the runner computes itself gets real values on the CPU: small
parameters from the Init reply, computed buffers (rotary frequencies) made anew from the config.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .client import InitInfo
from .errors import ConfigError, ModelError, ModelNotFoundError, UnplacedParameterError
from .plain_meta import PlainMeta
from .protocol import FLOAT_DTYPES
from .remote import RemoteModule

#: Config entries a server may not decide: they choose code to run (attention, experts, kernels) or a weight
#: format.
FOREIGN_ENTRIES = ("attn_implementation", "experts_implementation", "quantization_config", "compile_config")
#: What transformers raises for a config or weights it can't use.
CHECKPOINT_FAULTS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
)


def resolve_dtype(dtype: str | torch.dtype, info: InitInfo) -> torch.dtype:
    """The runner's model dtype: ``auto`` is the served model's. Raises :class:`~tsqp.errors.ConfigError`."""
    if dtype == "auto":
        return info.torch_dtype
    found = FLOAT_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in FLOAT_DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is unknown; give auto, {', '.join(FLOAT_DTYPES)}")
    return found


def build_skeleton(
    path: str | os.PathLike[str] | None, info: InitInfo, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """The model's own class with all parameters on the meta device, in eval mode, generation config included.

    Raises :class:`~tsqp.errors.ModelNotFoundError` where ``path`` holds no ``config.json`` and
    :class:`~tsqp.errors.ModelError` where transformers has no causal language model for the config.
    """
    config = _config_of_server(info) if path is None else config_of_path(path)
    model = make_empty(config, dtype, attn_implementation)
    generation = _generation_config(path, info)
    if generation is not None:
        model.generation_config = generation
    return model


def make_empty(config: Any, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """A model of this config whose parameters are all on the meta device, in eval mode.

    Raises :class:`~tsqp.errors.ModelError` where transformers has no causal language model for the config.
    """
    kwargs: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    try:
        with torch.device("meta"), PlainMeta():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **kwargs)
    except CHECKPOINT_FAULTS as error:
        raise ModelError(
            f"transformers can't make a causal language model of type {config.model_type!r}: {error}"
        ) from error
    return model.eval().requires_grad_(False)


def require_checkpoint(path: str | os.PathLike[str]) -> Path:
    """``path`` as a :class:`~pathlib.Path`; raises :class:`~tsqp.errors.ModelNotFoundError` without
    ``config.json``.
    """
    place = Path(path)
    if not (place / "config.json").is_file():
        why = "does not exist" if not place.exists() else "holds no config.json"
        raise ModelNotFoundError(f"{place} {why}; give the directory of a local transformers checkpoint")
    return place


def config_of_path(path: str | os.PathLike[str]) -> Any:
    """The config of a local checkpoint directory; raises :class:`~tsqp.errors.ModelNotFoundError` and
    :class:`~tsqp.errors.ModelError`.
    """
    path = require_checkpoint(path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except CHECKPOINT_FAULTS as error:
        raise ModelError(f"the config.json in {path} can't be used: {error}") from error


def _config_of_server(info: InitInfo) -> Any:
    """The config of the Init reply; nothing in it may choose code or make the runner build more than is
    served.
    """
    model_type = info.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ModelError(f"the server's model has type {model_type!r}, which this transformers does not know")
    layers = info.config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(info.modules):
        raise ModelError(
            f"the server's config speaks of {layers} layers but only {len(info.modules)} modules are served"
        )
    entries = {key: value for key, value in info.config.items() if key not in FOREIGN_ENTRIES and key[:1] != "_"}
    try:
        return CONFIG_MAPPING[model_type].from_dict(entries)
    except CHECKPOINT_FAULTS as error:
        raise ModelError(f"the server's config of type {model_type!r} can't be used: {error}") from error


def _generation_config(path: str | os.PathLike[str] | None, info: InitInfo) -> GenerationConfig | None:
    if path is not None:
        return generation_config_of_path(path)
    entries = {key: value for key, value in info.generation_config.items() if key not in FOREIGN_ENTRIES}
    return GenerationConfig.from_dict(entries) if entries else None


def generation_config_of_path(path: str | os.PathLike[str]) -> GenerationConfig | None:
    """What ``generation_config.json`` of a local checkpoint directory says; None where there is none."""
    if not (Path(path) / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(path, local_files_only=True)


def fill_trusted(model: nn.Module, trusted: dict[str, torch.Tensor]) -> None:
    """Gives the parameters and persistent buffers left in the model the values of ``trusted``, on the CPU.

    All of them, not only those on the meta device: some families draw theirs in a way that escapes it. Shape
    and kind (floating point or not) have to agree; the dtype is the model's own. Raises
    :class:`~tsqp.errors.UnplacedParameterError` naming what the server did not send and
    :class:`~tsqp.errors.ModelError` for a value of another shape.
    """
    missing = []
    for module, leaf, name, tensor in _state(model):
        if leaf in module._non_persistent_buffers_set or isinstance(module, RemoteModule):
            continue
        value = trusted.get(name)
        if value is None:
            missing.append(name)
            continue
        if value.shape != tensor.shape or value.is_floating_point() != tensor.is_floating_point():
            raise ModelError(
                f"the server's {name} is {value.dtype} of shape {list(value.shape)}; "
                f"this model's is {tensor.dtype} of shape {list(tensor.shape)}"
            )
        value = value.to(tensor.dtype)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value
    if missing:
        raise UnplacedParameterError(f"the server holds no values for {_listed(missing)}; is it serving this model?")


def remake_computed(model: PreTrainedModel) -> None:
    """Makes modules anew whose non-persistent buffers are still meta: these are computed from the config
    alone.

    Modules that can't be made from a config keep their meta buffers, which :func:`refuse_unusable` names.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            buffers = list(child.named_buffers(recurse=False))
            if buffers and all(buffer.is_meta for _, buffer in buffers) and not list(child.parameters(recurse=False)):
                parent._modules[name] = _remade(child, getattr(child, "config", model.config))


def _remade(module: nn.Module, config: Any) -> nn.Module:
    with torch.device("cpu"):
        for arguments, keywords in (((), {"config": config}), ((config,), {})):
            try:
                made = type(module)(*arguments, **keywords)
            except (TypeError, AttributeError, ValueError):
                continue
            return made.train(module.training)
    return module


def refuse_unusable(model: nn.Module) -> None:
    """Refuses a model whose remaining parameters and buffers have no values, or not on the CPU.

    Raises :class:`~tsqp.errors.UnplacedParameterError` or :class:`~tsqp.errors.ModelError`, naming them.
    """
    names = [name for _, _, name, tensor in _state(model) if tensor.is_meta]
    if names:
        raise UnplacedParameterError(f"neither the server nor the runner has values for {_listed(names)}")
    elsewhere = [name for _, _, name, tensor in _state(model) if tensor.device.type != "cpu"]
    if elsewhere:
        raise ModelError(
            f"the runner computes on the CPU, where {_listed(elsewhere)} are not; move the model to the CPU"
        )


def refuse_unplaced(model: nn.Module, remote: frozenset[str], inside: tuple[str, ...] = ()) -> None:
    """Refuses a model with weight matrices outside the modules named in ``remote``, and not below a name of
    ``inside``.

    A matrix (two dimensions or more, such as the experts' of a mixture) is work for the server that no
    placement knows how to give it; vectors are the runner's. Raises
    :class:`~tsqp.errors.UnplacedParameterError` naming them.
    """
    names = [
        name
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in remote
        and not name.startswith(inside)
        and sum(size > 1 for size in parameter.shape) >= 2
    ]
    if names:
        raise UnplacedParameterError(
            f"{type(model).__name__} has weights that no placement puts on the server: {_listed(names)}; "
            "run it with placement 'layer', or 'local'"
        )


def _state(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, torch.Tensor]]:
    """Owner, own name, full name and tensor of every parameter and buffer."""
    for prefix, module in model.named_modules():
        for leaf, tensor in list(module._parameters.items()) + list(module._buffers.items()):
            if tensor is not None:
                yield module, leaf, f"{prefix}.{leaf}" if prefix else leaf, tensor


def _listed(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
