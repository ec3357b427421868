/* bfloat16 and int8 on the wire against references computed in double, in each of the instruction sets this
 * machine has, which must also agree bit for bit. Includes convert.c to reach the sets. */
#include "convert.c"

#include "convert_reference.h"

#define LENGTHS 301
#define UPPER_HALVES 65536

static const size_t ALIGNMENTS[] = {0, 1, 2, 17, 63};
#define ALIGNMENT_COUNT (sizeof ALIGNMENTS / sizeof ALIGNMENTS[0])

/* ---- bfloat16 ---- */

/* Every sign, exponent and kept digit, with what is cut off at, beside and between the halfway point. */
static void bfloat16_rounds_every_upper_half(void) {
    static const uint32_t lower[] = {0, 1, 0x1234, 0x7fff, 0x8000, 0x8001, 0xfedc, 0xffff};
    uint32_t *values = check_malloc(UPPER_HALVES * sizeof *values);
    for (size_t n = 0; n < sizeof lower / sizeof lower[0]; n++) {
        for (uint32_t upper = 0; upper < UPPER_HALVES; upper++)
            values[upper] = upper << 16 | lower[n];
        check_bfloat16_encoding(values, UPPER_HALVES, 0);
    }
    free(values);
}

static void bfloat16_decodes_every_pattern(void) {
    uint16_t *values = check_malloc(UPPER_HALVES * sizeof *values);
    for (uint32_t i = 0; i < UPPER_HALVES; i++)
        values[i] = (uint16_t)i;
    check_bfloat16_decoding(values, UPPER_HALVES, 0);
    free(values);
}

static void bfloat16_of_any_length(void) {
    static const size_t large[] = {STAGE_BYTES / 2 - 1, STAGE_BYTES / 2 + 1, STAGE_BYTES, 1000003};
    uint64_t state = 3;
    uint32_t *values = check_malloc(1000003 * sizeof *values);
    uint16_t *halves = check_malloc(1000003 * sizeof *halves);
    for (size_t i = 0; i < 1000003; i++) {
        values[i] = (uint32_t)check_random(&state);
        halves[i] = (uint16_t)check_random(&state);
    }
    for (size_t count = 0; count < LENGTHS; count++)
        for (size_t a = 0; a < ALIGNMENT_COUNT; a++) {
            check_bfloat16_encoding(values + count, count, ALIGNMENTS[a]);
            check_bfloat16_decoding(halves + count, count, ALIGNMENTS[a]);
        }
    for (size_t n = 0; n < sizeof large / sizeof large[0]; n++) {
        check_bfloat16_encoding(values, large[n], 3);
        check_bfloat16_decoding(halves, large[n], 3);
    }
    free(values);
    free(halves);
}

/* ---- int8 rows ---- */

static void check_int8_shape(size_t rows, size_t cols, size_t alignment, uint64_t *state) {
    size_t items = rows * cols;
    uint8_t *values = check_malloc(items * 4);
    uint32_t *scales = check_malloc(rows * 4);
    for (size_t d = 0; d < DTYPE_COUNT; d++) {
        for (size_t row = 0; row < rows; row++) {
            /* Everything at once, or numbers near each other as in real rows, where all of q is used. */
            bool near = check_random(state) % 4 > 0;
            for (size_t i = row * cols; i < (row + 1) * cols; i++) {
                uint32_t bits = random_finite(DTYPES[d], state);
                float x = (float)((int64_t)check_random(state) >> 40) * 0x1p-20f;
                set_element(values, DTYPES[d], i, near ? nearest_of(DTYPES[d], x) : bits);
            }
        }
        CHECK_EQ(check_int8(values, DTYPES[d], rows, cols, alignment), 0);
    }
    for (size_t row = 0; row < rows; row++)
        scales[row] = (uint32_t)check_random(state); /* any bits */
    for (size_t i = 0; i < items; i++)
        values[i] = (uint8_t)check_random(state);
    check_int8_decoding(scales, (int8_t *)values, rows, cols, alignment);
    free(scales);
    free(values);
}

