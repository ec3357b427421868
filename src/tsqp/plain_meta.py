"""Builds models on the meta device without torch's symbolic shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

#: What models compute their rotary frequencies and the like with; operators are without their underscores.
_ARITHMETIC = frozenset(("add", "sub", "mul", "div", "truediv", "true_divide", "pow", "reciprocal", "neg", "where"))
_ARITHMETIC |= {"radd", "rsub", "rmul", "rdiv", "rtruediv", "rpow", "sqrt", "rsqrt", "exp", "log", "cos", "sin"}
_ARITHMETIC |= {"gt", "lt", "ge", "le", "eq", "ne", "and", "or", "invert", "logical_not", "bitwise_and", "bitwise_or"}
_DRAWING = (Tensor.normal_, Tensor.uniform_)
#: Of a tensor that is worked on on the CPU to see what comes of it; computed buffers have a few thousand.
_MAX_ELEMENTS = 1 << 20


class PlainMeta(TorchFunctionMode):
    """Inside the block, models are built on the meta device without torch's symbolic shapes, and so without sympy.

    torch works out in Python what becomes of a tensor there. Here random weights are not drawn, as there is no memory
    to draw them into, and the arithmetic of small tensors is done with ones on the CPU, whose shape and dtype are
    those of the result. Anything else that a model does is done as without this.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # nn.init's functions come here by themselves or, where they don't ask, with the tensor's own method.
        if func in _DRAWING or getattr(func, "__module__", "") == nn.init.__name__:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        elif func is torch.arange and not kwargs.get("out"):
            device = torch.device(kwargs.get("device") or torch.get_default_device())
            if device.type == "meta":
                return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        elif func is torch.empty_like and set(kwargs) <= {"dtype", "device"} and args[0].is_meta:
            return torch.empty(args[0].shape, **{"dtype": args[0].dtype, "device": "meta", **kwargs})
        elif _is_arithmetic(func) and _all_small_and_meta(args, kwargs):
            plain_args, plain_kwargs = tree_map(_ones, (args, kwargs))
            return func(*plain_args, **plain_kwargs).to("meta")
        return func(*args, **kwargs)


def _is_arithmetic(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return not in_place and name.strip("_") in _ARITHMETIC


def _all_small_and_meta(args: Any, kwargs: Any) -> bool:
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
    known = all(type(value) is Tensor and value.is_meta and value.numel() <= _MAX_ELEMENTS for value in tensors)
    return bool(tensors) and known and "out" not in kwargs


def _ones(value: Any) -> Any:
    return torch.ones(value.shape, dtype=value.dtype, device="cpu") if isinstance(value, Tensor) else value
