/* kernels_set.h: one instruction set's loops (kernels_each.c, kernels_avx2.c, kernels_avx512.c), chosen in
 * kernels.c. Each works on rows, lines or elements [begin, end) of its job. */
#ifndef TSQP_KERNELS_SET_H
#define TSQP_KERNELS_SET_H

#include "kernels.h"

/* Scratch of a row is padded by this many floats at its end. */
#define SCRATCH_PADDING 32
/* As many rows of it softmax works on at a time. */
#define SOFTMAX_ROWS 3

static inline size_t scratch_row(size_t cols) {
    return (cols + SCRATCH_PADDING + 15) & ~(size_t)15;
}

struct tsqp_kernel_set {
    const char *name;
    /* `scratch`: a row of scratch_row(cols) floats, SOFTMAX_ROWS of them for softmax. `stream`: write past
     * the caches. */
    void (*rms_norm)(const struct tsqp_rms_norm *job, size_t begin, size_t end, float *scratch, bool stream);
    void (*silu_mul)(const struct tsqp_silu_mul *job, size_t begin, size_t end, bool stream);
    void (*rotary)(const struct tsqp_rotary *job, size_t begin, size_t end);
    void (*softmax)(const struct tsqp_softmax *job, size_t begin, size_t end, float *scratch, bool stream);
    void (*move)(const struct tsqp_move *job, size_t begin, size_t end); /* bytes, multiples of 64 */
    void (*exp)(float *dst, const float *src, size_t count);             /* what the others compute with */
};

/* The sets this machine can run, best first; NULL past the last. */
const struct tsqp_kernel_set *tsqp_kernel_set(size_t index);

extern const struct tsqp_kernel_set tsqp_kernels_each;
#if defined(__x86_64__)
extern const struct tsqp_kernel_set tsqp_kernels_avx2, tsqp_kernels_avx512, tsqp_kernels_avx512bf16;
#endif

/* Where a row of several strided dimensions lies, row after row; offsets in elements. */
#define CURSOR_TENSORS 4

struct cursor {
    const size_t *shape;
    const int64_t *strides[CURSOR_TENSORS];
    unsigned ndim, tensors;
    size_t index[TSQP_SOFTMAX_NDIM];
    int64_t offset[CURSOR_TENSORS];
};

static inline void cursor_seek(struct cursor *cursor, size_t row) {
    for (unsigned t = 0; t < cursor->tensors; t++)
        cursor->offset[t] = 0;
    for (unsigned d = cursor->ndim; d-- > 0;) {
        cursor->index[d] = row % cursor->shape[d];
        row /= cursor->shape[d];
        for (unsigned t = 0; t < cursor->tensors; t++)
            cursor->offset[t] += (int64_t)cursor->index[d] * cursor->strides[t][d];
    }
}

static inline void cursor_next(struct cursor *cursor) {
    for (unsigned d = cursor->ndim; d-- > 0;) {
        cursor->index[d]++;
        for (unsigned t = 0; t < cursor->tensors; t++)
            cursor->offset[t] += cursor->strides[t][d];
        if (cursor->index[d] < cursor->shape[d])
            return;
        for (unsigned t = 0; t < cursor->tensors; t++)
            cursor->offset[t] -= (int64_t)cursor->index[d] * cursor->strides[t][d];
        cursor->index[d] = 0;
    }
}

/* Past `rows` rows, 1 or more, of the last dimension. */
static inline void cursor_skip(struct cursor *cursor, size_t rows) {
    const unsigned last = cursor->ndim - 1;
    cursor->index[last] += rows - 1;
    for (unsigned t = 0; t < cursor->tensors; t++)
        cursor->offset[t] += (int64_t)(rows - 1) * cursor->strides[t][last];
    cursor_next(cursor);
}

#endif
