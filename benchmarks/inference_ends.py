"""The other processes of the inference benchmark: stock transformers in one, the server of the split in another."""

from __future__ import annotations

import contextlib
import gc
import signal
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import tsqp

from . import baselines, machine
from .inference_limits import Peaks, measure_peaks
from .inference_model import Spec, Timed, build
from .peers import processes

START_S = 600.0
STOP_S = 30.0


class EndFailedError(RuntimeError):
    """One of the other processes failed; the message holds its traceback, or says that it is gone."""


def _laid_out_anew(_module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """A forward pre-hook: the same input with the strides of its shape."""
    (x,) = inputs
    return (x.flatten().view(x.shape),)


class Stock:
    """transformers as it is, in a process of its own: what the split is compared with.

    But for one thing, in stock's favour. The last position that a prefill gives to the LM head keeps the strides of the
    whole sequence, and with these torch's bfloat16 product on a CPU rearranges the weight first, which takes seconds
    for this vocabulary. So the position is laid out anew, as it is where it comes over a wire.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._model = build(spec)
        self._model.get_output_embeddings().register_forward_pre_hook(_laid_out_anew)
        timed = Timed(self._model, spec.device)
        self.prefill, self.decode, self.logits, self.forget = timed.prefill, timed.decode, timed.logits, timed.forget

    def peaks(self) -> Peaks:
        """What this device does at best, with the threads of the benchmark."""
        found = measure_peaks(self._spec)
        gc.collect()
        return found

    def attention(self) -> str:
        """The attention implementation transformers chose."""
        return str(self._model.config._attn_implementation)


class End:
    """A process of its own that answers calls of the object it made."""

    def __init__(self, name: str, target: Any, *arguments: Any) -> None:
        self.name = name
        self._pipe, theirs = processes.Pipe()
        self._process = processes.Process(target=target, args=(theirs, *arguments), name=name, daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def result(self, limit_s: float = START_S) -> Any:
        """What the process says next; raises :class:`EndFailedError` where it failed or says nothing."""
        try:
            if not self._pipe.poll(limit_s):
                raise EndFailedError(f"the {self.name} process did not answer for {limit_s:.0f} s")
            good, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(STOP_S)
            raise EndFailedError(f"the {self.name} process ended, exit code {self._process.exitcode}") from None
        if not good:
            raise EndFailedError(f"the {self.name} process failed:\n{value}")
        return value

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of the process's object."""
        self._pipe.send((method, arguments))
        return self.result()

    def stop(self) -> None:
        """Ends the process, in order where it still can."""
        self._pipe.close()
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _begin(spec: Spec) -> None:
    machine.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's business
    torch.set_num_threads(spec.threads)


def _run_stock(pipe: Connection, spec: Spec) -> None:
    _begin(spec)
    with _told(pipe), contextlib.suppress(EOFError):  # the pipe's end is the order to stop
        stock = Stock(spec)
        pipe.send((True, stock.attention()))
        while True:
            method, arguments = pipe.recv()
            pipe.send((True, getattr(stock, method)(*arguments)))


def _run_server(pipe: Connection, spec: Spec, endpoint: str, addresses: dict[str, Any]) -> None:
    _begin(spec)
    with _told(pipe), contextlib.suppress(EOFError):
        model = build(spec)
        with (
            tsqp.GPUServer(
                model,
                endpoint,
                device=spec.device,
                dtype=spec.dtype,
                linear_backend=spec.linear_backend,
                pack_weights=None if spec.linear_backend == "torch" else True,  # as of a checkpoint
            ) as server,
            baselines.serving(model, spec.device, addresses),
        ):
            pipe.send((True, server.endpoint))
            pipe.recv()


@contextlib.contextmanager
def _told(pipe: Connection) -> Iterator[None]:
    """What fails inside is told to the benchmark's process."""
    try:
        yield
    except Exception:
        with contextlib.suppress(OSError):
            pipe.send((False, traceback.format_exc()))
        raise


class Ends:
    """Both other processes of a run, ready; ``addresses`` are the baselines' that could start."""

    def __init__(self, stock: End, server: End, addresses: dict[str, Any]) -> None:
        self.stock, self.server, self.addresses = stock, server, addresses
        self.attention: str = stock.result()
        self.endpoint: str = server.result()


@contextlib.contextmanager
def running(spec: Spec, wanted: Sequence[str], skipped: dict[str, str]) -> Iterator[Ends]:
    """Starts both processes and ends them; baselines of ``wanted`` that can't start are in ``skipped``."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tsqp-bench-")))
        addresses = stack.enter_context(baselines.addresses(wanted, folder, skipped))
        stock = End("stock", _run_stock, spec)
        stack.callback(stock.stop)
        server = End("server", _run_server, spec, f"ipc://{folder}/server.sock", addresses)
        stack.callback(server.stop)
        yield Ends(stock, server, addresses)
