# Included by _ring.pyx: a mapped segment, and who owns the segment files of this host.

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
        if in_gramine():
            raise e.SegmentError(error_numbers.ENODEV, "no segment can be made inside Gramine, where its space can't be "
                                 "reserved and a full /dev/shm would kill this process; have the process on the host "
                                 "make it, and attach here by its handle()")
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
            with nogil:  # to unmap 200 MB takes 30 ms
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

    @property
    def address(self):
        """Where the segment is mapped in this process: for page-locking it, not for reading."""
        self.usable()
        return <uintptr_t>c.tsqp_segment_address(self.ptr)

    def unlink(self):
        """Removes the name; the memory lives on while an end maps it."""
        self.usable()
        check(c.tsqp_segment_unlink(self.ptr), f"unlinking segment {self.name}")

    def drop_name(self):
        """Removes the name if it is still there. In a forked child nothing; what can't be removed is the reaper's."""
        if self.ptr != NULL:
            c.tsqp_segment_unlink(self.ptr)

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
