# cython: language_level=3, binding=True, auto_pickle=False, autotestdict=False, nonecheck=True
"""Shared-memory segments and rings: arguments, buffers, the GIL and errors. The algorithms are in csrc/."""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

from . cimport _core as c

import errno as error_numbers
import os
import weakref
from typing import NamedTuple

from . import errors as e
from .enclave import check_waiting
from .handshake import futex_works, in_gramine

cdef uint64_t FOREVER = 0xFFFFFFFFFFFFFFFF
# A wait is cut into slices; between them signals, the peer and the deadline are looked at.
cdef uint64_t SLICE_NS = 100_000_000

WAIT_MODES = {
    "auto": c.TSQP_WAIT_AUTO,
    "spin": c.TSQP_WAIT_SPIN,
    "block": c.TSQP_WAIT_BLOCK,
    "poll": c.TSQP_WAIT_POLL,
}

# code -> (exception, what was wrong and what to do); {what} names the segment or message.
_ERRORS = {
    c.TSQP_PEER_CLOSED: (e.ClosedError, "the peer of {what} closed it; connect again to go on"),
    c.TSQP_CLOSED: (e.ClosedError, "{what} is closed; open a new one"),
    c.TSQP_CORRUPTED: (e.RingCorruptedError,
                       "a flag, slot number or length of {what} has a value the protocol forbids; "
                       "the peer is broken or hostile: close this connection"),
    c.TSQP_USAGE: (e.RingUsageError,
                   "{what} is used against its contract: one open write at a time, at most max_chunks leases, "
                   "and one producer and one consumer"),
    c.TSQP_NOT_FOUND: (e.SegmentNotFoundError,
                       "{what} does not exist; is its creator still running, and does it share /dev/shm?"),
    c.TSQP_EXISTS: (e.SegmentExistsError, "{what} exists already; take another name or run `tsqp clean`"),
    c.TSQP_PERMISSION: (e.SegmentPermissionError, "{what} may not be opened by this user; run both ends as one user"),
    c.TSQP_BAD_MAGIC: (e.SegmentFormatError, "{what} does not start with tsqp's magic; it is no tsqp segment"),
    c.TSQP_BAD_VERSION: (e.SegmentVersionError, "{what} was laid out by another version of tsqp; "
                                                "use one version at both ends"),
    c.TSQP_BAD_GEOMETRY: (e.SegmentGeometryError, "{what} can't have this geometry: a slot has 64 bytes to 1 TiB, a ring "
                                                  "1 to 1024 slots, and both ends name the same"),
    c.TSQP_TRUNCATED: (e.SegmentTruncatedError, "the file of {what} is shorter than its geometry needs; "
                                                "it was cut or is still being created"),
    c.TSQP_NO_MEMORY: (MemoryError, "no memory left for {what}"),
    c.TSQP_BAD_NAME: (e.ConfigError, "{what} has an invalid name; it must start with 'tsqp', have at most 63 "
                                     "characters and only letters, digits, '-', '_' and '.'"),
    c.TSQP_BAD_SESSION: (e.SegmentGeometryError, "{what} belongs to another session than the handle names; "
                                                 "pass the creator's current handle() on"),
    c.TSQP_ATTACHED: (e.RingUsageError, "{what} already has its second end attached; each ring has two ends"),
}


def _full_message(what, needed):
    directory = c.tsqp_shm_directory().decode()
    try:
        info = os.statvfs(directory)
        free_bytes = info.f_bavail * info.f_frsize
    except OSError:
        free_bytes = 0
    return (f"{directory} has {free_bytes} bytes free but {what} needs {needed}; raise its size "
            "(docker: --shm-size, mount -o remount,size=...), or lower TSQP_MAX_SHM_CHUNK_BYTES or "
            "TSQP_SHM_MAX_CHUNKS, or run `tsqp clean`")


cdef int check(int rc, object what) except -1:
    """The one place where a code becomes an exception."""
    if rc >= 0:
        return rc
    if rc == c.TSQP_ERRNO:
        error = errno
        raise e.SegmentError(error, f"{what} in {c.tsqp_shm_directory().decode()} failed: {os.strerror(error)}")
    if rc in _ERRORS:
        kind, text = _ERRORS[rc]
        raise kind(text.format(what=what))
    raise e.TsqpError(f"{what} failed with code {rc}")


cdef uint64_t deadline_of(object timeout) except? 0:
    """`timeout` in seconds, None for ever, as a point of the monotonic clock in ns."""
    if timeout is None:
        return FOREVER
    cdef double seconds = timeout
    if not seconds >= 0:
        raise e.ConfigError(f"timeout={timeout!r} is negative; give seconds, or None to wait for ever")
    if seconds > 1e9:
        return FOREVER
    return c.tsqp_now_ns() + <uint64_t>(seconds * 1e9)


include "_segment.pxi"


