# cython: language_level=3, binding=True, auto_pickle=False, autotestdict=False, nonecheck=True
"""Shared-memory segments and rings: arguments, buffers, the GIL and errors. The algorithms are in csrc/."""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from . cimport _core as c

import os
import weakref
from typing import NamedTuple

from . import errors as e

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


_segments = weakref.WeakSet()


def _after_fork_in_child():
    """A child holds copies of the parent's ends: it must not keep their locks alive."""
    for segment in list(_segments):
        (<Segment>segment).drop_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


cdef class Segment:
    """A mapped shared-memory segment of one or two rings; end 0 is its creator, end 1 who attached."""

    def __cinit__(self):
        self.ptr = NULL

    @staticmethod
    def create(uint64_t max_chunk_bytes, uint64_t max_chunks, unsigned ring_count, name=None):
        """Creates a segment (mode 0600, space reserved). Raises SharedMemoryFullError, SegmentExistsError, ..."""
        cdef Segment self = Segment.__new__(Segment)
        cdef c.tsqp_geometry geometry = c.tsqp_geometry(max_chunk_bytes, max_chunks, ring_count)
        cdef bytes encoded = None if name is None else os.fsencode(name)
        cdef const char *text = NULL
        if encoded is not None:
            text = encoded
        cdef int rc
        with nogil:
            rc = c.tsqp_segment_create(&geometry, text, &self.ptr)
        what = f"segment {name}" if name else "a new segment"
        if rc == c.TSQP_FULL:
            raise e.SharedMemoryFullError(_full_message(what, c.tsqp_segment_bytes(&geometry)))
        check(rc, what)
        self._adopt(geometry, True)
        return self

    @staticmethod
    def attach(uint64_t max_chunk_bytes, uint64_t max_chunks, unsigned ring_count, str name, bytes session=None):
        """Maps an existing segment after checking every field of its header against the arguments."""
        cdef Segment self = Segment.__new__(Segment)
        cdef c.tsqp_geometry geometry = c.tsqp_geometry(max_chunk_bytes, max_chunks, ring_count)
        cdef bytes encoded = os.fsencode(name)
        cdef const char *text = encoded
        cdef uint64_t words[2]
        cdef uint64_t *wanted = NULL
        if session is not None:
            if len(session) != 16:
                raise e.ConfigError(f"a session id has 16 bytes, not {len(session)}; pass the creator's handle() on")
            words[0] = int.from_bytes(session[:8], "little")
            words[1] = int.from_bytes(session[8:], "little")
            wanted = words
        check(c.tsqp_segment_attach(&geometry, text, wanted, &self.ptr), f"segment {name}")
        self._adopt(geometry, False)
        return self

    def _adopt(self, geometry, is_creator):
        self.max_chunk_bytes = geometry["max_chunk_bytes"]
        self.max_chunks = geometry["max_chunks"]
        self.ring_count = geometry["ring_count"]
        self.is_creator = is_creator
        self.beat_at = c.tsqp_now_ns()
        _segments.add(self)

    def __dealloc__(self):
        if self.ptr != NULL:
            # An end that is just dropped says goodbye too: the peer must not wait for it.
            c.tsqp_segment_close_end(self.ptr)
            c.tsqp_segment_release(self.ptr)
            self.ptr = NULL

    cdef int usable(self) except -1:
        if self.ptr == NULL:
            raise e.RingUsageError("this segment is not usable here: it was inherited by fork; "
                                   "attach in the child with the parent's handle()")
        return 0

    def drop_in_child(self):
        """After fork, in the child: forgets the segment without closing, unlinking or unlocking it."""
        if self.ptr != NULL:
            c.tsqp_segment_forget_after_fork(self.ptr)
            # Rings and views may still point into the mapping, so it stays until the child exits.
            self.ptr = NULL

    @property
    def name(self):
        self.usable()
        return c.tsqp_segment_name(self.ptr).decode()

    @property
    def session(self):
        """The random 16-byte id of this segment."""
        cdef uint64_t words[2]
        self.usable()
        c.tsqp_segment_session(self.ptr, words)
        return words[0].to_bytes(8, "little") + words[1].to_bytes(8, "little")

    @property
    def nbytes(self):
        self.usable()
        return c.tsqp_segment_length(self.ptr)

    def unlink(self):
        """Removes the name; the memory lives on while an end maps it."""
        self.usable()
        check(c.tsqp_segment_unlink(self.ptr), f"unlinking segment {self.name}")

    def close_end(self):
        """Tells the peer that this end is finished."""
        if self.ptr != NULL:
            c.tsqp_segment_close_end(self.ptr)

    cdef note_heartbeat(self):
        cdef uint64_t beat = c.tsqp_segment_peer_heartbeat(self.ptr)
        if beat != self.beat_seen:
            self.beat_seen = beat
            self.beat_at = c.tsqp_now_ns()

    def peer_silent_s(self):
        """Seconds since the peer's heartbeat was last seen to move, by this end's own clock."""
        self.usable()
        self.note_heartbeat()
        return (c.tsqp_now_ns() - self.beat_at) / 1e9


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
        cdef uint64_t now, left
        cdef c.tsqp_watch watch
        cdef c.tsqp_waiter *waiter
        cdef int rc
        if self.try_acquire(slot):
            return 0
        c.tsqp_segment_beat(self.segment.ptr)
        waiter = c.tsqp_ring_waiter(self.ptr)
        while True:
            now = c.tsqp_now_ns()
            if now >= deadline_ns:
                self.check_peer()
                raise e.WaitTimeoutError(self._timeout_text())
            left = deadline_ns - now
            watch = c.tsqp_ring_watch(self.ptr)
            with nogil:
                rc = c.tsqp_wait(waiter, &watch, 1, left if left < SLICE_NS else SLICE_NS)
            if self.try_acquire(slot):
                return 0
            if rc != c.TSQP_OK:
                PyErr_CheckSignals()
                c.tsqp_segment_beat(self.segment.ptr)
                self.segment.note_heartbeat()
                if self.check_peer() and self.try_acquire(slot):
                    return 0

    cdef int check_peer(self) except -1:
        """Raises PeerDiedError; returns 1 where the caller should look once more before it waits on."""
        reason = None
        if c.tsqp_segment_peer_locked(self.segment.ptr) == 0:
            reason = "the kernel released its lock on the segment although it had not closed it"
        elif self.liveness is not None:
            reason = self.liveness()
        if reason is None:
            return 0
        if c.tsqp_segment_peer_closed(self.segment.ptr):
            return 1
        if not self.is_producer and self.has_message():
            return 1  # what the dead peer published before is still delivered
        peer = "attached end" if self.segment.is_creator else "creating end"
        raise e.PeerDiedError(f"the {peer} of {self.segment.name} died: {reason}")

    cdef bint has_message(self):
        cdef c.tsqp_watch watch = c.tsqp_ring_watch(self.ptr)
        return c.tsqp_load_acquire(watch.word) != watch.idle

    def _timeout_text(self):
        what = "a free slot" if self.is_producer else "a message"
        return (f"no {what[2:]} of {self.segment.name} before the deadline; the peer is still there and its "
                f"heartbeat last moved {self.segment.peer_silent_s():.1f} s ago: wait longer or look at the peer")

    def free_slots(self):
        """How many messages the producer could publish now without waiting."""
        self.segment.usable()
        return c.tsqp_ring_free_slots(self.ptr)

    def ready(self):
        """True if a message waits (consumer), or nobody will send one any more."""
        cdef c.tsqp_watch watch
        self.segment.usable()
        watch = c.tsqp_ring_watch(self.ptr)
        return c.tsqp_load_acquire(watch.word) != watch.idle or c.tsqp_segment_peer_closed(self.segment.ptr)

    def close(self):
        """Ends this end's use of the ring and wakes the peer. The segment's closed word is the segment's."""
        if not self.closed:
            self.closed = True
            if self.segment.ptr != NULL:
                c.tsqp_ring_wake_peer(self.ptr)


