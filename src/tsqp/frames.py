"""The frames of a ZeroMQ message: small ones are copied, large ones borrow memory until libzmq is done with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from zmq.utils import garbage

from . import descriptors
from .errors import PeerDiedError, WaitTimeoutError

#: Waits are cut into slices of this many seconds; signals and the peer are looked at between them.
SLICE_S = 0.1
#: A copy is cheaper than the bookkeeping of a borrowed buffer below this size.
_COPY_BYTES = 1 << 16


def slice_until(deadline: float) -> float:
    """Seconds to wait now: a slice, or what is left before `deadline`."""
    return max(0.0, min(SLICE_S, deadline - time.monotonic()))


def wait_sent(tracker: zmq.MessageTracker, deadline: float, dead: Callable[[], str | None]) -> None:
    """Waits until libzmq is done with borrowed memory: only then may the caller change it."""
    while not tracker.done:
        try:
            tracker.wait(slice_until(deadline))
        except zmq.NotDone:
            reason = dead()
            if reason:
                raise PeerDiedError(f"the peer died during a transfer: {reason}") from None
            if time.monotonic() >= deadline:
                error = WaitTimeoutError(
                    "a large message was not taken by the peer before the deadline; it stays queued: do not change "
                    "its tensors, and wait longer"
                )
                error.queued = True
                raise error from None


def received(sock: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
    """The frames of the next message, not copied; None where none has come. pyzmq's own call asks the socket after each
    frame whether there are more, which takes longer than all the rest."""
    try:
        frame: zmq.Frame = sock.recv(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    frames = [frame]
    while frame.more:
        frame = sock.recv(copy=False)
        frames.append(frame)
    return frames


def multipart(prefix: Sequence[bytes], head: bytes, frames: Sequence[Any]) -> list[Any]:
    """The frames of a message; small ones are copied, large ones borrow their memory."""
    if any(len(f) >= _COPY_BYTES for f in frames) and not garbage.gc.is_alive():
        # The first borrowed frame of a process makes pyzmq open a context of its own.
        descriptors.require(descriptors.BORROWING, "send a large message")
    large = [zmq.Frame(f, copy=False, track=True) if len(f) >= _COPY_BYTES else bytes(f) for f in frames]
    return [*prefix, head, *large]


def trackers(parts: Sequence[Any]) -> zmq.MessageTracker:
    """One tracker over every borrowed frame of `parts`."""
    return zmq.MessageTracker(*[p.tracker for p in parts if isinstance(p, zmq.Frame)])
