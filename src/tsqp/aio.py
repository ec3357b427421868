"""The asyncio face of a channel: waits happen in a thread of the channel's own, so that the loop goes on.

Only the waiting is done there. Messages are taken and sent by the coroutine, so a cancelled one has lost nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._message import Message
from ._ring import Doorbell
from .errors import TsqpError, WaitTimeoutError

if TYPE_CHECKING:
    from .channel import Channel

#: A wait looks at the peer this often.
_SLICE_S = 0.5
#: While a message is on its way over ZeroMQ the bell can't be heard.
_LINK_SLICE_S = 0.1
#: A copy of less than this does not hold up the loop.
_INLINE_BYTES = 1 << 20
#: The loop has other work: its helper gives up the core early.
_SPIN_US = 20.0


class _Wait:
    """One coroutine that waits for something to receive."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.cancelled = False

    def tell(self) -> None:
        """Lets the coroutine look again."""
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Helper:
    """The thread that waits for one channel. Started by the first coroutine that has to wait, ended by the close."""

    def __init__(self, channel: Channel, futex: bool, wait: str) -> None:
        self._channel = weakref.ref(channel)  # an idle thread must not keep it open
        self._bell = Doorbell(_SPIN_US, futex, wait)
        self._waits: queue.SimpleQueue[_Wait | None] = queue.SimpleQueue()
        self._stopped = False
        threading.Thread(target=self._run, name="tsqp-asyncio", daemon=True).start()

    async def wait(self, seconds: float) -> None:
        """Returns when there may be something to receive; raises TimeoutError."""
        one = _Wait()
        self._waits.put(one)
        if self._stopped:  # it may have looked for the last time
            one.tell()
        self._bell.ring()
        try:
            # Not wait_for: before Python 3.12 it forgets a cancellation that comes together with the result.
            done, _ = await asyncio.wait((one.done,), timeout=seconds)
            if not done:
                raise asyncio.TimeoutError
        finally:
            one.cancelled = True
            self._bell.ring()

    def look(self) -> None:
        """Has the thread look at once: something may have come another way than through the ring."""
        self._bell.ring()

    def stop(self) -> None:
        """Ends the thread; whoever waits, or begins to, looks again."""
        self._stopped = True
        self._waits.put(None)
        self._bell.ring()

    def _run(self) -> None:
        waiting: list[_Wait] = []
        while True:
            while not waiting or not self._waits.empty():
                one = self._waits.get()
                if one is not None:
                    waiting.append(one)
                elif self._waits.empty():
                    for other in waiting:
                        other.tell()
                    return
                else:
                    self._waits.put(None)  # after those that came with the end
            if self._settled():
                for one in waiting:
                    one.tell()
                waiting = []
            waiting = [one for one in waiting if not one.cancelled]

    def _settled(self) -> bool:
        """Waits a slice of time; True if a coroutine should look."""
        channel = self._channel()
        try:
            if channel is None or channel.closed or channel.poll():
                return True
            ring = channel.wait_ring
            if ring is not None:
                self._bell.wait([ring], _SLICE_S)
                return False
            return channel.wait_link(time.monotonic() + _LINK_SLICE_S)
        except TsqpError:
            return True  # the coroutine's own look raises it


async def receive(channel: Channel, timeout: float | None) -> Message:
    """The next message of `channel`, private. See :meth:`Channel.arecv`."""
    deadline = time.monotonic() + (1e9 if timeout is None else timeout)
    while True:
        held = channel.recv_nowait(lease=False)
        if held is not None:
            with held as message:
                return message
        try:
            await channel.helper().wait(min(deadline - time.monotonic(), 1e6))
        except asyncio.TimeoutError:
            raise WaitTimeoutError(
                f"no message from {channel.peer} before the deadline; it is connected: wait longer"
            ) from None


async def send(channel: Channel, tensors: Sequence[Any], options: dict[str, Any]) -> int:
    """Sends without holding up the loop. See :meth:`Channel.asend`."""
    nbytes = sum(tensor.nbytes for tensor in tensors)
    if nbytes < _INLINE_BYTES and nbytes < channel.threshold // 2 and channel.can_send():
        return channel.send(tensors, **options)
    return await asyncio.get_running_loop().run_in_executor(None, lambda: channel.send(tensors, **options))
