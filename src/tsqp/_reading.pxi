# Included by _message.pyx: from a slot or frames to tensors. Everything read is validated from a private copy.

cdef class Decoder(Scratch):
    """Decodes one channel's incoming messages. One caller at a time."""

    cdef int _parse(self, const uint8_t *first, uint64_t looked, uint64_t available,
                    const uint8_t *rest) except -1:
        """Fills `inn` from a private copy of the first `looked` bytes, fetching what is missing from `rest`.

        `rest` is the same message in shared (or private) memory; only bytes after `looked` are read from it.
        """
        cdef c.tsqp_message *message = &self.inn
        cdef uint64_t descs, have
        if looked < sizeof(c.tsqp_message_header):
            check(c.TSQP_TRUNCATED)
        memcpy(&message.header, first, sizeof(c.tsqp_message_header))
        check(c.tsqp_message_check_header(&message.header, available))
        descs = message.header.tensor_count * sizeof(c.tsqp_tensor_desc)
        have = looked - sizeof(c.tsqp_message_header)
        if descs <= have:
            memcpy(message.tensors, first + sizeof(c.tsqp_message_header), descs)
        else:
            memcpy(message.tensors, first + sizeof(c.tsqp_message_header), have)
            c.tsqp_copy_from_shared(<uint8_t *>message.tensors + have, rest + looked, descs - have)
        check(c.tsqp_message_check_tensors(message))
        return 0

    cdef bytes _meta(self, const uint8_t *first, uint64_t looked, const uint8_t *rest):
        cdef uint64_t nbytes = self.inn.header.meta_bytes
        cdef uint64_t at = sizeof(c.tsqp_message_header) + \
            self.inn.header.tensor_count * sizeof(c.tsqp_tensor_desc)
        cdef uint64_t start
        if nbytes == 0:
            return b""
        if at + nbytes <= looked:
            return PyBytes_FromStringAndSize(<const char *>first + at, <Py_ssize_t>nbytes)
        # The shared side is read in whole aligned blocks: take the blocks around the meta, then cut.
        start = at & ~<uint64_t>63
        cdef uint8_t *scratch = self._scratch(at + nbytes - start)
        c.tsqp_copy_from_shared(scratch, rest + start, at + nbytes - start)
        return PyBytes_FromStringAndSize(<const char *>scratch + (at - start), <Py_ssize_t>nbytes)

    cdef Message read_slot(self, Ring ring, c.tsqp_slot *slot, uint64_t deadline_ns, bint view):
        """The message in an acquired slot, which may still be filling; its tensors are copied out or, with `view`,
        lie in the slot and pin the mapping. A wait that fails gives the slot back unread."""
        cdef Message message = self._read_head(ring, slot, deadline_ns)
        if not message.flags & OUT_OF_SLOT:
            self._read_tensors(ring, slot, message, deadline_ns, view)
        return message

    cdef Message _read_head(self, Ring ring, c.tsqp_slot *slot, uint64_t deadline_ns):
        """A message without its tensors, from a private copy."""
        cdef uint8_t first[FIRST_LOOK_BYTES]
        cdef uint64_t looked = slot.nbytes if slot.nbytes < FIRST_LOOK_BYTES else FIRST_LOOK_BYTES
        cdef uint64_t head
        if self.timed:
            self.begun_ns, self.waited_ns = c.tsqp_now_ns(), ring.fill_waited_ns
        if slot.filled < looked:
            ring.fill_wait(slot, looked, deadline_ns)
        c.tsqp_copy_from_shared(first, slot.data, looked)
        if slot.filled < slot.nbytes and looked >= sizeof(c.tsqp_message_header):
            head = c.tsqp_message_head_bytes(<c.tsqp_message_header *>first)  # not validated yet: clipped
            ring.fill_wait(slot, slot.nbytes if slot.nbytes < head else head, deadline_ns)
        self._parse(first, looked, slot.nbytes, slot.data)
        return _new_message(&self.inn.header, self._meta(first, looked, slot.data), "ring")

    cdef int _read_tensors(self, Ring ring, c.tsqp_slot *slot, Message message, uint64_t deadline_ns,
                           bint view) except -1:
        """Adds the tensors of `inn`, the message whose head was just read."""
        cdef c.tsqp_tensor_desc *desc
        cdef uint32_t i
        if self.inn.header.total_bytes != slot.nbytes:
            check(c.TSQP_BAD_TOTAL)
        if not view:
            self._copy_tensors(ring, slot, message, deadline_ns)
            return self._note_times(ring, message)
        for i in range(self.inn.header.tensor_count):
            desc = &self.inn.tensors[i]
            if desc.encoding != c.TSQP_PLAIN:
                message.tensors.append(self._decoded(ring, slot, desc, deadline_ns))
                continue
            c.tsqp_segment_retain(ring.segment.ptr)
            message.tensors.append(_wrap(desc, slot.data + desc.offset, NULL, ring.segment.ptr))
        if slot.filled < slot.nbytes:
            ring.fill_wait(slot, slot.nbytes, deadline_ns)
        return self._note_times(ring, message)

    cdef int _note_times(self, Ring ring, Message message) except -1:
        """Waiting for the sender, who may still write, is no time of reading."""
        if self.timed:
            message.arrived_ns = self.begun_ns + (ring.fill_waited_ns - self.waited_ns)
            message.taken_ns = c.tsqp_now_ns()
        return 0

    cdef object _decoded(self, Ring ring, c.tsqp_slot *slot, c.tsqp_tensor_desc *desc, uint64_t deadline_ns):
        """An encoded tensor of the slot in private memory."""
        cdef void *data = NULL
        tensor = _new_tensor(desc, &data)
        if slot.filled < desc.offset + desc.nbytes:
            ring.fill_wait(slot, desc.offset + desc.nbytes, deadline_ns)
        with nogil:
            _decode(desc, data, slot.data + desc.offset)
        return tensor

    cdef object _copy_tensors(self, Ring ring, c.tsqp_slot *slot, Message message, uint64_t deadline_ns):
        """Copies the tensors of `inn` to private memory, following the sender where it still writes."""
        cdef c.tsqp_tensor_desc *desc
        cdef void *data = NULL
        cdef uint64_t done
        cdef uint32_t i
        cdef int rc
        for i in range(self.inn.header.tensor_count):
            desc = &self.inn.tensors[i]
            if desc.encoding != c.TSQP_PLAIN:
                message.tensors.append(self._decoded(ring, slot, desc, deadline_ns))
                continue
            message.tensors.append(_new_tensor(desc, &data))
            done = 0
            while True:
                if desc.nbytes >= NOGIL_BYTES:
                    with nogil:
                        rc = c.tsqp_inflow_copy(ring.ptr, slot, desc.offset, data, desc.nbytes, &done)
                else:
                    rc = c.tsqp_inflow_copy(ring.ptr, slot, desc.offset, data, desc.nbytes, &done)
                if rc == c.TSQP_OK:
                    break
                if rc != c.TSQP_AGAIN:
                    check_ring(rc, f"segment {ring.segment.name}")
                ring.fill_wait(slot, slot.filled + 1, deadline_ns)
        if slot.filled < slot.nbytes:  # only padding is left: the sender has done with the slot after it
            ring.fill_wait(slot, slot.nbytes, deadline_ns)

    def read(self, Ring ring, uint64_t deadline_ns):
        """The next message of the ring, copied to private memory."""
        cdef c.tsqp_slot slot
        ring.acquire(&slot, deadline_ns)
        try:
            return self.read_slot(ring, &slot, deadline_ns, False)
        finally:
            c.tsqp_ring_release(ring.ptr, &slot)

    def lease(self, Ring ring, uint64_t deadline_ns):
        """The next message of the ring as a :class:`Lease`; deadline 0 returns None where no whole one waits."""
        cdef c.tsqp_slot slot
        if deadline_ns != 0:
            ring.acquire(&slot, deadline_ns)
        elif not ring.is_ready() or not ring.try_acquire(&slot):
            return None
        return self.lease_slot(ring, &slot, deadline_ns)

    cdef Lease lease_slot(self, Ring ring, c.tsqp_slot *slot, uint64_t deadline_ns):
        cdef Lease lease = Lease.__new__(Lease)
        lease.ring = ring
        try:
            lease.message = self.read_slot(ring, slot, deadline_ns, True)
        except BaseException:
            c.tsqp_ring_release(ring.ptr, slot)  # in vain where it was given back unread
            raise
        lease.slot = slot[0]
        lease.open = True
        return lease

    cdef object copy_or_lease(self, Ring ring, c.tsqp_slot *slot, uint64_t deadline_ns, uint64_t request_id):
        """The message in an acquired slot: of this request id as a :class:`Lease`, of another one copied out."""
        cdef Message message
        cdef Lease lease
        cdef bint keep = False
        try:
            message = self._read_head(ring, slot, deadline_ns)
            if message.flags & OUT_OF_SLOT:
                return message
            keep = message.request_id == request_id
            self._read_tensors(ring, slot, message, deadline_ns, keep)
            if not keep:
                return message
            lease = Lease.__new__(Lease)
            lease.ring, lease.message = ring, message
            lease.slot = slot[0]
            lease.open = True
            return lease
        except BaseException:
            keep = False
            raise
        finally:
            if not keep:
                c.tsqp_ring_release(ring.ptr, slot)  # in vain where it was given back unread

    def decode_frames(self, head, list frames):
        """The message in ZeroMQ frames: `head` and one frame per tensor, whose memory the tensors keep alive."""
        cdef const uint8_t[::1] first = head
        cdef uint64_t nbytes = first.shape[0]
        cdef Message message
        cdef uint32_t i
        cdef uint64_t begin_ns = c.tsqp_now_ns()
        if nbytes < sizeof(c.tsqp_message_header):
            check(c.TSQP_TRUNCATED)
        self._parse(&first[0], nbytes, nbytes, &first[0])
        if c.tsqp_message_head_bytes(&self.inn.header) != nbytes or len(frames) != self.inn.header.tensor_count:
            check(c.TSQP_BAD_TOTAL)
        message = _new_message(&self.inn.header, self._meta(&first[0], nbytes, &first[0]), "zmq")
        for i in range(self.inn.header.tensor_count):
            message.tensors.append(self._frame_tensor(&self.inn.tensors[i], frames[i]))
        message.arrived_ns, message.taken_ns, message.way = begin_ns, c.tsqp_now_ns(), VIA_ZMQ
        return message

    cdef _frame_tensor(self, c.tsqp_tensor_desc *desc, frame):
        cdef TensorBytes aligned
        cdef const uint8_t[::1] source
        cdef void *data = NULL
        shape = [desc.shape[i] for i in range(desc.ndim)]
        dtype = DTYPES[desc.dtype]
        buffer = memoryview(frame)
        if buffer.nbytes != desc.nbytes:
            check(c.TSQP_BAD_NBYTES)
        if desc.nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        if desc.encoding == c.TSQP_PLAIN:
            return torch.frombuffer(buffer, dtype=dtype).reshape(shape)
        aligned = _pooled_bytes(desc.nbytes)  # what is decoded is read in whole aligned blocks
        source = buffer
        memcpy(aligned.data, &source[0], desc.nbytes)
        tensor = _new_tensor(desc, &data)
        with nogil:
            _decode(desc, data, aligned.data)
        return tensor

    def assemble(self, Message message, uint64_t max_bytes):
        """An :class:`Assembly` for a tiled message whose head was just read; it says itself whether it takes it."""
        cdef Assembly assembly = Assembly.__new__(Assembly)
        memcpy(&assembly.plan, &self.inn, sizeof(c.tsqp_message))
        message.flags &= USER_FLAGS
        assembly.message = message
        assembly.at = c.tsqp_message_head_bytes(&self.inn.header)
        assembly.allocate(max_bytes)
        return assembly
