"""Imports torch and transformers without what a runner never uses: the compiler, the cluster, optional packages.

transformers imports torch's compiler (torch._dynamo, and with it torch._inductor and sympy) because some of its
functions are marked "do not compile" where they are defined, and torch's distributed tensors because it could train
with them. A process that compiles nothing and is alone needs neither. Every module less is less code in the enclave,
less memory, and fewer files to be measured when it starts.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

#: Packages that transformers uses where it finds them, for images, sound, chats and progress: never for the
#: continuing of a text.
NEEDLESS: tuple[str, ...] = ("PIL", "torchvision", "torchaudio", "librosa", "soundfile", "sklearn", "scipy", "pandas")
NEEDLESS += ("matplotlib", "rich", "jinja2", "triton", "tensorboard")
_COMPILER = "torch._dynamo"
#: Set where they are not set, before torch loads.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # workers that spin take the core the server computes on
    "OPENBLAS_NUM_THREADS": "1",  # numpy's own pool: no runner multiplies matrices with numpy
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def prepare(threads: int | None = None) -> None:
    """Sets the environment variables that torch, numpy and transformers read when they load."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


@contextmanager
def lean_imports() -> Iterator[None]:
    """Inside the block transformers' modules load without compiler, cluster and the packages of :data:`NEEDLESS`.

    Where torch's compiler is asked for something it would have to compile, it loads as it always does. Nothing
    happens in a process that has loaded transformers already: there is nothing left to be saved.
    """
    if "transformers" in sys.modules:
        yield
        return
    with ExitStack() as undo:
        undo.enter_context(_without(NEEDLESS))
        torch = importlib.import_module("torch")
        if _COMPILER not in sys.modules:
            uncompiled = _Uncompiled(torch)
            undo.callback(uncompiled.leave)
            for name in ("disable", "allow_in_graph", "assume_constant_result"):
                undo.enter_context(_replaced(torch.compiler, name, getattr(uncompiled, name)))
        # What a torch that was built without it says; transformers asks this before it imports any of it.
        undo.enter_context(_replaced(torch.distributed, "is_available", lambda: False))
        yield


@contextmanager
def _without(packages: tuple[str, ...]) -> Iterator[None]:
    """Inside the block these packages seem not to be installed, unless they are loaded already."""
    hidden = [name for name in packages if name not in sys.modules]
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules.update(dict.fromkeys(hidden))  # None is Python's own sign for "there is no such module"
    try:
        yield
    finally:
        for name in hidden:
            if name in modules and modules[name] is None:
                del modules[name]


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Inside the block ``module.name`` is ``value``."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class _Uncompiled(ModuleType):
    """Stands for ``torch._dynamo`` where nothing is compiled: its marks mean nothing.

    Its submodules load as ever, alone: transformers takes a helper for masks from one of them. Whoever asks for
    anything else gets the real one, in the place of this one from then on.
    """

    def __init__(self, torch: ModuleType) -> None:
        super().__init__(_COMPILER)
        self.__path__ = [os.path.join(path, "_dynamo") for path in torch.__path__]
        self._torch = torch
        sys.modules[_COMPILER] = self
        vars(torch)["_dynamo"] = self

    def leave(self) -> None:
        """Makes room for the real one."""
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
        if vars(self._torch).get("_dynamo") is self:
            del vars(self._torch)["_dynamo"]

    @staticmethod
    def disable(fn: Any = None, recursive: bool = True, **_: Any) -> Any:
        """Not compiled it is anyway."""
        return _itself if fn is None else fn

    @staticmethod
    def allow_in_graph(fn: Any) -> Any:
        """There is no graph."""
        return fn

    @staticmethod
    def assume_constant_result(fn: Any) -> Any:
        """Asked each time."""
        return fn

    @staticmethod
    def mark_static_address(*_: Any, **__: Any) -> None:
        """Said of a static cache, for graphs of CUDA."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's questions
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(_COMPILER), name)


def _itself(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn
