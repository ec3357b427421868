"""Where a decoder keeps its layers, attention and MLP, and how they are called: found by watching it once.

The server finds it, by running one token through the model, and tells the runner in its Init reply. So the
fused operators know no family by name; what they can't run is told before anything is served with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: Attention implementations whose masks the runner can make and the server can use.
ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
#: Tensors of a forward that layers share: names of keyword arguments -> how many tensors each holds.
CONTEXT_ARGUMENTS = ("attention_mask", "position_embeddings", "position_ids")
#: The names a cache goes by.
CACHE_ARGUMENTS = ("past_key_values", "layer_past")
#: Passed along by every family, and of no use to a layer.
IGNORED_ARGUMENTS = ("cache_position", "input_ids", "inputs_embeds")
#: What a model can raise that is not made for one token, or is no language model at all.
_PROBE_FAULTS = (AttributeError, TypeError, RuntimeError, ValueError, IndexError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class FusedModule:
    """A module the server runs whole: its full name, and how many values its ``forward`` returns (0: the tensor
    itself, not in a tuple).
    """

    name: str
    returns: int


@dataclass(frozen=True)
class FusedLayout:
    """The modules of each layer that can be run whole, in the order of the layers.

    ``hidden`` is the width of their inputs and outputs, ``attention_implementation`` transformers' name of the
    attention the server computes with, for which the runner has to make its masks. ``attention`` and ``mlp`` are
    empty where layers are not made of one of each; ``why`` says why, or why there are no layers either. ``widths``
    are those of the rotary tables that were seen; the runner is not told.
    """

    hidden: int = 0
    attention_implementation: str = ""
    layers: tuple[FusedModule, ...] = ()
    attention: tuple[FusedModule, ...] = ()
    mlp: tuple[FusedModule, ...] = ()
    why: str = ""
    widths: frozenset[int] = frozenset()


#: A model of which nothing can be run whole.
NOT_FUSED = FusedLayout(why="the server does not say what it can run whole")


@dataclass
class _Seen:
    """How a module was called: names of tensors it was given that are not known, the width of its rotary tables, and
    what it returned.
    """

    unknown: list[str] = field(default_factory=list)
    width: int = 0
    returns: int = 0
    fits: bool = False


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's ``forward``, without ``self`` and without those of ``**kwargs``."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def required_arguments(module: nn.Module) -> tuple[str, ...]:
    """Those of :func:`argument_names` that have no default."""
    parameters = inspect.signature(type(module).forward).parameters
    return tuple(name for name in argument_names(module) if parameters[name].default is inspect.Parameter.empty)


def takes_any(module: nn.Module) -> bool:
    """True where ``forward`` has ``**kwargs``."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(module).forward).parameters.values())


def candidates(model: Any) -> list[list[str]]:
    """What might be run whole, by structure alone: the full names of the layers, and of each one's attention and of
    each one's MLP where all have one of each. Empty where the model has no list of its layers.

    Raises :class:`AttributeError` where the config is not that of a decoder.
    """
    count = model.config.get_text_config().num_hidden_layers
    container, layers = _layers(model, count)
    if not layers:
        return []
    names = [[f"{container}.{number}" for number in range(count)]]
    parts = [_parts(layer) for layer in layers]
    if all(part is not None for part in parts):
        names += [
            [f"{container}.{number}.{part[kind]}" for number, part in enumerate(parts) if part] for kind in (0, 1)
        ]
    return names