cdef class Ring:
    """One direction of a segment, as its producer or its consumer. `liveness()` may be set to a callable that
    returns a sentence once the peer is known to be dead by other means (the control connection)."""

    def __cinit__(self):
        self.ptr = NULL

    def __init__(self, Segment segment, unsigned index, bint producer, str wait="auto", double spin_us=400,
                 bint futex=True):
        segment.usable()
        if wait not in WAIT_MODES:
            raise e.ConfigError(f"wait={wait!r} is none of {', '.join(WAIT_MODES)}")
        self.segment = segment
        self.is_producer = producer
        self.liveness = None
        role = c.TSQP_PRODUCER if producer else c.TSQP_CONSUMER
        check(c.tsqp_ring_open(segment.ptr, index, role, &self.ptr), "ring")
        c.tsqp_waiter_init(c.tsqp_ring_waiter(self.ptr), WAIT_MODES[wait], <uint64_t>(spin_us * 1000), futex)

    def __dealloc__(self):
        if self.ptr != NULL:
            with nogil:  # the last one unmaps the segment
                c.tsqp_ring_close(self.ptr)
            self.ptr = NULL

    cdef int try_acquire(self, c.tsqp_slot *slot) except -2:
        """1: acquired, 0: not now; raises for everything else."""
        if self.closed:
            check(c.TSQP_CLOSED, "the ring")
        self.segment.usable()
        cdef int rc
        if self.is_producer:
            rc = c.tsqp_ring_try_write(self.ptr, slot)
        else:
            rc = c.tsqp_ring_try_read(self.ptr, slot)
        if rc == c.TSQP_OK:
            return 1
        if rc == c.TSQP_AGAIN:
            return 0
        check(rc, f"segment {self.segment.name}")
        return 0

    cdef int acquire(self, c.tsqp_slot *slot, uint64_t deadline_ns) except -1:
        """The next slot. A reader's may still be filling: see :meth:`fill_wait`."""
        return self.acquire_answer(slot, deadline_ns, NULL)

    cdef int acquire_answer(self, c.tsqp_slot *slot, uint64_t deadline_ns, c.tsqp_forecast *forecast) except -1:
        """The same where it is the answer to a request just sent. `forecast`: when such answers come; may be NULL."""
        cdef c.tsqp_watch watch
        if self.try_acquire(slot):
            return 0
        c.tsqp_segment_beat(self.segment.ptr)
        if forecast != NULL:
            forecast.begin_ns = c.tsqp_now_ns()
        while True:
            watch = c.tsqp_ring_watch(self.ptr)
            self.wait_slice(&watch, deadline_ns, forecast)
            if self.try_acquire(slot):
                return 0

    cdef int wait_slice(self, c.tsqp_watch *watch, uint64_t deadline_ns, c.tsqp_forecast *forecast) except -1:
        """Waits for one word, a slice of time at most. Raises at the deadline, for a signal, and where the peer is
        dead and left nothing."""
        cdef uint64_t now = c.tsqp_now_ns()
        cdef uint64_t left
        cdef int rc
        if now >= deadline_ns:
            self.check_peer()
            raise e.WaitTimeoutError(self._timeout_text())
        left = deadline_ns - now
        if left > SLICE_NS:
            left = SLICE_NS
        with nogil:
            if forecast == NULL:
                rc = c.tsqp_wait(c.tsqp_ring_waiter(self.ptr), watch, 1, left)
            else:
                rc = c.tsqp_wait_answer(c.tsqp_ring_waiter(self.ptr), watch, forecast, left)
        PyErr_CheckSignals()  # in every case: once it is taken, what came would be lost with the exception
        if rc == c.TSQP_OK:
            return 0
        if self.closed:
            check(c.TSQP_CLOSED, "the ring")
        self.segment.usable()
        c.tsqp_segment_beat(self.segment.ptr)
        self.segment.note_heartbeat()
        if c.tsqp_load_acquire(watch.word) == watch.idle:
            self.check_peer()
        return 0

    cdef int fill_wait(self, c.tsqp_slot *slot, uint64_t upto, uint64_t deadline_ns) except -1:
        """Waits until `upto` bytes of an acquired message are there. On an exception it is given back unread."""
        cdef c.tsqp_watch watch
        cdef bint closed
        cdef int rc
        cdef uint64_t begin_ns = c.tsqp_now_ns()
        try:
            while True:
                closed = c.tsqp_segment_peer_closed(self.segment.ptr)  # before the look: it may finish, then close
                rc = c.tsqp_ring_follow(self.ptr, slot, upto)
                if rc == c.TSQP_OK:
                    self.fill_waited_ns += c.tsqp_now_ns() - begin_ns
                    return 0
                if rc != c.TSQP_AGAIN:
                    check(rc, f"segment {self.segment.name}")
                if closed:
                    raise e.ClosedError(f"the peer of {self.segment.name} closed it in the middle of a message")
                watch = c.tsqp_ring_fill_watch(self.ptr, slot)
                self.wait_slice(&watch, deadline_ns, NULL)
        except BaseException:
            if self.segment.ptr != NULL:
                c.tsqp_ring_unread(self.ptr, slot)
            raise

    cdef int check_peer(self) except -1:
        """Raises PeerDiedError where the peer is dead and nothing it published is left."""
        reason = None
        if c.tsqp_segment_peer_locked(self.segment.ptr) == 0:
            reason = "the kernel released its lock on the segment although it had not closed it"
        elif self.liveness is not None:
            reason = self.liveness()
        if reason is None or c.tsqp_segment_peer_closed(self.segment.ptr):
            return 0
        if not self.is_producer and c.tsqp_ring_ready(self.ptr):
            return 0  # what the dead peer published before is still delivered
        peer = "attached end" if self.segment.is_creator else "creating end"
        raise e.PeerDiedError(f"the {peer} of {self.segment.name} died: {reason}")

    def _timeout_text(self):
        what = "a free slot" if self.is_producer else "a message"
        return (f"no {what[2:]} of {self.segment.name} before the deadline; the peer is still there and its "
                f"heartbeat last moved {self.segment.peer_silent_s():.1f} s ago: wait longer or look at the peer")

    def free_slots(self):
        """How many messages the producer could publish now without waiting."""
        self.segment.usable()
        return c.tsqp_ring_free_slots(self.ptr)

    def unread_slots(self):
        """How many slots the producer published that the consumer, this end, has not begun to read. Any thread may
        ask: the ring's own place is only moved under the GIL."""
        self.segment.usable()
        return c.tsqp_ring_unread_slots(self.ptr)

    cdef int is_ready(self) except -1:
        self.segment.usable()
        return c.tsqp_ring_ready(self.ptr) or c.tsqp_segment_peer_closed(self.segment.ptr)

    def ready(self):
        """True if a whole message waits (consumer), a slot is free (producer), or the peer closed."""
        return self.is_ready() != 0

    def close(self):
        """Ends this end's use of the ring and wakes the peer. The segment's closed word is the segment's."""
        if not self.closed:
            self.closed = True
            if self.segment.ptr != NULL:
                c.tsqp_ring_wake_peer(self.ptr)


