# Included by _message.pyx: tensors that travel in fewer bits than they have (csrc/convert.h says how).

#: What `wire` may name -> code in a descriptor.
WIRE_ENCODINGS = {None: c.TSQP_PLAIN, "bfloat16": c.TSQP_AS_BFLOAT16, "int8": c.TSQP_AS_INT8_ROWS}

# bfloat16 is written in parts of this many elements, so that the receiver can follow.
cdef uint64_t PART_ELEMENTS = 1 << 15


cdef int _encoding_of(object name) except -1:
    try:
        return WIRE_ENCODINGS[name]
    except (KeyError, TypeError):
        raise e.EncodingError(f"wire={name!r} is none of None, 'bfloat16' and 'int8'; give one of them, or a sequence "
                              "with one for each tensor") from None


cdef bint _takes(int encoding, int dtype) noexcept:
    if encoding == c.TSQP_AS_BFLOAT16:
        return dtype == 1
    return encoding == c.TSQP_PLAIN or 1 <= dtype <= 3


cdef int _set_encodings(c.tsqp_message *message, object wire) except -1:
    """Writes the encodings that `wire` asks for into the descriptors: one name for every tensor that can be sent so,
    or a sequence with one for each tensor."""
    cdef uint32_t count = message.header.tensor_count
    cdef uint32_t i
    cdef int encoding
    cdef bint each = isinstance(wire, (list, tuple))
    if each and len(wire) != count:
        raise e.EncodingError(f"wire names {len(wire)} encodings for {count} tensors; give one for each, or one name")
    for i in range(count):
        encoding = _encoding_of(wire[i] if each else wire)
        if not _takes(encoding, message.tensors[i].dtype):
            if each:
                raise e.EncodingError(f"tensor {i} is {DTYPES[message.tensors[i].dtype]} and can't travel as {wire[i]}; "
                                      "bfloat16 takes float32, int8 takes float32, float16 and bfloat16")
            encoding = c.TSQP_PLAIN
        message.tensors[i].encoding = <uint8_t>encoding
    return 0


cdef void _encode(const c.tsqp_tensor_desc *desc, void *dst, const void *src) noexcept nogil:
    """The whole tensor; `dst` as csrc/convert.h wants it."""
    cdef uint64_t rows, cols
    if desc.encoding == c.TSQP_AS_BFLOAT16:
        c.tsqp_encode_bfloat16(dst, src, desc.nbytes // 2)
    else:
        c.tsqp_tensor_rows(desc, &rows, &cols)
        c.tsqp_encode_int8_rows(dst, src, desc.dtype, rows, cols)


cdef void _encode_into(c.tsqp_outflow *flow, const c.tsqp_tensor_desc *desc, const void *src) noexcept nogil:
    """The whole tensor into its place in the slot."""
    cdef uint8_t *dst = flow.slot.data + desc.offset
    cdef uint64_t at = 0
    cdef uint64_t count = desc.nbytes // 2
    cdef uint64_t part
    if desc.encoding != c.TSQP_AS_BFLOAT16:
        _encode(desc, dst, src)
        return
    while at < count:
        part = count - at if count - at < PART_ELEMENTS else PART_ELEMENTS
        c.tsqp_encode_bfloat16(dst + 2 * at, <const uint8_t *>src + 4 * at, part)
        at += part
        if desc.offset + 2 * at < flow.total:
            c.tsqp_outflow_mark(flow, desc.offset + 2 * at)


cdef void _decode(const c.tsqp_tensor_desc *desc, void *dst, const void *src) noexcept nogil:
    """The whole tensor; any bytes at `src` are safe to decode."""
    cdef uint64_t rows, cols
    if desc.encoding == c.TSQP_AS_BFLOAT16:
        c.tsqp_decode_bfloat16(dst, src, desc.nbytes // 2)
    else:
        c.tsqp_tensor_rows(desc, &rows, &cols)
        c.tsqp_decode_int8_rows(dst, desc.dtype, src, rows, cols)