def find_layout(model: Any, device: torch.device) -> FusedLayout:
    """Watches one forward of ``model`` and tells what can be fused. Raises nothing: ``why`` tells."""
    try:
        config = model.config.get_text_config()
        count, hidden = config.num_hidden_layers, config.hidden_size
        implementation = _choose_attention(model)
    except _PROBE_FAULTS as error:
        return FusedLayout(why=f"the model's config is not that of a decoder ({type(error).__name__})")
    names = candidates(model)
    if not names:
        return FusedLayout(why=f"the model has no list of its {count} layers")
    try:
        seen = _watch(model, [name for group in names for name in group], hidden, device)
    except _PROBE_FAULTS as error:
        return FusedLayout(why=f"a forward of one token failed ({type(error).__name__})")
    found: list[tuple[FusedModule, ...]] = []
    why = "" if len(names) > 1 else "its layers are not made of one attention and one MLP"
    for group in names:
        fault = next((text for name in group if (text := _fault(name, seen.get(name)))), "")
        why = why or fault
        found.append(() if fault else tuple(FusedModule(name, seen[name].returns) for name in group))
    whole, attention, mlp = (*found, (), ())[:3]
    if not (attention and mlp):
        attention = mlp = ()
    widths = frozenset(one.width for one in seen.values() if one.width)
    return FusedLayout(hidden, implementation, whole, attention, mlp, why, widths)


def _choose_attention(model: Any) -> str:
    """The implementation the model computes its attention with; another than the known ones is replaced."""
    name = model.config._attn_implementation
    if name not in ATTENTION_IMPLEMENTATIONS:
        name = "sdpa" if model._supports_sdpa else "eager"
        model.set_attn_implementation(name)
    return name


def _layers(model: nn.Module, count: int) -> tuple[str, list[nn.Module]]:
    """The list of modules that has one entry per layer, the one with most parameters, and its name."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count and n]
    if not lists:
        return "", []
    name, found = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return name, list(found)


def _parts(layer: nn.Module) -> tuple[str, str] | None:
    """The names of a layer's attention and of its MLP; None where it has not exactly one of each."""
    heavy = [name for name, child in layer.named_children() if any(p.dim() > 1 for p in child.parameters())]
    attention = [name for name in heavy if isinstance(getattr(layer._modules[name], "layer_idx", None), int)]
    if len(heavy) != 2 or len(attention) != 1:
        return None
    (mlp,) = set(heavy) - set(attention)
    return attention[0], mlp


@torch.inference_mode()
def _watch(model: Any, names: list[str], hidden: int, device: torch.device) -> dict[str, _Seen]:
    """Runs one token through the model and notes how each named module is called."""
    seen: dict[str, _Seen] = {}
    handles = []

    def watch(name: str, own: tuple[str, ...]) -> None:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[name] = _noted(args, dict(zip(own[1:], args[1:], strict=False)) | kwargs, own, output, hidden)

        handles.append(model.get_submodule(name).register_forward_hook(note, with_kwargs=True))

    for name in names:
        watch(name, argument_names(model.get_submodule(name)))
    was_training = model.training
    try:
        model.eval()
        token = torch.ones(1, 1, dtype=torch.int64, device=device)
        model.base_model(input_ids=token, attention_mask=token, use_cache=True)  # without the LM head
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return seen


def _noted(args: Any, rest: dict[str, Any], own: tuple[str, ...], output: Any, hidden: int) -> _Seen:
    first = args[0] if args else rest.pop(own[0], None)
    outputs = output if isinstance(output, tuple) else (output,)
    shape = (1, 1, hidden)
    tables = rest.get("position_embeddings")
    known = (*CONTEXT_ARGUMENTS, *CACHE_ARGUMENTS, *IGNORED_ARGUMENTS)
    return _Seen(
        unknown=[name for name, value in rest.items() if name not in known and _holds_tensor(value)],
        width=tables[0].shape[-1] if isinstance(tables, tuple) and isinstance(tables[0], Tensor) else 0,
        returns=len(output) if isinstance(output, tuple) else 0,
        fits=isinstance(first, Tensor) and isinstance(outputs[0], Tensor) and first.shape == outputs[0].shape == shape,
    )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


def _fault(name: str, seen: _Seen | None) -> str:
    if seen is None:
        return f"{name} is not called by the model's forward"
    if seen.unknown:
        return f"{name} is given {', '.join(seen.unknown)}, which does not travel"
    return "" if seen.fits else f"{name} does not map [batch, positions, hidden] to the same"


def fused_names(layout: FusedLayout | None) -> Iterator[str]:
    """The full names of all modules of a layout."""
    if layout is not None:
        for group in (layout.layers, layout.attention, layout.mlp):
            yield from (module.name for module in group)
