/* convert.c: bfloat16 and int8 on the wire.
 *
 * A piece of STAGE_BYTES is converted in private memory, in a buffer that stays in the nearest cache, and
 * crosses the border by copy.c's whole-block copies (measured: as fast as converting from register to slot).
 * What was read from the wire is read again from that private piece alone.
 */
#include "convert.h"

#include "access.h"
#include "convert_kernels.h"
#include "tsqp.h"

#include <string.h>

#define STAGE_BYTES 4096

/* ---- sizes ---- */

/* Keeps every sum far from overflow, as in codec.c; no message reaches it. */
#define MAX_ENCODED_BYTES (UINT64_C(1) << 48)

static size_t scales_bytes(size_t rows) {
    return (rows * sizeof(float) + TSQP_ALIGN - 1) & ~(size_t)(TSQP_ALIGN - 1);
}

static bool quantizable(unsigned dtype) {
    return dtype == TSQP_FLOAT32 || dtype == TSQP_FLOAT16 || dtype == TSQP_BFLOAT16;
}

int tsqp_encoded_bytes(unsigned encoding, unsigned dtype, uint64_t rows, uint64_t cols, uint64_t *out) {
    uint64_t itemsize = tsqp_dtype_itemsize(dtype), extra = 0;
    if (encoding >= TSQP_ENCODING_END)
        return TSQP_BAD_ENCODING;
    if (itemsize == 0 || (encoding == TSQP_AS_BFLOAT16 && dtype != TSQP_FLOAT32) ||
        (encoding == TSQP_AS_INT8_ROWS && !quantizable(dtype)))
        return TSQP_BAD_DTYPE;
    if (rows == 0 || cols == 0) {
        *out = 0;
        return TSQP_OK;
    }
    /* The tensor itself must be in reach as well: it is what decoding makes. */
    if (rows > MAX_ENCODED_BYTES / itemsize || cols > MAX_ENCODED_BYTES / itemsize / rows)
        return TSQP_BAD_SHAPE;
    if (encoding == TSQP_AS_BFLOAT16)
        itemsize = 2;
    if (encoding == TSQP_AS_INT8_ROWS) {
        itemsize = 1;
        extra = scales_bytes(rows);
    }
    *out = extra + rows * cols * itemsize;
    return TSQP_OK;
}

/* ---- bfloat16 ---- */

#define STAGE_ELEMENTS (STAGE_BYTES / 2)

void tsqp_encode_bfloat16(void *shared_dst, const void *src, size_t count) {
    _Alignas(64) uint8_t stage[STAGE_BYTES];
    uint8_t *out = shared_dst;
    const uint8_t *in = src;
    while (count > 0) {
        size_t part = count < STAGE_ELEMENTS ? count : STAGE_ELEMENTS;
        kernels->narrow(stage, in, part);
        tsqp_copy_to_shared(out, stage, part * 2);
        out += part * 2;
        in += part * 4;
        count -= part;
    }
}

void tsqp_decode_bfloat16(void *dst, const void *shared_src, size_t count) {
    _Alignas(64) uint8_t stage[STAGE_BYTES];
    uint8_t *out = dst;
    const uint8_t *in = shared_src;
    while (count > 0) {
        size_t part = count < STAGE_ELEMENTS ? count : STAGE_ELEMENTS;
        tsqp_copy_from_shared(stage, in, part * 2);
        kernels->widen(out, stage, part);
        out += part * 4;
        in += part * 2;
        count -= part;
    }
}

/* ---- int8 rows ---- */

/* A stream on the wire and the piece of it that is here. Writing: [0, used) waits for the wire. Reading:
 * [used, filled) came from it, `left` bytes are still there. */
struct stream {
    uint8_t *wire;
    size_t used, filled, left;
    _Alignas(64) uint8_t stage[STAGE_BYTES];
};

static void flush(struct stream *stream) {
    tsqp_copy_to_shared(stream->wire, stream->stage, stream->used);
    stream->wire += stream->used;
    stream->used = 0;
}

static void refill(struct stream *stream) {
    stream->filled = stream->left < STAGE_BYTES ? stream->left : STAGE_BYTES;
    tsqp_copy_from_shared(stream->stage, stream->wire, stream->filled);
    stream->wire += stream->filled;
    stream->left -= stream->filled;
    stream->used = 0;
}

