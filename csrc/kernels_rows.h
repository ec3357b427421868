/* kernels_rows.h: RMSNorm, SiLU times gate, rotary embedding and a plain copy, written once in the vectors of
 * the source that includes it (`vf` of LANES floats and the functions v*). */

/* Of x below EXP_HIGH. */
INLINE SIMD vf vexp_bounded(vf x) {
    x = vmax(vset(EXP_LOW), x); /* a NaN passes */
    vf n = vnearest(vmul(x, vset(LOG2_E)));
    vf r = vfma(n, vset(-LN2_HIGH), x);
    r = vfma(n, vset(-LN2_LOW), r);
    vf p = vfma(vset(EXP_C6), r, vset(EXP_C5));
    p = vfma(p, r, vset(EXP_C4));
    p = vfma(p, r, vset(EXP_C3));
    p = vfma(p, r, vset(EXP_C2));
    p = vfma(p, r, vset(EXP_C1));
    p = vadd(vfma(p, vmul(r, r), r), vset(1));
    return vscale2(p, n);
}

INLINE SIMD vf vexp(vf x) {
    return vexp_bounded(vmin(vset(EXP_HIGH), x));
}

/* 2^t; as exactly as a result of the dtype needs it. */
INLINE SIMD vf vexp2(vf t, unsigned dtype) {
    vf n, f = vfraction(t, &n), p;
    if (dtype == TSQP_BFLOAT16) {
        p = vfma(vset(ROUGH_C3), f, vset(ROUGH_C2));
        p = vfma(p, f, vset(ROUGH_C1));
        return vscale2(vfma(p, f, vset(ROUGH_C0)), n);
    }
    p = vfma(vset(EXP2_C6), f, vset(EXP2_C5));
    p = vfma(p, f, vset(EXP2_C4));
    p = vfma(p, f, vset(EXP2_C3));
    p = vfma(p, f, vset(EXP2_C2));
    p = vfma(p, f, vset(EXP2_C1));
    return vscale2(vfma(p, f, vset(1)), n);
}

INLINE SIMD vf get_float(const float *src) {
    return vget((const uint8_t *)src, TSQP_FLOAT32, LANES);
}

INLINE SIMD void put_float(float *dst, vf x) {
    vput((uint8_t *)dst, TSQP_FLOAT32, x, LANES, false);
}

/* A stream store writes whole aligned vectors only. */
INLINE bool streamable(const void *dst, bool stream) {
    return stream && (uintptr_t)dst % 64 == 0;
}

static SIMD void exp_all(float *dst, const float *src, size_t count) {
    size_t i = 0;
    for (; i + LANES <= count; i += LANES)
        put_float(dst + i, vexp(get_float(src + i)));
    if (i < count) {
        vf x = vexp(vget((const uint8_t *)(src + i), TSQP_FLOAT32, count - i));
        vput((uint8_t *)(dst + i), TSQP_FLOAT32, x, count - i, false);
    }
}

/* ---- RMSNorm ---- */

/* The order of torch's sum over a contiguous row on x86 (aten/src/ATen/native/cpu/SumKernel.cpp: 4 vectors of
 * 8, cascaded every 16 steps), so that the sum is the stock model's to the last bit; it is a good one, too.
 */
#define SUM_LANES 32
#define SUM_VECTORS (SUM_LANES / LANES)
#define SUM_LEVELS 4
#define SUM_STEPS 16

INLINE SIMD void carry(vf level[SUM_LEVELS][SUM_VECTORS], size_t steps) {
    for (unsigned j = 1, shift = 4; j < SUM_LEVELS; j++, shift += 4) {
        for (unsigned k = 0; k < SUM_VECTORS; k++) {
            level[j][k] = vadd(level[j][k], level[j - 1][k]);
            level[j - 1][k] = vset(0);
        }
        if (steps & ((size_t)(SUM_STEPS - 1) << shift))
            break;
    }
}

