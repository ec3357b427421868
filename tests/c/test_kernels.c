/* The operators of each instruction set this machine has, against references computed in double, on private
 * memory of exactly their size (the address sanitizer sees a read or write beside it). */
#include "check.h"
#include "kernels_set.h"
#include "tsqp.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

static const struct tsqp_kernel_set *set;
static uint64_t state;

#define SIZES 130
#define KEYS 77
#define QUERIES 5

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* In [-range, range]. */
static float some(double range) {
    return (float)(((double)(check_random(&state) >> 11) * 0x1p-52 - 1) * range);
}

static size_t width(unsigned dtype) {
    return dtype == TSQP_FLOAT32 ? 4 : 2;
}

static double at(const void *data, size_t i, unsigned dtype) {
    uint16_t half;
    float whole;
    if (dtype == TSQP_FLOAT32)
        memcpy(&whole, (const uint8_t *)data + i * 4, 4);
    else {
        memcpy(&half, (const uint8_t *)data + i * 2, 2);
        whole = float_of((uint32_t)half << 16);
    }
    return whole;
}

static void *random_elements(size_t count, unsigned dtype, double range) {
    uint8_t *data = check_malloc(count * width(dtype));
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        float x = some(range);
        memcpy(&bits, &x, 4);
        bits >>= dtype == TSQP_FLOAT32 ? 0 : 16;
        memcpy(data + i * width(dtype), &bits, width(dtype));
    }
    return data;
}

/* Products with a power of e that may have been rounded to 0. */
#define SMALL 1e-35

/* Within `steps` of the dtype's rounding at `scale`. */
static bool near(double found, double expected, unsigned dtype, double steps, double scale) {
    if (isnan(expected) || isinf(expected))
        return isnan(expected) ? isnan(found) : found == expected;
    double step = dtype == TSQP_FLOAT32 ? 0x1p-24 : 0x1p-8;
    return fabs(found - expected) <= steps * step * (fabs(expected) + scale) + SMALL;
}

static const unsigned DTYPES[] = {TSQP_FLOAT32, TSQP_BFLOAT16};

/* ---- e^x ---- */

static void exp_is_right_everywhere(void) {
    enum { STRIDE = 4099, BATCH = 1024 };
    float x[BATCH], y[BATCH];
    double worst = 0;
    for (uint64_t bits = 0; bits < UINT64_C(1) << 32; bits += (uint64_t)STRIDE * BATCH) {
        for (uint64_t i = 0; i < BATCH; i++)
            x[i] = float_of((uint32_t)(bits + i * STRIDE));
        set->exp(y, x, BATCH);
        for (size_t i = 0; i < BATCH; i++) {
            double expected = exp((double)x[i]);
            if (isnan(x[i]) || expected > FLT_MAX) {
                CHECK(isnan(x[i]) ? isnan(y[i]) : isinf(y[i]) && y[i] > 0);
                continue;
            }
            if (expected < FLT_MIN) { /* denormal: exact to a step, or 0 */
                CHECK((double)y[i] >= 0 && (double)y[i] <= expected + 0x1p-149);
                continue;
            }
            double ulp = ldexp(1, ilogb(expected) - 23);
            worst = fmax(worst, fabs((double)y[i] - expected) / ulp);
        }
    }
    if (worst >= 1.5)
        printf("%.3f ulp\n", worst);
    CHECK(worst < 1.5);
}

static void exp_at_its_edges(void) {
    const float x[] = {0,       -0.0f,     -INFINITY, INFINITY, NAN,    -FLT_MAX,
                       FLT_MAX, 88.72283f, 88.72284f, -87.3f,   -104.1f};
    float y[sizeof x / sizeof x[0]];
    set->exp(y, x, sizeof x / sizeof x[0]);
    CHECK(y[0] == 1 && y[1] == 1 && y[2] == 0 && isinf(y[3]) && isnan(y[4]) && y[5] == 0 && isinf(y[6]));
    CHECK(isfinite(y[7]) && isinf(y[8]) && y[9] > 0 && y[10] == 0);
}

/* ---- RMSNorm ---- */