static void int8_of_any_shape(void) {
    static const size_t shapes[][2] = {{0, 0},        {0, 7},    {7, 0},     {STAGE_BYTES / 4 + 1, 1},
                                       {2500, 3},     {17, 241}, {64, 64},   {3, STAGE_BYTES + 1},
                                       {1, 3 * 4099}, {33, 260}, {65, 2048}, {1, 300007}};
    uint64_t state = 4;
    for (size_t cols = 1; cols < LENGTHS; cols++)
        for (size_t a = 0; a < 2; a++)
            check_int8_shape(1 + (cols + a) % 4, cols, ALIGNMENTS[(cols + 2 * a) % ALIGNMENT_COUNT], &state);
    for (size_t n = 0; n < sizeof shapes / sizeof shapes[0]; n++)
        check_int8_shape(shapes[n][0], shapes[n][1], n % 5, &state);
}

/* Rows of one repeated value: the scale shows exactly how it was read. Vectors and what is left over. */
static void int8_reads_every_half_precision_pattern(void) {
    const size_t cols = 73, rows = 4096;
    uint16_t *values = check_malloc(rows * cols * 2);
    int64_t not_finite[2] = {0};
    for (int d = 0; d < 2; d++)
        for (size_t first = 0; first < UPPER_HALVES; first += rows) {
            for (size_t i = 0; i < rows * cols; i++)
                values[i] = (uint16_t)(first + i / cols);
            not_finite[d] += check_int8(values, d ? TSQP_FLOAT16 : TSQP_BFLOAT16, rows, cols, 0);
        }
    CHECK_EQ(not_finite[0], 2 * 128);
    CHECK_EQ(not_finite[1], 2 * 1024);
    free(values);
}

/* With q = 1 the result is the scale, rounded: both narrow formats at and beside their halfway points. */
static void int8_rounds_every_upper_half(void) {
    static const uint32_t lower[] = {0, 0x0fff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff};
    const size_t cols = 9, rows = UPPER_HALVES;
    uint32_t *scales = check_malloc(rows * 4);
    int8_t *q = check_malloc(rows * cols);
    memset(q, 1, rows * cols);
    for (size_t n = 0; n < sizeof lower / sizeof lower[0]; n++) {
        for (uint32_t upper = 0; upper < rows; upper++)
            scales[upper] = upper << 16 | lower[n];
        check_int8_decoding(scales, q, rows, cols, 0);
    }
    free(scales);
    free(q);
}

/* Every q, -128 as well, with scales that encoding writes and scales it never would. */
static void int8_decodes_hostile_bytes(void) {
    static const uint32_t odd[] = {0x7fc00000, 0x7f800001, 0xffffffff, 0x7f800000, 0xff800000, 0,
                                   0x80000000, 1,          0x807fffff, 0x00800000, 0x7f7fffff, 0xbf800000};
    const size_t rows = sizeof odd / sizeof odd[0], cols = 256 + 13;
    int8_t *q = check_malloc(rows * cols);
    for (size_t i = 0; i < rows * cols; i++)
        q[i] = (int8_t)(uint8_t)(i % cols);
    check_int8_decoding(odd, q, rows, cols, 1);
    free(q);
}

