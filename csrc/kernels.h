/* kernels.h: the trusted operators on private memory, and the threads that share their work.
 *
 * Shapes and strides come from the caller and are trusted; the numbers are not: whatever the elements hold,
 * or become while an operator runs, no address and no count is ever made of them. Elements of tensors that
 * only float32 and bfloat16 are computed on; sums, exponentials and products are float32, rounded to the
 * dtype where transformers' Llama rounds. An output may lie exactly on an input of the same dtype, or apart
 * from it.
 */
#ifndef TSQP_KERNELS_H
#define TSQP_KERNELS_H

#include "layout.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- threads (threads.c) ---- */

#define TSQP_MAX_THREADS 256u

/* One piece [begin, end) of the work; `worker` numbers the participants from 0, the caller. */
typedef void (*tsqp_task)(void *context, unsigned worker, size_t begin, size_t end);

/* How many threads take part at most, the caller included; 1 .. TSQP_MAX_THREADS. Threads that run are joined
 * if there are others than wanted; new ones start with the first work that needs them. */
void tsqp_threads_set(unsigned count);
unsigned tsqp_threads(void);
unsigned tsqp_threads_running(void); /* beside the callers */
/* Splits [0, count) into pieces of `grain` and returns when all are done. At most `participants` threads take
 * pieces. While another caller's work occupies the pool, and in a task, this thread does all by itself. */
void tsqp_parallel(tsqp_task task, void *context, size_t count, size_t grain, unsigned participants);
/* Ends the threads; later work starts them anew. */
void tsqp_threads_stop(void);

/* ---- operators (kernels.c) ---- */

/* rows x cols, contiguous. With `residual`, x + residual is normalised and stored in `total`. */
struct tsqp_rms_norm {
    const void *x, *residual, *weight; /* residual: or NULL */
    void *out, *total;                 /* total: with residual */
    unsigned dtype;
    size_t rows, cols;
    float eps;
};

/* `count` elements, contiguous. */
struct tsqp_silu_mul {
    const void *gate, *up;
    void *out;
    unsigned dtype;
    size_t count;
};

#define TSQP_ROTARY_NDIM 3

/* Lines of `dim` contiguous elements: shape and strides (in elements) of the dimensions before the last, the
 * slowest first. The tables' strides are over the same dimensions, 0 where they repeat. */
struct tsqp_rotary {
    const void *x, *cos, *sin;
    void *out;
    unsigned dtype;
    size_t dim;
    size_t shape[TSQP_ROTARY_NDIM];
    int64_t x_strides[TSQP_ROTARY_NDIM], out_strides[TSQP_ROTARY_NDIM];
    int64_t cos_strides[TSQP_ROTARY_NDIM], sin_strides[TSQP_ROTARY_NDIM];
};

enum tsqp_mask {
    TSQP_MASK_NONE,
    TSQP_MASK_BOOL, /* a byte each, 0 hides */
    TSQP_MASK_FLOAT32,
    TSQP_MASK_BFLOAT16, /* added after the scaling */
};

#define TSQP_SOFTMAX_NDIM (TSQP_MAX_NDIM - 1)

/* Rows of `keys` contiguous elements; shape and strides (in elements) of the dimensions before, the slowest
 * first; the last of them counts queries. Query i is at position first + i. */
struct tsqp_softmax {
    const void *scores, *mask;
    void *out;
    unsigned dtype, out_dtype;
    enum tsqp_mask mask_kind;
    unsigned ndim;
    size_t shape[TSQP_SOFTMAX_NDIM];
    int64_t strides[TSQP_SOFTMAX_NDIM], out_strides[TSQP_SOFTMAX_NDIM], mask_strides[TSQP_SOFTMAX_NDIM];
    size_t keys;
    float scale;
    bool causal;   /* keys after the query's position are hidden */
    size_t first;  /* position of query 0 */
    size_t window; /* that many keys up to the query's position are visible; 0: all */
};

/* 0, TSQP_BAD_DTYPE, or TSQP_NO_MEMORY for a row of scratch. */
int tsqp_rms_norm(const struct tsqp_rms_norm *job);
int tsqp_silu_mul(const struct tsqp_silu_mul *job);
int tsqp_rotary(const struct tsqp_rotary *jobs, size_t count);
int tsqp_softmax(const struct tsqp_softmax *job);

/* What memory allows, to judge the others by: reads `sources` arrays of `nbytes` and writes one, with the
 * same threads. `stream` writes past the caches. */
struct tsqp_move {
    const void *source[2];
    void *target;
    size_t sources, nbytes; /* nbytes: a multiple of 64, everything aligned to 64 */
    bool stream;
};
void tsqp_move(const struct tsqp_move *job);

/* The instruction set in use: "AVX-512 with bfloat16", "AVX-512", "AVX2" or "portable". */
const char *tsqp_kernels_name(void);

#endif
