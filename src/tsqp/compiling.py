"""The served model's MLPs, compiled by ``torch.compile``: fewer kernels and less memory traffic on a device.

Attention is left alone: it is one fused kernel already, and its cache changes length with every token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, ModelError
from .loading import ServedModel

log = logging.getLogger("tsqp.server")


class _OrEager:
    """A compiled module's call; the module's own from its first failure on."""

    def __init__(self, name: str, compiled: Callable[..., Any], eager: Callable[..., Any]) -> None:
        self._name, self._compiled, self._eager = name, compiled, eager
        self._call = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._call(*args, **kwargs)
        except Exception as error:
            if self._call is self._eager:
                raise
            # Nothing was changed by a call that failed; what is wrong with the input fails again.
            result = self._eager(*args, **kwargs)
            self._call = self._eager
            log.warning(
                "%s is not compiled any more (%s: %s)", self._name, type(error).__name__, str(error).partition("\n")[0]
            )
            return result


def compile_mlps(served: ServedModel, backend: str) -> int:
    """Compiles the MLP of every layer for any number of rows with a backend of ``torch.compile``; returns how many.

    They are compiled here, which takes seconds to minutes: no client waits for it. Raises
    :class:`~tsqp.errors.ConfigError` for an unknown backend and :class:`~tsqp.errors.ModelError` where the model has
    no MLPs that can be told apart.
    """
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ConfigError(f"torch.compile has no backend {backend!r}; give inductor, or True")
    modules = [served.fused[module.name] for module in served.layout.mlp]
    if not modules:
        raise ModelError("this model's MLPs can't be told apart, so they can't be compiled; serve it without compile")
    for module, info in zip(modules, served.layout.mlp, strict=True):
        _compile(module, info.name, backend)
    with torch.inference_mode():
        for module in modules:
            for rows in (1, 8):  # the first number is compiled for itself, the second for any
                module(torch.zeros(1, rows, served.layout.hidden, dtype=served.dtype, device=served.device))
    return len(modules)


def _compile(module: nn.Module, name: str, backend: str) -> None:
    eager = module._call_impl
    # What nn.Module.compile() sets, with a way back.
    module._compiled_call_impl = _OrEager(name, torch.compile(eager, dynamic=True, backend=backend), eager)