cdef class Doorbell:
    """A word of this process that ends a `Doorbell.wait` over many rings from another thread."""

    cdef c.tsqp_doorbell bell
    cdef c.tsqp_waiter waiter
    cdef uint64_t seen

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
        cdef uint64_t deadline_ns = deadline_of(timeout)
        cdef uint64_t now
        cdef c.tsqp_watch *watches = <c.tsqp_watch *>malloc(count * sizeof(c.tsqp_watch))
        cdef int rc
        cdef size_t i
        if watches == NULL:
            raise MemoryError()
        try:
            watches[0].word = &self.bell.count
            watches[0].idle = self.seen
            watches[0].waiting = &self.bell.waiting
            watches[0].closed = NULL
            for i in range(1, count):
                watches[i] = c.tsqp_ring_watch((<Ring>rings[i - 1]).ptr)
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
                    if c.tsqp_segment_peer_closed((<Ring>rings[i - 1]).segment.ptr):
                        return True
        finally:
            self.seen = self.bell.count
            free(watches)


class RingHandle(NamedTuple):
    """What another process needs to attach: ``ShmRingBuffer(*handle)``. Picklable."""

    max_chunk_bytes: int
    max_chunks: int
    name: str
    session: bytes


cdef class _SlotBytes:
    """Exports a slot's bytes and keeps the mapping alive as long as a view of them lives."""

    cdef Segment segment
    cdef uint8_t *data
    cdef Py_ssize_t nbytes
    cdef bint readonly

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.nbytes, self.readonly, flags)

    def __releasebuffer__(self, Py_buffer *view):
        pass


