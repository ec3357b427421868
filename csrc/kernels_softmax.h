/* kernels_softmax.h: scaled and masked softmax of rows, in the vectors of the source that includes it.
 *
 * A row of scores is read once, into scratch, where its maximum, exponentials and sum are taken (stable
 * softmax; the scratch stays in the nearest cache); then it is written once.
 */

#ifndef ROWS_AHEAD
#define ROWS_AHEAD 2
#endif

/* Scales and masks the scores [low, high) of a row into `row`; returns their largest. */
INLINE SIMD vf scale_part(float *row, const uint8_t *scores, unsigned dtype, const uint8_t *mask,
                          enum tsqp_mask kind, size_t at, size_t n, vf scale, vf largest) {
    vf x = vmul(vget(scores + at * width_of(dtype), dtype, n), scale);
    if (kind == TSQP_MASK_BOOL)
        x = vvisible(mask + at, x, vset(-FLT_MAX), n);
    else if (kind == TSQP_MASK_FLOAT32)
        x = vadd(x, vget(mask + at * 4, TSQP_FLOAT32, n));
    else if (kind == TSQP_MASK_BFLOAT16)
        x = vadd(x, vget(mask + at * 2, TSQP_BFLOAT16, n));
    x = vfirst(x, vset(-INFINITY), n);
    put_float(row + at, x);
    return vmax(x, largest); /* a NaN does not become the maximum: it spoils the sum */
}

INLINE SIMD float scale_row(float *row, const uint8_t *scores, unsigned dtype, const uint8_t *mask,
                            enum tsqp_mask kind, size_t low, size_t high, float factor) {
    vf scale = vset(factor), even = vset(-INFINITY), odd = even;
    size_t i = low;
    for (; i + 2 * LANES <= high; i += 2 * LANES) {
        even = scale_part(row, scores, dtype, mask, kind, i, LANES, scale, even);
        odd = scale_part(row, scores, dtype, mask, kind, i + LANES, LANES, scale, odd);
    }
    for (; i < high; i += LANES)
        even =
            scale_part(row, scores, dtype, mask, kind, i, high - i < LANES ? high - i : LANES, scale, even);
    return vlargest(vmax(even, odd));
}

#define SCALE_ROW(dtype, kind)                                                                               \
    case (kind) * 2 + ((dtype) == TSQP_BFLOAT16):                                                            \
        return scale_row(row, scores, dtype, mask, kind, low, high, job->scale);

static SIMD float scale_any(const struct tsqp_softmax *job, float *row, const uint8_t *scores,
                            const uint8_t *mask, size_t low, size_t high) {
    switch (job->mask_kind * 2 + (job->dtype == TSQP_BFLOAT16)) {
        SCALE_ROW(TSQP_FLOAT32, TSQP_MASK_BOOL)
        SCALE_ROW(TSQP_FLOAT32, TSQP_MASK_FLOAT32)
        SCALE_ROW(TSQP_FLOAT32, TSQP_MASK_BFLOAT16)
        SCALE_ROW(TSQP_BFLOAT16, TSQP_MASK_NONE)
        SCALE_ROW(TSQP_BFLOAT16, TSQP_MASK_BOOL)
        SCALE_ROW(TSQP_BFLOAT16, TSQP_MASK_FLOAT32)
        SCALE_ROW(TSQP_BFLOAT16, TSQP_MASK_BFLOAT16)
    default:
        return scale_row(row, scores, TSQP_FLOAT32, mask, TSQP_MASK_NONE, low, high, job->scale);
    }
}

/* e^(x - largest) of [low, high), and 0 up to the next whole vector; returns their sum. (Not by single
 * stores: a load of what they and others made waits until all stores before have left the core.) Computing
 * takes most of a row's time here, and the memory is idle: it fetches the scores of a row that follows,
 * `ahead`, meanwhile. */
static SIMD float exp_row(float *row, size_t low, size_t high, float largest, const uint8_t *ahead,
                          size_t width) {
    vf shift = vset(largest), even = vset(0), odd = even;
    size_t i = low;
    for (; i + 2 * LANES <= high; i += 2 * LANES) {
        for (size_t line = i * width; line < (i + 2 * LANES) * width; line += 64)
            __builtin_prefetch(ahead + line);
        vf x = vexp_bounded(vsub(get_float(row + i), shift));
        vf y = vexp_bounded(vsub(get_float(row + i + LANES), shift));
        put_float(row + i, x);
        put_float(row + i + LANES, y);
        even = vadd(even, x);
        odd = vadd(odd, y);
    }
    __builtin_prefetch(ahead + i * width);
    for (; i < high; i += LANES) {
        /* The rest of the last vector is 0, even where the row is NaN. */
        size_t n = high - i < LANES ? high - i : LANES;
        vf x = vfirst(vexp_bounded(vsub(get_float(row + i), shift)), vset(0), n);
        put_float(row + i, x);
        even = vadd(even, x);
    }
    return vsum(vadd(even, odd));
}

