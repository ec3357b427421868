/* convert.h: tensors that travel in fewer bits than they have. What is lost, and when:
 * docs/wire-compression.md.
 *
 * The wire side is 64-byte aligned shared memory, touched in whole 64-byte blocks and read once (access.h),
 * so up to 63 bytes after the end are touched there; encoding zeroes them. The private side is contiguous, of
 * any alignment. Nothing is allocated, and the result does not depend on the processor, the alignment or
 * whether the thread flushes denormals.
 */
#ifndef TSQP_CONVERT_H
#define TSQP_CONVERT_H

#include <stddef.h>
#include <stdint.h>

enum tsqp_encoding {
    TSQP_PLAIN = 0,    /* the tensor's own bytes */
    TSQP_AS_BFLOAT16,  /* of float32 */
    TSQP_AS_INT8_ROWS, /* of float32, float16, bfloat16: one float32 scale a row, then one int8 an element */
    TSQP_ENCODING_END
};

/* Writes how many bytes rows x cols elements take on the wire, the zeroed padding after the last byte not
 * counted (as `nbytes` of a tensor's descriptor does not). Checked: TSQP_BAD_DTYPE where the encoding does
 * not take `dtype`, TSQP_BAD_SHAPE where the size is out of reach, TSQP_BAD_ENCODING where there is
 * no such encoding. No elements take no bytes, whatever the other dimension. */
int tsqp_encoded_bytes(unsigned encoding, unsigned dtype, uint64_t rows, uint64_t cols, uint64_t *out);

/* float32 -> bfloat16 to the nearest, ties to even. A NaN stays one: quieted, sign and upper payload bits
 * kept. What lies beyond the largest bfloat16 by half a step or more becomes Inf. */
void tsqp_encode_bfloat16(void *shared_dst, const void *src, size_t count);

/* bfloat16 -> float32, exact. */
void tsqp_decode_bfloat16(void *dst, const void *shared_src, size_t count);

/* On the wire: `rows` float32 scales, zeros up to a multiple of 64 bytes, then rows * cols int8 without gaps.
 * scale = max|x| of the row / 127, kept within [2^-125, FLT_MAX / 127]; q = x / scale, computed in float32
 * and rounded to the nearest integer, ties to even, so -127 <= q <= 127. A row of zeros has scale 0. A row
 * with a NaN or an Inf has scale NaN and q 0: all of it decodes to NaN. Returns how many such rows there
 * were, so that the caller may send the tensor as it is instead; TSQP_BAD_DTYPE. */
int64_t tsqp_encode_int8_rows(void *shared_dst, const void *src, unsigned dtype, size_t rows, size_t cols);

/* q * scale, computed in float32, then rounded to `dtype`, ties to even. Any wire bytes are safe to decode: a
 * scale that is NaN or Inf makes its row NaN, one below 2^-126 in magnitude makes it zeros. 0 or
 * TSQP_BAD_DTYPE.
 */
int tsqp_decode_int8_rows(void *dst, unsigned dtype, const void *shared_src, size_t rows, size_t cols);

#endif