INLINE SIMD void add_squares(vf sum[SUM_VECTORS], const float *x) {
    for (unsigned k = 0; k < SUM_VECTORS; k++) {
        vf v = get_float(x + k * LANES);
        sum[k] = vadd(sum[k], vmul(v, v));
    }
}

INLINE SIMD float sum_of_squares(const float *x, size_t count) {
    vf level[SUM_LEVELS][SUM_VECTORS];
    float lane[SUM_LANES], sum = 0;
    for (unsigned j = 0; j < SUM_LEVELS; j++)
        for (unsigned k = 0; k < SUM_VECTORS; k++)
            level[j][k] = vset(0);
    size_t steps = count / SUM_LANES, i = 0;
    while (i + SUM_STEPS <= steps) {
        for (size_t end = i + SUM_STEPS; i < end; i++)
            add_squares(level[0], x + i * SUM_LANES);
        carry(level, i);
    }
    for (; i < steps; i++)
        add_squares(level[0], x + i * SUM_LANES);
    for (unsigned k = 0; k < SUM_VECTORS; k++) {
        for (unsigned j = 1; j < SUM_LEVELS; j++)
            level[0][k] = vadd(level[0][k], level[j][k]);
        put_float(lane + k * LANES, level[0][k]);
    }
    for (i *= SUM_LANES; i + 8 <= count; i += 8)
        for (unsigned l = 0; l < 8; l++)
            lane[l] += x[i + l] * x[i + l];
    for (; i < count; i++)
        sum += x[i] * x[i];
    for (unsigned l = 0; l < 8; l++)
        sum += lane[l] + lane[l + 8] + lane[l + 16] + lane[l + 24];
    return sum;
}

/* One row, with the residual added, as floats: everything that follows is computed from this one reading. */
INLINE SIMD void read_part(const struct tsqp_rms_norm *job, size_t at, float *row, unsigned dtype, size_t n,
                           bool stream) {
    const size_t offset = at * width_of(dtype);
    vf x = vget((const uint8_t *)job->x + offset, dtype, n);
    if (job->residual) {
        x = vround(vadd(x, vget((const uint8_t *)job->residual + offset, dtype, n)), dtype);
        vput((uint8_t *)job->total + offset, dtype, x, n, stream);
    }
    put_float(row, x);
}

INLINE SIMD void norm_part(const uint8_t *weight, uint8_t *out, const float *row, vf factor, unsigned dtype,
                           size_t n, bool stream) {
    vf x = vround(vmul(get_float(row), factor), dtype);
    vput(out, dtype, vmul(vget(weight, dtype, n), x), n, stream);
}

INLINE SIMD void rms_norm_rows(const struct tsqp_rms_norm *job, size_t begin, size_t end, float *row,
                               bool stream, unsigned dtype) {
    const size_t cols = job->cols, whole = cols - cols % LANES, width = width_of(dtype);
    const uint8_t *weight = job->weight;
    for (size_t at = begin * cols; at < end * cols; at += cols) {
        uint8_t *out = (uint8_t *)job->out + at * width;
        for (size_t i = 0; i < whole; i += LANES)
            read_part(job, at + i, row + i, dtype, LANES, stream);
        if (whole < cols)
            read_part(job, at + whole, row + whole, dtype, cols - whole, false);
        float mean = sum_of_squares(row, cols) / (float)cols;
        vf factor = vset(1.0f / sqrtf(mean + job->eps));
        for (size_t i = 0; i < whole; i += LANES)
            norm_part(weight + i * width, out + i * width, row + i, factor, dtype, LANES, stream);
        if (whole < cols)
            norm_part(weight + whole * width, out + whole * width, row + whole, factor, dtype, cols - whole,
                      false);
    }
}

static SIMD void rms_norm(const struct tsqp_rms_norm *job, size_t begin, size_t end, float *row,
                          bool stream) {
    stream = streamable(job->out, stream) && job->cols % (64 / width_of(job->dtype)) == 0 &&
             (!job->residual || streamable(job->total, stream));
    if (job->dtype == TSQP_FLOAT32 && stream)
        rms_norm_rows(job, begin, end, row, true, TSQP_FLOAT32);
    else if (job->dtype == TSQP_FLOAT32)
        rms_norm_rows(job, begin, end, row, false, TSQP_FLOAT32);
    else if (stream)
        rms_norm_rows(job, begin, end, row, true, TSQP_BFLOAT16);
    else
        rms_norm_rows(job, begin, end, row, false, TSQP_BFLOAT16);
    if (stream)
        vfence();
}