INLINE SIMD void write_row(uint8_t *out, const float *row, unsigned dtype, size_t low, size_t high,
                           size_t keys, float factor, bool stream) {
    const size_t whole = keys - keys % LANES, width = width_of(dtype);
    vf scale = vset(factor);
    size_t i = 0;
    for (; i < low && i < whole; i += LANES)
        vput(out + i * width, dtype, vset(0), LANES, stream);
    for (; i < high && i < whole; i += LANES)
        vput(out + i * width, dtype, vmul(get_float(row + i), scale), LANES, stream);
    for (; i < whole; i += LANES)
        vput(out + i * width, dtype, vset(0), LANES, stream);
    if (whole < keys) {
        vf last = low < keys && high > whole ? vmul(get_float(row + whole), scale) : vset(0);
        vput(out + whole * width, dtype, last, keys - whole, false);
    }
}

static SIMD void write_any(const struct tsqp_softmax *job, uint8_t *out, const float *row, size_t low,
                           size_t high, float factor, bool stream) {
    stream = streamable(out, stream);
    if (job->out_dtype == TSQP_FLOAT32 && stream)
        write_row(out, row, TSQP_FLOAT32, low, high, job->keys, factor, true);
    else if (job->out_dtype == TSQP_FLOAT32)
        write_row(out, row, TSQP_FLOAT32, low, high, job->keys, factor, false);
    else if (stream)
        write_row(out, row, TSQP_BFLOAT16, low, high, job->keys, factor, true);
    else
        write_row(out, row, TSQP_BFLOAT16, low, high, job->keys, factor, false);
}

/* The keys [low, high) a query at `position` may see. */
static void visible_keys(const struct tsqp_softmax *job, size_t position, size_t *low, size_t *high) {
    *low = job->window && position >= job->window ? position - job->window + 1 : 0;
    *high = job->causal && position < job->keys ? position + 1 : job->keys;
    if (*low > *high)
        *low = *high;
}

static SIMD void softmax_row(const struct tsqp_softmax *job, const uint8_t *scores, const uint8_t *mask,
                             uint8_t *out, size_t position, const uint8_t *ahead, float *row, bool stream) {
    size_t low, high;
    visible_keys(job, position, &low, &high);
    float largest = scale_any(job, row, scores, mask, low, high);
    float sum = exp_row(row, low, high, largest, ahead, width_of(job->dtype));
    size_t start = low - low % LANES;
    if (start < low) { /* the vectors of the output begin and end elsewhere than those of `row` */
        for (size_t i = start; i < low; i++)
            row[i] = 0;
        for (size_t i = high; i % LANES; i++)
            row[i] = 0;
    }
    float factor = 1.0f / sum;
    if (isnan(factor)) { /* what is visible, and nothing beside it */
        for (size_t i = low; i < high; i++)
            row[i] = factor;
        factor = 1;
    }
    write_any(job, out, row, start, high, factor, stream);
}

static SIMD void softmax(const struct tsqp_softmax *job, size_t begin, size_t end, float *row, bool stream) {
    const int64_t width = (int64_t)width_of(job->dtype), out_width = (int64_t)width_of(job->out_dtype);
    const int64_t mask_width = job->mask_kind == TSQP_MASK_BOOL      ? 1
                               : job->mask_kind == TSQP_MASK_FLOAT32 ? 4
                                                                     : 2;
    struct cursor cursor = {.shape = job->shape,
                            .strides = {job->strides, job->out_strides, job->mask_strides},
                            .ndim = job->ndim,
                            .tensors = 3};
    cursor_seek(&cursor, begin);
    struct cursor ahead = cursor;
    for (size_t i = 0; i < ROWS_AHEAD; i++)
        cursor_next(&ahead);
    for (size_t i = begin; i < end; i++, cursor_next(&cursor), cursor_next(&ahead)) {
        const uint8_t *scores = (const uint8_t *)job->scores + cursor.offset[0] * width;
        const uint8_t *mask = job->mask ? (const uint8_t *)job->mask + cursor.offset[2] * mask_width : NULL;
        uint8_t *out = (uint8_t *)job->out + cursor.offset[1] * out_width;
        softmax_row(job, scores, mask, out, job->first + cursor.index[job->ndim - 1],
                    (const uint8_t *)job->scores + ahead.offset[0] * width, row, stream);
    }
    if (stream)
        vfence();
}

#define KERNEL_SET(set, title)                                                                               \
    const struct tsqp_kernel_set tsqp_kernels_##set = {title,   rms_norm, silu_mul, rotary,                  \
                                                       softmax, move,     exp_all};
