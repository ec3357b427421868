# cython: language_level=3, binding=True, auto_pickle=False, autotestdict=False, nonecheck=True
"""Tensor messages: between torch / NumPy tensors and the bytes of a slot or of ZeroMQ frames."""

from cpython.buffer cimport (PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_FillInfo, PyBuffer_Release,
                             PyObject_CheckBuffer, PyObject_GetBuffer)
from cpython.exc cimport PyErr_Clear, PyErr_Occurred
from cpython.ref cimport Py_DECREF
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from . cimport _core as c
from ._ring cimport Ring, Segment, check as check_ring, deadline_of

import msgpack
import torch

from . import errors as e

# A copy shorter than this is done before another thread could have made use of the GIL.
cdef uint64_t NOGIL_BYTES = 1 << 18
# The first look at a message copies this much: header and descriptors of the usual one.
cdef enum:
    FIRST_LOOK_BYTES = 512
    HEAD_ON_STACK_BYTES = 1024

#: Message flags from here on belong to the transport.
FLAG_VIA_ZMQ = 1 << 24  # the message with sequence number `index` comes over ZeroMQ
FLAG_TILED = 1 << 25  # this is the head of a message whose payload follows in further slots
cdef uint32_t OUT_OF_SLOT = (1 << 24) | (1 << 25)
cdef uint32_t TILED = 1 << 25
cdef uint32_t USER_FLAGS = (1 << 24) - 1

MAX_TENSORS = c.TSQP_MAX_TENSORS
MAX_META_BYTES = c.TSQP_MAX_META_BYTES

_DTYPES = [
    (1, "float32", "f4"), (2, "float16", "f2"), (3, "bfloat16", None), (4, "float64", "f8"), (5, "int8", "i1"),
    (6, "int16", "i2"), (7, "int32", "i4"), (8, "int64", "i8"), (9, "uint8", "u1"), (10, "uint16", "u2"),
    (11, "uint32", "u4"), (12, "bool", "b1"), (13, "float8_e4m3fn", None), (14, "float8_e5m2", None),
]
#: torch dtype -> code on the wire
DTYPE_CODES = {getattr(torch, name): code for code, name, _ in _DTYPES if hasattr(torch, name)}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
_NUMPY_CODES = {}
for _code, _name, _text in _DTYPES:
    # NumPy has no bfloat16 or float8 of its own; the ml_dtypes package's arrays carry these names.
    _NUMPY_CODES[_name] = _code
# Codes for which DLPack has no type of its own: they come as bytes and are viewed.
cdef int FIRST_FLOAT8 = 13

cdef object Tensor = torch.Tensor
cdef object STRIDED = torch.strided
# The public function is a Python wrapper for objects of every kind; for a capsule it ends in this one.
cdef object from_dlpack = getattr(torch._C, "_from_dlpack", torch.utils.dlpack.from_dlpack)

_ERRORS = {
    c.TSQP_TOO_LARGE: (e.MessageTooLargeError, "the message is too large"),
    c.TSQP_BAD_MAGIC: (e.MagicError, "the header does not start with tsqp's magic: these bytes are no tsqp message"),
    c.TSQP_BAD_VERSION: (e.VersionError, "the header has another version; use one version of tsqp at both ends"),
    c.TSQP_TRUNCATED: (e.TruncatedMessageError, "the message is shorter than its header says"),
    c.TSQP_BAD_DTYPE: (e.DTypeError, "a tensor has an unknown dtype code"),
    c.TSQP_BAD_RANK: (e.RankError, "a tensor has more than 8 dimensions"),
    c.TSQP_BAD_SHAPE: (e.ShapeError, "a tensor's shape has a negative dimension or overflows"),
    c.TSQP_BAD_NBYTES: (e.SizeMismatchError, "a tensor's nbytes is not shape times item size"),
    c.TSQP_BAD_OFFSET: (e.OffsetError, "a tensor's offset is not where the layout puts it"),
    c.TSQP_TOO_MANY_TENSORS: (e.TooManyTensorsError, f"a message carries at most {c.TSQP_MAX_TENSORS} tensors; "
                                                     "send several messages"),
    c.TSQP_BAD_META: (e.MetaError, f"meta is limited to {c.TSQP_MAX_META_BYTES} bytes; send large data as a tensor"),
    c.TSQP_BAD_RESERVED: (e.VersionError, "a reserved field is not zero; use one version of tsqp at both ends"),
    c.TSQP_BAD_ENCODING: (e.EncodingError, "a tensor's encoding on the wire is unknown"),
    c.TSQP_BAD_TOTAL: (e.TruncatedMessageError, "the header's total bytes differ from what its parts add up to"),
}


