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
    # Numbers of perf.h, for a message's `way`; 0: a slot.
    VIA_ZMQ = 1
    IN_TILES = 2

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


cdef class Scratch:
    """Private memory for a header that is too long for the stack."""

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


include "_writing.pxi"


include "_reading.pxi"


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
