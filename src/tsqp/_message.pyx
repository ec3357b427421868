# cython: language_level=3, binding=True, auto_pickle=False, autotestdict=False, nonecheck=True
"""Tensor messages: between torch / NumPy tensors and the bytes of a slot or of ZeroMQ frames."""

from cpython.buffer cimport (PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_FillInfo, PyBuffer_Release,
                             PyObject_CheckBuffer, PyObject_GetBuffer)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from . cimport _core as c
from ._ring cimport Ring, Segment, deadline_of

import msgpack
import torch

from . import errors as e

# A copy shorter than this is done before another thread could have made use of the GIL.
cdef uint64_t NOGIL_BYTES = 1 << 18
# The first look at a message copies this much: header and descriptors of the usual one.
cdef enum:
    FIRST_LOOK_BYTES = 512

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
    c.TSQP_BAD_TOTAL: (e.TruncatedMessageError, "the header's total bytes differ from what its parts add up to"),
}


cdef int check(int rc) except -1:
    if rc >= 0:
        return rc
    kind, text = _ERRORS[rc]
    raise kind(text)


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

    cdef readonly uint32_t tag, flags, site
    cdef readonly uint64_t request_id, index, compute_ns, queue_ns, nbytes
    cdef readonly int status
    cdef readonly bytes meta_bytes
    cdef readonly list tensors
    cdef readonly str carrier
    cdef object _meta

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


# ---- sources: what is sent -------------------------------------------------------------------------------

cdef struct Source:
    void *data
    bint contiguous
    int64_t strides[8]  # bytes


cdef int _describe_torch(object tensor, c.tsqp_tensor_desc *desc, Source *source) except -1:
    cdef object shape = tensor.shape
    cdef Py_ssize_t ndim = len(shape)
    cdef Py_ssize_t i
    cdef int64_t itemsize
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise e.DTypeError(f"{tensor.dtype} can't be sent; convert the tensor to one of "
                           f"{', '.join(str(d)[6:] for d in DTYPE_CODES)}")
    if not tensor.is_cpu:
        raise e.MessageError(f"a tensor on {tensor.device} can't be sent; move it to the CPU first")
    if ndim > c.TSQP_MAX_NDIM:
        raise e.RankError(f"a tensor of {ndim} dimensions can't be sent; at most {c.TSQP_MAX_NDIM} are allowed")
    if tensor.layout is not STRIDED:
        raise e.MessageError(f"a {tensor.layout} tensor can't be sent; convert it with to_dense()")
    if tensor.is_neg():  # its memory holds the values with the other sign
        raise e.MessageError("a lazily negated view can't be sent; call resolve_neg() first")
    desc.dtype = code
    desc.ndim = <uint8_t>ndim
    for i in range(ndim):
        desc.shape[i] = shape[i]
    source.contiguous = tensor.is_contiguous()
    if not source.contiguous:
        itemsize = tensor.element_size()
        strides = tensor.stride()
        for i in range(ndim):
            source.strides[i] = <int64_t>strides[i] * itemsize
    source.data = <void *><uintptr_t>tensor.data_ptr()
    return 0


cdef int _describe_buffer(object array, c.tsqp_tensor_desc *desc, Source *source) except -1:
    """A NumPy array, through the buffer protocol. Its memory lives as long as the caller's reference."""
    cdef Py_buffer view
    cdef int i
    cdef int64_t run
    code = _NUMPY_CODES.get(array.dtype.name)
    if code is None or array.dtype.byteorder == ">":
        raise e.DTypeError(f"a NumPy array of dtype {array.dtype} can't be sent; convert it with astype()")
    if array.ndim > c.TSQP_MAX_NDIM:
        raise e.RankError(f"an array of {array.ndim} dimensions can't be sent; at most {c.TSQP_MAX_NDIM} are allowed")
    if code == 3 or code >= FIRST_FLOAT8:
        array = array.view(f"u{array.dtype.itemsize}")  # extension dtypes export no buffer
    PyObject_GetBuffer(array, &view, PyBUF_STRIDES)
    try:
        desc.dtype = code
        desc.ndim = <uint8_t>view.ndim
        source.data = view.buf
        run = view.itemsize
        source.contiguous = True
        for i in range(view.ndim - 1, -1, -1):
            desc.shape[i] = view.shape[i]
            source.strides[i] = view.strides[i]
            if view.shape[i] != 1 and view.strides[i] != run:
                source.contiguous = False
            run *= view.shape[i]
    finally:
        PyBuffer_Release(&view)
    return 0