/* ---- SiLU times gate ---- */

INLINE SIMD vf silu_mul_part(const uint8_t *gates, const uint8_t *ups, unsigned dtype, size_t n) {
    vf gate = vget(gates, dtype, n), up = vget(ups, dtype, n);
    if (dtype ==
        TSQP_BFLOAT16) { /* 2^-12.8 off before it is rounded, by which half a step counts for nothing */
        vf power = vexp2(vmul(gate, vset(-LOG2_E)), dtype);
        return vmul(vround_half_up(vdivide_rough(gate, vadd(vset(1), power))), up);
    }
    /* sigmoid(x) = 1 / (1 + e^-x), or e^x / (1 + e^x) where x < 0: the divisor is in [1, 2]. */
    vf small = vexp_bounded(vminus_abs(gate)), sigmoid = vinverse(vadd(vset(1), small));
    sigmoid = vif_negative(gate, vmul(small, sigmoid), sigmoid);
    return vmul(vmul(gate, sigmoid), up);
}

INLINE SIMD void silu_mul_all(const struct tsqp_silu_mul *job, size_t begin, size_t end, bool stream,
                              unsigned dtype) {
    const size_t width = width_of(dtype), step = LANES * width, nbytes = (end - begin) * width;
    const uint8_t *gate = (const uint8_t *)job->gate + begin * width;
    const uint8_t *up = (const uint8_t *)job->up + begin * width;
    uint8_t *out = (uint8_t *)job->out + begin * width;
    size_t i = 0;
    for (; i + 2 * step <= nbytes; i += 2 * step) { /* two chains of dependent steps side by side */
        vf x = silu_mul_part(gate + i, up + i, dtype, LANES);
        vf y = silu_mul_part(gate + i + step, up + i + step, dtype, LANES);
        vput2(out + i, dtype, x, y, stream);
    }
    for (; i < nbytes; i += step) {
        size_t n = nbytes - i < step ? (nbytes - i) / width : LANES;
        vput(out + i, dtype, silu_mul_part(gate + i, up + i, dtype, n), n, stream);
    }
}

static SIMD void silu_mul(const struct tsqp_silu_mul *job, size_t begin, size_t end, bool stream) {
    stream = streamable((const uint8_t *)job->out + begin * width_of(job->dtype), stream);
    if (job->dtype == TSQP_FLOAT32 && stream)
        silu_mul_all(job, begin, end, true, TSQP_FLOAT32);
    else if (job->dtype == TSQP_FLOAT32)
        silu_mul_all(job, begin, end, false, TSQP_FLOAT32);
    else if (stream)
        silu_mul_all(job, begin, end, true, TSQP_BFLOAT16);
    else
        silu_mul_all(job, begin, end, false, TSQP_BFLOAT16);
    if (stream)
        vfence();
}

/* ---- rotary embedding ---- */

/* Lines that share their row of the tables, `x_step` and `out_step` bytes apart. */
struct lines {
    const uint8_t *x, *cos, *sin;
    uint8_t *out;
    int64_t x_step, out_step;
    size_t count, half; /* half of a line in bytes */
};

/* Elements i and i + dim/2 of the lines, n of each, from byte `at` on; both are read before either is
 * written. */
