"""Coroutines that wait for calls in flight: what one event loop needs to read replies while it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .in_flight import InFlight

#: The helper is asked anew after so many seconds; a reply ends its wait at once.
_PATIENCE_S = 1000.0


class _Arrival:
    """A coroutine that sleeps until its condition holds."""

    def __init__(self, ready: Callable[[], bool], loop: asyncio.AbstractEventLoop) -> None:
        self.ready = ready
        self.told: asyncio.Future[None] = loop.create_future()

    def tell(self, error: BaseException | None = None) -> None:
        """In the loop's thread."""
        if self.told.done():
            return
        if error is None:
            self.told.set_result(None)
        else:
            self.told.set_exception(error)


class _LoopReader:
    """Reads replies for all coroutines of one event loop that wait for calls, as a thread that waits does for all.

    A single task reads, and only while a coroutine waits. Nothing is read outside it and no message is ever held by
    a coroutine, so cancelling one loses nothing. The waiting itself is done by the channel's asyncio thread.
    """

    def __init__(self, flight: InFlight) -> None:
        self.loop = asyncio.get_running_loop()
        self._flight = flight
        self._arrivals: list[_Arrival] = []
        self._turn = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def wait(self, ready: Callable[[], bool]) -> None:
        """Returns once ``ready()``."""
        arrival = _Arrival(ready, self.loop)
        self._arrivals.append(arrival)
        try:
            # From here on who settles a call tells; what was settled before is seen now.
            if ready():
                return
            if self._task is None:
                self._task = self.loop.create_task(self._read())
            await arrival.told
        finally:
            self._arrivals.remove(arrival)
            if not self._arrivals and self._task is not None:
                self._task.cancel()
                self._task = None

    @property
    def idle(self) -> bool:
        """True while no coroutine waits."""
        return not self._arrivals

    async def _read(self) -> None:
        channel: Any = self._flight.channel
        try:
            while self._arrivals:
                self._turn.clear()
                if not self._flight.take_ready():
                    await self._turn.wait()  # a thread reads for all; it tells when it leaves
                    continue
                if channel.closed:
                    return  # every call ends with that
                with contextlib.suppress(asyncio.TimeoutError):
                    await channel.helper().wait(_PATIENCE_S)
        except Exception as error:  # noqa: BLE001 - they would wait for ever
            self._task = None
            for arrival in self._arrivals:
                arrival.tell(error)

    # --- called by any thread, under the table's lock ------------------------------------------------------

    def wake(self) -> None:
        """It is this loop's turn to read, if nobody else does."""
        self._call(self._turn.set)

    def wake_ready(self) -> None:
        """Tells those whose condition holds."""
        for arrival in list(self._arrivals):
            if not arrival.told.done() and arrival.ready():
                self._call(arrival.tell)

    def _call(self, function: Callable[[], Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(function)


class Loops:
    """The event loops in which coroutines wait for calls. `table` guards what settles calls."""

    def __init__(self, table: threading.RLock) -> None:
        self._table = table
        self.readers: list[_LoopReader] = []  # one for each

    async def wait(self, flight: InFlight, ready: Callable[[], bool]) -> None:
        """Returns once ``ready()``, of which :meth:`wake_ready` is told. ``flight`` is not kept: it holds this."""
        loop = asyncio.get_running_loop()
        with self._table:
            reader = next((one for one in self.readers if one.loop is loop), None)
            if reader is None:
                reader = _LoopReader(flight)
                self.readers.append(reader)
        try:
            await reader.wait(ready)
        finally:
            with self._table:
                if reader.idle and reader in self.readers:
                    self.readers.remove(reader)

    # --- called by any thread, under the table's lock ------------------------------------------------------

    def wake(self) -> None:
        """No thread reads any more: it is on a loop."""
        for reader in self.readers:
            reader.wake()

    def wake_ready(self) -> None:
        """Tells the coroutines whose condition holds."""
        for reader in self.readers:
            reader.wake_ready()
