# The C core as Cython sees it (csrc/tsqp.h, csrc/access.h). No code here.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "tsqp.h" nogil:
    enum:
        TSQP_OK, TSQP_AGAIN, TSQP_INTERRUPTED, TSQP_PEER_CLOSED, TSQP_CLOSED, TSQP_CORRUPTED, TSQP_USAGE
        TSQP_ERRNO, TSQP_NOT_FOUND, TSQP_EXISTS, TSQP_PERMISSION, TSQP_FULL, TSQP_BAD_MAGIC, TSQP_BAD_VERSION
        TSQP_BAD_GEOMETRY, TSQP_TRUNCATED, TSQP_NO_MEMORY, TSQP_BAD_NAME, TSQP_BAD_SESSION, TSQP_ATTACHED
        TSQP_TOO_LARGE, TSQP_BAD_DTYPE, TSQP_BAD_RANK, TSQP_BAD_SHAPE, TSQP_BAD_NBYTES, TSQP_BAD_OFFSET
        TSQP_TOO_MANY_TENSORS, TSQP_BAD_META, TSQP_BAD_RESERVED, TSQP_BAD_TOTAL, TSQP_BAD_ENCODING

    enum:
        TSQP_MAX_NDIM, TSQP_MAX_TENSORS, TSQP_MAX_META_BYTES, TSQP_MAX_CHUNKS

    struct tsqp_geometry:
        uint64_t max_chunk_bytes
        uint64_t max_chunks
        uint64_t ring_count

    struct tsqp_segment:
        pass

    struct tsqp_owner:
        uint64_t pid
        uint64_t start
        uint64_t pidns
        uint64_t segment_bytes
        bint locked

    uint64_t tsqp_segment_bytes(const tsqp_geometry *geometry)
    int tsqp_segment_create(const tsqp_geometry *geometry, const char *name, tsqp_segment **out)
    int tsqp_segment_attach(const tsqp_geometry *geometry, const char *name, const uint64_t *session,
                            tsqp_segment **out)
    void tsqp_segment_retain(tsqp_segment *segment)
    void tsqp_segment_release(tsqp_segment *segment)
    int tsqp_segment_unlink(tsqp_segment *segment)
    const char *tsqp_segment_name(const tsqp_segment *segment)
    void tsqp_segment_session(const tsqp_segment *segment, uint64_t *out)
    uint64_t tsqp_segment_length(const tsqp_segment *segment)
    void *tsqp_segment_address(const tsqp_segment *segment)
    void tsqp_segment_close_end(tsqp_segment *segment)
    bint tsqp_segment_peer_closed(tsqp_segment *segment)
    void tsqp_segment_beat(tsqp_segment *segment)
    uint64_t tsqp_segment_peer_heartbeat(tsqp_segment *segment)
    int tsqp_segment_peer_locked(tsqp_segment *segment)
    void tsqp_segment_forget_after_fork(tsqp_segment *segment)
    const char *tsqp_shm_directory()
    int tsqp_process_start(uint64_t pid, uint64_t *start)
    uint64_t tsqp_pid_namespace()
    int tsqp_segment_owner(const char *name, tsqp_owner *out)

    enum tsqp_wait_mode:
        TSQP_WAIT_AUTO, TSQP_WAIT_SPIN, TSQP_WAIT_BLOCK, TSQP_WAIT_POLL

    struct tsqp_waiter:
        tsqp_wait_mode mode
        uint64_t spin_max_ns
        uint64_t spin_ns
        bint futex

    struct tsqp_watch:
        uint64_t *word
        uint64_t idle
        uint64_t *waiting
        uint64_t *closed

    struct tsqp_doorbell:
        uint64_t count
        uint64_t waiting

    void tsqp_waiter_init(tsqp_waiter *waiter, tsqp_wait_mode mode, uint64_t spin_ns, bint futex)
    int tsqp_wait(tsqp_waiter *waiter, const tsqp_watch *watches, size_t count, uint64_t slice_ns)
    struct tsqp_estimate:
        uint64_t mean_ns

    struct tsqp_forecast:
        tsqp_estimate took
        uint64_t begin_ns

    struct tsqp_forecasts:
        pass

    tsqp_forecast *tsqp_forecast_of(tsqp_forecasts *forecasts, uint64_t request_bytes)
    int tsqp_wait_answer(tsqp_waiter *waiter, const tsqp_watch *watch, tsqp_forecast *forecast, uint64_t slice_ns)
    uint64_t tsqp_now_ns()
    void tsqp_doorbell_ring(tsqp_doorbell *bell)

    struct tsqp_ring:
        pass

    enum tsqp_role:
        TSQP_PRODUCER, TSQP_CONSUMER

    struct tsqp_slot:
        uint8_t *data
        uint64_t nbytes
        uint64_t filled
        uint64_t ticket

    int tsqp_ring_open(tsqp_segment *segment, unsigned index, tsqp_role role, tsqp_ring **out)
    void tsqp_ring_close(tsqp_ring *ring)
    tsqp_waiter *tsqp_ring_waiter(tsqp_ring *ring)
    tsqp_watch tsqp_ring_watch(tsqp_ring *ring)
    int tsqp_ring_try_write(tsqp_ring *ring, tsqp_slot *out)
    int tsqp_ring_try_read(tsqp_ring *ring, tsqp_slot *out)
    int tsqp_ring_publish(tsqp_ring *ring, const tsqp_slot *slot, uint64_t nbytes)
    int tsqp_ring_cancel(tsqp_ring *ring, const tsqp_slot *slot)
    int tsqp_ring_release(tsqp_ring *ring, const tsqp_slot *slot)
    bint tsqp_ring_ready(tsqp_ring *ring)
    int tsqp_ring_follow(tsqp_ring *ring, tsqp_slot *slot, uint64_t upto)
    tsqp_watch tsqp_ring_fill_watch(tsqp_ring *ring, const tsqp_slot *slot)
    int tsqp_ring_unread(tsqp_ring *ring, const tsqp_slot *slot)
    uint64_t tsqp_ring_free_slots(tsqp_ring *ring)
    uint64_t tsqp_ring_unread_slots(tsqp_ring *ring)
    void tsqp_ring_wake_peer(tsqp_ring *ring)
    void tsqp_ring_rouse(tsqp_ring *ring)

    struct tsqp_outflow:
        tsqp_ring *ring
        const tsqp_slot *slot
        uint64_t total
        uint64_t marked

    void tsqp_outflow_copy(tsqp_outflow *flow, uint64_t offset, const void *src, uint64_t nbytes)
    int tsqp_outflow_mark(tsqp_outflow *flow, uint64_t upto)
    int tsqp_inflow_copy(tsqp_ring *ring, tsqp_slot *slot, uint64_t offset, void *dst, uint64_t nbytes,
                         uint64_t *done)

    struct tsqp_message_header:
        uint32_t magic
        uint16_t version
        uint16_t header_bytes
        uint32_t tag
        uint32_t flags
        uint64_t request_id
        int32_t status
        uint32_t tensor_count
        uint32_t meta_bytes
        uint32_t site
        uint64_t index
        uint64_t total_bytes
        uint64_t compute_ns
        uint64_t queue_ns

    struct tsqp_tensor_desc:
        uint8_t dtype
        uint8_t ndim
        uint8_t encoding
        uint64_t nbytes
        uint64_t offset
        int64_t shape[8]

    struct tsqp_message:
        tsqp_message_header header
        tsqp_tensor_desc tensors[64]

    uint32_t tsqp_dtype_itemsize(unsigned dtype)
    int tsqp_message_plan(tsqp_message *message)
    uint64_t tsqp_tensor_nbytes(const tsqp_tensor_desc *tensor)
    void tsqp_tensor_rows(const tsqp_tensor_desc *tensor, uint64_t *rows, uint64_t *cols)
    uint64_t tsqp_message_head_bytes(const tsqp_message_header *header)
    void tsqp_message_write_head(const tsqp_message *message, const void *meta, void *dst)
    int tsqp_message_check_header(const tsqp_message_header *header, uint64_t available_bytes)
    int tsqp_message_check_tensors(const tsqp_message *message)

    struct tsqp_buffer:
        pass

    tsqp_buffer *tsqp_buffer_new(uint64_t nbytes)
    void *tsqp_buffer_data(tsqp_buffer *buffer)
    void tsqp_buffer_release(tsqp_buffer *buffer)
    void tsqp_pool_limit(uint64_t nbytes)
    void tsqp_pool_trim()
    uint64_t tsqp_pool_idle_bytes()

    struct DLManagedTensor:
        pass

    struct DLManagedTensorVersioned:
        pass

    DLManagedTensor *tsqp_tensor_new(const tsqp_tensor_desc *desc, void *data, tsqp_buffer *buffer,
                                     tsqp_segment *segment)
    void tsqp_tensor_delete(DLManagedTensor *tensor)
    DLManagedTensorVersioned *tsqp_tensor_new_versioned(const tsqp_tensor_desc *desc, void *data,
                                                        tsqp_buffer *buffer, tsqp_segment *segment)
    unsigned tsqp_dtype_of_dlpack(unsigned code, unsigned bits, unsigned lanes)