cdef class _Acquired:
    """The context manager of acquire_write and acquire_read."""

    cdef Ring ring
    cdef object timeout
    cdef object nbytes
    cdef object view
    cdef c.tsqp_slot slot

    def __enter__(self):
        cdef _SlotBytes exported
        if self.view is not None:
            raise e.RingUsageError("this acquire is already open; call acquire_write() or acquire_read() again")
        if self.nbytes is not None and not 0 <= self.nbytes <= self.ring.segment.max_chunk_bytes:
            raise e.MessageTooLargeError(f"{self.nbytes} bytes do not fit a slot of "
                                         f"{self.ring.segment.max_chunk_bytes} bytes; raise max_chunk_bytes")
        self.ring.acquire(&self.slot, deadline_of(self.timeout))
        exported = _SlotBytes.__new__(_SlotBytes)
        exported.segment = self.ring.segment
        exported.data = self.slot.data
        exported.nbytes = <Py_ssize_t>(self.slot.nbytes if self.nbytes is None else self.nbytes)
        exported.readonly = not self.ring.is_producer
        self.view = memoryview(exported)
        return self.view

    def __exit__(self, kind, value, traceback):
        cdef uint64_t nbytes = len(self.view)
        try:
            self.view.release()
        except BufferError:
            # Somebody keeps an array over it: it pins the mapping, and its contents are stale from now on.
            self.view = None
        self.view = None
        self.ring.segment.usable()  # a forked child must not publish or release what its parent will
        if not self.ring.is_producer:
            check(c.tsqp_ring_release(self.ring.ptr, &self.slot), "release")
        elif kind is not None:
            check(c.tsqp_ring_cancel(self.ring.ptr, &self.slot), "cancel")
        else:
            check(c.tsqp_ring_publish(self.ring.ptr, &self.slot, nbytes), "publish")
        return False


