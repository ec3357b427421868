"""From a checkpoint or a ready transformers model to what the server serves: callable modules and the Init
reply.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError
from torch import nn

from . import model_info
from .errors import ConfigError, ModelError, ModelNotFoundError, UnplacedParameterError
from .layout import FusedLayout, find_layout, fused_names
from .model_info import InitInfo
from .protocol import FLOAT_DTYPES, FLOAT_NAMES, PROTECTION_LINE, AttentionGeometry, ModuleInfo

#: Called with one line of text whenever loading enters a new phase.
Progress = Callable[[str], None]
#: What transformers, safetensors and torch raise for a checkpoint they can't read.
_LOAD_FAULTS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
)


class ServedModule:
    """A module that may be called by name: ``call`` maps a tensor on the device to the output tensor."""

    __slots__ = ("call", "dtype", "info", "linear", "name", "weight")

    def __init__(self, name: str, module: nn.Module) -> None:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        self.name = name
        self.weight = weight
        self.dtype = weight.dtype
        self.info = _describe(module)
        # The plain class skips nn.Module's dispatch; a subclass (a scaled embedding, say) keeps its own
        # forward.
        self.call: Callable[[torch.Tensor], torch.Tensor] = module
        #: The module where it is of that plain class.
        self.linear: nn.Linear | None = module if type(module) is nn.Linear else None
        if self.linear is not None:
            self.call = torch_product(self.linear)


def torch_product(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """``F.linear`` with the module's weight and bias, without nn.Module's dispatch."""
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    return lambda x: F.linear(x, weight, bias)


class ServedModel:
    """A model split into modules by name, and the description of it that a runner gets."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model: Any = model
        self.device = device
        self.modules = {
            name: ServedModule(name, module)
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding))
        }
        if not self.modules:
            raise ModelError("the model has no linear or embedding module; there is nothing to serve")
        self.dtype = _model_dtype(model)
        self.layout: FusedLayout = find_layout(model, device)
        #: The modules a fused operator runs whole, by full name.
        self.fused: dict[str, nn.Module] = {name: model.get_submodule(name) for name in fused_names(self.layout)}
        self.info = _init_info(model, self)
        self.table = self.info.table()
        self.geometry = self.info.geometry


def load_model(
    model_or_path: nn.Module | str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> ServedModel:
    """Loads a local checkpoint, or takes a ready transformers model, and prepares it for serving.

    ``dtype`` is ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``; ``device`` is a
    torch device, by default the checkpoint's place of choice (see ``config.device``) or where a ready model
    lies. A ready model is moved and converted in place. Raises :class:`ModelNotFoundError`,
    :class:`ModelError`, :class:`UnplacedParameterError`, :class:`ConfigError`.
    """
    if dtype != "auto" and dtype not in FLOAT_DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; give auto, {', '.join(FLOAT_DTYPES)}")
    tell = progress or (lambda line: None)
    if isinstance(model_or_path, nn.Module):
        model = model_or_path
        place = _device(device if device is not None else next(model.parameters()).device)
        if dtype != "auto":
            model = model.to(FLOAT_DTYPES[dtype])
    else:
        if device is None:
            from . import config

            device = config.device()
        place = _device(device)
        tell(f"loading {model_or_path}")
        model = _load_checkpoint(Path(model_or_path), dtype)
    tell(f"moving the model to {place}")
    try:
        model = model.to(place).eval()
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(f"the model can't be put on {place}: {_first_line(error)}") from None
    served = ServedModel(model, place)
    tell(f"ready: {len(served.modules)} modules, {FLOAT_NAMES[served.dtype]}, {place}")
    return served


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {str(device)!r} is unknown; give cpu, cuda:0 or another torch device") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {place} asked for, but torch sees no CUDA device; give --device cpu")
    return place


