"""A server that computes on a CUDA device: page-locked rings, copies straight between slot and device, graphs.

A request's tensors are copied from its slot to the device by the device's own engine, and results from the device
into the slot the reply is sent from. That is asynchronous only where the memory is page-locked, so the ring is
registered with the driver in place: best effort, since the limits of the machine may forbid it. A slot is published
after the event that follows its copy, and a request's slot is given back after its reply, so neither is ever read or
written while a copy runs.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .cuda_driver import SUCCESS, Driver

log = logging.getLogger("tsqp.server")

#: A module is captured as a graph when it was called this often with one shape, of at most so many rows.
_CALLS_BEFORE_CAPTURE, _MAX_GRAPH_ROWS = 4, 16
#: Graphs kept; each holds its inputs and outputs on the device.
_MAX_GRAPHS = 1024
#: Who has its share of graphs may replace one after so many calls: to capture one takes as long as several calls.
_CALLS_PER_REPLACEMENT = 128
_WARM_UP_RUNS = 3


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A ``with`` block in whose thread a CUDA device is the current one.

    That is what streams, events and kernels of other libraries are made for where nobody names a device, and another
    thread's choice does not hold in this one.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class PageLock:
    """One client's shared memory, page-locked for the device as long as this is not released.

    ``pinned`` says whether that worked, ``reason`` why not. To be released before the memory is unmapped.
    """

    def __init__(self, mapping: tuple[int, int] | None, driver: Any, synchronize: Callable[[], None]) -> None:
        self._driver, self._synchronize = driver, synchronize
        self._address = 0
        self.reason = ""
        if mapping is None:
            self.reason = "no shared memory"
            return
        error = driver.register(*mapping)
        if error == SUCCESS:
            self._address = mapping[0]
        else:
            self.reason = f"cuMemHostRegister of {mapping[1]} bytes: {driver.error_name(error)}"

    @property
    def pinned(self) -> bool:
        return self._address != 0

    def release(self) -> None:
        """Gives the pages back after the copies that still use them; a second call does nothing."""
        address, self._address = self._address, 0
        if address:
            try:
                self._synchronize()
            except RuntimeError as fault:  # of an earlier kernel: whoever called that is told
                log.warning("the device has failed: %s", str(fault).partition("\n")[0])
            error = self._driver.unregister(address)
            if error != SUCCESS:
                log.warning("cuMemHostUnregister: %s", self._driver.error_name(error))


class CudaWork:
    """How replies leave a CUDA device, and how clients' memory is prepared for it."""

    def __init__(self, device: torch.device, driver: Any = None, runtime: Any = torch.cuda) -> None:
        self._device = device
        self._driver = Driver(_number(device)) if driver is None else driver
        self._synchronize = partial(runtime.synchronize, device)
        self._stream = partial(runtime.current_stream, device)
        self._done = runtime.Event()

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """True for results that are on the device."""
        return bool(tensors) and all(tensor.device.type == self._device.type for tensor in tensors)

    def page_lock(self, channel: Any) -> PageLock:
        """Page-locks the channel's shared memory, best effort."""
        lock = PageLock(channel.mapping, self._driver, self._synchronize)
        if lock.pinned:
            log.info("ring of %s is page-locked", channel.peer)
        else:
            log.warning("ring of %s is not page-locked (%s): copies take longer", channel.peer, lock.reason)
        return lock

    def send(self, channel: Any, tensors: Sequence[torch.Tensor], begin_ns: int, queue_ns: int, **fields: Any) -> int:
        """Copies results from the device into the reply's slot and sends it once they are there.

        ``fields`` are those of ``Channel.reserve``. Returns the nanoseconds since ``begin_ns`` that computing and
        copying took.
        """
        reservation = channel.reserve([(t.shape, t.dtype) for t in tensors], transfer=True, **fields)
        with reservation as slot:
            for out, result in zip(slot, tensors, strict=True):
                out.copy_(result, non_blocking=True)
            # The copies' stream by name: without one it is that of the thread's device, which may be another.
            self._done.record(self._stream())
            self._done.synchronize()
            compute_ns = time.perf_counter_ns() - begin_ns
            reservation.set_times(compute_ns, queue_ns)
        return compute_ns


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class _Owner:
    """A client's calls of graphs, and from which of them on it may replace one."""

    __slots__ = ("__weakref__", "calls", "replaces_at")

    def __init__(self) -> None:
        self.calls = self.replaces_at = 0


