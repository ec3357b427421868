"""The runner's end of the remote procedure calls.

The server is not trusted: every reply is checked against what was asked (request id, method, number of
tensors, exact shapes and dtype) before any of it is used, and what does not fit is a :class:`ProtocolError`.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import config, curve
from .calls import Protection
from .errors import ConfigError
from .fused_requests import FusedRequests, KvSequence
from .in_flight import InFlight
from .in_place import InPlace
from .model_info import InitInfo
from .perf_log import PerfLog, model_facts, transport_fact
from .protocol import FLOAT_DTYPES, Method
from .requests import Requests
from .submitting import Submitter
from .telemetry import Telemetry, print_stats
from .tracing import Recorder
from .transport import connect

#: Default bound on the requests in flight: enough to hide the way there and back, few enough to cancel.
MAX_IN_FLIGHT = 64


class GPUClient:
    """Calls the heavy modules of a model on a :class:`GPUServer`.

    ``endpoint``: as the server's. ``timeout``: seconds one call may take, None for ever. ``wire_dtype``: the
    dtype of activations on the wire, ``auto`` (the served model's), ``float32``, ``bfloat16`` or ``float16``.
    ``wait``: how to wait for a reply, see :func:`connect`. ``max_in_flight``: how many requests may be under way
    at once. ``perf_log``: a file to write a row per round trip to, see :mod:`tsqp.perf_log`. ``curve_key``,
    ``curve_server``: this client's secret-key file and the server's public-key file, see :func:`connect`.

    Inputs are cast to the wire dtype before they are sent; the server computes in its model's dtype and
    rounds the result to the wire dtype; results come back in the caller's dtype. Each rounding has a relative
    error of at most 2^-24 (float32), 2^-11 (float16) or 2^-8 (bfloat16) of each element, so for a linear
    module ``y = W x + b`` narrower wires add at most ``u (|W| |x| + |y|)`` to the model's own error, ``u``
    being that bound. float16 also turns magnitudes over 65504 into infinities; bfloat16 and float32 share one
    range.

    A call that times out raises :class:`WaitTimeoutError` and leaves the connection usable: the late reply is
    told by its request id, dropped and counted. Calls raise :class:`RemoteError` with the server's status for
    a refused request, :class:`ProtocolError` for a reply that is not what was asked for,
    :class:`PeerDiedError` and :class:`ClosedError`.

    :attr:`submit` has the same methods and returns before the reply is there, so that many requests are under
    way at once::

        calls = [client.submit.batch_linear(layer, names, h) for layer, h in work]
        outs = [call.result() for call in calls]

    The server answers in the order of sending. Several threads may use one client, in both ways: nobody waits
    for another's reply, and there is no thread beside theirs.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        timeout: float | None = 30.0,
        wire_dtype: str = "auto",
        connect_timeout: float = 10.0,
        wait: str = "auto",
        *,
        shm: bool = True,
        large: str = "tile",
        protection: Protection | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        perf_log: str | os.PathLike[str] | None = None,
        curve_key: curve.PathLike | None = None,
        curve_server: curve.PathLike | None = None,
    ) -> None:
        if wire_dtype != "auto" and wire_dtype not in FLOAT_DTYPES:
            raise ConfigError(f"wire_dtype {wire_dtype!r} is unknown; give auto, {', '.join(FLOAT_DTYPES)}")
        if max_in_flight < 1:
            raise ConfigError(f"max_in_flight={max_in_flight} is too small; give 1 or more")
        self.endpoint = endpoint or config.default_endpoint()
        self.wire_dtype = wire_dtype
        self.telemetry = Telemetry()
        self._protection_name = "none" if protection is None else protection.name
        wire = None if wire_dtype == "auto" else FLOAT_DTYPES[wire_dtype]
        # None of these knows the client: a cycle would keep a dropped client's connection until the collector comes.
        self._channel = connect(
            self.endpoint,
            timeout=connect_timeout,
            shm=shm,
            large=large,
            wait=wait,
            curve_key=curve_key,
            curve_server=curve_server,
        )
        self._flight = InFlight(self._channel, max_in_flight, timeout)
        self._requests = Requests(self.telemetry, self._flight.ask, wire, protection)
        #: Sends a request made by hand and returns its result.
        self.ask = self._run = self._flight.ask
        #: The requests of the fused operators, and what is kept on the server for them.
        self.fused = FusedRequests(self._requests)
        #: The calls that do not wait, see :class:`Submitter`.
        self.submit = Submitter(self._requests, self._flight, self.fused)
        #: Calls whose tensors are read and written in their slots, see ``tsqp.in_place``.
        self.in_place = InPlace(self._requests, self._flight)
        #: The performance log, None without.
        self.perf_log: PerfLog | None = None
        if perf_log is not None:
            self._log_to(perf_log, max_in_flight)

    def _log_to(self, path: str | os.PathLike[str], max_in_flight: int) -> None:
        channel, requests = self._channel, self._requests
        try:
            log = PerfLog(
                path,
                lambda: model_facts(requests.info),
                max_in_flight,
                transport=transport_fact(channel.transport),
                endpoint=self.endpoint,
            )
        except BaseException:
            channel.close()
            raise
        self.perf_log, self._flight.round_trip_log = log, log.round_trips
        channel.measure(log.round_trips)
        weakref.finalize(self, log.close)  # of a client that is dropped, or lives until the interpreter ends

    # --- calls ---------------------------------------------------------------------------------------------

    def init(self) -> InitInfo:
        """What the runner has to know of the served model; asked for once, then remembered.

        Other calls ask by themselves where it is needed.
        """
        return self._requests.init()

    def embedding(self, ids: Tensor, module: str | None = None) -> Tensor:
        """Rows of an embedding: ``ids`` integers [..] to [.., out] in the served model's dtype.

        ``module`` is a full name, by default the model's input embedding.
        """
        return self._run(self._requests.embedding(ids, module))

    def batch_linear(self, layer_idx: int | None, names: Sequence[str], h: Tensor) -> list[Tensor]:
        """``h`` [.., in] through several linear modules of a layer in one round trip: one [.., out_i] each.

        ``names`` are relative to the layer (``self_attn.q_proj``), or their last word where the layer has one
        such module (``q_proj``); without a layer (None) they are full names. Raises :class:`ConfigError` for a
        layer or module that does not exist.
        """
        return self._run(self._requests.batch_linear(layer_idx, names, h))

    def linear(self, name: str, h: Tensor) -> Tensor:
        """``h`` [.., in] through the linear module of this full name: [.., out]."""
        return self._run(self._requests.linear(name, h))

    def lm_head(self, h: Tensor) -> Tensor:
        """``h`` [.., hidden] through the model's output embedding: logits [.., vocab]."""
        return self._run(self._requests.lm_head(h))

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``torch.matmul(a, b)`` on the server, batch dimensions broadcast; both operands travel."""
        return self._run(self._requests.matmul(a, b))

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
    ) -> Tensor:
        """Unscaled attention scores Q·Kᵀ against every K of this layer the server holds: [B, H, Q, S].

        ``q`` is [B, H, Q, D]; ``k_new``, ``v_new`` [B, Hkv, N, D] are added to the server's K and V of the
        layer, which then have S positions. Before that, in this order: rows are gathered by ``batch_index``
        (int64 [B]), the ``drop`` first positions are dropped, all but the ``keep`` first of the rest are
        dropped (``keep=0`` starts afresh, None keeps all). ``keys``: only the first so many of the S positions are
        looked at, so that rows of a causal attention need not be computed where they are hidden.

        After a call of this layer that failed on the way (a timeout), how much the server holds is unknown:
        give ``keep`` in the next one, or :class:`ConfigError` is raised.
        """
        return self._run(self._requests.attention_scores(layer_idx, q, k_new, v_new, keep, batch_index, drop, keys))

    def attention_values(self, layer_idx: int, probs: Tensor) -> Tensor:
        """``probs`` [B, H, Q, S] times the first S positions of the V of this layer the server holds: [B, H, Q, D]."""
        return self._run(self._requests.attention_values(layer_idx, probs))

    def fused_mlp(self, layer_idx: int, h: Tensor) -> Tensor:
        """``h`` [B, N, hidden] through the whole MLP of a layer (experts and all) in one round trip: [B, N, hidden]."""
        return self._run(self.fused.mlp(layer_idx, h))

    def fused_attention(self, layer_idx: int, h: Tensor, **options: Any) -> Tensor:
        """``h`` [B, N, hidden] through the whole attention of a layer, output projection included: [B, N, hidden].

        ``options`` (see :meth:`FusedRequests.call`): ``position_embeddings``, the cosine and the sine
        [1 or B, N, D]; ``mask``, True where a query sees a key, or added to the scores, [1 or B, 1 or H, N, S], None:
        causal; ``position_ids`` int64 [1 or B, N] for families that use them; or ``reuse=True`` for those of the last
        call with this ``slot``. ``sequence`` (of :meth:`new_sequence`) is where K and V are kept, without it the N
        positions see only each other; ``new=True`` in the first call of a layer. Before the new positions are
        appended to the S - N earlier ones, rows are gathered by ``batch_index`` (int64 [B]), the ``drop`` first
        positions dropped and all but the ``keep`` first of the rest (None keeps all); ``source`` is a sequence to
        build upon that itself stays as it is.

        Raises :class:`RemoteError`: with ``Status.LIMIT`` where this client's K and V would take more than the
        server's ``kv_limit_bytes``. A refused call changes nothing.
        """
        return self._run(self.fused.call(Method.FUSED_ATTENTION, layer_idx, h, **options))

    def fused_layer(self, layer_idx: int, h: Tensor, **options: Any) -> Tensor:
        """``h`` [B, N, hidden] through a whole decoder layer, norms and residuals included: [B, N, hidden].

        ``options`` and errors are those of :meth:`fused_attention`.
        """
        return self._run(self.fused.call(Method.FUSED_LAYER, layer_idx, h, **options))

    def new_sequence(self) -> KvSequence:
        """A place on the server for the K and V of one cache; given back when the object is garbage."""
        return self.fused.new_sequence()

    def drop_cache(self) -> None:
        """Makes the server forget the K and V of this connection, of all sequences."""
        self._run(self._requests.drop_cache())

    def ping(self) -> float:
        """Seconds of a round trip in which the server does a small real computation."""
        begin = time.perf_counter()
        self._run(self._requests.ping())
        return time.perf_counter() - begin

    def server_stats(self) -> dict[str, float]:
        """The server's numbers of this connection: requests, errors, kv_bytes, kv_limit_bytes, uptime_seconds."""
        return self._run(self._requests.server_stats())

    # --- statistics and end --------------------------------------------------------------------------------

    @property
    def info(self) -> InitInfo | None:
        """What :meth:`init` returned, None before it was called."""
        return self._requests.info

    @property
    def wire_itemsize(self) -> int:
        """Bytes of one element of an activation on the wire; asks for Init where that decides."""
        return self._requests.wire().itemsize

    @property
    def slot_bytes(self) -> int:
        """The size up to which a message goes through one slot of the ring; 0 where there is no ring."""
        return int(self._channel.threshold)

    @property
    def timeout(self) -> float | None:
        """Seconds one call may take, None for ever; may be changed at any time."""
        return self._flight.timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        self._flight.timeout = seconds

    @property
    def round_trips(self) -> int:
        """Requests that were answered, refused ones included."""
        return self._flight.round_trips

    @property
    def stale_replies(self) -> int:
        """Replies that came after their call had timed out or was cancelled, and were dropped."""
        return self._flight.stale_replies

    @property
    def errors(self) -> int:
        """Requests the server refused."""
        return self._flight.errors

    @property
    def stats(self) -> dict[str, Any]:
        """Plain numbers: transfers per carrier, calls per method, ``operators`` (see :class:`Telemetry`),
        round trips.

        ``busy_seconds`` is the time in which a call was in flight, ``seconds`` that since the client was made.
        """
        return {
            "side": "runner",
            "endpoint": self.endpoint,
            "protection": self._protection_name,
            "round_trips": self.round_trips,
            "errors": self.errors,
            "stale_replies": self.stale_replies,
            "in_flight": len(self._flight),
            "busy_seconds": self._flight.busy_ns / 1e9,
            **self.telemetry.snapshot(),
            **self._channel.stats,
        }

    def trace(self, recorder: Recorder | None) -> None:
        """Writes down what this client and the models that use it do from now on, for a timeline; None ends that."""
        self._flight.recorder = self.telemetry.recorder = recorder

    def print_stats(self) -> None:
        """Prints :attr:`stats` as tables."""
        print_stats(self.stats, "tsqp runner")

    def close(self) -> None:
        """Closes the connection; the server frees what it kept for it. May be called more than once.

        Calls in flight end with :class:`ClosedError`.
        """
        self._channel.close()
        self._flight.close()
        if self.perf_log is not None:
            self.perf_log.close()

    def __enter__(self) -> GPUClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