cdef extern from "convert.h" nogil:
    enum:
        TSQP_PLAIN, TSQP_AS_BFLOAT16, TSQP_AS_INT8_ROWS

    void tsqp_encode_bfloat16(void *shared_dst, const void *src, size_t count)
    void tsqp_decode_bfloat16(void *dst, const void *shared_src, size_t count)
    int64_t tsqp_encode_int8_rows(void *shared_dst, const void *src, unsigned dtype, size_t rows, size_t cols)
    int tsqp_decode_int8_rows(void *dst, unsigned dtype, const void *shared_src, size_t rows, size_t cols)


cdef extern from "dlpack.h":
    ctypedef struct DLDevice:
        int32_t device_type
        int32_t device_id

    ctypedef struct DLDataType:
        uint8_t code
        uint8_t bits
        uint16_t lanes

    ctypedef struct DLTensor:
        void *data
        DLDevice device
        int32_t ndim
        DLDataType dtype
        int64_t *shape
        int64_t *strides
        uint64_t byte_offset

    ctypedef struct DLPackVersion:
        uint32_t major
        uint32_t minor

    ctypedef struct DLPackExchangeAPIHeader:
        DLPackVersion version

    ctypedef struct DLPackExchangeAPI:
        DLPackExchangeAPIHeader header
        int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *tensor, void **out_py_object)
        int (*dltensor_from_py_object_no_sync)(void *py_object, DLTensor *out)

    enum:
        DL_CPU
        DL_MAJOR


cdef extern from "access.h" nogil:
    uint64_t tsqp_load_acquire(uint64_t *word)
    void tsqp_copy_from_shared(void *dst, const void *shared_src, size_t nbytes)
    void tsqp_copy_to_shared(void *shared_dst, const void *src, size_t nbytes)
    void tsqp_pack_to_shared(void *shared_dst, const void *src, size_t itemsize, unsigned ndim,
                             const int64_t *shape, const int64_t *strides)