cdef int _describe(object tensor, c.tsqp_tensor_desc *desc, Source *source) except -1:
    if isinstance(tensor, Tensor):
        return _describe_torch(tensor, desc, source)
    if hasattr(tensor, "dtype") and PyObject_CheckBuffer(tensor) or type(tensor).__module__ == "numpy":
        return _describe_buffer(tensor, desc, source)
    raise e.MessageError(f"a {type(tensor).__name__} can't be sent; give torch tensors or NumPy arrays")


# ---- destinations: what is received ----------------------------------------------------------------------

cdef void _free_capsule(object capsule) noexcept:
    # Runs for capsules nobody consumed; a consumer renames its capsule and owns the tensor.
    if PyCapsule_IsValid(capsule, "dltensor"):
        c.tsqp_tensor_delete(<c.DLManagedTensor *>PyCapsule_GetPointer(capsule, "dltensor"))


cdef object _wrap(c.tsqp_tensor_desc *desc, void *data, c.tsqp_buffer *buffer, c.tsqp_segment *segment):
    """A torch tensor over `data`; takes over the reference on `buffer` or `segment`."""
    cdef c.DLManagedTensor *managed = c.tsqp_tensor_new(desc, data, buffer, segment)
    if managed == NULL:
        raise MemoryError("no memory for a received tensor")
    tensor = from_dlpack(PyCapsule_New(managed, "dltensor", _free_capsule))
    if desc.dtype >= FIRST_FLOAT8:
        tensor = tensor.view(DTYPES[desc.dtype])
    return tensor


cdef object _copy_in(c.tsqp_tensor_desc *desc, const uint8_t *shared):
    cdef c.tsqp_buffer *buffer = c.tsqp_buffer_new(desc.nbytes)
    if buffer == NULL:
        raise MemoryError(f"no memory for a received tensor of {desc.nbytes} bytes")
    cdef void *data = c.tsqp_buffer_data(buffer)
    cdef uint64_t nbytes = desc.nbytes
    if nbytes >= NOGIL_BYTES:
        with nogil:
            c.tsqp_copy_from_shared(data, shared, nbytes)
    else:
        c.tsqp_copy_from_shared(data, shared, nbytes)
    return _wrap(desc, data, buffer, NULL)


cdef class Lease:
    """``with`` block over a message whose tensors are views into its slot; they are valid inside it only."""

    cdef Ring ring
    cdef c.tsqp_slot slot
    cdef bint open
    cdef readonly Message message

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


cdef class TensorBytes:
    """Exports a contiguous tensor's memory as bytes and keeps the tensor alive; what a ZeroMQ frame sends."""

    cdef object owner
    cdef void *data
    cdef Py_ssize_t nbytes

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.nbytes, 1, flags)

    def __releasebuffer__(self, Py_buffer *view):
        pass

    def __len__(self):
        return self.nbytes