static void check_rms_norm(size_t rows, size_t cols, unsigned dtype, bool residual, bool stream) {
    const size_t n = rows * cols, nbytes = n * width(dtype);
    void *x = random_elements(n, dtype, 3), *weight = random_elements(cols, dtype, 2);
    void *add = random_elements(n, dtype, 3), *out = check_malloc(nbytes), *total = check_malloc(nbytes);
    float *scratch = check_malloc((cols + SCRATCH_PADDING) * sizeof(float));
    struct tsqp_rms_norm job = {x, residual ? add : NULL, weight, out, total, dtype, rows, cols, 1e-6f};
    set->rms_norm(&job, 0, rows, scratch, stream);
    const void *sum = residual ? total : x;
    for (size_t r = 0; r < rows; r++) {
        double squares = 0;
        for (size_t i = r * cols; i < (r + 1) * cols; i++) {
            if (residual)
                CHECK(near(at(total, i, dtype), at(x, i, dtype) + at(add, i, dtype), dtype, 1.01, 0));
            squares += at(sum, i, dtype) * at(sum, i, dtype);
        }
        double factor = 1 / sqrt(squares / (double)cols + 1e-6);
        for (size_t i = 0; i < cols; i++)
            CHECK(near(at(out, r * cols + i, dtype),
                       at(sum, r * cols + i, dtype) * factor * at(weight, i, dtype), dtype, 8, 0));
    }
    free(x), free(weight), free(add), free(out), free(total), free(scratch);
}

static void rms_norm_of_any_size(void) {
    for (unsigned d = 0; d < 2; d++)
        for (size_t cols = 1; cols <= SIZES; cols++)
            check_rms_norm(1 + cols % 3, cols, DTYPES[d], cols % 2, cols % 4 > 1);
}

static void rms_norm_of_long_rows(void) {
    static const size_t cols[] = {511, 512, 513, 2048, 8192 + 9, 20000};
    for (unsigned d = 0; d < 2; d++)
        for (size_t i = 0; i < sizeof cols / sizeof cols[0]; i++)
            check_rms_norm(2, cols[i], DTYPES[d], i % 2, true);
}

/* ---- SiLU times gate ---- */

static void check_silu_mul(size_t count, unsigned dtype, double range, bool stream) {
    void *gate = random_elements(count, dtype, range), *up = random_elements(count, dtype, 3);
    void *out = check_malloc(count * width(dtype));
    struct tsqp_silu_mul job = {gate, up, out, dtype, count};
    set->silu_mul(&job, 0, count / 2, stream);
    set->silu_mul(&job, count / 2, count, stream);
    for (size_t i = 0; i < count; i++) {
        double g = at(gate, i, dtype);
        CHECK(near(at(out, i, dtype), g / (1 + exp(-g)) * at(up, i, dtype), dtype, 6, 0));
    }
    free(gate), free(up), free(out);
}

static void silu_mul_of_any_size(void) {
    for (unsigned d = 0; d < 2; d++)
        for (size_t count = 1; count <= SIZES; count++)
            check_silu_mul(count, DTYPES[d], 8, count % 2);
    check_silu_mul(100003, TSQP_FLOAT32, 100, true);
    check_silu_mul(100003, TSQP_BFLOAT16, 100, true);
}

static void silu_mul_of_what_is_no_number(void) {
    const float gate[] = {NAN, INFINITY, -INFINITY, -200, 200, 0, 1e-42f, -FLT_MAX, FLT_MAX};
    float up[9], out[9];
    for (size_t i = 0; i < 9; i++)
        up[i] = 1;
    struct tsqp_silu_mul job = {gate, up, out, TSQP_FLOAT32, 9};
    set->silu_mul(&job, 0, 9, false);
    CHECK(isnan(out[0]) && isinf(out[1]) && isnan(out[2]) && fabsf(out[3]) < (float)SMALL && out[4] == 200);
    CHECK(out[5] == 0 && fabsf(out[6]) < FLT_MIN && out[8] == FLT_MAX);
}

/* ---- rotary embedding ---- */

/* Lines of q lie `stride` apart; in place and into other memory must give the same bits. */
static void check_rotary(size_t dim, size_t heads, size_t positions, unsigned dtype) {
    const size_t n = heads * positions * dim, table = positions * dim;
    void *x = random_elements(n, dtype, 3), *out = check_malloc(n * width(dtype));
    void *cosines = random_elements(table, dtype, 1), *sines = random_elements(table, dtype, 1);
    const int64_t line = (int64_t)dim, h = (int64_t)heads;
    struct tsqp_rotary job = {x,
                              cosines,
                              sines,
                              out,
                              dtype,
                              dim,
                              {1, positions, heads},
                              {h * line * (int64_t)positions, h * line, line},
                              {h * line * (int64_t)positions, h * line, line},
                              {0, line, 0},
                              {0, line, 0}};
    set->rotary(&job, 0, positions * heads / 2);
    set->rotary(&job, positions * heads / 2, positions * heads);
    for (size_t p = 0; p < positions; p++)
        for (size_t i = 0; i < heads * dim; i++) {
            size_t d = i % dim, from = p * heads * dim + i, half = dim / 2;
            double other = d < half ? -at(x, from + half, dtype) : at(x, from - half, dtype);
            double expected =
                at(x, from, dtype) * at(cosines, p * dim + d, dtype) + other * at(sines, p * dim + d, dtype);
            CHECK(near(at(out, from, dtype), expected, dtype, 3, 3));
        }
    job.out = x;
    set->rotary(&job, 0, positions * heads);
    CHECK(memcmp(x, out, n * width(dtype)) == 0);
    free(x), free(out), free(cosines), free(sines);
}