cdef class ShmRingBuffer:
    """A single-producer, single-consumer ring of byte slots in POSIX shared memory.

    Args:
        max_chunk_bytes: size of a slot in bytes (64 to 2**40).
        max_chunks: number of slots (1 to 1024).
        name: None creates a segment with a random name; a name attaches to it, or, with ``create=True``,
            creates it under this fixed name, which must start with ``tsqp``.
        session: the creator's session id, from :meth:`handle`; None skips that check.
        wait: ``auto`` (spin while it pays, then block), ``spin``, ``block`` or ``poll`` (no futex).
        spin_us: the longest spin before blocking, in microseconds.

    Raises:
        SharedMemoryFullError, SegmentNotFoundError, SegmentExistsError, SegmentPermissionError,
        SegmentFormatError, SegmentVersionError, SegmentGeometryError, SegmentTruncatedError, ConfigError.

    One process writes and one reads; which does which is decided by the first call. The creator's lock and the
    attacher's lock on the file tell each end when the other died (`PeerDiedError`).
    """

    cdef readonly Segment segment
    cdef Ring producer
    cdef Ring consumer
    cdef object _wait
    cdef double _spin_us
    cdef bint _closed

    def __init__(self, max_chunk_bytes=10 << 20, max_chunks=10, name=None, session=None, *, create=None,
                 wait="auto", spin_us=400.0):
        if wait not in WAIT_MODES:
            raise e.ConfigError(f"wait={wait!r} is none of {', '.join(WAIT_MODES)}")
        for label, value in (("max_chunk_bytes", max_chunk_bytes), ("max_chunks", max_chunks)):
            if not isinstance(value, int) or not 0 < value < 1 << 63:
                raise e.SegmentGeometryError(f"{label}={value!r} is not a positive whole number of reasonable size")
        if create is None:
            create = name is None
        if create:
            self.segment = Segment.create(max_chunk_bytes, max_chunks, 1, name)
        else:
            if name is None:
                raise e.ConfigError("create=False needs the name of an existing segment; pass handle() on")
            self.segment = Segment.attach(max_chunk_bytes, max_chunks, 1, name, session)
        self._wait = wait
        self._spin_us = spin_us

    def handle(self):
        """The :class:`RingHandle` with which another process attaches."""
        segment = self.segment
        return RingHandle(segment.max_chunk_bytes, segment.max_chunks, segment.name, segment.session)

    @property
    def name(self):
        """The segment's file name in the shared-memory directory."""
        return self.segment.name

    @property
    def max_chunk_bytes(self):
        return self.segment.max_chunk_bytes

    @property
    def max_chunks(self):
        return self.segment.max_chunks

    @property
    def is_creator(self):
        return self.segment.is_creator

    @property
    def closed(self):
        return self._closed

    cdef Ring _ring(self, bint producer):
        if self._closed:
            check(c.TSQP_CLOSED, "this ring")
        if producer:
            if self.producer is None:
                self.producer = Ring(self.segment, 0, True, self._wait, self._spin_us)
            return self.producer
        if self.consumer is None:
            self.consumer = Ring(self.segment, 0, False, self._wait, self._spin_us)
        return self.consumer

    def acquire_write(self, timeout=None, nbytes=None):
        """A context manager yielding a writable memoryview of a free slot; published when the block ends.

        Args:
            timeout: seconds to wait for a free slot; None waits for ever, 0 tries once.
            nbytes: length of the message; None publishes the whole slot.

        An exception inside the block publishes nothing. Raises WaitTimeoutError, ClosedError, PeerDiedError,
        MessageTooLargeError, RingUsageError (a write is already open).
        """
        return self._acquired(self._ring(True), timeout, nbytes)

    def acquire_read(self, timeout=None):
        """A context manager yielding a read-only memoryview of the next message; its slot is freed when the
        block ends. Raises WaitTimeoutError, ClosedError (the writer closed and all is read), PeerDiedError."""
        return self._acquired(self._ring(False), timeout, None)

    cdef _acquired(self, Ring ring, timeout, nbytes):
        cdef _Acquired acquired = _Acquired.__new__(_Acquired)
        acquired.ring = ring
        acquired.timeout = timeout
        acquired.nbytes = nbytes
        return acquired

    def unlink(self):
        """Removes the name from the shared-memory directory now; both mappings stay usable."""
        self.segment.unlink()

    def close(self):
        """Closes this end: the peer reads what was published, then gets ClosedError. The creator unlinks."""
        if self._closed:
            return
        self._closed = True
        if self.segment is None or self.segment.ptr == NULL:
            return
        self.segment.close_end()
        for ring in (self.producer, self.consumer):
            if ring is not None:
                ring.close()
        # An end that never used the ring in a direction still has to wake a peer that waits there.
        for producer in (True, False):
            Ring(self.segment, 0, producer).close()
        self.segment.unlink()

    def __reduce__(self):
        raise TypeError("a ShmRingBuffer can't be pickled; pass its handle() and attach with ShmRingBuffer(*handle)")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


# ---- owners of segments, for tsqp.segments ----

def segment_owner(str name):
    """(pid, start, pid namespace, nbytes, creator holds its lock) of a segment file, or None if it is not one."""
    cdef c.tsqp_owner owner
    cdef bytes encoded = os.fsencode(name)
    if c.tsqp_segment_owner(encoded, &owner) != c.TSQP_OK:
        return None
    return owner.pid, owner.start, owner.pidns, owner.segment_bytes, bool(owner.locked)


def process_start(uint64_t pid):
    """Clock ticks after boot at which `pid` started, or None if there is no such process here."""
    cdef uint64_t start
    return start if c.tsqp_process_start(pid, &start) == c.TSQP_OK else None


def pid_namespace():
    """The inode of this process's pid namespace, 0 if unknown."""
    return c.tsqp_pid_namespace()


def shm_directory():
    """Where segments live: /dev/shm, or TSQP_SHM_DIR."""
    return c.tsqp_shm_directory().decode()