static void int8_row_that_is_not_finite_is_nan(void) {
    static const uint32_t odd[] = {0x7f800000, 0xff800000, 0x7f800001, 0x7fc00000, 0xffffffff};
    const size_t rows = 3, cols = 75;
    uint32_t *values = check_malloc(rows * cols * 4), *decoded = check_malloc(rows * cols * 4);
    for (size_t n = 0; n < sizeof odd / sizeof odd[0]; n++)
        for (size_t at = 0; at < cols; at++) {
            for (size_t i = 0; i < rows * cols; i++)
                values[i] = bits_of((float)i - 100);
            values[cols + at] = odd[n];
            CHECK_EQ(check_int8(values, TSQP_FLOAT32, rows, cols, 0), 1);
        }
    struct wire wire = wire_new(int8_bytes(rows, cols));
    CHECK_EQ(tsqp_encode_int8_rows(wire.at, values, TSQP_FLOAT32, rows, cols), 1);
    CHECK_EQ(tsqp_decode_int8_rows(decoded, TSQP_FLOAT32, wire.at, rows, cols), TSQP_OK);
    for (size_t i = 0; i < rows * cols; i++)
        CHECK_EQ(isnan(float_of(decoded[i])) != 0, i / cols == 1);
    wire_free(&wire);
    free(values);
    free(decoded);
}

/* The ends of the scale's range, and rows of zeros. */
static void int8_keeps_scales_in_range(void) {
    static const uint32_t largest[] = {0,          0x80000000, 1,          0x807fffff, 0x00800000,
                                       0x047dffff, 0x047e0000, 0x047e0001, 0x7f7ffffe, 0x7f7fffff};
    const size_t rows = sizeof largest / sizeof largest[0], cols = 70;
    CHECK_EQ(bits_of(SMALLEST_SCALED), 0x047e0000);
    uint32_t *values = check_malloc(rows * cols * 4), *decoded = check_malloc(rows * cols * 4);
    for (size_t i = 0; i < rows * cols; i++)
        values[i] = largest[i / cols] ^ (i % 2 ? 0x80000000 : 0);
    CHECK_EQ(check_int8(values, TSQP_FLOAT32, rows, cols, 0), 0);
    struct wire wire = wire_new(int8_bytes(rows, cols));
    CHECK_EQ(tsqp_encode_int8_rows(wire.at, values, TSQP_FLOAT32, rows, cols), 0);
    CHECK_EQ(tsqp_decode_int8_rows(decoded, TSQP_FLOAT32, wire.at, rows, cols), TSQP_OK);
    for (size_t i = 0; i < rows * cols; i++) {
        double x = float_of(values[i]), error = fabs(x - (double)float_of(decoded[i]));
        CHECK(error <= fabs(x) * 0x1p-22 || error <= 0x1p-126);
    }
    CHECK_EQ(decoded[0], 0);
    CHECK_EQ(decoded[cols], 0);
    wire_free(&wire);
    free(values);
    free(decoded);
}

/* ---- what holds between the sets ---- */

struct outputs {
    uint8_t *bytes;
    size_t used;
};

static void encode_and_decode(const uint8_t *bits, unsigned dtype, size_t rows, size_t cols,
                              struct outputs *out) {
    uint8_t *wire = out->bytes;
    tsqp_encode_int8_rows(wire, bits, dtype, rows, cols);
    out->used = padded(int8_bytes(rows, cols));
    tsqp_decode_int8_rows(out->bytes + out->used, dtype, wire, rows, cols);
    out->used += padded(rows * cols * item_bytes(dtype));
    tsqp_encode_bfloat16(out->bytes + out->used, bits, rows * cols * item_bytes(dtype) / 4);
    out->used += padded(rows * cols * item_bytes(dtype) / 2);
    tsqp_decode_int8_rows(out->bytes + out->used, dtype, bits, 16, cols); /* as if it came from the peer */
    out->used += padded(16 * cols * item_bytes(dtype));
}

static const struct kernels *compared;
static bool flushing;

static void flush_denormals(bool on) {
#if defined(__x86_64__)
    const unsigned both = 0x8040; /* results to zero, operands as zero */
    _mm_setcsr(on ? _mm_getcsr() | both : _mm_getcsr() & ~both);
#else
    (void)on;
#endif
}

