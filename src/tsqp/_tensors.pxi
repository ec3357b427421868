# Included by _message.pyx: tensors of torch and NumPy as descriptors and addresses, and the way back.

cdef c.DLPackExchangeAPI *_exchange_api() except? NULL:
    """torch's table of C functions for tensors (DLPack 1), or NULL where this torch is older."""
    cdef c.DLPackExchangeAPI *api
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return NULL
    api = <c.DLPackExchangeAPI *>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    if api.header.version.major != c.DL_MAJOR or api.dltensor_from_py_object_no_sync == NULL:
        return NULL
    return api


cdef c.DLPackExchangeAPI *EXCHANGE = _exchange_api()


# ---- sources: what is sent -------------------------------------------------------------------------------

cdef bint _contiguous(c.tsqp_tensor_desc *desc, const int64_t *strides, int64_t unit) noexcept:
    """Whether `strides`, in units of which `unit` make one element, run through the shape without a gap."""
    cdef int64_t run = unit
    cdef int i
    for i in range(desc.ndim - 1, -1, -1):
        if desc.shape[i] == 0:
            return True
        if desc.shape[i] != 1 and strides[i] != run:
            run = -1
        elif run > 0:
            run *= desc.shape[i]
    return run > 0


cdef int _describe_torch(object tensor, c.tsqp_tensor_desc *desc, Source *source) except -1:
    cdef c.DLTensor view
    cdef int i
    cdef int64_t itemsize
    cdef unsigned code
    if EXCHANGE == NULL or tensor.is_neg():
        return _describe_attributes(tensor, desc, source)
    if EXCHANGE.dltensor_from_py_object_no_sync(<void *>tensor, &view) != 0:
        PyErr_Clear()
        return _describe_attributes(tensor, desc, source)  # says what is wrong with it
    code = c.tsqp_dtype_of_dlpack(view.dtype.code, view.dtype.bits, view.dtype.lanes)
    if code == 0 or view.device.device_type != c.DL_CPU or view.ndim > c.TSQP_MAX_NDIM:
        return _describe_attributes(tensor, desc, source)
    desc.dtype = <uint8_t>code
    desc.ndim = <uint8_t>view.ndim
    for i in range(view.ndim):
        desc.shape[i] = view.shape[i]
    source.contiguous = _contiguous(desc, view.strides, 1)
    if not source.contiguous:
        itemsize = c.tsqp_dtype_itemsize(code)
        for i in range(view.ndim):
            source.strides[i] = view.strides[i] * itemsize
    source.data = <uint8_t *>view.data + view.byte_offset
    return 0


cdef int _describe_attributes(object tensor, c.tsqp_tensor_desc *desc, Source *source) except -1:
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
        for i in range(view.ndim):
            desc.shape[i] = view.shape[i]
            source.strides[i] = view.strides[i]
        source.contiguous = _contiguous(desc, source.strides, view.itemsize)
    finally:
        PyBuffer_Release(&view)
    return 0


cdef int _describe(object tensor, c.tsqp_tensor_desc *desc, Source *source) except -1:
    desc.encoding = c.TSQP_PLAIN
    if isinstance(tensor, Tensor):
        return _describe_torch(tensor, desc, source)
    if hasattr(tensor, "dtype") and PyObject_CheckBuffer(tensor) or type(tensor).__module__ == "numpy":
        return _describe_buffer(tensor, desc, source)
    raise e.MessageError(f"a {type(tensor).__name__} can't be sent; give torch tensors or NumPy arrays")


# ---- destinations: what is received ----------------------------------------------------------------------

cdef int _check_made(int rc) except -1:
    if rc != 0 and PyErr_Occurred() == NULL:
        raise MemoryError("torch could not make a tensor of received memory")
    return rc


cdef void _free_capsule(object capsule) noexcept:
    # Runs for capsules nobody consumed; a consumer renames its capsule and owns the tensor.
    if PyCapsule_IsValid(capsule, "dltensor"):
        c.tsqp_tensor_delete(<c.DLManagedTensor *>PyCapsule_GetPointer(capsule, "dltensor"))


cdef object _wrap(c.tsqp_tensor_desc *desc, void *data, c.tsqp_buffer *buffer, c.tsqp_segment *segment):
    """A torch tensor over `data`; takes over the reference on `buffer` or `segment`."""
    cdef c.DLManagedTensorVersioned *versioned
    cdef c.DLManagedTensor *managed
    cdef void *made = NULL
    if EXCHANGE != NULL:
        versioned = c.tsqp_tensor_new_versioned(desc, data, buffer, segment)
        if versioned == NULL:
            raise MemoryError("no memory for a received tensor")
        _check_made(EXCHANGE.managed_tensor_to_py_object_no_sync(versioned, &made))
        tensor = <object>made
        Py_DECREF(tensor)  # the reference that was made for us; `tensor` holds its own
        return tensor
    managed = c.tsqp_tensor_new(desc, data, buffer, segment)
    if managed == NULL:
        raise MemoryError("no memory for a received tensor")
    tensor = from_dlpack(PyCapsule_New(managed, "dltensor", _free_capsule))
    if desc.dtype >= FIRST_FLOAT8:
        tensor = tensor.view(DTYPES[desc.dtype])
    return tensor


cdef object _new_tensor(c.tsqp_tensor_desc *desc, void **data):
    """A private tensor of the descriptor's dtype and shape, and the address of its uninitialised memory."""
    cdef uint64_t nbytes = desc.nbytes if desc.encoding == c.TSQP_PLAIN else c.tsqp_tensor_nbytes(desc)
    cdef c.tsqp_buffer *buffer = c.tsqp_buffer_new(nbytes)
    if buffer == NULL:
        raise MemoryError(f"no memory for a received tensor of {nbytes} bytes")
    data[0] = c.tsqp_buffer_data(buffer)
    return _wrap(desc, data[0], buffer, NULL)


cdef class TensorBytes:
    """Exports memory as bytes and keeps its owner, a tensor or a pooled buffer, alive; what a ZeroMQ frame sends."""

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.nbytes, 1, flags)

    def __releasebuffer__(self, Py_buffer *view):
        pass

    def __len__(self):
        return self.nbytes

    def __dealloc__(self):
        c.tsqp_buffer_release(self.buffer)


cdef TensorBytes _pooled_bytes(uint64_t nbytes):
    """`nbytes` of the pool, 64-byte aligned, with room up to the next multiple of 64."""
    cdef TensorBytes pooled = TensorBytes.__new__(TensorBytes)
    pooled.buffer = c.tsqp_buffer_new(nbytes + 64)
    if pooled.buffer == NULL:
        raise MemoryError(f"no memory to pack a tensor of {nbytes} bytes")
    pooled.data = c.tsqp_buffer_data(pooled.buffer)
    pooled.nbytes = <Py_ssize_t>nbytes
    return pooled