static void rotary_of_any_size(void) {
    for (unsigned d = 0; d < 2; d++)
        for (size_t dim = 2; dim <= SIZES; dim += 2)
            check_rotary(dim, 1 + dim % 3, 3, DTYPES[d]);
}

/* ---- softmax ---- */

static struct tsqp_softmax softmax_job(const void *scores, void *out, unsigned dtype, unsigned out_dtype,
                                       size_t keys) {
    return (struct tsqp_softmax){.scores = scores,
                                 .out = out,
                                 .dtype = dtype,
                                 .out_dtype = out_dtype,
                                 .ndim = 1,
                                 .shape = {QUERIES},
                                 .strides = {(int64_t)keys},
                                 .out_strides = {(int64_t)keys},
                                 .mask_strides = {(int64_t)keys},
                                 .keys = keys,
                                 .scale = 0.3f};
}

static double masked(const struct tsqp_softmax *job, size_t query, size_t key) {
    size_t i = query * job->keys + key, position = job->first + query;
    double x = at(job->scores, i, job->dtype) * (double)job->scale;
    if ((job->causal && key > position) || (job->window && key + job->window <= position))
        return -INFINITY;
    if (job->mask_kind == TSQP_MASK_BOOL)
        return ((const uint8_t *)job->mask)[i] ? x : -FLT_MAX;
    if (job->mask_kind != TSQP_MASK_NONE)
        x += at(job->mask, i, job->mask_kind == TSQP_MASK_FLOAT32 ? TSQP_FLOAT32 : TSQP_BFLOAT16);
    return x;
}

static void check_softmax(const struct tsqp_softmax *job, bool stream) {
    float *scratch = check_malloc(scratch_row(job->keys) * SOFTMAX_ROWS * sizeof(float));
    set->softmax(job, 0, QUERIES / 2, scratch, stream);
    set->softmax(job, QUERIES / 2, QUERIES, scratch, stream);
    for (size_t q = 0; q < QUERIES; q++) {
        double largest = -INFINITY, sum = 0;
        for (size_t k = 0; k < job->keys; k++)
            largest = fmax(largest, masked(job, q, k));
        for (size_t k = 0; k < job->keys; k++)
            sum += exp(masked(job, q, k) - largest);
        for (size_t k = 0; k < job->keys; k++) {
            double expected = exp(masked(job, q, k) - largest) / sum;
            /* Scaled scores, sums with a mask and exponents are rounded at sizes up to some 20. */
            CHECK(near(at(job->out, q * job->keys + k, job->out_dtype), expected, job->out_dtype, 32, 1e-3));
        }
    }
    free(scratch);
}

static void softmax_with(unsigned dtype, unsigned out_dtype, size_t keys, enum tsqp_mask kind, bool causal,
                         size_t window) {
    void *scores = random_elements(QUERIES * keys, dtype, 20);
    void *out = check_malloc(QUERIES * keys * width(out_dtype)), *mask = NULL;
    struct tsqp_softmax job = softmax_job(scores, out, dtype, out_dtype, keys);
    job.mask_kind = kind;
    job.causal = causal && keys >= QUERIES;
    job.first = keys >= QUERIES ? (keys - QUERIES) / 2 : 0;
    job.window = keys >= QUERIES ? window : 0;
    if (kind == TSQP_MASK_BOOL) {
        uint8_t *visible = mask = check_malloc(QUERIES * keys);
        for (size_t i = 0; i < QUERIES * keys; i++)
            visible[i] = check_random(&state) % 3 ? (uint8_t)(1 + check_random(&state) % 255) : 0;
    } else if (kind != TSQP_MASK_NONE) {
        mask = random_elements(QUERIES * keys, kind == TSQP_MASK_FLOAT32 ? TSQP_FLOAT32 : TSQP_BFLOAT16, 5);
    }
    job.mask = mask;
    check_softmax(&job, keys % 2);
    free(scores), free(out), free(mask);
}