/* Against the portable set in the ordinary mode, NaN payloads and padding included. */
static void results_equal_the_portable_ones(void) {
    const struct kernels *chosen = kernels;
    const size_t rows = 40, cols = 333, most = 40 * 333 * 4;
    uint8_t *bits = aligned_alloc(64, padded(most));
    struct outputs want = {aligned_alloc(64, 6 * padded(most)), 0},
                   got = {aligned_alloc(64, 6 * padded(most)), 0};
    uint64_t state = 5;
    for (int round = 0; round < 60; round++) {
        unsigned dtype = DTYPES[round % 3];
        for (size_t i = 0; i < rows * cols; i++) {
            uint32_t word = (uint32_t)check_random(&state), finite = random_finite(dtype, &state);
            uint32_t tiny = finite & (dtype == TSQP_FLOAT16    ? 0x87ff
                                      : dtype == TSQP_BFLOAT16 ? 0x84ff
                                                               : 0x84ffffff);
            set_element(bits, dtype, i, round % 5 == 0 ? word : round % 5 < 3 ? finite : tiny);
        }
        memset(want.bytes, 0, 6 * padded(most));
        memset(got.bytes, 0, 6 * padded(most));
        kernels = &kernels_each;
        encode_and_decode(bits, dtype, rows, cols, &want);
        kernels = compared;
        flush_denormals(flushing);
        encode_and_decode(bits, dtype, rows, cols, &got);
        flush_denormals(false);
        kernels = chosen;
        CHECK_EQ(got.used, want.used);
        CHECK(memcmp(got.bytes, want.bytes, want.used) == 0);
    }
    free(bits);
    free(want.bytes);
    free(got.bytes);
}

static void flushing_denormals_changes_nothing(void) {
#if !defined(__x86_64__)
    SKIP("this test knows how to set the mode on x86-64 only");
#endif
    flushing = true;
    results_equal_the_portable_ones();
    flushing = false;
}

static void errors_stay_within_their_bounds(void) {
    const size_t cols = 2048, rows = 50;
    float *x = check_malloc(rows * cols * 4), *y = check_malloc(rows * cols * 4);
    struct wire wire = wire_new(rows * cols * 2);
    uint64_t state = 6;
    for (size_t i = 0; i < rows * cols; i++) {
        x[i] = 0;
        for (int n = 0; n < 12; n++) /* nearly normal */
            x[i] += (float)(int32_t)check_random(&state) * 0x1p-32f;
    }
    tsqp_encode_bfloat16(wire.at, x, rows * cols);
    tsqp_decode_bfloat16(y, wire.at, rows * cols);
    for (size_t i = 0; i < rows * cols; i++)
        CHECK(fabs((double)x[i] - y[i]) <= fabs((double)x[i]) / 257);
    CHECK_EQ(tsqp_encode_int8_rows(wire.at, x, TSQP_FLOAT32, rows, cols), 0);
    CHECK_EQ(tsqp_decode_int8_rows(y, TSQP_FLOAT32, wire.at, rows, cols), TSQP_OK);
    for (size_t i = 0; i < rows * cols; i++) {
        double scale = float_of(element(wire.at, TSQP_FLOAT32, i / cols));
        CHECK(fabs((double)x[i] - y[i]) <= scale * (0.5 + 0x1p-16));
    }
    wire_free(&wire);
    free(x);
    free(y);
}

/* ---- sizes ---- */

static void check_size(unsigned encoding, unsigned dtype, uint64_t rows, uint64_t cols, int64_t want) {
    uint64_t nbytes = 12345;
    int rc = tsqp_encoded_bytes(encoding, dtype, rows, cols, &nbytes);
    CHECK_EQ(rc, want < 0 ? want : 0);
    CHECK_EQ(nbytes, want < 0 ? 12345 : want);
}