cdef int check(int rc) except -1:
    if rc >= 0:
        return rc
    kind, text = _ERRORS[rc]
    raise kind(text)


cdef bytes meta_of(object meta):
    """What :func:`pack_meta` returns, quickly where there is nothing to do."""
    if meta is None:
        return b""
    if type(meta) is bytes and len(<bytes>meta) <= c.TSQP_MAX_META_BYTES:
        return <bytes>meta
    return pack_meta(meta)


def pack_meta(meta):
    """A mapping as msgpack bytes; None or an empty mapping is no bytes; bytes pass as they are."""
    if not meta:
        return b""
    if type(meta) is not bytes:
        try:
            meta = msgpack.packb(meta)
        except (TypeError, ValueError, OverflowError) as error:
            raise e.MetaError(f"meta can't be packed: {error}; use None, bool, int, float, str, bytes, "
                              "lists and string-keyed mappings") from None
    if len(meta) > c.TSQP_MAX_META_BYTES:
        check(c.TSQP_BAD_META)
    return meta


def unpack_meta(bytes data):
    """The mapping in msgpack bytes. Bounded: no container may claim more items than there are bytes."""
    if not data:
        return {}
    try:
        meta = msgpack.unpackb(data, raw=False, strict_map_key=True, max_str_len=len(data), max_bin_len=len(data),
                               max_array_len=len(data), max_map_len=len(data), max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise e.MetaError(f"meta is no valid msgpack ({type(error).__name__})") from None
    if not isinstance(meta, dict):
        raise e.MetaError(f"meta is a {type(meta).__name__}, not a mapping")
    return meta


cdef class Message:
    """A received message.

    Attributes: ``tag``, ``flags``, ``request_id``, ``status``, ``site``, ``index``, ``compute_ns``, ``queue_ns``
    (ints), ``meta`` (dict), ``meta_bytes`` (as received), ``tensors`` (list of torch CPU tensors), ``carrier``
    (``"ring"`` or ``"zmq"``) and ``nbytes`` (total bytes on the wire).
    """

    @property
    def meta(self):
        if self._meta is None:
            self._meta = unpack_meta(self.meta_bytes)
        return self._meta

    def __repr__(self):
        shapes = ", ".join(f"{t.dtype}{tuple(t.shape)}" for t in self.tensors)
        return f"Message(tag={self.tag}, request_id={self.request_id}, status={self.status}, tensors=[{shapes}])"


cdef Message _new_message(c.tsqp_message_header *header, bytes meta, str carrier):
    cdef Message message = Message.__new__(Message)
    message.tag = header.tag
    message.flags = header.flags
    message.site = header.site
    message.request_id = header.request_id
    message.index = header.index
    message.compute_ns = header.compute_ns
    message.queue_ns = header.queue_ns
    message.nbytes = header.total_bytes
    message.status = header.status
    message.meta_bytes = meta
    message.tensors = []
    message.carrier = carrier
    return message


include "_tensors.pxi"
include "_wire.pxi"


cdef class Lease:
    """``with`` block over a message whose tensors are views into its slot; they are valid inside it only."""

    def __enter__(self):
        return self.message

    def __exit__(self, *exc):
        self.release()

    def release(self):
        """Gives the slot back to the sender."""
        if self.open:
            self.open = False
            self.ring.segment.usable()  # a forked child must not release what its parent will
            check(c.tsqp_ring_release(self.ring.ptr, &self.slot))

    def __dealloc__(self):
        cdef Segment segment = self.ring.segment if self.ring is not None else None
        if self.open and segment is not None and segment.ptr != NULL and self.ring.ptr != NULL:
            c.tsqp_ring_release(self.ring.ptr, &self.slot)


cdef class Codec:
    """Encodes and decodes one channel's messages; holds the scratch memory for it. One caller at a time."""

    def __cinit__(self):
        self.scratch = NULL
        self.scratch_bytes = 0

    def __dealloc__(self):
        free(self.scratch)

    cdef uint8_t *_scratch(self, uint64_t nbytes) except NULL:
        if nbytes > self.scratch_bytes:
            free(self.scratch)
            self.scratch_bytes = 0
            self.scratch = <uint8_t *>malloc(nbytes)
            if self.scratch == NULL:
                raise MemoryError()
            self.scratch_bytes = nbytes
        return self.scratch

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
        if count > c.TSQP_MAX_TENSORS:
            check(c.TSQP_TOO_MANY_TENSORS)
        if header.flags & ~USER_FLAGS:
            raise e.MessageError(f"flags={header.flags:#x} uses bits of the transport; only the low 24 are the user's")
        header.tensor_count = <uint32_t>count
        header.meta_bytes = <uint32_t>len(meta)
        for i in range(count):
            _describe(tensors[i], &self.out.tensors[i], &self.sources[i])
        self.packed = None
        if wire is not None:
            _set_encodings(&self.out, wire)
            self._pack_encoded()
        check(c.tsqp_message_plan(&self.out))
        return header.total_bytes

    cdef uint64_t begin_specs(self, specs, bytes meta) except 0:
        """Like :meth:`begin` for tensors that are still to be made: `specs` are pairs of shape and torch dtype, or
        tensors to be like."""
        cdef c.tsqp_message_header *header = &self.out.header
        cdef c.tsqp_tensor_desc *desc
        cdef Py_ssize_t count = len(specs)
        cdef Py_ssize_t i, k, ndim
        if count > c.TSQP_MAX_TENSORS:
            check(c.TSQP_TOO_MANY_TENSORS)
        if header.flags & ~USER_FLAGS:
            raise e.MessageError(f"flags={header.flags:#x} uses bits of the transport; only the low 24 are the user's")
        header.tensor_count = <uint32_t>count
        header.meta_bytes = <uint32_t>len(meta)
        self.packed = None
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
            scratch = self._scratch(head)
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
        c.tsqp_outflow_mark(&flow, flow.total)

    def write_tiled_head(self, Ring ring, bytes meta, uint64_t deadline_ns):
        """Writes the head of the planned message; its payload follows by :meth:`write_tile`. False: it has no room
        in a slot."""
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
        return True

    def write_tile(self, Ring ring, uint64_t start, uint64_t nbytes, uint64_t deadline_ns):
        """Writes bytes [start, start + nbytes) of the planned message's payload; multiples of 64."""
        cdef c.tsqp_slot slot
        ring.acquire(&slot, deadline_ns)
        with nogil:
            self._fill_tile(slot.data, c.tsqp_message_head_bytes(&self.out.header) + start, nbytes)
        check(c.tsqp_ring_publish(ring.ptr, &slot, nbytes))

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

    def assemble(self, Message message, uint64_t max_bytes):
        """An :class:`Assembly` for a tiled message whose head was just read."""
        cdef Assembly assembly = Assembly.__new__(Assembly)
        if message.nbytes > max_bytes or self._decoded_bytes() > max_bytes:
            raise e.MessageTooLargeError(f"a message of {message.nbytes} bytes on the wire, {self._decoded_bytes()} in "
                                         f"memory, is over the limit of {max_bytes} bytes")
        memcpy(&assembly.plan, &self.inn, sizeof(c.tsqp_message))
        message.flags &= USER_FLAGS
        assembly.message = message
        assembly.at = c.tsqp_message_head_bytes(&self.inn.header)
        assembly.allocate()
        return assembly

    cdef uint64_t _decoded_bytes(self):
        """What the tensors of `inn` take in memory."""
        cdef uint64_t total = 0
        cdef uint32_t i
        for i in range(self.inn.header.tensor_count):
            total += c.tsqp_tensor_nbytes(&self.inn.tensors[i])
        return total

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

    # ---- receive ----

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
        cdef uint8_t first[FIRST_LOOK_BYTES]
        cdef uint64_t looked = slot.nbytes if slot.nbytes < FIRST_LOOK_BYTES else FIRST_LOOK_BYTES
        cdef uint64_t head
        cdef Message message
        cdef c.tsqp_tensor_desc *desc
        cdef uint32_t i
        if slot.filled < looked:
            ring.fill_wait(slot, looked, deadline_ns)
        c.tsqp_copy_from_shared(first, slot.data, looked)
        if slot.filled < slot.nbytes and looked >= sizeof(c.tsqp_message_header):
            head = c.tsqp_message_head_bytes(<c.tsqp_message_header *>first)  # not validated yet: clipped
            ring.fill_wait(slot, slot.nbytes if slot.nbytes < head else head, deadline_ns)
        self._parse(first, looked, slot.nbytes, slot.data)
        message = _new_message(&self.inn.header, self._meta(first, looked, slot.data), "ring")
        if self.inn.header.flags & OUT_OF_SLOT:
            return message  # its tensors are not in this slot
        if self.inn.header.total_bytes != slot.nbytes:
            check(c.TSQP_BAD_TOTAL)
        if not view:
            self._copy_tensors(ring, slot, message, deadline_ns)
            return message
        for i in range(self.inn.header.tensor_count):
            desc = &self.inn.tensors[i]
            if desc.encoding != c.TSQP_PLAIN:
                message.tensors.append(self._decoded(ring, slot, desc, deadline_ns))
                continue
            c.tsqp_segment_retain(ring.segment.ptr)
            message.tensors.append(_wrap(desc, slot.data + desc.offset, NULL, ring.segment.ptr))
        if slot.filled < slot.nbytes:
            ring.fill_wait(slot, slot.nbytes, deadline_ns)
        return message

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
        elif not ring.ready() or not ring.try_acquire(&slot):
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

    def decode_frames(self, head, list frames):
        """The message in ZeroMQ frames: `head` and one frame per tensor, whose memory the tensors keep alive."""
        cdef const uint8_t[::1] first = head
        cdef uint64_t nbytes = first.shape[0]
        cdef Message message
        cdef uint32_t i
        if nbytes < sizeof(c.tsqp_message_header):
            check(c.TSQP_TRUNCATED)
        self._parse(&first[0], nbytes, nbytes, &first[0])
        if c.tsqp_message_head_bytes(&self.inn.header) != nbytes or len(frames) != self.inn.header.tensor_count:
            check(c.TSQP_BAD_TOTAL)
        message = _new_message(&self.inn.header, self._meta(&first[0], nbytes, &first[0]), "zmq")
        for i in range(self.inn.header.tensor_count):
            message.tensors.append(self._frame_tensor(&self.inn.tensors[i], frames[i]))
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


include "_parts.pxi"


def deadline_ns(timeout):
    """`timeout` in seconds (None: for ever) as a point of the monotonic clock in ns."""
    return deadline_of(timeout)


def set_pool_limit(uint64_t nbytes):
    """How many bytes of freed result memory are kept for reuse (default 256 MiB; 0 keeps none)."""
    c.tsqp_pool_limit(nbytes)


def pool_idle_bytes():
    """Freed result memory kept for reuse now, in bytes."""
    return c.tsqp_pool_idle_bytes()
