from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from typing_extensions import disjoint_base

from ._message import Decoder, Encoder, Lease, Message
from ._perf import RoundTrips
from ._ring import Doorbell, Ring
from .receiving import HeldMessage

_Port = TypeVar("_Port", bound=Port)

@disjoint_base
class Gate: ...

@disjoint_base
class Holder:
    def __init__(self, lock: Any) -> None: ...
    @property
    def held(self) -> bool: ...
    def take(self, seconds: float = 0.0) -> bool: ...
    def give(self) -> None: ...

@disjoint_base
class Reservation:
    def __enter__(self) -> list[torch.Tensor]: ...
    def set_times(self, compute_ns: int, queue_ns: int) -> None: ...
    def __exit__(self, kind: object, value: object, traceback: object) -> Literal[False]: ...

@disjoint_base
class Forecast:
    def expected_s(self, request_bytes: int) -> float: ...

@disjoint_base
class Port:
    direct_send: bool
    direct_receive: bool
    flush_due: bool
    link_used: bool
    threshold: int
    _closed: bool
    _sent: int
    _sent_bytes: int
    _received: int
    _received_bytes: int
    def __init__(self, tx: Ring | None, rx: Ring | None, threshold: int) -> None: ...
    @property
    def _round_trips(self) -> RoundTrips | None: ...
    def measure(self, round_trips: RoundTrips) -> None: ...
    @property
    def _tx(self) -> Ring | None: ...
    @property
    def _rx(self) -> Ring | None: ...
    @property
    def _encoder(self) -> Encoder: ...
    @property
    def _decoder(self) -> Decoder: ...
    @property
    def send_gate(self) -> Gate: ...
    @property
    def receive_gate(self) -> Gate: ...
    def send(
        self,
        tensors: Sequence[Any],
        *,
        tag: int = 0,
        meta: Mapping[str, Any] | bytes | None = None,
        request_id: int = 0,
        status: int = 0,
        flags: int = 0,
        site: int = 0,
        index: int = 0,
        compute_ns: int = 0,
        queue_ns: int = 0,
        timeout: float | None = None,
        transfer: bool = False,
        wire: str | Sequence[str | None] | None = None,
    ) -> int: ...
    def reserve(
        self,
        specs: Sequence[torch.Tensor | tuple[Sequence[int], torch.dtype]],
        *,
        tag: int = 0,
        meta: Mapping[str, Any] | bytes | None = None,
        request_id: int = 0,
        status: int = 0,
        flags: int = 0,
        site: int = 0,
        index: int = 0,
        compute_ns: int = 0,
        queue_ns: int = 0,
        timeout: float | None = None,
        transfer: bool = False,
    ) -> Reservation: ...
    def check_not_reserved(self) -> None: ...
    def recv(self, timeout: float | None = None, forecast: Forecast | None = None) -> Message: ...
    def lease(self, timeout: float | None = None, forecast: Forecast | None = None) -> Lease | HeldMessage: ...
    def recv_or_lease(self, request_id: int, timeout: float | None = None) -> Message | Lease: ...
    def recv_nowait(self, lease: bool = True) -> Lease | HeldMessage | None: ...
    def poll(self) -> bool: ...
    def can_send(self, n: int = 1) -> bool: ...

@disjoint_base
class Watcher:
    def __init__(self, bell: Doorbell) -> None: ...
    def ready(self, ports: list[_Port]) -> list[_Port]: ...
    def wait(self, ports: list[Any], timeout: float | None) -> None: ...
