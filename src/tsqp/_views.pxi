# Included by _kernels.pyx: where a tensor's elements lie, and whether a kernel may read or write them there.

cdef struct View:
    c.tsqp_tensor_desc desc  # dtype, ndim, shape
    uint8_t *data
    bint contiguous
    int64_t itemsize, count
    int64_t strides[8]  # elements


cdef bint take(object tensor, View *view, bint grad) except -1:
    """Whether it is a plain CPU tensor with elements that no gradient is wanted of; then `view` says where it is."""
    cdef Source source
    cdef int64_t run = 1
    cdef int i
    kind = type(tensor)
    if kind is not Tensor and kind is not Parameter or grad and tensor.requires_grad:
        return False
    try:
        _describe(tensor, &view.desc, &source)
    except TsqpError:
        return False
    view.data = <uint8_t *>source.data
    view.contiguous = source.contiguous
    view.itemsize = c.tsqp_dtype_itemsize(view.desc.dtype)
    for i in range(<int>view.desc.ndim - 1, -1, -1):
        view.strides[i] = run if source.contiguous else source.strides[i] // view.itemsize
        run *= view.desc.shape[i]
    view.count = run
    return run > 0


cdef bint is_ours(const View *view) noexcept:
    return view.desc.dtype == TSQP_FLOAT32 or view.desc.dtype == TSQP_BFLOAT16


cdef bint alike(const View *a, const View *b) noexcept:
    cdef int i
    if a.desc.dtype != b.desc.dtype:
        return False
    return same_shape(a, b)


cdef bint same_shape(const View *a, const View *b) noexcept:
    cdef int i
    if a.desc.ndim != b.desc.ndim:
        return False
    for i in range(a.desc.ndim):
        if a.desc.shape[i] != b.desc.shape[i]:
            return False
    return True


cdef bint rows_whole(const View *view) noexcept:
    """Whether the elements of the last dimension follow each other."""
    cdef int last = view.desc.ndim - 1
    return last >= 0 and (view.strides[last] == 1 or view.desc.shape[last] == 1)


cdef uint8_t *end_of(const View *view) noexcept:
    cdef int64_t last = 0
    cdef int i
    for i in range(view.desc.ndim):
        last += (view.desc.shape[i] - 1) * view.strides[i]
    return view.data + (last + 1) * view.itemsize


cdef bint apart(const View *a, const View *b) noexcept:
    return end_of(a) <= b.data or end_of(b) <= a.data


cdef bint in_place(const View *out, const View *source) noexcept:
    """Whether each element of `out` lies on the same element of `source`."""
    cdef int i
    if out.data != source.data or not alike(out, source):
        return False
    for i in range(out.desc.ndim):
        if out.desc.shape[i] > 1 and out.strides[i] != source.strides[i]:
            return False
    return True


cdef bint may_write(const View *out, const View *source) noexcept:
    return apart(out, source) or in_place(out, source)


cdef object new_like(const View *view, unsigned dtype, bint swapped, View *out):
    """A contiguous tensor of the view's shape; `swapped`: its dimensions 1 and 2 are in memory the other way round."""
    cdef void *data = NULL
    cdef int64_t run = 1
    cdef int i
    out.desc = view.desc
    out.desc.dtype = <uint8_t>dtype
    out.desc.encoding = c.TSQP_PLAIN
    out.itemsize = c.tsqp_dtype_itemsize(dtype)
    out.desc.nbytes = <uint64_t>(view.count * out.itemsize)
    if swapped:
        out.desc.shape[1], out.desc.shape[2] = view.desc.shape[2], view.desc.shape[1]
    tensor = _new_tensor(&out.desc, &data)
    for i in range(<int>out.desc.ndim - 1, -1, -1):
        out.strides[i] = run
        run *= out.desc.shape[i]
    out.data = <uint8_t *>data
    out.count = view.count
    out.contiguous = not swapped
    if swapped:
        out.desc.shape[1], out.desc.shape[2] = view.desc.shape[1], view.desc.shape[2]
        out.strides[1], out.strides[2] = out.strides[2], out.strides[1]
        return tensor.transpose(1, 2)
    return tensor
