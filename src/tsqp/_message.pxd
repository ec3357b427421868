from libc.stdint cimport uint8_t, uint32_t, uint64_t, int64_t

from ._core cimport tsqp_buffer, tsqp_message, tsqp_slot, tsqp_tensor_desc
from ._ring cimport Ring, Segment


cdef struct Source:
    void *data
    bint contiguous
    int64_t strides[8]  # bytes


cdef class Message:
    cdef readonly uint32_t tag, flags, site
    cdef readonly uint64_t request_id, index, compute_ns, queue_ns, nbytes
    cdef readonly int status
    cdef readonly bytes meta_bytes
    cdef readonly list tensors
    cdef readonly str carrier
    # For the performance log: when the reply was there and when it was in private memory, ns (0: not measured), and
    # by what it came, a number of perf.h.
    cdef public uint64_t arrived_ns, taken_ns
    cdef public uint8_t way
    cdef object _meta


cdef class Lease:
    cdef Ring ring
    cdef tsqp_slot slot
    cdef bint open
    cdef readonly Message message


cdef class TensorBytes:
    cdef object owner
    cdef tsqp_buffer *buffer
    cdef void *data
    cdef Py_ssize_t nbytes


cdef class Scratch:
    cdef uint8_t *scratch
    cdef uint64_t scratch_bytes
    cdef uint8_t *_scratch(self, uint64_t nbytes) except NULL


cdef class Encoder(Scratch):
    cdef tsqp_message out
    cdef Source sources[64]
    cdef list packed
    cdef readonly uint64_t tiles_due  # bytes of a message in tiles that the receiver waits for
    cdef public bint timed
    cdef uint64_t written_ns  # if timed: when all of the last message was in its slot, before that was said
    cdef uint64_t begin(self, tensors, bytes meta, object wire) except 0
    cdef int _count_parts(self, Py_ssize_t count, bytes meta) except -1
    cdef uint64_t begin_specs(self, specs, bytes meta) except 0
    cdef list tensors_in(self, Ring ring, tsqp_slot *slot)
    cdef int check_written(self, list tensors) except -1
    cdef int publish_written(self, Ring ring, bytes meta, tsqp_slot *slot) except -1
    cdef object _pack_encoded(self)
    cdef TensorBytes _packed(self, Py_ssize_t i)
    cdef TensorBytes _encoded(self, Py_ssize_t i)
    cdef _keep(self, Py_ssize_t i, TensorBytes private)
    cdef int write_slot(self, Ring ring, bytes meta, tsqp_slot *slot) except -1
    cdef void _fill(self, Ring ring, tsqp_slot *slot, const uint8_t *head, uint64_t head_bytes) noexcept nogil
    cdef void _fill_tile(self, uint8_t *slot, uint64_t start, uint64_t nbytes) noexcept nogil


cdef class Decoder(Scratch):
    cdef tsqp_message inn
    cdef public bint timed
    cdef uint64_t begun_ns, waited_ns  # if timed: when the message was looked at, and fill_waited_ns then
    cdef int _note_times(self, Ring ring, Message message) except -1
    cdef object _decoded(self, Ring ring, tsqp_slot *slot, tsqp_tensor_desc *desc, uint64_t deadline_ns)
    cdef int _parse(self, const uint8_t *first, uint64_t looked, uint64_t available, const uint8_t *rest) except -1
    cdef bytes _meta(self, const uint8_t *first, uint64_t looked, const uint8_t *rest)
    cdef Message read_slot(self, Ring ring, tsqp_slot *slot, uint64_t deadline_ns, bint view)
    cdef Message _read_head(self, Ring ring, tsqp_slot *slot, uint64_t deadline_ns)
    cdef int _read_tensors(self, Ring ring, tsqp_slot *slot, Message message, uint64_t deadline_ns, bint view) except -1
    cdef object _copy_tensors(self, Ring ring, tsqp_slot *slot, Message message, uint64_t deadline_ns)
    cdef _frame_tensor(self, tsqp_tensor_desc *desc, frame)
    cdef Lease lease_slot(self, Ring ring, tsqp_slot *slot, uint64_t deadline_ns)
    cdef object copy_or_lease(self, Ring ring, tsqp_slot *slot, uint64_t deadline_ns, uint64_t request_id)


cdef bytes meta_of(object meta)
cdef int _describe(object tensor, tsqp_tensor_desc *desc, Source *source) except -1
cdef object _new_tensor(tsqp_tensor_desc *desc, void **data)
cdef uint32_t OUT_OF_SLOT