cdef class Doorbell:
    """A word of this process that ends a `Doorbell.wait` over many rings from another thread."""

    def __init__(self, double spin_us=400, bint futex=True, str wait="auto"):
        if wait not in WAIT_MODES:
            raise e.ConfigError(f"wait={wait!r} is none of {', '.join(WAIT_MODES)}")
        self.bell.count = 0
        self.bell.waiting = 0
        self.seen = 0
        c.tsqp_waiter_init(&self.waiter, WAIT_MODES[wait], <uint64_t>(spin_us * 1000), futex)

    def ring(self):
        c.tsqp_doorbell_ring(&self.bell)

    def set_futex(self, bint futex):
        """False once a ring is watched whose peer can't wake us (it runs in an enclave)."""
        self.waiter.futex = futex

    def wait(self, list rings, timeout):
        """Waits until a consumer ring of `rings` has a message or its peer closed, or the bell was rung.

        Returns False when `timeout` (seconds) passed first. Signals are handled; death of a peer is not this
        call's business.
        """
        cdef size_t count = len(rings) + 1
        cdef c.tsqp_watch *watches = <c.tsqp_watch *>malloc(count * sizeof(c.tsqp_watch))
        cdef size_t i
        if watches == NULL:
            raise MemoryError()
        try:
            for i in range(1, count):
                watches[i] = c.tsqp_ring_watch((<Ring>rings[i - 1]).ptr)
            return self.wait_watches(watches, count, deadline_of(timeout))
        finally:
            free(watches)

    cdef bint wait_watches(self, c.tsqp_watch *watches, size_t count, uint64_t deadline_ns) except -1:
        """The same over watches of which the first is left to the bell."""
        cdef uint64_t now
        cdef int rc
        cdef size_t i
        watches[0].word = &self.bell.count
        watches[0].idle = self.seen
        watches[0].waiting = &self.bell.waiting
        watches[0].closed = NULL
        try:
            while True:
                now = c.tsqp_now_ns()
                if now >= deadline_ns:
                    return False
                with nogil:
                    rc = c.tsqp_wait(&self.waiter, watches, count,
                                     deadline_ns - now if deadline_ns - now < SLICE_NS else SLICE_NS)
                if rc == c.TSQP_OK:
                    return True
                PyErr_CheckSignals()
                for i in range(1, count):
                    if c.tsqp_load_acquire(watches[i].closed) != 0:
                        return True
        finally:
            self.seen = c.tsqp_load_acquire(&self.bell.count)


include "_shm_ring.pxi"