static void sizes_are_checked(void) {
    check_size(TSQP_PLAIN, TSQP_FLOAT64, 3, 5, 120);
    check_size(TSQP_AS_BFLOAT16, TSQP_FLOAT32, 3, 5, 30);
    check_size(TSQP_AS_INT8_ROWS, TSQP_FLOAT32, 3, 5, 64 + 15);
    check_size(TSQP_AS_INT8_ROWS, TSQP_FLOAT16, 16, 2048, 64 + 16 * 2048);
    check_size(TSQP_AS_INT8_ROWS, TSQP_BFLOAT16, 17, 1, 128 + 17);
    for (unsigned encoding = 0; encoding < TSQP_ENCODING_END; encoding++) {
        check_size(encoding, TSQP_FLOAT32, 0, UINT64_MAX, 0);
        check_size(encoding, TSQP_FLOAT32, UINT64_MAX, 0, 0);
        check_size(encoding, TSQP_FLOAT32, 1, UINT64_MAX, TSQP_BAD_SHAPE);
        check_size(encoding, TSQP_FLOAT32, UINT64_MAX, 1, TSQP_BAD_SHAPE);
        check_size(encoding, TSQP_FLOAT32, UINT64_C(1) << 32, UINT64_C(1) << 32, TSQP_BAD_SHAPE);
        check_size(encoding, TSQP_FLOAT32, UINT64_C(1) << 23, (UINT64_C(1) << 23) + 1, TSQP_BAD_SHAPE);
        check_size(encoding, TSQP_DTYPE_END, 1, 1, TSQP_BAD_DTYPE);
        check_size(encoding, 0, 1, 1, TSQP_BAD_DTYPE);
    }
    check_size(TSQP_AS_INT8_ROWS, TSQP_FLOAT32, UINT64_C(1) << 46, 1,
               (INT64_C(1) << 48) + (INT64_C(1) << 46));
    check_size(TSQP_ENCODING_END, TSQP_FLOAT32, 1, 1, TSQP_BAD_ENCODING);
}

static void other_dtypes_are_refused(void) {
    uint8_t bytes[256] = {0};
    for (unsigned dtype = 0; dtype <= TSQP_DTYPE_END; dtype++) {
        bool fits = dtype == TSQP_FLOAT32 || dtype == TSQP_FLOAT16 || dtype == TSQP_BFLOAT16;
        if (dtype != TSQP_FLOAT32)
            check_size(TSQP_AS_BFLOAT16, dtype, 1, 1, TSQP_BAD_DTYPE);
        if (fits)
            continue;
        check_size(TSQP_AS_INT8_ROWS, dtype, 1, 1, TSQP_BAD_DTYPE);
        CHECK_EQ(tsqp_encode_int8_rows(bytes, bytes, dtype, 1, 1), TSQP_BAD_DTYPE);
        CHECK_EQ(tsqp_decode_int8_rows(bytes, dtype, bytes, 1, 1), TSQP_BAD_DTYPE);
    }
    check_bytes(bytes, sizeof bytes, 0);
}

static void run_all(const char *set, const struct kernels *tested) {
    check_group = set;
    compared = kernels = tested;
    RUN(bfloat16_rounds_every_upper_half);
    RUN(bfloat16_decodes_every_pattern);
    RUN(bfloat16_of_any_length);
    RUN(int8_of_any_shape);
    RUN(int8_reads_every_half_precision_pattern);
    RUN(int8_rounds_every_upper_half);
    RUN(int8_decodes_hostile_bytes);
    RUN(int8_row_that_is_not_finite_is_nan);
    RUN(int8_keeps_scales_in_range);
    RUN(results_equal_the_portable_ones);
    RUN(flushing_denormals_changes_nothing);
    RUN(errors_stay_within_their_bounds);
}

int main(void) {
    RUN(sizes_are_checked);
    RUN(other_dtypes_are_refused);
    run_all("portable ", &kernels_each);
#if defined(__x86_64__)
    if (have_avx2())
        run_all("avx2 ", &kernels_avx2);
    else
        printf("SKIPPED convert_avx2: this processor has no AVX2 or no F16C\n");
    if (have_avx512())
        run_all("avx512 ", &kernels_avx512);
    else
        printf("SKIPPED convert_avx512: this processor has no AVX-512 F, BW, DQ, VL\n");
#endif
    return check_result();
}