static void softmax_of_any_size(void) {
    for (size_t keys = 1; keys <= SIZES; keys++)
        for (int kind = TSQP_MASK_NONE; kind <= TSQP_MASK_BFLOAT16; kind++)
            softmax_with(DTYPES[keys % 2], DTYPES[keys / 2 % 2], keys, (enum tsqp_mask)kind,
                         kind == 0 && keys % 3, keys % 5 == 0 ? 1 + keys / 7 : 0);
    softmax_with(TSQP_FLOAT32, TSQP_FLOAT32, 10007, TSQP_MASK_NONE, true, 0);
    softmax_with(TSQP_BFLOAT16, TSQP_BFLOAT16, 4096, TSQP_MASK_NONE, true, 1000);
}

/* The two ends of what is visible everywhere beside the borders of vectors, pairs and strips (of 512). */
static void softmax_across_strips(void) {
    static const size_t keys[] = {511, 512, 513, 1024, 1056, 1100, 2048 + 7};
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        for (unsigned d = 0; d < 4; d++) {
            const unsigned dtype = DTYPES[d % 2], out_dtype = DTYPES[d / 2];
            for (int kind = TSQP_MASK_NONE; kind <= TSQP_MASK_BFLOAT16; kind++)
                softmax_with(dtype, out_dtype, keys[i], (enum tsqp_mask)kind, false, 0);
            for (size_t window = 0; window <= keys[i] / 2; window += 61)
                softmax_with(dtype, out_dtype, keys[i], TSQP_MASK_NONE, true, window);
        }
}

/* All of one row's scores are `base` and up to 4 more: their size must cost no precision but its own. */
static void softmax_of_scores_about(float base, unsigned out_dtype, double steps) {
    float scores[QUERIES * KEYS], scratch[SOFTMAX_ROWS * (KEYS + 2 * SCRATCH_PADDING)];
    void *out = check_malloc(QUERIES * KEYS * width(out_dtype));
    struct tsqp_softmax job = softmax_job(scores, out, TSQP_FLOAT32, out_dtype, KEYS);
    job.scale = 1;
    for (size_t i = 0; i < QUERIES * KEYS; i++)
        scores[i] = base + some(2);
    set->softmax(&job, 0, QUERIES, scratch, false);
    for (size_t q = 0; q < QUERIES; q++) {
        double sum = 0;
        for (size_t k = 0; k < KEYS; k++)
            sum += exp((double)scores[q * KEYS + k] - base);
        for (size_t k = 0; k < KEYS; k++)
            CHECK(near(at(out, q * KEYS + k, out_dtype), exp((double)scores[q * KEYS + k] - base) / sum,
                       out_dtype, steps, 0));
    }
    free(out);
}

/* Exponents are rounded at 2^-25 of their size, at most some 6 here: 1 is what rounding alone may cost. */
static void softmax_keeps_its_precision(void) {
    static const float bases[] = {0, 3, -40, 1000, -40000, 50000, 4e6f, -7e6f};
    for (size_t i = 0; i < sizeof bases / sizeof bases[0]; i++) {
        softmax_of_scores_about(bases[i], TSQP_BFLOAT16, 1.04);
        softmax_of_scores_about(bases[i], TSQP_FLOAT32, 16);
    }
}

static void softmax_rows_that_are_no_numbers(void) {
    float scores[QUERIES * KEYS], out[QUERIES * KEYS], scratch[SOFTMAX_ROWS * (KEYS + 2 * SCRATCH_PADDING)];
    struct tsqp_softmax job = softmax_job(scores, out, TSQP_FLOAT32, TSQP_FLOAT32, KEYS);
    job.scale = 1;
    for (size_t i = 0; i < QUERIES * KEYS; i++)
        scores[i] = some(2);
    for (size_t k = 0; k < KEYS; k++)
        scores[k] = -INFINITY;           /* row 0: NaN */
    scores[KEYS + 3] = NAN;              /* row 1: NaN */
    scores[2 * KEYS + 5] = -INFINITY;    /* row 2: one weight of 0 */
    scores[3 * KEYS + KEYS - 1] = 1e38f; /* row 3: one weight of 1 */
    scores[4 * KEYS + 2] = 1e-45f;       /* row 4: an ordinary one */
    set->softmax(&job, 0, QUERIES, scratch, false);
    for (size_t k = 0; k < KEYS; k++) {
        CHECK(isnan(out[k]) && isnan(out[KEYS + k]) && isfinite(out[4 * KEYS + k]));
        CHECK(out[3 * KEYS + k] == (k == KEYS - 1 ? 1.0f : 0.0f));
    }
    CHECK(out[2 * KEYS + 5] == 0 && out[2 * KEYS + 4] > 0);
    job.causal = true;
    set->softmax(&job, 0, 2, scratch, false); /* what is hidden is 0, whatever the rest is */
    for (size_t k = 2; k < KEYS; k++)
        CHECK(out[k] == 0 && out[KEYS + k] == 0);
}

