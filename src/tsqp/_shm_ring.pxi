# Included by _ring.pyx: the ring of bytes by itself, without tensors or connections.

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
    cdef uint64_t filled
    cdef c.tsqp_slot slot

    def __enter__(self):
        cdef _SlotBytes exported
        cdef uint64_t deadline_ns
        if self.view is not None:
            raise e.RingUsageError("this acquire is already open; call acquire_write() or acquire_read() again")
        if self.nbytes is not None and not 0 <= self.nbytes <= self.ring.segment.max_chunk_bytes:
            raise e.MessageTooLargeError(f"{self.nbytes} bytes do not fit a slot of "
                                         f"{self.ring.segment.max_chunk_bytes} bytes; raise max_chunk_bytes")
        deadline_ns = deadline_of(self.timeout)
        self.ring.acquire(&self.slot, deadline_ns)
        if not self.ring.is_producer and self.slot.filled < self.slot.nbytes:
            self.ring.fill_wait(&self.slot, self.slot.nbytes, deadline_ns)
        exported = _SlotBytes.__new__(_SlotBytes)
        exported.segment = self.ring.segment
        exported.data = self.slot.data
        exported.nbytes = <Py_ssize_t>(self.slot.nbytes if self.nbytes is None else self.nbytes)
        exported.readonly = not self.ring.is_producer
        self.filled = <uint64_t>exported.nbytes
        self.view = memoryview(exported)
        return self.view

    def __exit__(self, kind, value, traceback):
        try:
            self.view.release()  # or its user has
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
            check(c.tsqp_ring_publish(self.ring.ptr, &self.slot, self.filled), "publish")
        return False


cdef class ShmRingBuffer:
    """A single-producer, single-consumer ring of byte slots in POSIX shared memory.

    Args:
        max_chunk_bytes: size of a slot in bytes (64 to 2**40).
        max_chunks: number of slots (1 to 1024).
        name: None creates a segment with a random name; a name attaches to it, or, with ``create=True``,
            creates it under this fixed name, which must start with ``tsqp``.
        session: the creator's session id, from :meth:`handle`; None skips that check.
        wait: ``auto`` (spin while it pays, then block), ``spin``, ``block`` or ``poll`` (no futex). An end inside
            Gramine polls; no futex of its reaches the end on the host, which has to be given ``poll``.
        spin_us: the longest spin before blocking, in microseconds.

    Raises:
        SharedMemoryFullError, SegmentNotFoundError, SegmentExistsError, SegmentPermissionError,
        SegmentFormatError, SegmentVersionError, SegmentGeometryError, SegmentTruncatedError, ConfigError,
        EndpointError (a wait that can't work inside Gramine).

    One process writes and one reads; which does which is decided by the first call. The creator's lock and the
    attacher's lock on the file tell each end when the other died (`PeerDiedError`). Inside Gramine there are no
    locks, and no segment can be made: the process on the host makes it, and only a timeout tells of its death.
    """

    cdef readonly Segment segment
    cdef Ring producer
    cdef Ring consumer
    cdef object _wait
    cdef double _spin_us
    cdef bint _futex
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
        check_waiting(wait)
        self._futex = futex_works()
        if create:
            from .segments import check_directory  # which is made of what is defined here

            check_directory()
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
                self.producer = Ring(self.segment, 0, True, self._wait, self._spin_us, self._futex)
            return self.producer
        if self.consumer is None:
            self.consumer = Ring(self.segment, 0, False, self._wait, self._spin_us, self._futex)
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
            Ring(self.segment, 0, producer, futex=self._futex).close()
        self.segment.unlink()

    def __reduce__(self):
        raise TypeError("a ShmRingBuffer can't be pickled; pass its handle() and attach with ShmRingBuffer(*handle)")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
