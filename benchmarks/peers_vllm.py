"""vLLM's MessageQueue, which carries its engine's requests to its workers and their answers back."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

from .peers import Copies, Peer, shm_shortage

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

_MODULE = "vllm.distributed.device_communicators.shm_broadcast"
_CHUNK_BYTES, _CHUNKS = 24 << 20, 10
_OUT_OF_BAND_BYTES = 1 << 20


class VllmMessageQueue(Peer):
    """Two queues of one writer and one local reader each, as vLLM has them between an engine and a worker: a tensor is
    pickled, small ones in the pickle and large ones beside it; what fits no chunk (24 MiB) goes over ZeroMQ."""

    key = "vllm"
    title = "vLLM MessageQueue"

    @classmethod
    def unavailable(cls) -> str | None:
        if importlib.util.find_spec("vllm") is None:
            return "it is not installed (pip install vllm)"
        try:
            importlib.import_module(_MODULE)
        except Exception as error:  # noqa: BLE001 (whatever its import raises, it can't be measured)
            return f"{_MODULE} can't be imported ({type(error).__name__}: {error})"
        return shm_shortage(2 * _CHUNKS * _CHUNK_BYTES)

    @classmethod
    def copies(cls, nbytes: int) -> Copies:
        if nbytes < _OUT_OF_BAND_BYTES:
            return Copies(2, 1, 2, 1, "into the pickle, into the chunk; pickle.loads makes a bytearray")
        if nbytes < _CHUNK_BYTES:
            return Copies(1, 1, 1, 1, "into the chunk; dequeue makes a bytearray of it")
        return Copies(2, 0, 2, 0, "ZeroMQ sends from the tensor and keeps what arrives; the kernel copies in and out")

    def address(self) -> Any:
        queue = importlib.import_module(_MODULE).MessageQueue
        self._requests = queue(1, 1)
        self.stack.callback(self._requests.shutdown)
        self._mine, self._theirs = multiprocessing.Pipe()
        self.stack.callback(self._mine.close)
        return self._requests.export_handle(), self._theirs

    def started(self) -> None:
        self._theirs.close()

    @staticmethod
    def serve(address: Any, ready: Callable[[], None]) -> None:
        handle, wire = address
        queue = importlib.import_module(_MODULE).MessageQueue
        requests, replies = queue.create_from_handle(handle, 0), queue(1, 1)
        wire.send(replies.export_handle())
        ready()
        requests.wait_until_ready()
        replies.wait_until_ready()
        while (tensor := requests.dequeue()).numel() > 0:
            replies.enqueue(tensor)
        requests.shutdown()
        replies.shutdown()

    def connect(self, address: Any) -> None:
        queue = importlib.import_module(_MODULE).MessageQueue
        self._replies = queue.create_from_handle(self._mine.recv(), 0)
        self.stack.callback(self._replies.shutdown)
        self._requests.wait_until_ready()
        self._replies.wait_until_ready()

    def echo(self, tensor: torch.Tensor) -> torch.Tensor:
        self._requests.enqueue(tensor)
        return self._replies.dequeue()

    def send_end(self) -> None:
        self._requests.enqueue(torch.empty(0))