/* A hidden row of a bool mask weighs all keys alike. */
static void softmax_of_a_hidden_row(void) {
    float scores[QUERIES * KEYS], out[QUERIES * KEYS], scratch[SOFTMAX_ROWS * (KEYS + 2 * SCRATCH_PADDING)];
    uint8_t mask[QUERIES * KEYS] = {0};
    struct tsqp_softmax job = softmax_job(scores, out, TSQP_FLOAT32, TSQP_FLOAT32, KEYS);
    for (size_t i = 0; i < QUERIES * KEYS; i++)
        scores[i] = some(2);
    job.mask = mask;
    job.mask_kind = TSQP_MASK_BOOL;
    set->softmax(&job, 0, QUERIES, scratch, false);
    for (size_t i = 0; i < QUERIES * KEYS; i++)
        CHECK(near(out[i], 1.0 / KEYS, TSQP_FLOAT32, 4, 0));
}

/* ---- whole calls: shared by threads, the same numbers ---- */

static void calls_are_the_same_with_threads(void) {
    enum { ROWS = 700, COLS = 333 };
    float *x = random_elements((size_t)ROWS * COLS, TSQP_FLOAT32, 4),
          *weight = random_elements(COLS, TSQP_FLOAT32, 1);
    float *out[2] = {check_malloc(ROWS * COLS * 4), check_malloc(ROWS * COLS * 4)};
    for (unsigned threads = 1; threads <= 2; threads++) {
        tsqp_threads_set(threads);
        struct tsqp_rms_norm norm = {x,    NULL, weight, out[threads - 1], NULL, TSQP_FLOAT32,
                                     ROWS, COLS, 1e-6f};
        CHECK_EQ(tsqp_rms_norm(&norm), TSQP_OK);
        struct tsqp_softmax softmax =
            softmax_job(out[threads - 1], out[threads - 1], TSQP_FLOAT32, TSQP_FLOAT32, COLS);
        softmax.shape[0] = ROWS;
        CHECK_EQ(tsqp_softmax(&softmax), TSQP_OK);
        struct tsqp_silu_mul silu = {out[threads - 1], x, out[threads - 1], TSQP_FLOAT32,
                                     (size_t)ROWS * COLS};
        CHECK_EQ(tsqp_silu_mul(&silu), TSQP_OK);
    }
    CHECK(memcmp(out[0], out[1], ROWS * COLS * 4) == 0);
    tsqp_threads_stop();
    free(x), free(weight), free(out[0]), free(out[1]);
}

static void wrong_dtypes_are_refused(void) {
    struct tsqp_rms_norm norm = {.dtype = TSQP_FLOAT16};
    struct tsqp_silu_mul silu = {.dtype = TSQP_INT8};
    struct tsqp_rotary rotary = {.dtype = TSQP_FLOAT64};
    struct tsqp_softmax softmax = {.dtype = TSQP_FLOAT32, .out_dtype = TSQP_FLOAT16};
    CHECK_EQ(tsqp_rms_norm(&norm), TSQP_BAD_DTYPE);
    CHECK_EQ(tsqp_silu_mul(&silu), TSQP_BAD_DTYPE);
    CHECK_EQ(tsqp_rotary(&rotary, 1), TSQP_BAD_DTYPE);
    CHECK_EQ(tsqp_softmax(&softmax), TSQP_BAD_DTYPE);
}

int main(void) {
    char group[64];
    for (size_t i = 0; (set = tsqp_kernel_set(i)) != NULL; i++) {
        snprintf(group, sizeof group, "%s: ", set->name);
        check_group = group;
        state = 7;
        RUN(exp_is_right_everywhere);
        RUN(exp_at_its_edges);
        RUN(rms_norm_of_any_size);
        RUN(rms_norm_of_long_rows);
        RUN(silu_mul_of_any_size);
        RUN(silu_mul_of_what_is_no_number);
        RUN(rotary_of_any_size);
        RUN(softmax_of_any_size);
        RUN(softmax_across_strips);
        RUN(softmax_keeps_its_precision);
        RUN(softmax_rows_that_are_no_numbers);
        RUN(softmax_of_a_hidden_row);
    }
    check_group = "";
    RUN(calls_are_the_same_with_threads);
    RUN(wrong_dtypes_are_refused);
    return check_result();
}
