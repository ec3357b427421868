from ._core cimport tsqp_doorbell, tsqp_forecast, tsqp_ring, tsqp_segment, tsqp_slot, tsqp_waiter, tsqp_watch
from libc.stdint cimport uint64_t


cdef int check(int rc, object what) except -1


cdef class Segment:
    cdef tsqp_segment *ptr
    cdef object __weakref__
    cdef readonly uint64_t max_chunk_bytes
    cdef readonly uint64_t max_chunks
    cdef readonly unsigned ring_count
    cdef readonly bint is_creator
    cdef uint64_t beat_seen
    cdef uint64_t beat_at
    cdef int usable(self) except -1
    cdef note_heartbeat(self)


cdef class Ring:
    cdef tsqp_ring *ptr
    cdef readonly Segment segment
    cdef readonly bint is_producer
    cdef public object liveness
    cdef bint closed
    cdef uint64_t fill_waited_ns  # in fill_wait, all of it
    cdef int acquire(self, tsqp_slot *slot, uint64_t deadline_ns) except -1
    cdef int try_acquire(self, tsqp_slot *slot) except -2
    cdef int acquire_answer(self, tsqp_slot *slot, uint64_t deadline_ns, tsqp_forecast *forecast) except -1
    cdef int wait_slice(self, tsqp_watch *watch, uint64_t deadline_ns, tsqp_forecast *forecast) except -1
    cdef int fill_wait(self, tsqp_slot *slot, uint64_t upto, uint64_t deadline_ns) except -1
    cdef int check_peer(self) except -1
    cdef int is_ready(self) except -1


cdef class Doorbell:
    cdef tsqp_doorbell bell
    cdef tsqp_waiter waiter
    cdef uint64_t seen
    cdef bint wait_watches(self, tsqp_watch *watches, size_t count, uint64_t deadline_ns) except -1


cdef uint64_t deadline_of(object timeout) except? 0
