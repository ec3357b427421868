"""The calls of a client that do not wait: ``client.submit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from .errors import ConfigError
from .fused_requests import FusedRequests
from .in_flight import InFlight
from .pending import PendingCall
from .protocol import Method
from .requests import Requests

T = TypeVar("T")


class Submitter:
    """Each method takes what the client's method of that name takes, sends the request, and returns a
    :class:`PendingCall` whose ``result()`` is what the client's method would have returned.

    ``client.submit("batch_linear", layer, names, h)`` is the same as ``client.submit.batch_linear(layer, names,
    h)``, for a name that is only known at run time.

    Where as many requests are in flight as may be, or as many bytes, a call first waits for replies, at most
    the client's ``timeout`` (see :meth:`room` for asyncio). What is wrong with the arguments is raised here, what
    the server says of them by ``result()``, or by ``await`` of the call. The tensors may be changed as soon as the
    method returns. The first call of a client asks for Init, and waits for that.
    """

    def __init__(self, requests: Requests, flight: InFlight, fused: FusedRequests) -> None:
        self._requests = requests
        self._fused = fused
        self._flight = flight

    async def room(self) -> None:
        """For asyncio: returns once a request could be sent without waiting for replies, so that the event loop is
        not held up by a submit while as many are in flight as may be.

        ``await client.submit.room(); call = client.submit.linear(name, h); ...; y = await call``
        """
        await self._flight.arrival(self._flight.has_room)

    def _send(self, call: PendingCall[T]) -> PendingCall[T]:
        return self._flight.submit(call, self._flight.timeout)

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> PendingCall[Any]:
        """Submits a call of the method of this name; raises :class:`ConfigError` if there is none."""
        if method not in _METHODS:
            raise ConfigError(f"there is no call {method!r} to submit; there are {', '.join(_METHODS)}")
        return getattr(self, method)(*args, **kwargs)

    def embedding(self, ids: Tensor, module: str | None = None) -> PendingCall[Tensor]:
        """See :meth:`GPUClient.embedding`."""
        return self._send(self._requests.embedding(ids, module))

    def batch_linear(self, layer_idx: int | None, names: Sequence[str], h: Tensor) -> PendingCall[list[Tensor]]:
        """See :meth:`GPUClient.batch_linear`."""
        return self._send(self._requests.batch_linear(layer_idx, names, h))

    def linear(self, name: str, h: Tensor) -> PendingCall[Tensor]:
        """See :meth:`GPUClient.linear`."""
        return self._send(self._requests.linear(name, h))

    def lm_head(self, h: Tensor) -> PendingCall[Tensor]:
        """See :meth:`GPUClient.lm_head`."""
        return self._send(self._requests.lm_head(h))

    def matmul(self, a: Tensor, b: Tensor) -> PendingCall[Tensor]:
        """See :meth:`GPUClient.matmul`."""
        return self._send(self._requests.matmul(a, b))

    def attention_scores(
        self,
        layer_idx: int,
        q: Tensor,
        k_new: Tensor,
        v_new: Tensor,
        *,
        keep: int | None = None,
        batch_index: Tensor | None = None,
        drop: int = 0,
        keys: int | None = None,
    ) -> PendingCall[Tensor]:
        """See :meth:`GPUClient.attention_scores`. What the server holds is reckoned on the assumption that the
        requests in flight succeed; if one of a layer is refused, those of the layer that were built upon it
        raise :class:`RemoteError` too, and the next one has to give ``keep``.
        """
        return self._send(self._requests.attention_scores(layer_idx, q, k_new, v_new, keep, batch_index, drop, keys))

    def attention_values(self, layer_idx: int, probs: Tensor) -> PendingCall[Tensor]:
        """See :meth:`GPUClient.attention_values`."""
        return self._send(self._requests.attention_values(layer_idx, probs))

    def fused_mlp(self, layer_idx: int, h: Tensor) -> PendingCall[Tensor]:
        """See :meth:`GPUClient.fused_mlp`."""
        return self._send(self._fused.mlp(layer_idx, h))

    def fused_attention(self, layer_idx: int, h: Tensor, **options: Any) -> PendingCall[Tensor]:
        """See :meth:`GPUClient.fused_attention`."""
        return self._send(self._fused.call(Method.FUSED_ATTENTION, layer_idx, h, **options))

    def fused_layer(self, layer_idx: int, h: Tensor, **options: Any) -> PendingCall[Tensor]:
        """See :meth:`GPUClient.fused_layer`."""
        return self._send(self._fused.call(Method.FUSED_LAYER, layer_idx, h, **options))

    def drop_cache(self) -> PendingCall[None]:
        """See :meth:`GPUClient.drop_cache`."""
        return self._send(self._requests.drop_cache())

    def ping(self) -> PendingCall[None]:
        """A small real computation on the server; the result is None."""
        return self._send(self._requests.ping())

    def server_stats(self) -> PendingCall[dict[str, float]]:
        """See :meth:`GPUClient.server_stats`."""
        return self._send(self._requests.server_stats())


_METHODS = tuple(name for name in vars(Submitter) if not name.startswith("_") and name != "room")
