from libc.stdint cimport int64_t


cdef extern from "layout.h" nogil:
    enum:
        TSQP_FLOAT32
        TSQP_BFLOAT16
        TSQP_BOOL


cdef extern from "kernels.h" nogil:
    enum:
        TSQP_MAX_THREADS

    enum tsqp_mask:
        TSQP_MASK_NONE
        TSQP_MASK_BOOL
        TSQP_MASK_FLOAT32
        TSQP_MASK_BFLOAT16

    struct tsqp_rms_norm:
        const void *x
        const void *residual
        const void *weight
        void *out
        void *total
        unsigned dtype
        size_t rows, cols
        float eps

    struct tsqp_silu_mul:
        const void *gate
        const void *up
        void *out
        unsigned dtype
        size_t count

    struct tsqp_rotary:
        const void *x
        const void *cos
        const void *sin
        void *out
        unsigned dtype
        size_t dim
        size_t shape[3]
        int64_t x_strides[3]
        int64_t out_strides[3]
        int64_t cos_strides[3]
        int64_t sin_strides[3]

    struct tsqp_softmax:
        const void *scores
        const void *mask
        void *out
        unsigned dtype, out_dtype
        tsqp_mask mask_kind
        unsigned ndim
        size_t shape[7]
        int64_t strides[7]
        int64_t out_strides[7]
        int64_t mask_strides[7]
        size_t keys
        float scale
        bint causal
        size_t first, window

    struct tsqp_move:
        const void *source[2]
        void *target
        size_t sources, nbytes
        bint stream

    void tsqp_threads_set(unsigned count)
    unsigned tsqp_threads()
    unsigned tsqp_threads_running()
    void tsqp_threads_stop()
    int c_rms_norm "tsqp_rms_norm"(const tsqp_rms_norm *job)
    int c_silu_mul "tsqp_silu_mul"(const tsqp_silu_mul *job)
    int c_rotary "tsqp_rotary"(const tsqp_rotary *jobs, size_t count)
    int c_softmax "tsqp_softmax"(const tsqp_softmax *job)
    void c_move "tsqp_move"(const tsqp_move *job)
    const char *tsqp_kernels_name()
