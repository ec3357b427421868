/* convert_reference.h: what test_convert.c compares with, computed in double by definition, and guarded
 * memory. Included after convert.c. Needs no libm: frexp and ldexp are in the C library. */
#ifndef TSQP_CONVERT_REFERENCE_H
#define TSQP_CONVERT_REFERENCE_H

#include "check.h"

#include <math.h>
#include <sys/mman.h>

#define GUARD 0xa5
#define GUARD_BYTES 64
#define PAGE 4096

static const unsigned DTYPES[] = {TSQP_FLOAT32, TSQP_BFLOAT16, TSQP_FLOAT16};
#define DTYPE_COUNT (sizeof DTYPES / sizeof DTYPES[0])

/* ---- references ---- */

struct format {
    int digits, min_exponent, max_exponent; /* of 1.xxx * 2^exponent */
};

static const struct format BFLOAT16 = {8, -126, 127}, FLOAT16 = {11, -14, 15};

static double value_of(unsigned dtype, uint32_t bits) {
    if (dtype != TSQP_FLOAT16) {
        float x;
        bits = dtype == TSQP_BFLOAT16 ? bits << 16 : bits;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
    double magnitude, fraction = bits & 0x3ff;
    int exponent = bits >> 10 & 31;
    if (exponent == 31)
        magnitude = fraction != 0 ? NAN : INFINITY;
    else
        magnitude = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

/* rint in the ordinary mode, without libm; |x| < 2^51. */
static double round_even(double x) {
    volatile double sum = x + 0x1.8p52;
    return sum - 0x1.8p52;
}

/* The bits of the nearest number of a format, ties to even; x is not NaN. */
static uint32_t nearest(struct format format, double x) {
    int exponent, shift = format.digits - 1, bias = format.max_exponent;
    uint32_t sign = signbit(x) ? 0x8000 : 0, infinite = (uint32_t)(2 * bias + 1) << shift;
    if (x == 0)
        return sign;
    (void)frexp(x, &exponent);
    exponent = exponent - 1 < format.min_exponent ? format.min_exponent : exponent - 1;
    double steps = round_even(ldexp(fabs(x), shift - exponent)); /* of the last digit */
    if (isinf(x) || ldexp(steps, exponent - shift) >= ldexp(1, format.max_exponent + 1))
        return sign | infinite;
    /* Where the implicit digit is there, it carries into the exponent's field. */
    return sign | (uint32_t)(((uint64_t)(exponent + bias - 1) << shift) + (uint64_t)steps);
}

static uint32_t nearest_of(unsigned dtype, float x) {
    if (dtype == TSQP_FLOAT32)
        return bits_of(x);
    return nearest(dtype == TSQP_BFLOAT16 ? BFLOAT16 : FLOAT16, x);
}

static uint16_t reference_bfloat16(uint32_t bits) {
    double x = value_of(TSQP_FLOAT32, bits);
    return (uint16_t)(isnan(x) ? bits >> 16 | 0x40 : nearest(BFLOAT16, x));
}

/* A quotient or product of two floats, rounded to double and then to float, is as if rounded once. */
static float reference_scale(double largest) {
    if (isnan(largest) || isinf(largest))
        return NAN;
    if (largest == 0)
        return 0;
    float scale = (float)(largest / 127);
    if (scale < 0x1p-125)
        return 0x1p-125f;
    bool overflows = 127 * (double)scale >= 0x1p128 - 0x1p103; /* half a step beyond the largest float */
    return overflows ? float_of(bits_of(scale) - 1) : scale;
}

static int8_t reference_q(double x, float scale) {
    return scale > 0 ? (int8_t)round_even((float)(x / (double)scale)) : 0;
}

/* What decoding makes of one element; NaN has any sign and payload. */
static bool is_decoded(unsigned dtype, uint32_t got, int8_t q, uint32_t scale_bits) {
    double scale = value_of(TSQP_FLOAT32, scale_bits);
    if (isnan(scale) || isinf(scale))
        return isnan(value_of(dtype, got));
    if (fabs(scale) < ldexp(1, -126))
        scale = 0;
    return got == nearest_of(dtype, (float)(q * scale));
}

/* ---- memory ---- */

static size_t padded(size_t nbytes) {
    return (nbytes + 63) / 64 * 64;
}

static size_t int8_bytes(size_t rows, size_t cols) {
    uint64_t nbytes = 0;
    CHECK_EQ(tsqp_encoded_bytes(TSQP_AS_INT8_ROWS, TSQP_FLOAT32, rows, cols, &nbytes), TSQP_OK);
    return nbytes;
}

static void check_bytes(const uint8_t *at, size_t nbytes, uint8_t want) {
    for (size_t i = 0; i < nbytes; i++)
        if (at[i] != want)
            CHECK_EQ(at[i], want);
}

/* Memory whose padded end is where the process may read and write: a byte beyond is a segmentation fault. A
 * guard block lies before. */
struct wire {
    uint8_t *map, *at;
    size_t map_bytes, nbytes;
};

static struct wire wire_new(size_t nbytes) {
    struct wire wire = {.nbytes = nbytes};
    size_t usable = (GUARD_BYTES + padded(nbytes) + PAGE - 1) / PAGE * PAGE;
    wire.map_bytes = usable + PAGE;
    wire.map = mmap(NULL, wire.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(wire.map != MAP_FAILED);
    CHECK_EQ(mprotect(wire.map + usable, PAGE, PROT_NONE), 0);
    memset(wire.map, GUARD, usable);
    wire.at = wire.map + usable - padded(nbytes);
    return wire;
}

static void wire_free(struct wire *wire) {
    check_bytes(wire->at - GUARD_BYTES, GUARD_BYTES, GUARD);
    munmap(wire->map, wire->map_bytes);
}

/* A private destination between guards. */
static uint8_t *guarded_new(size_t nbytes, size_t alignment) {
    uint8_t *block = check_malloc(GUARD_BYTES + alignment + nbytes + GUARD_BYTES);
    memset(block, GUARD, GUARD_BYTES + alignment + nbytes + GUARD_BYTES);
    return block + GUARD_BYTES + alignment;
}

static void guarded_free(uint8_t *at, size_t nbytes, size_t alignment) {
    check_bytes(at - GUARD_BYTES - alignment, GUARD_BYTES + alignment, GUARD);
    check_bytes(at + nbytes, GUARD_BYTES, GUARD);
    free(at - GUARD_BYTES - alignment);
}

static uint32_t element(const void *array, unsigned dtype, size_t i) {
    const uint8_t *at = (const uint8_t *)array + i * item_bytes(dtype); /* little-endian, as the wire is */
    uint32_t low = at[0] | (uint32_t)at[1] << 8;
    return dtype == TSQP_FLOAT32 ? low | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24 : low;
}

static void set_element(void *array, unsigned dtype, size_t i, uint32_t bits) {
    memcpy((uint8_t *)array + i * item_bytes(dtype), &bits, item_bytes(dtype));
}

/* Any exponent but that of NaN and Inf. */
static uint32_t random_finite(unsigned dtype, uint64_t *state) {
    uint32_t exponent = dtype == TSQP_FLOAT16 ? 0x7c00 : dtype == TSQP_BFLOAT16 ? 0x7f80 : INFINITE;
    uint32_t bits = (uint32_t)check_random(state) & (dtype == TSQP_FLOAT32 ? UINT32_MAX : 0xffff);
    return (bits & exponent) == exponent ? bits ^ (exponent & (exponent << 1)) : bits;
}

/* ---- checks ---- */

static void check_bfloat16_encoding(const uint32_t *values, size_t count, size_t alignment) {
    uint8_t *block = check_malloc(alignment + count * 4), *src = block + alignment;
    memcpy(src, values, count * 4);
    struct wire wire = wire_new(count * 2);
    tsqp_encode_bfloat16(wire.at, src, count);
    for (size_t i = 0; i < count; i++) {
        uint32_t got = element(wire.at, TSQP_BFLOAT16, i), want = reference_bfloat16(values[i]);
        if (got != want) {
            printf("%08x\n", values[i]);
            CHECK_EQ(got, want);
        }
    }
    check_bytes(wire.at + count * 2, padded(count * 2) - count * 2, 0);
    wire_free(&wire);
    free(block);
}

static void check_bfloat16_decoding(const uint16_t *values, size_t count, size_t alignment) {
    struct wire wire = wire_new(count * 2);
    memcpy(wire.at, values, count * 2);
    uint8_t *dst = guarded_new(count * 4, alignment);
    tsqp_decode_bfloat16(dst, wire.at, count);
    for (size_t i = 0; i < count; i++)
        if (element(dst, TSQP_FLOAT32, i) != (uint32_t)values[i] << 16)
            CHECK_EQ(element(dst, TSQP_FLOAT32, i), (uint32_t)values[i] << 16);
    guarded_free(dst, count * 4, alignment);
    wire_free(&wire);
}

/* Encodes, checks every byte of the wire, decodes to each dtype and checks that; returns the rows that are
 * not finite. */
static int64_t check_int8(const void *values, unsigned dtype, size_t rows, size_t cols, size_t alignment) {
    size_t items = rows * cols, src_bytes = items * item_bytes(dtype), nbytes = int8_bytes(rows, cols);
    uint8_t *block = check_malloc(alignment + src_bytes), *src = block + alignment;
    memcpy(src, values, src_bytes);
    struct wire wire = wire_new(nbytes);
    int64_t not_finite = tsqp_encode_int8_rows(wire.at, src, dtype, rows, cols), expected = 0;
    size_t scales = items ? padded(rows * 4) : 0;
    const int8_t *q = (const int8_t *)wire.at + scales;
    for (size_t row = 0; row < rows && cols > 0; row++) {
        double largest = 0;
        for (size_t i = row * cols; i < (row + 1) * cols; i++) {
            if (i > row * cols && element(src, dtype, i) == element(src, dtype, i - 1))
                continue;
            double x = fabs(value_of(dtype, element(src, dtype, i)));
            largest = isnan(x) || isnan(largest) ? NAN : x > largest ? x : largest;
        }
        float scale = reference_scale(largest);
        uint32_t want = isnan(scale) ? QUIET_NAN : bits_of(scale);
        CHECK_EQ(element(wire.at, TSQP_FLOAT32, row), want);
        int8_t q_want = 0;
        for (size_t i = row * cols; i < (row + 1) * cols; i++) {
            if (i == row * cols || element(src, dtype, i) != element(src, dtype, i - 1))
                q_want = reference_q(value_of(dtype, element(src, dtype, i)), scale);
            if (q[i] != q_want)
                CHECK_EQ(q[i], q_want);
        }
        expected += isnan(scale);
    }
    CHECK_EQ(not_finite, expected);
    if (items)
        check_bytes(wire.at + rows * 4, scales - rows * 4, 0);
    check_bytes(wire.at + nbytes, padded(nbytes) - nbytes, 0);
    wire_free(&wire);
    free(block);
    return not_finite;
}

/* The wire holds these scales and, element by element, these q: decodes them. */
static void check_int8_decoding(const uint32_t *scales, const int8_t *q, size_t rows, size_t cols,
                                size_t alignment) {
    size_t items = rows * cols, nbytes = int8_bytes(rows, cols);
    struct wire wire = wire_new(nbytes);
    if (items) {
        memcpy(wire.at, scales, rows * 4);
        memcpy(wire.at + padded(rows * 4), q, items);
    }
    for (size_t d = 0; d < DTYPE_COUNT; d++) {
        size_t dst_bytes = items * item_bytes(DTYPES[d]);
        uint8_t *dst = guarded_new(dst_bytes, alignment);
        CHECK_EQ(tsqp_decode_int8_rows(dst, DTYPES[d], wire.at, rows, cols), TSQP_OK);
        for (size_t i = 0; i < items; i++) {
            uint32_t got = element(dst, DTYPES[d], i);
            if (i % cols > 0 && q[i] == q[i - 1] && got == element(dst, DTYPES[d], i - 1))
                continue; /* known to be right */
            if (!is_decoded(DTYPES[d], got, q[i], scales[i / cols])) {
                printf("dtype %u: %d * %08x gave %08x\n", DTYPES[d], q[i], scales[i / cols], got);
                CHECK(false);
            }
        }
        guarded_free(dst, dst_bytes, alignment);
    }
    wire_free(&wire);
}

#endif
