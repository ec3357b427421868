# Included by _message.pyx: from tensors to a slot, tiles or frames.

cdef class Encoder(Scratch):
    """Encodes one channel's outgoing messages. One caller at a time."""

    def plan(self, tensors, bytes meta, uint32_t tag, uint32_t flags, uint64_t request_id, int status,
             uint32_t site, uint64_t index, uint64_t compute_ns, uint64_t queue_ns, wire=None):
        """Fills the outgoing header and returns the message's total bytes. Raises MessageError classes."""
        cdef c.tsqp_message_header *header = &self.out.header
        header.tag = tag
        header.flags = flags
        header.request_id = request_id
        header.status = status
        header.site = site
        header.index = index
        header.compute_ns = compute_ns
        header.queue_ns = queue_ns
        return self.begin(tensors, meta, wire)

    cdef uint64_t begin(self, tensors, bytes meta, object wire) except 0:
        """The rest of :meth:`plan`, for a caller that has filled the header's own fields."""
        cdef c.tsqp_message_header *header = &self.out.header
        cdef Py_ssize_t count = len(tensors)
        cdef Py_ssize_t i
        self._count_parts(count, meta)
        for i in range(count):
            _describe(tensors[i], &self.out.tensors[i], &self.sources[i])
        if wire is not None:
            _set_encodings(&self.out, wire)
            self._pack_encoded()
        check(c.tsqp_message_plan(&self.out))
        return header.total_bytes

    cdef int _count_parts(self, Py_ssize_t count, bytes meta) except -1:
        cdef c.tsqp_message_header *header = &self.out.header
        self.packed = None
        if count > c.TSQP_MAX_TENSORS:
            check(c.TSQP_TOO_MANY_TENSORS)
        if header.flags & ~USER_FLAGS:
            raise e.MessageError(f"flags={header.flags:#x} uses bits of the transport; only the low 24 are the user's")
        header.tensor_count = <uint32_t>count
        header.meta_bytes = <uint32_t>len(meta)
        return 0

    cdef uint64_t begin_specs(self, specs, bytes meta) except 0:
        """Like :meth:`begin` for tensors that are still to be made: `specs` are pairs of shape and torch dtype, or
        tensors to be like."""
        cdef c.tsqp_message_header *header = &self.out.header
        cdef c.tsqp_tensor_desc *desc
        cdef Py_ssize_t count = len(specs)
        cdef Py_ssize_t i, k, ndim
        self._count_parts(count, meta)
        for i in range(count):
            desc = &self.out.tensors[i]
            shape, dtype = (specs[i].shape, specs[i].dtype) if isinstance(specs[i], Tensor) else specs[i]
            if dtype not in DTYPE_CODES:
                raise e.DTypeError(f"{dtype} can't be sent; reserve one of {', '.join(str(d)[6:] for d in DTYPE_CODES)}")
            ndim = len(shape)
            if ndim > c.TSQP_MAX_NDIM:
                raise e.RankError(f"a tensor of {ndim} dimensions can't be sent; at most {c.TSQP_MAX_NDIM} are allowed")
            desc.dtype = DTYPE_CODES[dtype]
            desc.encoding = c.TSQP_PLAIN
            desc.ndim = <uint8_t>ndim
            for k in range(ndim):
                desc.shape[k] = shape[k]
        check(c.tsqp_message_plan(&self.out))
        return header.total_bytes

    cdef list tensors_in(self, Ring ring, c.tsqp_slot *slot):
        """The planned message's tensors in an acquired slot (None: in private memory), to be written by the caller."""
        cdef c.tsqp_tensor_desc *desc
        cdef void *data = NULL
        cdef uint32_t i
        cdef list tensors = []
        for i in range(self.out.header.tensor_count):
            desc = &self.out.tensors[i]
            if ring is None:
                tensors.append(_new_tensor(desc, &data))
            else:
                data = slot.data + desc.offset
                c.tsqp_segment_retain(ring.segment.ptr)
                tensors.append(_wrap(desc, data, NULL, ring.segment.ptr))
            self.sources[i].data = data
        return tensors

    cdef int check_written(self, list tensors) except -1:
        """Raises ShapeError unless the tensors made by :meth:`tensors_in` are what and where they were: `out=` of a
        wrong shape resizes its tensor instead of failing."""
        cdef c.tsqp_tensor_desc now
        cdef c.tsqp_tensor_desc *planned
        cdef Source source
        cdef uint32_t i
        cdef int k
        for i in range(self.out.header.tensor_count):
            planned = &self.out.tensors[i]
            _describe(tensors[i], &now, &source)
            same = now.dtype == planned.dtype and now.ndim == planned.ndim and source.contiguous
            for k in range(planned.ndim):
                same = same and now.shape[k] == planned.shape[k]
            if not same or (planned.nbytes and source.data != self.sources[i].data):
                raise e.ShapeError(
                    f"tensor {i} of the reserved message was {DTYPES[planned.dtype]} "
                    f"{[planned.shape[k] for k in range(planned.ndim)]} and is {tensors[i].dtype} "
                    f"{list(tensors[i].shape)} now: an operation resized or replaced it instead of writing into it; "
                    "reserve the shape and dtype of its result. Nothing was sent")
        return 0

    cdef int publish_written(self, Ring ring, bytes meta, c.tsqp_slot *slot) except -1:
        """Writes the head beside tensors that are in the slot already, and publishes."""
        cdef uint64_t head = c.tsqp_message_head_bytes(&self.out.header)
        cdef uint8_t *scratch = self._scratch(head)
        c.tsqp_message_write_head(&self.out, <char *>meta, scratch)
        c.tsqp_copy_to_shared(slot.data, scratch, head)
        return check_ring(c.tsqp_ring_publish(ring.ptr, slot, self.out.header.total_bytes), "publish")

    cdef object _pack_encoded(self):
        """Encoders read contiguous memory: strided tensors are packed privately first."""
        cdef uint32_t i
        for i in range(self.out.header.tensor_count):
            if self.out.tensors[i].encoding != c.TSQP_PLAIN and not self.sources[i].contiguous:
                self._keep(i, self._packed(i))

    cdef TensorBytes _packed(self, Py_ssize_t i):
        """Tensor `i` of the planned message, strided, as contiguous private memory."""
        cdef c.tsqp_tensor_desc *desc = &self.out.tensors[i]
        cdef TensorBytes packed = _pooled_bytes(c.tsqp_tensor_nbytes(desc))
        c.tsqp_pack_to_shared(packed.data, self.sources[i].data, c.tsqp_dtype_itemsize(desc.dtype), desc.ndim,
                              desc.shape, self.sources[i].strides)
        return packed

    cdef TensorBytes _encoded(self, Py_ssize_t i):
        """Tensor `i` of the planned message, contiguous, in private memory as it travels."""
        cdef c.tsqp_tensor_desc *desc = &self.out.tensors[i]
        cdef TensorBytes encoded = _pooled_bytes(desc.nbytes)
        with nogil:
            _encode(desc, encoded.data, self.sources[i].data)
        return encoded

    cdef _keep(self, Py_ssize_t i, TensorBytes private):
        """From here on tensor `i` of the planned message is `private`, which lives until the next message."""
        self.sources[i].data = private.data
        self.sources[i].contiguous = True
        if self.packed is None:
            self.packed = []
        self.packed.append(private)

    def write(self, Ring ring, bytes meta, uint64_t deadline_ns):
        """Writes the planned message into the ring. The caller keeps the tensors alive until this returns."""
        cdef c.tsqp_slot slot
        ring.acquire(&slot, deadline_ns)
        self.write_slot(ring, meta, &slot)

    cdef int write_slot(self, Ring ring, bytes meta, c.tsqp_slot *slot) except -1:
        """Writes the planned message into an acquired slot and publishes it."""
        cdef uint64_t total = self.out.header.total_bytes
        cdef uint64_t head = c.tsqp_message_head_bytes(&self.out.header)
        cdef uint8_t small[HEAD_ON_STACK_BYTES]
        cdef uint8_t *scratch = small
        if total > slot.nbytes:
            c.tsqp_ring_cancel(ring.ptr, slot)
            raise e.MessageTooLargeError(f"a message of {total} bytes does not fit a slot of {slot.nbytes} bytes")
        if head > HEAD_ON_STACK_BYTES:
            try:
                scratch = self._scratch(head)
            except BaseException:
                c.tsqp_ring_cancel(ring.ptr, slot)
                raise
        c.tsqp_message_write_head(&self.out, <char *>meta, scratch)
        if total >= NOGIL_BYTES:
            with nogil:
                self._fill(ring, slot, scratch, head)
        else:
            self._fill(ring, slot, scratch, head)
        return 0

    cdef void _fill(self, Ring ring, c.tsqp_slot *slot, const uint8_t *head, uint64_t head_bytes) noexcept nogil:
        cdef c.tsqp_outflow flow = c.tsqp_outflow(ring.ptr, slot, self.out.header.total_bytes, 0)
        cdef c.tsqp_tensor_desc *desc
        cdef Source *source
        cdef uint32_t i
        c.tsqp_copy_to_shared(slot.data, head, head_bytes)
        for i in range(self.out.header.tensor_count):
            desc = &self.out.tensors[i]
            source = &self.sources[i]
            if desc.encoding != c.TSQP_PLAIN:
                _encode_into(&flow, desc, source.data)
            elif source.contiguous:
                c.tsqp_outflow_copy(&flow, desc.offset, source.data, desc.nbytes)
            else:
                c.tsqp_pack_to_shared(slot.data + desc.offset, source.data, c.tsqp_dtype_itemsize(desc.dtype),
                                      desc.ndim, desc.shape, source.strides)
        if self.timed:
            self.written_ns = c.tsqp_now_ns()
        c.tsqp_outflow_mark(&flow, flow.total)

    def write_tiled_head(self, Ring ring, bytes meta, uint64_t deadline_ns):
        """Writes the head of the planned message; its payload follows by :meth:`write_tile`. False: it has no room
        in a slot.

        How far a message got is noted here, together with the publishing: whoever calls this may be interrupted.
        """
        cdef c.tsqp_slot slot
        cdef uint64_t head = c.tsqp_message_head_bytes(&self.out.header)
        cdef uint8_t *scratch = self._scratch(head)
        if head > ring.segment.max_chunk_bytes:
            return False
        self.out.header.flags |= TILED
        c.tsqp_message_write_head(&self.out, <char *>meta, scratch)
        ring.acquire(&slot, deadline_ns)
        c.tsqp_copy_to_shared(slot.data, scratch, head)
        check(c.tsqp_ring_publish(ring.ptr, &slot, head))
        self.tiles_due = self.out.header.total_bytes - head
        return True

    def write_tile(self, Ring ring, uint64_t most, uint64_t deadline_ns):
        """Writes the next bytes of the planned message's payload, `most` of them, a multiple of 64, or the rest."""
        cdef c.tsqp_slot slot
        cdef uint64_t nbytes = most if most < self.tiles_due else self.tiles_due
        ring.acquire(&slot, deadline_ns)
        with nogil:
            self._fill_tile(slot.data, self.out.header.total_bytes - self.tiles_due, nbytes)
        check(c.tsqp_ring_publish(ring.ptr, &slot, nbytes))
        self.tiles_due -= nbytes

    def give_up(self, Ring ring, uint64_t deadline_ns):
        """Tells the receiver that the tiled message under way will not be finished."""
        cdef c.tsqp_slot slot
        ring.acquire(&slot, deadline_ns)
        check(c.tsqp_ring_publish(ring.ptr, &slot, 0))
        self.tiles_due = 0

    cdef void _fill_tile(self, uint8_t *slot, uint64_t start, uint64_t nbytes) noexcept nogil:
        cdef c.tsqp_tensor_desc *desc
        cdef uint64_t end = start + nbytes
        cdef uint64_t first, last
        cdef uint32_t i
        for i in range(self.out.header.tensor_count):
            desc = &self.out.tensors[i]
            first = desc.offset if desc.offset > start else start
            last = desc.offset + desc.nbytes if desc.offset + desc.nbytes < end else end
            if first < last:
                c.tsqp_copy_to_shared(slot + (first - start), <uint8_t *>self.sources[i].data + (first - desc.offset),
                                      last - first)

    @property
    def planned_bytes(self):
        """Bytes of the planned message on the wire."""
        return self.out.header.total_bytes

    @property
    def planned_head_bytes(self):
        """Bytes of the planned message before its payload."""
        return c.tsqp_message_head_bytes(&self.out.header)

    def as_they_travel(self, tensors):
        """One object per tensor of the planned message that exports its bytes on the wire: the tensor's own memory
        where that is possible, else a private copy. The planned message is written from them afterwards, so they
        must be kept alive until then."""
        cdef TensorBytes out
        cdef Py_ssize_t i
        frames = []
        for i in range(len(tensors)):
            if self.out.tensors[i].encoding != c.TSQP_PLAIN:
                out = self._encoded(i)
            elif not self.sources[i].contiguous:
                out = self._packed(i)
            else:
                out = TensorBytes.__new__(TensorBytes)
                out.nbytes = <Py_ssize_t>self.out.tensors[i].nbytes
                out.owner = tensors[i]
                out.data = self.sources[i].data
            self.sources[i].data = out.data
            self.sources[i].contiguous = True
            frames.append(out)
        return frames

    def copy_ns(self, Ring ring, uint64_t nbytes):
        """Nanoseconds that writing `nbytes` into a free slot and reading them back takes; publishes nothing. None
        where no slot is free."""
        cdef c.tsqp_slot slot
        cdef uint64_t begin, spent
        cdef TensorBytes private
        if not ring.is_producer or not ring.try_acquire(&slot):
            return None
        try:
            nbytes = nbytes if nbytes < slot.nbytes else slot.nbytes
            private = _pooled_bytes(nbytes)
            memset(private.data, 0, nbytes)
            with nogil:
                c.tsqp_copy_to_shared(slot.data, private.data, nbytes)  # the first touch of a page is not counted
                begin = c.tsqp_now_ns()
                c.tsqp_copy_to_shared(slot.data, private.data, nbytes)
                c.tsqp_copy_from_shared(private.data, slot.data, nbytes)
                spent = c.tsqp_now_ns() - begin
        finally:
            c.tsqp_ring_cancel(ring.ptr, &slot)
        return nbytes, spent

    def announce(self, Ring ring, uint64_t deadline_ns):
        """Acquires a slot for the note that the planned message comes over ZeroMQ; see :class:`Announcement`."""
        cdef Announcement note = Announcement.__new__(Announcement)
        ring.acquire(&note.slot, deadline_ns)
        note.ring = ring
        note.open = True
        return note

    def head_bytes(self, bytes meta):
        """Header, descriptors and meta of the planned message: the first ZeroMQ frame."""
        cdef uint64_t nbytes = c.tsqp_message_head_bytes(&self.out.header)
        cdef bytes head = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>nbytes)
        c.tsqp_message_write_head(&self.out, <char *>meta, PyBytes_AS_STRING(head))
        return head
