"""The segment under a fixed name: made when the server starts to listen, and made anew whenever it was given away.

An enclave's manifest can mount one file of shared memory (Gramine's ``untrusted_shm``), and that file must exist
when the enclave starts, before its runner can say anything to the server.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ._ring import Segment
from .errors import SegmentError

if TYPE_CHECKING:
    from .door import HubOptions

#: How long after a failure to make the segment anew it is tried again.
_RETRY_S = 1.0


class FixedSegment:
    """Belongs to one thread at a time: who makes it, then the hub's I/O thread. Without a name it does nothing.

    The first is made at once, and raises what :meth:`tsqp._ring.Segment.create` raises.
    """

    def __init__(self, options: HubOptions) -> None:
        self._name = options.shm_name if options.shm else None
        self._geometry = options.max_chunk_bytes, options.max_chunks
        self._spare: Segment | None = None
        self._lent: Segment | None = None
        self._retry_at = 0.0
        self._closed = False
        self._make()

    def _make(self) -> None:
        if self._name is not None:
            self._spare = Segment.create(*self._geometry, 2, self._name)

    def take(self) -> Segment | None:
        """The segment, for one client; None while another has it, or while it can't be made."""
        if self._spare is None:
            return None
        self._lent, self._spare = self._spare, None
        return self._lent

    def release(self, segment: Segment | None) -> None:
        """`segment`, if it is the one that was taken, is not needed under its name any more. Always a new one takes
        its place: who had the old one may have it mapped still."""
        if segment is None or segment is not self._lent:
            return
        self._lent = None
        segment.drop_name()
        self._retry_at = 0.0
        self.look()

    def look(self) -> None:
        """Makes the segment anew where it is missing. What fails, for want of memory or as somebody else took the name,
        is tried again later: clients that come meanwhile have segments with random names, and nothing is lost."""
        missing = self._name is not None and self._spare is None and self._lent is None
        if missing and not self._closed and time.monotonic() >= self._retry_at:
            try:
                self._make()
            except (SegmentError, MemoryError):
                self._retry_at = time.monotonic() + _RETRY_S

    def close(self) -> None:
        """Removes the segment if nobody has it; none is made any more. Idempotent."""
        self._closed = True
        if self._spare is not None:
            self._spare.unlink()
            self._spare = None


__all__ = ["FixedSegment"]
