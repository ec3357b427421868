"""Stand-ins for the heavy modules of a model: each sends its input to the server and returns the server's
result.

They hold no weights. :class:`SiblingGroup` joins modules that are fed the same tensor (q, k, v; gate, up)
into one round trip without a change in the code that calls them one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ClosedError, ModelError
from .timing import Clock

#: Sends one tensor and returns one result per module asked for.
Send = Callable[[Tensor], Sequence[Tensor]]


class Fingerprint:
    """Tells whether a tensor object still is, and still holds, what it did when this was made.

    The tensor is held, so that its identity can't pass to another one. In-place changes are seen by torch's
    version counter; tensors made under ``torch.inference_mode()`` have none, so their values are kept and
    compared. Writing through ``.data`` or a NumPy view bypasses the counter and is not seen, here as in
    autograd.
    """

    __slots__ = ("_tensor", "_values", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        inference = tensor.is_inference()
        self._version = None if inference else tensor._version
        self._values = tensor.clone() if inference else None

    def matches(self, tensor: Tensor) -> bool:
        """True where ``tensor`` is the same object with unchanged values."""
        if tensor is not self._tensor:
            return False
        if self._values is not None:
            return torch.equal(self._values, tensor)
        return self._version == tensor._version


class SiblingGroup:
    """One round trip for several modules that are called in turn with the same tensor.

    The first call with a tensor sends one request for all members; the others' results are handed out, once
    each, to calls with that same tensor object unchanged. Any other call (another tensor, one changed in
    place, a member called a second time) asks the server anew.
    """

    def __init__(self, names: Sequence[str], send: Send) -> None:
        self.names = tuple(names)
        self._send = send
        self._origin: Fingerprint | None = None
        self._results: dict[str, Tensor] = {}

    def take(self, name: str, x: Tensor) -> Tensor:
        """The result of member ``name`` for ``x``."""
        if len(self.names) == 1:
            return self._send(x)[0]  # there is no later call to know the tensor again for
        if name not in self._results or self._origin is None or not self._origin.matches(x):
            self.forget()
            results = self._send(x)
            self._origin, self._results = Fingerprint(x), dict(zip(self.names, results, strict=True))
        result = self._results.pop(name)
        if not self._results:
            self.forget()
        return result

    def forget(self) -> None:
        """Drops results nobody asked for and the reference to their input."""
        self._origin = None
        self._results = {}


class RemoteModule(nn.Module):
    """A module whose weights are on the server. Inference only; closed with the model it belongs to."""

    def __init__(self, name: str, call: Callable[[Tensor], Tensor], clock: Clock) -> None:
        super().__init__()
        self.name = name
        self._call = call
        self._clock = clock

    def close(self) -> None:
        """Further calls raise :class:`~tsqp.errors.ClosedError`."""
        self._call = self._refuse

    def _refuse(self, _: Tensor) -> Tensor:
        raise ClosedError(f"{self.name} is on a server this model was detached from; make the model anew")

    def _fetch(self, x: Tensor) -> Tensor:
        """The server's result for ``x``; the client has checked its shape."""
        if self.training:
            raise ModelError("a split model only does inference; call model.eval() before the forward")
        begin = self._clock.now()
        result = self._call(x)
        self._clock.remote_done(begin)
        return result

    def __getattr__(self, attribute: str) -> Any:
        if attribute in ("weight", "bias"):
            raise AttributeError(f"{type(self).__name__} has no {attribute!r} here: it is on the server")
        return super().__getattr__(attribute)


class RemoteLinear(RemoteModule):
    """Stands for an ``nn.Linear``: ``[..., in_features]`` to ``[..., out_features]`` in the dtype of the
    input.

    Raises :class:`~tsqp.errors.ModelError` in training mode or for another width, and what the client raises.
    """

    def __init__(self, name: str, sizes: tuple[int, int], call: Callable[[Tensor], Tensor], clock: Clock) -> None:
        super().__init__(name, call, clock)
        self.in_features, self.out_features = sizes

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ModelError(f"{self.name} got {list(x.shape)}; its last dimension has to be {self.in_features}")
        return self._fetch(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, on the server"


class RemoteEmbedding(RemoteModule):
    """Stands for an ``nn.Embedding``: integer ids ``[...]`` to ``[..., embedding_dim]``.

    ``anchor``, an empty parameter, says in which dtype (and keeps ``model.dtype`` and ``model.device`` true
    where the model has no other parameter left). Raises :class:`~tsqp.errors.ModelError` in training mode,
    and what the client raises.
    """

    def __init__(
        self,
        name: str,
        sizes: tuple[int, int],
        call: Callable[[Tensor], Tensor],
        clock: Clock,
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(name, call, clock)
        self.num_embeddings, self.embedding_dim = sizes
        self.anchor = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self._fetch(ids).to(self.anchor.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, on the server"