/* With no scale below this, every operation is one on normal numbers, and a denormal element is less than
 * half a step: the result is the same in a thread that flushes denormals. */
#define SMALLEST_SCALE 0x1p-125f
#define SMALLEST_SCALED 0x1.fcp-119f /* 127 times that */
/* The next larger number, times 127, is Inf. */
#define LARGEST_SCALE 0x1.020406p+121f

static float scale_of(uint32_t largest) {
    if (largest == 0)
        return 0;
    if (largest >= INFINITE)
        return float_of(QUIET_NAN);
    if (largest < bits_of(SMALLEST_SCALED))
        return SMALLEST_SCALE;
    float scale = float_of(largest) / 127.0f;
    return scale < LARGEST_SCALE ? scale : LARGEST_SCALE;
}

/* What the wire may hold is anything: what encoding never writes would be slow (denormals) or differ between
 * processors (which NaN Inf * 0 is). */
static float clean_scale(uint32_t bits) {
    if ((bits & MAGNITUDE) >= INFINITE)
        return float_of(QUIET_NAN);
    return (bits & MAGNITUDE) < SMALLEST_NORMAL ? 0 : float_of(bits);
}

static void put_row(struct stream *stream, const uint8_t *row, unsigned dtype, size_t cols, float scale) {
    while (cols > 0) {
        size_t room = STAGE_BYTES - stream->used, part = cols < room ? cols : room;
        int8_t *q = (int8_t *)stream->stage + stream->used;
        if (scale > 0)
            kernels->quantize(q, row, dtype, part, scale);
        else /* 0 or NaN */
            memset(q, 0, part);
        stream->used += part;
        row += part * item_bytes(dtype);
        cols -= part;
        if (stream->used == STAGE_BYTES)
            flush(stream);
    }
}

static void take_row(struct stream *stream, uint8_t *row, unsigned dtype, size_t cols, float scale) {
    while (cols > 0) {
        if (stream->used == stream->filled)
            refill(stream);
        size_t here = stream->filled - stream->used, part = cols < here ? cols : here;
        kernels->dequantize(row, dtype, (const int8_t *)stream->stage + stream->used, part, scale);
        stream->used += part;
        row += part * item_bytes(dtype);
        cols -= part;
    }
}

int64_t tsqp_encode_int8_rows(void *shared_dst, const void *src, unsigned dtype, size_t rows, size_t cols) {
    if (!quantizable(dtype))
        return TSQP_BAD_DTYPE;
    if (rows == 0 || cols == 0)
        return 0;
    struct stream scales, elements;
    scales.wire = shared_dst;
    elements.wire = scales.wire + scales_bytes(rows);
    scales.used = elements.used = 0;
    const uint8_t *row = src;
    int64_t not_finite = 0;
    for (size_t i = 0; i < rows; i++, row += cols * item_bytes(dtype)) {
        uint32_t largest = kernels->largest(row, dtype, cols);
        float scale = scale_of(largest);
        not_finite += largest >= INFINITE;
        memcpy(scales.stage + scales.used, &scale, sizeof scale);
        scales.used += sizeof scale;
        if (scales.used == STAGE_BYTES)
            flush(&scales);
        put_row(&elements, row, dtype, cols, scale);
    }
    flush(&scales);
    flush(&elements);
    return not_finite;
}

int tsqp_decode_int8_rows(void *dst, unsigned dtype, const void *shared_src, size_t rows, size_t cols) {
    if (!quantizable(dtype))
        return TSQP_BAD_DTYPE;
    if (rows == 0 || cols == 0)
        return TSQP_OK;
    struct stream scales, elements;
    scales.wire = (uint8_t *)shared_src; /* only read */
    elements.wire = scales.wire + scales_bytes(rows);
    scales.left = rows * sizeof(float);
    elements.left = rows * cols;
    scales.used = scales.filled = elements.used = elements.filled = 0;
    uint8_t *row = dst;
    for (size_t i = 0; i < rows; i++, row += cols * item_bytes(dtype)) {
        if (scales.used == scales.filled)
            refill(&scales);
        uint32_t bits;
        memcpy(&bits, scales.stage + scales.used, sizeof bits);
        scales.used += sizeof bits;
        take_row(&elements, row, dtype, cols, clean_scale(bits));
    }
    return TSQP_OK;
}