cdef class Codec:
    """Encodes and decodes one channel's messages; holds the scratch memory for it. One caller at a time."""

    cdef c.tsqp_message out
    cdef c.tsqp_message inn
    cdef Source sources[64]
    cdef uint8_t *scratch
    cdef uint64_t scratch_bytes

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
             uint32_t site, uint64_t index, uint64_t compute_ns, uint64_t queue_ns):
        """Fills the outgoing header and returns the message's total bytes. Raises MessageError classes."""
        cdef c.tsqp_message_header *header = &self.out.header
        cdef Py_ssize_t count = len(tensors)
        cdef Py_ssize_t i
        if count > c.TSQP_MAX_TENSORS:
            check(c.TSQP_TOO_MANY_TENSORS)
        if flags & ~USER_FLAGS:
            raise e.MessageError(f"flags={flags:#x} uses bits of the transport; only the low 24 are the user's")
        header.tag = tag
        header.flags = flags
        header.request_id = request_id
        header.status = status
        header.tensor_count = <uint32_t>count
        header.meta_bytes = <uint32_t>len(meta)
        header.site = site
        header.index = index
        header.compute_ns = compute_ns
        header.queue_ns = queue_ns
        for i in range(count):
            _describe(tensors[i], &self.out.tensors[i], &self.sources[i])
        check(c.tsqp_message_plan(&self.out))
        return header.total_bytes

    def write(self, Ring ring, bytes meta, uint64_t deadline_ns):
        """Writes the planned message into the ring. The caller keeps the tensors alive until this returns."""
        cdef c.tsqp_slot slot
        cdef uint64_t total = self.out.header.total_bytes
        cdef uint64_t head = c.tsqp_message_head_bytes(&self.out.header)
        cdef uint8_t *scratch = self._scratch(head)
        c.tsqp_message_write_head(&self.out, <char *>meta, scratch)
        ring.acquire(&slot, deadline_ns)
        if total > slot.nbytes:
            c.tsqp_ring_cancel(ring.ptr, &slot)
            raise e.MessageTooLargeError(f"a message of {total} bytes does not fit a slot of {slot.nbytes} bytes")
        if total >= NOGIL_BYTES:
            with nogil:
                self._fill(slot.data, scratch, head)
        else:
            self._fill(slot.data, scratch, head)
        check(c.tsqp_ring_publish(ring.ptr, &slot, total))

    cdef void _fill(self, uint8_t *slot, const uint8_t *head, uint64_t head_bytes) noexcept nogil:
        cdef c.tsqp_tensor_desc *desc
        cdef Source *source
        cdef uint32_t i
        c.tsqp_copy_to_shared(slot, head, head_bytes)
        for i in range(self.out.header.tensor_count):
            desc = &self.out.tensors[i]
            source = &self.sources[i]
            if source.contiguous:
                c.tsqp_copy_to_shared(slot + desc.offset, source.data, desc.nbytes)
            else:
                c.tsqp_pack_to_shared(slot + desc.offset, source.data, c.tsqp_dtype_itemsize(desc.dtype), desc.ndim,
                                      desc.shape, source.strides)

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
    def planned_head_bytes(self):
        """Bytes of the planned message before its payload."""
        return c.tsqp_message_head_bytes(&self.out.header)

    def make_contiguous(self, tensors):
        """Packs the strided tensors of the planned message privately; returns what must be kept alive."""
        cdef TensorBytes packed
        kept = list(tensors)
        for i in range(len(kept)):
            if not self.sources[i].contiguous:
                packed = TensorBytes.__new__(TensorBytes)
                self._pack_private(i, packed)
                self.sources[i].data = packed.data
                self.sources[i].contiguous = True
                kept[i] = packed
        return kept

    def assemble(self, Message message, uint64_t max_bytes):
        """An :class:`Assembly` for a tiled message whose head was just read."""
        cdef Assembly assembly = Assembly.__new__(Assembly)
        if message.nbytes > max_bytes:
            raise e.MessageTooLargeError(f"a message of {message.nbytes} bytes is over the limit of {max_bytes} bytes")
        memcpy(&assembly.plan, &self.inn, sizeof(c.tsqp_message))
        message.flags &= USER_FLAGS
        assembly.message = message
        assembly.at = c.tsqp_message_head_bytes(&self.inn.header)
        assembly.allocate()
        return assembly

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

    def payload(self, tensors):
        """One buffer per tensor of the planned message, without a copy where it is contiguous."""
        cdef TensorBytes out
        cdef Py_ssize_t i
        frames = []
        for i in range(len(tensors)):
            out = TensorBytes.__new__(TensorBytes)
            out.nbytes = <Py_ssize_t>self.out.tensors[i].nbytes
            if self.sources[i].contiguous:
                out.owner = tensors[i]
                out.data = self.sources[i].data
            else:
                self._pack_private(i, out)
            frames.append(out)
        return frames

    cdef _pack_private(self, Py_ssize_t i, TensorBytes out):
        cdef c.tsqp_tensor_desc *desc = &self.out.tensors[i]
        cdef c.tsqp_buffer *buffer = c.tsqp_buffer_new(desc.nbytes + 64)
        if buffer == NULL:
            raise MemoryError(f"no memory to pack a tensor of {desc.nbytes} bytes")
        out.data = c.tsqp_buffer_data(buffer)
        c.tsqp_pack_to_shared(out.data, self.sources[i].data, c.tsqp_dtype_itemsize(desc.dtype), desc.ndim,
                              desc.shape, self.sources[i].strides)
        out.owner = _wrap(desc, out.data, buffer, NULL)

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

    cdef Message _read_slot(self, c.tsqp_slot *slot, Segment pinned):
        """The message in a slot; `pinned` None copies its tensors out, else they are views that pin the mapping."""
        cdef uint8_t first[FIRST_LOOK_BYTES]
        cdef uint64_t looked = slot.nbytes if slot.nbytes < FIRST_LOOK_BYTES else FIRST_LOOK_BYTES
        cdef Message message
        cdef c.tsqp_tensor_desc *desc
        cdef uint32_t i
        c.tsqp_copy_from_shared(first, slot.data, looked)
        self._parse(first, looked, slot.nbytes, slot.data)
        message = _new_message(&self.inn.header, self._meta(first, looked, slot.data), "ring")
        if self.inn.header.flags & OUT_OF_SLOT:
            return message  # its tensors are not in this slot
        if self.inn.header.total_bytes != slot.nbytes:
            check(c.TSQP_BAD_TOTAL)
        for i in range(self.inn.header.tensor_count):
            desc = &self.inn.tensors[i]
            if pinned is None:
                message.tensors.append(_copy_in(desc, slot.data + desc.offset))
            else:
                c.tsqp_segment_retain(pinned.ptr)
                message.tensors.append(_wrap(desc, slot.data + desc.offset, NULL, pinned.ptr))
        return message

    def read(self, Ring ring, uint64_t deadline_ns):
        """The next message of the ring, copied to private memory."""
        cdef c.tsqp_slot slot
        ring.acquire(&slot, deadline_ns)
        try:
            return self._read_slot(&slot, None)
        finally:
            c.tsqp_ring_release(ring.ptr, &slot)

    def lease(self, Ring ring, uint64_t deadline_ns):
        """The next message of the ring as a :class:`Lease`; deadline 0 returns None where none waits."""
        cdef Lease lease = Lease.__new__(Lease)
        if deadline_ns != 0:
            ring.acquire(&lease.slot, deadline_ns)
        elif not ring.try_acquire(&lease.slot):
            return None
        lease.ring = ring
        lease.open = True
        try:
            lease.message = self._read_slot(&lease.slot, ring.segment)
        except BaseException:
            lease.release()
            raise
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
        shape = [desc.shape[i] for i in range(desc.ndim)]
        dtype = DTYPES[desc.dtype]
        buffer = memoryview(frame)
        if buffer.nbytes != desc.nbytes:
            check(c.TSQP_BAD_NBYTES)
        if desc.nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


