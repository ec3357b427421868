"""Every change that a split makes to one model, written down so that all of it can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .client import GPUClient
from .placement import Placement
from .remote import RemoteModule
from .tiles import Tiling
from .timing import Clock


class Attachment:
    """Every change made to one model, and how to take it back."""

    def __init__(
        self,
        model: PreTrainedModel,
        client: GPUClient,
        placement: Placement,
        *,
        owns_client: bool,
        skeleton: bool,
        tiling: Tiling,
    ) -> None:
        self.model, self.client, self.placement = model, client, placement
        self.owns_client, self.skeleton, self.tiling = owns_client, skeleton, tiling
        self.clock = Clock(client.telemetry)
        self._undo: list[Callable[[], None]] = []

    def replace(self, parent: nn.Module, name: str, module: RemoteModule) -> None:
        """Puts ``module`` in the place of ``parent``'s child ``name``.

        Where that has no weights to compute with, the stand-in stays when all is taken back, and says so when
        called.
        """
        original = parent._modules[name]
        parent._modules[name] = module
        self._undo.append(module.close if self.skeleton else partial(parent._modules.__setitem__, name, original))

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute of this one instance, in front of one its class may have."""
        vars(module)[name] = value
        self._undo.append(partial(vars(module).pop, name, None))

    def hook(self, handle: Any) -> None:
        """Remembers a hook's handle."""
        self._undo.append(handle.remove)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Remembers something to be done when all is taken back."""
        self._undo.append(action)

    def hollow(self, module: nn.Module, forward: Callable[..., Any], refuse: Callable[..., Any]) -> None:
        """Replaces a module's ``forward`` and takes away what is in it.

        Where that has no weights to compute with, ``refuse`` stays as its ``forward`` when all is taken back.
        """
        before = {name: dict(getattr(module, name)) for name in ("_modules", "_parameters", "_buffers")}
        for name in before:
            getattr(module, name).clear()
        vars(module)["forward"] = forward

        def fill() -> None:
            if self.skeleton:
                vars(module)["forward"] = refuse
                return
            vars(module).pop("forward", None)
            for name, content in before.items():
                getattr(module, name).update(content)

        self._undo.append(fill)

    def choose_attention(self, name: str) -> None:
        """Sets the attention implementation of the model's config and of the configs inside it."""
        for module in self.model.modules():
            config = getattr(module, "config", None)
            before = getattr(config, "_attn_implementation_internal", None)
            if config is not None and before != name:
                config._attn_implementation_internal = name
                self._undo.append(partial(setattr, config, "_attn_implementation_internal", before))

    def undo(self) -> None:
        """Takes all changes back, the last one first, and closes the client if it was made for this model.

        This is ``model.close()``; a second call does nothing.
        """
        while self._undo:
            self._undo.pop()()
        if self.owns_client:
            self.client.close()