class Graphs:
    """CUDA graphs of functions of one tensor, for inputs so small that launching costs more than computing.

    A graph's outputs are overwritten by the next run of it or of another, since they share memory: they are to be
    copied away before. Clients choose shapes, and so what there are graphs of: each has a ``share`` of them, and
    where that, or all there may be, is used up, the one not used for longest goes, of whoever has most.
    """

    def __init__(
        self,
        capture: Callable[[Callable[[Any], Any], Any], Callable[[Any], Any]] | None = None,
        share: int = _MAX_GRAPHS,
    ) -> None:
        self._capture = Capture() if capture is None else capture
        self._share = min(share, _MAX_GRAPHS)
        self._calls: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[Callable[[Any], Any], weakref.ref[_Owner]]] = {}  # last used last
        self._owners: weakref.WeakKeyDictionary[Any, _Owner] = weakref.WeakKeyDictionary()
        self._nobody = _Owner()

    def run(
        self, key: Any, function: Callable[[torch.Tensor], Any], x: torch.Tensor, rows: int, client: object = None
    ) -> Any:
        """``function(x)``, by a graph once ``key`` (which has to tell function, shape and dtype apart) came often.

        ``client`` is for whom; graphs serve whoever asks for the same.
        """
        owner = self._owner(client)
        owner.calls += 1
        found = self._graphs.pop(key, None)
        if found is not None:
            self._graphs[key] = found
            return found[0](x)
        if rows > _MAX_GRAPH_ROWS:
            return function(x)
        if len(self._calls) >= _MAX_GRAPHS * 4:
            self._calls.clear()  # clients choose shapes: what they can make this remember is bounded
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] < _CALLS_BEFORE_CAPTURE or not self._make_room(owner):
            return function(x)
        del self._calls[key]
        graph = self._captured(function, x)
        self._graphs[key] = graph, weakref.ref(owner)
        return graph(x)

    def _owner(self, client: object) -> _Owner:
        if client is None:
            return self._nobody
        owner = self._owners.get(client)
        if owner is None:
            owner = self._owners[client] = _Owner()
        return owner

    def _make_room(self, owner: _Owner) -> bool:
        """Makes room for one graph more of ``owner``; False if it has to do without."""
        if owner.calls < owner.replaces_at:
            return False
        counts = Counter(of() for _, of in self._graphs.values())  # None: of clients that are gone
        if counts[owner] < self._share and len(self._graphs) < _MAX_GRAPHS:
            return True
        victim: _Owner | None = owner
        if counts[owner] < self._share:
            victim = None if counts[None] else max(counts, key=counts.__getitem__)
        if not counts[victim]:
            return False  # it has no share at all
        owner.replaces_at = owner.calls + _CALLS_PER_REPLACEMENT
        del self._graphs[next(key for key, (_, of) in self._graphs.items() if of() is victim)]
        return True

    def _captured(self, function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        """The function's graph; the function itself where it can't be captured, or there is no memory for it."""
        try:
            return self._capture(function, x)
        except RuntimeError as fault:  # a device that has failed says so again when the function is called
            log.warning("computing without a CUDA graph: %s", str(fault).partition("\n")[0])
            return function


class Capture:
    """Records functions as graphs (torch.cuda.graphs: warmed up on a side stream, then captured).

    All graphs share a pool of memory, else each would keep megabytes of its own, and are captured on one stream,
    since cuBLAS keeps a workspace for every stream it has seen.
    """

    def __init__(self, runtime: Any = torch.cuda) -> None:
        self._runtime = runtime
        self._side: Any = None
        self._pool: Any = None

    def __call__(self, function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        """``function`` for inputs like ``x``, which is on the device."""
        runtime = self._runtime
        with runtime.device(x.device):
            if self._side is None:
                self._side, self._pool = runtime.Stream(), runtime.graph_pool_handle()
            side, current = self._side, runtime.current_stream()
            static_in = x.clone()
            side.wait_stream(current)
            with runtime.stream(side):
                for _ in range(_WARM_UP_RUNS):
                    function(static_in)
            current.wait_stream(side)
            graph = runtime.CUDAGraph()
            # What other threads of the process do with the device meanwhile is none of the capture's business.
            with runtime.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                static_out = function(static_in)

        def replay(given: torch.Tensor) -> Any:
            static_in.copy_(given, non_blocking=True)
            graph.replay()
            return static_out

        return replay