cdef class Assembly:
    """A tiled message on its way: private tensors that fill tile by tile."""

    cdef c.tsqp_message plan
    cdef void *data[64]
    cdef uint64_t at
    cdef readonly Message message

    cdef allocate(self):
        cdef c.tsqp_buffer *buffer
        cdef uint32_t i
        for i in range(self.plan.header.tensor_count):
            buffer = c.tsqp_buffer_new(self.plan.tensors[i].nbytes)
            if buffer == NULL:
                raise MemoryError(f"no memory for a received tensor of {self.plan.tensors[i].nbytes} bytes")
            self.data[i] = c.tsqp_buffer_data(buffer)
            self.message.tensors.append(_wrap(&self.plan.tensors[i], self.data[i], buffer, NULL))

    @property
    def complete(self):
        return self.at == self.plan.header.total_bytes

    def feed(self, Ring ring, uint64_t deadline_ns):
        """Takes one tile from the ring. False: the sender gave this message up."""
        cdef c.tsqp_slot slot
        ring.acquire(&slot, deadline_ns)
        try:
            if slot.nbytes == 0:
                return False
            if slot.nbytes % 64 or slot.nbytes > self.plan.header.total_bytes - self.at:
                check(c.TSQP_BAD_TOTAL)
            with nogil:
                self._take(slot.data, slot.nbytes)
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


def give_up(Ring ring, uint64_t deadline_ns):
    """Tells the receiver that the tiled message under way will not be finished."""
    cdef c.tsqp_slot slot
    ring.acquire(&slot, deadline_ns)
    check(c.tsqp_ring_publish(ring.ptr, &slot, 0))


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


def deadline_ns(timeout):
    """`timeout` in seconds (None: for ever) as a point of the monotonic clock in ns."""
    return deadline_of(timeout)


def set_pool_limit(uint64_t nbytes):
    """How many bytes of freed result memory are kept for reuse (default 256 MiB; 0 keeps none)."""
    c.tsqp_pool_limit(nbytes)


def pool_idle_bytes():
    """Freed result memory kept for reuse now, in bytes."""
    return c.tsqp_pool_idle_bytes()