def _load_checkpoint(path: Path, dtype: str) -> nn.Module:
    config_file = path / "config.json"
    if not config_file.is_file():
        why = "does not exist" if not path.exists() else "holds no config.json"
        raise ModelNotFoundError(f"{path} {why}; give the directory of a local transformers checkpoint")
    from transformers import AutoModelForCausalLM

    wanted: Any = "auto" if dtype == "auto" else FLOAT_DTYPES[dtype]
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=wanted, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except _LOAD_FAULTS as error:
        raise ModelError(
            f"the checkpoint in {path} can't be loaded ({type(error).__name__}: {_first_line(error)}); "
            "check that its weights are complete and of an architecture transformers knows"
        ) from None
    missing = sorted(set(report.get("missing_keys", ())) | {str(k) for k in report.get("mismatched_keys", ())})
    if missing:
        raise ModelError(
            f"the checkpoint in {path} lacks weights for {', '.join(missing[:4])}"
            f"{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}; fetch it again"
        )
    return model


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def described_modules(model: nn.Module) -> dict[str, ModuleInfo]:
    """Kind and sizes of every linear and embedding module, by full name."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding)))
    return {name: _describe(module) for name, module in found}


def _describe(module: nn.Module) -> ModuleInfo:
    if isinstance(module, nn.Embedding):
        return ModuleInfo("embedding", module.num_embeddings, module.embedding_dim)
    assert isinstance(module, nn.Linear)
    return ModuleInfo("linear", module.in_features, module.out_features, module.bias is not None)


def _model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the largest parameter: norms may be kept in another."""
    largest = max(model.parameters(), key=lambda parameter: parameter.numel())
    if largest.is_meta:
        raise ModelError("the model's weights are not loaded (meta device); load it before serving it")
    if largest.dtype not in FLOAT_NAMES:
        raise ModelError(f"the model's weights are {largest.dtype}; tsqp serves {', '.join(FLOAT_DTYPES)}")
    return largest.dtype


def _init_info(model: Any, served: ServedModel) -> InitInfo:
    layers = tuple(module.name for module in served.layout.layers)
    state = model.state_dict()
    names = runners_own(state, served.modules, layers)
    return describe_model(
        model,
        {name: module.info for name, module in served.modules.items()},
        trusted=refuse_large({name: state[name].detach().cpu() for name in names}),
        dtype=served.dtype,
        layout=served.layout,
        server=_about_server(served.device),
    )


def describe_model(
    model: Any,
    modules: dict[str, ModuleInfo],
    *,
    trusted: dict[str, torch.Tensor],
    dtype: torch.dtype,
    layout: FusedLayout,
    server: dict[str, str],
) -> InitInfo:
    """What there is to know of ``model``, which may be on the meta device: ``modules`` are its linear and embedding
    modules, ``trusted`` the values that none of them owns.
    """
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    generation = getattr(model, "generation_config", None)
    return InitInfo(
        config=model_info.plain_config(model.config),
        generation_config={} if generation is None else model_info.without_private_keys(generation.to_dict()),
        dtype=FLOAT_NAMES[dtype],
        trusted=trusted,
        modules=modules,
        embedding=names[id(embedding)] if isinstance(embedding, nn.Embedding) else "",
        lm_head=names[id(head)] if isinstance(head, nn.Linear) else "",
        tied=head is not None and embedding is not None and head.weight is embedding.weight,
        geometry=_geometry(model.config),
        server=server,
        fused=layout,
    )


def _geometry(config: Any) -> AttentionGeometry:
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return AttentionGeometry(text.num_hidden_layers, heads, kv_heads, head_dim)


def runners_own(state: Mapping[str, torch.Tensor], modules: Container[str], layers: tuple[str, ...]) -> Iterator[str]:
    """The names in a state dict whose values a runner computes with itself: those no linear or embedding module owns.

    ``modules`` are the names of these modules, ``layers`` those of the layers that can be run whole. Of such a layer
    only vectors count: a runner that computes with its matrices (experts) itself there is not.
    """
    inside = tuple(f"{name}." for name in layers)
    for name, tensor in state.items():
        if name.rpartition(".")[0] not in modules and not (name.startswith(inside) and _is_matrix(tensor)):
            yield name


def refuse_large(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns ``state``, what a runner computes with itself, if it is small and of dtypes that can travel.

    Raises :class:`~tsqp.errors.UnplacedParameterError` or :class:`~tsqp.errors.ModelError`.
    """
    total = sum(tensor.nbytes for tensor in state.values())
    if total > model_info.MAX_TRUSTED_BYTES:
        largest = sorted(state, key=lambda name: -state[name].nbytes)[:4]
        raise UnplacedParameterError(
            f"{len(state)} parameters outside linear and embedding modules hold {total} bytes, more than the "
            f"{model_info.MAX_TRUSTED_BYTES} a runner may be sent; the largest are {', '.join(largest)}"
        )
    odd = [name for name, tensor in state.items() if tensor.dtype not in model_info.TRUSTED_NAMES]
    if odd:
        raise ModelError(f"parameters {', '.join(odd[:4])} have a dtype that has no code on the wire")
    return state


def _is_matrix(tensor: torch.Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) >= 2


def _about_server(device: torch.device) -> dict[str, str]:
    about = {"device": str(device), "protection": PROTECTION_LINE}
    if device.type == "cuda":
        about["device_name"] = torch.cuda.get_device_name(device)
    for package in ("tsqp", "torch", "transformers"):
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = "unknown"
    return about
