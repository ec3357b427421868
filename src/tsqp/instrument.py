"""The runner's own operators in a split model: timed, and computed by :mod:`tsqp.ops` where that is the same.

A norm or gated MLP is run through :mod:`tsqp.ops` only if its own ``forward`` was seen to compute that very
formula on random numbers; every other module keeps its ``forward`` and is only timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import ops
from .client import GPUClient
from .tiled_mlp import GatedMlp
from .tiles import Tiling
from .timing import Clock

#: Relative tolerance of the comparison on random numbers, by dtype: a few units in the last place.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
#: What a module can raise when called with stand-ins for what it is made of.
_PROBE_FAULTS = (AttributeError, TypeError, RuntimeError, ValueError, IndexError)


class _Changes(Protocol):
    """Where changes are made reversibly; :class:`tsqp.attachment.Attachment`."""

    clock: Clock
    client: GPUClient
    tiling: Tiling

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None: ...

    def hook(self, handle: Any) -> None: ...


def instrument(model: nn.Module, changes: _Changes) -> None:
    """Times ``model``'s forward, norms, rotary modules and gated activations; all through ``changes``."""
    clock = changes.clock
    for module in model.modules():
        if _is_norm(module):
            forward = partial(_rms_norm, module) if is_plain_rms_norm(module) else module.forward
            changes.set_attribute(module, "forward", clock.timed("tee_rmsnorm", forward))
        elif "rotary" in type(module).__name__.lower():
            changes.set_attribute(module, "forward", clock.timed("tee_rotary", module.forward))
        elif is_gated_mlp(module):
            gated = clock.timed("tee_silu", ops.silu_mul)
            mlp = GatedMlp(module, gated, changes.client, clock, changes.tiling.mlp)
            changes.set_attribute(module, "forward", mlp)
    changes.hook(model.register_forward_pre_hook(clock.forward_began))
    changes.hook(model.register_forward_hook(clock.forward_ended))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(module.children())


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    result = ops.rms_norm(x, module.weight, module.variance_epsilon)
    assert isinstance(result, Tensor)
    return result


def is_plain_rms_norm(module: Any) -> bool:
    """True where ``module(x)`` is ``ops.rms_norm(x, module.weight, module.variance_epsilon)``, tried on
    numbers.
    """
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float) or weight.is_meta:
        return False
    # Rows of very different size, the smallest so small that epsilon shows.
    x = _random(3, weight.shape[0]) * torch.tensor([[1.0], [30.0], [eps**0.5]])
    x = x.to(weight.dtype)
    return _agree(lambda: module(x), lambda: _rms_norm(module, x))


def is_gated_mlp(module: Any) -> bool:
    """True where ``module(x)`` is ``down_proj(silu(gate_proj(x)) * up_proj(x))``, tried with other
    projections.
    """
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if not all(callable(getattr(module, part, None)) for part in parts):
        return False
    if {name for name, _ in module.named_children()} - set(parts):
        return False
    # Projections that are cheap and tell gate, up and down apart; all else the forward may look at is the
    # module's.
    outside = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    double = SimpleNamespace(**outside, training=False) if "training" not in outside else SimpleNamespace(**outside)
    double.gate_proj, double.up_proj, double.down_proj = (
        (lambda x: 1.5 * x),
        (lambda x: x - 0.5),
        (lambda x: 3 * x),
    )
    double.act_fn = module.act_fn
    x = 4 * _random(2, 3, 16)
    return _agree(lambda: type(module).forward(double, x), lambda: 3 * ops.silu_mul(1.5 * x, x - 0.5))


def _random(*shape: int) -> Tensor:
    # A generator of its own: the user's random state has to stay as it is.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(17))


@torch.no_grad()
def _agree(theirs: Callable[[], Any], ours: Callable[[], Tensor]) -> bool:
    try:
        found, expected = theirs(), ours()
    except _PROBE_FAULTS:
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    tolerance = _TOLERANCE.get(expected.dtype, 0.0)
    return torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance * 1e-2)
