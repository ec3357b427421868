# Included by _message.pyx: messages that do not lie in one slot, in tiles through the ring or in ZeroMQ frames.

cdef class Assembly:
    """A tiled message on its way: private tensors that fill tile by tile."""

    cdef c.tsqp_message plan
    cdef void *data[64]
    cdef uint64_t at
    cdef uint64_t copied_ns
    cdef Message message
    #: Why this message is not taken: its tiles are dropped as they come. None: it is.
    cdef readonly object refusal

    cdef allocate(self, uint64_t max_bytes):
        """Makes room for the tensors, or says in `refusal` why not: how long they are is only a claim so far."""
        cdef uint64_t nbytes = self.plan.header.total_bytes
        cdef uint64_t decoded = _decoded_bytes(&self.plan)
        if nbytes > max_bytes or decoded > max_bytes:
            self.refuse(f"{nbytes} bytes on the wire, {decoded} in memory, is over the limit of {max_bytes} bytes; "
                        "send it in parts, or raise max_message_bytes at this end")
            return
        try:
            self._make_tensors()
        except MemoryError:
            self.refuse(f"{nbytes} bytes was announced and there is no memory for it; lower max_message_bytes to what "
                        "this process may use, or free memory")

    cdef refuse(self, why):
        self.message.tensors.clear()
        self.refusal = e.MessageTooLargeError(f"a message of {why}")

    cdef _make_tensors(self):
        cdef TensorBytes raw
        cdef uint32_t i
        for i in range(self.plan.header.tensor_count):
            if self.plan.tensors[i].encoding == c.TSQP_PLAIN:
                self.message.tensors.append(_new_tensor(&self.plan.tensors[i], &self.data[i]))
            else:
                raw = _pooled_bytes(self.plan.tensors[i].nbytes)
                self.data[i] = raw.data
                self.message.tensors.append(raw)

    def finish(self):
        """The whole message, its encoded tensors decoded."""
        cdef void *data = NULL
        cdef uint32_t i
        cdef c.tsqp_tensor_desc *desc
        cdef uint64_t begin_ns = c.tsqp_now_ns()
        for i in range(self.plan.header.tensor_count):
            desc = &self.plan.tensors[i]
            if desc.encoding != c.TSQP_PLAIN:
                try:
                    tensor = _new_tensor(desc, &data)
                except MemoryError:
                    raise e.MessageTooLargeError(f"there is no memory to decode a tensor of "
                                                 f"{c.tsqp_tensor_nbytes(desc)} bytes; lower max_message_bytes to what "
                                                 "this process may use, or free memory") from None
                with nogil:
                    _decode(desc, data, self.data[i])
                self.message.tensors[i] = tensor
        self.message.taken_ns = c.tsqp_now_ns()
        # Copying was between waits for tiles; what counts is how long it took.
        self.message.arrived_ns = begin_ns - self.copied_ns
        self.message.way = IN_TILES
        return self.message

    @property
    def complete(self):
        return self.at == self.plan.header.total_bytes

    def feed(self, Ring ring, uint64_t deadline_ns):
        """Takes one tile from the ring. False: the sender gave this message up."""
        cdef c.tsqp_slot slot
        cdef uint64_t begin_ns
        ring.acquire(&slot, deadline_ns)
        try:
            if slot.filled < slot.nbytes:
                ring.fill_wait(&slot, slot.nbytes, deadline_ns)
            if slot.nbytes == 0:
                return False
            if slot.nbytes % 64 or slot.nbytes > self.plan.header.total_bytes - self.at:
                check(c.TSQP_BAD_TOTAL)
            if self.refusal is None:
                begin_ns = c.tsqp_now_ns()
                with nogil:
                    self._take(slot.data, slot.nbytes)
                self.copied_ns += c.tsqp_now_ns() - begin_ns
            self.at += slot.nbytes
            return True
        finally:
            c.tsqp_ring_release(ring.ptr, &slot)

    cdef void _take(self, const uint8_t *shared, uint64_t nbytes) noexcept nogil:
        cdef c.tsqp_tensor_desc *desc
        cdef uint64_t first, last
        cdef uint32_t i
        for i in range(self.plan.header.tensor_count):
            desc = &self.plan.tensors[i]
            first = desc.offset if desc.offset > self.at else self.at
            last = desc.offset + desc.nbytes
            if last > self.at + nbytes:
                last = self.at + nbytes
            if first < last:
                c.tsqp_copy_from_shared(<uint8_t *>self.data[i] + (first - desc.offset), shared + (first - self.at),
                                        last - first)


cdef uint64_t _decoded_bytes(c.tsqp_message *message) noexcept:
    """What its tensors take in memory."""
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(message.header.tensor_count):
        total += c.tsqp_tensor_nbytes(&message.tensors[i])
    return total


cdef class Announcement:
    """An acquired slot that will say: the next message comes over ZeroMQ. Publish it, or cancel it."""

    cdef Ring ring
    cdef c.tsqp_slot slot
    cdef bint open

    def publish(self, uint64_t sequence):
        cdef c.tsqp_message note
        cdef uint8_t head[128]
        memset(&note.header, 0, sizeof(note.header))
        note.header.flags = FLAG_VIA_ZMQ
        note.header.index = sequence
        check(c.tsqp_message_plan(&note))
        c.tsqp_message_write_head(&note, NULL, head)
        c.tsqp_copy_to_shared(self.slot.data, head, sizeof(head))
        self.open = False
        check(c.tsqp_ring_publish(self.ring.ptr, &self.slot, sizeof(head)))

    def cancel(self):
        if self.open:
            self.open = False
            check(c.tsqp_ring_cancel(self.ring.ptr, &self.slot))

    def __dealloc__(self):
        if self.open and self.ring is not None:  # lost by an interrupted caller
            c.tsqp_ring_cancel(self.ring.ptr, &self.slot)
