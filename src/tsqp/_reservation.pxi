# Included by _channel.pyx: a message that is computed in its slot.

cdef class Reservation:
    """The ``with`` block of :meth:`Port.reserve`."""

    cdef Port port
    cdef Encoder codec
    cdef c.tsqp_slot slot
    cdef tuple fields
    cdef object specs
    cdef bytes meta
    cdef uint64_t deadline
    cdef bint in_slot, transfer
    cdef list tensors

    def __enter__(self):
        if self.tensors is not None:
            raise e.RingUsageError("this reservation was used; call reserve() again")
        self.port._enter_send(self.deadline)
        try:
            self._open()
        except BaseException:
            self.port._leave_send()
            raise
        return list(self.tensors)

    cdef int _open(self) except -1:
        cdef uint64_t total
        cdef c.tsqp_message_header *header = &self.codec.out.header
        if self.codec.tiles_due:
            self.port._clear_way(self.deadline)  # the rest of what was given away is written from the encoder's plan
        (header.tag, header.flags, header.request_id, header.status, header.site, header.index, header.compute_ns,
         header.queue_ns) = self.fields
        total = self.codec.begin_specs(self.specs, self.meta)
        self.in_slot = self.port._tx is not None and total < self.port.threshold
        if not self.in_slot:
            self.tensors = self.codec.tensors_in(None, NULL)
            return 0
        self.port._clear_way(self.deadline)
        self.port._tx.acquire(&self.slot, self.deadline)
        try:
            self.tensors = self.codec.tensors_in(self.port._tx, &self.slot)
        except BaseException:
            c.tsqp_ring_cancel(self.port._tx.ptr, &self.slot)
            raise
        return 0

    def set_times(self, uint64_t compute_ns, uint64_t queue_ns):
        """Inside the block: durations for the header that were not known when it began."""
        (tag, flags, request_id, status, site, index, _, _) = self.fields
        self.fields = (tag, flags, request_id, status, site, index, compute_ns, queue_ns)
        self.codec.out.header.compute_ns, self.codec.out.header.queue_ns = compute_ns, queue_ns

    def __exit__(self, kind, value, traceback):
        cdef bint sent = False
        try:
            if kind is None:
                self.codec.check_written(self.tensors)
                if self.in_slot:
                    self._publish()
                    sent = True
        finally:
            if self.in_slot and not sent and self.port._tx.segment.ptr != NULL:
                c.tsqp_ring_cancel(self.port._tx.ptr, &self.slot)
            self.port._leave_send()
        if kind is None and not self.in_slot:
            # The memory is this block's own: nobody has to wait until libzmq is done with it.
            self.port._send_slow(self.tensors, self.meta, self.fields, self._left(), True if self.transfer else None,
                                 None)
        return False

    cdef int _publish(self) except -1:
        if self.port._closed:
            raise e.ClosedError("the channel was closed while a message was being written; connect again")
        self.port._tx.segment.usable()  # a forked child must not publish what its parent will
        cdef uint64_t begin_ns = c.tsqp_now_ns()  # what the caller wrote until now is its own time
        self.codec.publish_written(self.port._tx, self.meta, &self.slot)
        self.port._sent += 1
        self.port._sent_bytes += self.codec.out.header.total_bytes
        if self.port._round_trips is not None:
            self.port._round_trips.sent_now(self.codec.out.header.request_id, begin_ns, c.tsqp_now_ns(),
                                            self.codec.out.header.total_bytes)
        return 0

    cdef object _left(self):
        cdef uint64_t now = c.tsqp_now_ns()
        if self.deadline == <uint64_t>-1:
            return None
        return (self.deadline - now) / 1e9 if self.deadline > now else 0.0