INLINE SIMD void rotate_part(const struct lines *lines, size_t at, unsigned dtype, size_t n) {
    const size_t half = lines->half;
    const vf cos_low = vget(lines->cos + at, dtype, n), cos_high = vget(lines->cos + at + half, dtype, n);
    const vf sin_low = vget(lines->sin + at, dtype, n), sin_high = vget(lines->sin + at + half, dtype, n);
    const uint8_t *x = lines->x + at;
    uint8_t *out = lines->out + at;
    const int64_t x_step = lines->x_step, out_step = lines->out_step;
    for (size_t left = lines->count; left > 0; left--, x += x_step, out += out_step) {
        vf low = vget(x, dtype, n), high = vget(x + half, dtype, n);
        vf low_cos = vmul(low, cos_low), low_sin = vmul(high, sin_low);
        vf high_cos = vmul(high, cos_high), high_sin = vmul(low, sin_high);
        vround2(&low_cos, &low_sin, dtype);
        vround2(&high_cos, &high_sin, dtype);
        vput(out, dtype, vsub(low_cos, low_sin), n, false);
        vput(out + half, dtype, vadd(high_cos, high_sin), n, false);
    }
}

/* The lines from the cursor's on, at most `most`, that lie in one dimension in which the tables repeat. */
INLINE struct lines lines_at(const struct tsqp_rotary *job, const struct cursor *cursor, size_t most,
                             size_t width) {
    const unsigned inner = TSQP_ROTARY_NDIM - 1;
    const bool shared = job->cos_strides[inner] == 0 && job->sin_strides[inner] == 0;
    const size_t left = shared ? job->shape[inner] - cursor->index[inner] : 1;
    return (struct lines){.x = (const uint8_t *)job->x + cursor->offset[0] * (int64_t)width,
                          .cos = (const uint8_t *)job->cos + cursor->offset[2] * (int64_t)width,
                          .sin = (const uint8_t *)job->sin + cursor->offset[3] * (int64_t)width,
                          .out = (uint8_t *)job->out + cursor->offset[1] * (int64_t)width,
                          .x_step = job->x_strides[inner] * (int64_t)width,
                          .out_step = job->out_strides[inner] * (int64_t)width,
                          .count = left < most ? left : most,
                          .half = job->dim / 2 * width};
}

INLINE SIMD void rotary_lines(const struct tsqp_rotary *job, size_t begin, size_t end, unsigned dtype) {
    const size_t width = width_of(dtype), count = job->dim / 2, whole = count - count % LANES;
    struct cursor cursor = {.shape = job->shape,
                            .strides = {job->x_strides, job->out_strides, job->cos_strides, job->sin_strides},
                            .ndim = TSQP_ROTARY_NDIM,
                            .tensors = 4};
    cursor_seek(&cursor, begin);
    while (begin < end) {
        const struct lines lines = lines_at(job, &cursor, end - begin, width);
        for (size_t at = 0; at < whole * width; at += LANES * width)
            rotate_part(&lines, at, dtype, LANES);
        if (whole < count)
            rotate_part(&lines, whole * width, dtype, count - whole);
        cursor_skip(&cursor, lines.count);
        begin += lines.count;
    }
}

static SIMD void rotary(const struct tsqp_rotary *job, size_t begin, size_t end) {
    if (job->dtype == TSQP_FLOAT32)
        rotary_lines(job, begin, end, TSQP_FLOAT32);
    else
        rotary_lines(job, begin, end, TSQP_BFLOAT16);
}

/* ---- a plain copy ---- */

INLINE SIMD void move_all(const struct tsqp_move *job, size_t begin, size_t end, bool two, bool stream) {
    const uint8_t *first = job->source[0], *second = job->source[1];
    for (size_t i = begin; i < end; i += LANES * 4) {
        vf x = vget(first + i, TSQP_FLOAT32, LANES);
        if (two)
            x = vadd(x, vget(second + i, TSQP_FLOAT32, LANES));
        vput((uint8_t *)job->target + i, TSQP_FLOAT32, x, LANES, stream);
    }
}

static SIMD void move(const struct tsqp_move *job, size_t begin, size_t end) {
    if (job->sources == 2 && job->stream)
        move_all(job, begin, end, true, true);
    else if (job->sources == 2)
        move_all(job, begin, end, true, false);
    else if (job->stream)
        move_all(job, begin, end, false, true);
    else
        move_all(job, begin, end, false, false);
    if (job->stream)
        vfence();
}
