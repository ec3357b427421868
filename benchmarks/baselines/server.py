"""The server of the baselines: a loop over their sockets that computes one call at a time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import zmq
from torch import Tensor

from tsqp import model_info
from tsqp.loading import load_model

from .wires import Wire, server_wire

_WAIT_MS = 200


class _Loop:
    """Answers the baselines' calls with the modules of a model that GPUServer serves, too."""

    def __init__(self, model: Any, device: str) -> None:
        self._served = load_model(model, device)
        self._stopping = threading.Event()

    def run(self, wires: dict[zmq.Socket[bytes], Wire]) -> None:
        poller = zmq.Poller()
        for socket in wires:
            poller.register(socket, zmq.POLLIN)
        with torch.inference_mode():
            while not self._stopping.is_set():
                for socket, _ in poller.poll(_WAIT_MS):
                    self._answer(wires[socket])
        for wire in wires.values():
            wire.close()

    def stop(self) -> None:
        self._stopping.set()

    def _answer(self, wire: Wire) -> None:
        head, tensors = wire.recv()
        begin = time.perf_counter_ns()
        try:
            replies = self._compute(head, tensors)
        except Exception as error:  # noqa: BLE001 - the client raises it
            wire.send({"error": f"{type(error).__name__}: {error}"}, [])
            return
        wire.send({"compute_ns": time.perf_counter_ns() - begin}, replies)

    def _compute(self, head: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
        if head["method"] == "init":
            return model_info.pack(self._served.info)
        there = [tensor.to(self._served.device) for tensor in tensors]
        if head["method"] == "matmul":
            a, b = there
            outs = [torch.matmul(a, b.mT if head["transposed"] else b)]
        else:
            outs = [self._served.modules[name].call(there[0]) for name in head["names"]]
        return [out.cpu() for out in outs]


@contextlib.contextmanager
def serving(model: Any, device: str, addresses: dict[str, Any]) -> Iterator[None]:
    """Serves ``model`` to the baselines of ``addresses`` while inside, from a thread of its own."""
    if not addresses:
        yield
        return
    loop = _Loop(model, device)
    with zmq.Context() as context:
        sockets = {key: context.socket(zmq.REP) for key in addresses}
        wires = {sockets[key]: server_wire(key, address, sockets[key]) for key, address in addresses.items()}
        thread = threading.Thread(target=loop.run, args=(wires,), name="baselines", daemon=True)
        thread.start()
        try:
            yield
        finally:
            loop.stop()
            thread.join()
