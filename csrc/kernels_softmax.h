/* kernels_softmax.h: scaled and masked softmax of rows, in the vectors of the source that includes it.
 *
 * A row of scores is read once, into scratch, where its maximum, exponentials and sum are taken (stable
 * softmax; the scratch stays in the nearest cache); then it is written once. Three rows are at work side by
 * side, block by block: while a row's exponentials are computed, the next is read and the last is written, so
 * that neither the memory nor the core waits for the other.
 */

#define BLOCK_VECTORS 4
#define BLOCK (BLOCK_VECTORS * LANES)

/* A row in work. Where it has vectors that are visible in part, the rest of them counts as -inf. */
struct line {
    float *row; /* scratch */
    const uint8_t *scores, *ahead, *mask;
    uint8_t *out;
    size_t low, high; /* the visible keys */
    size_t start;     /* low, at the begin of its vector */
    float largest, factor;
};

/* What the rows of a call have in common. `fold`: the scale is applied with the exponential. */
struct plan {
    const struct tsqp_softmax *job;
    float power; /* e^(scale x) = 2^(power x), x being what is in scratch */
    bool fold, stream;
};

/* ---- first: read, mask, maximum ---- */

INLINE SIMD vf masked_vector(const struct line *line, unsigned dtype, enum tsqp_mask kind, size_t at,
                             size_t n, vf scale, bool fold) {
    vf x = vget(line->scores + at * width_of(dtype), dtype, n);
    x = fold ? x : vmul(x, scale);
    if (kind == TSQP_MASK_BOOL)
        return vvisible(line->mask + at, x, vset(-FLT_MAX), n);
    if (kind == TSQP_MASK_FLOAT32)
        return vadd(x, vget(line->mask + at * 4, TSQP_FLOAT32, n));
    if (kind == TSQP_MASK_BFLOAT16)
        return vadd(x, vget(line->mask + at * 2, TSQP_BFLOAT16, n));
    return x;
}

/* A NaN does not become the maximum: it spoils the sum. */
INLINE SIMD void read_block(const struct line *line, unsigned dtype, enum tsqp_mask kind, size_t at,
                            float factor, bool fold, vf largest[2]) {
    const size_t width = width_of(dtype);
    const vf scale = vset(factor), hidden = vset(-INFINITY);
    if (at >= line->low && at + BLOCK <= line->high) {
        for (size_t byte = 0; byte < BLOCK * width; byte += 64)
            __builtin_prefetch(line->ahead + at * width + byte);
        for (unsigned v = 0; v < BLOCK_VECTORS; v++) {
            vf x = masked_vector(line, dtype, kind, at + v * LANES, LANES, scale, fold);
            put_float(line->row + at + v * LANES, x);
            largest[v % 2] = vmax(x, largest[v % 2]);
        }
        return;
    }
    for (unsigned v = 0; v < BLOCK_VECTORS; v++) {
        const size_t i = at + v * LANES;
        if (i < line->start || i >= line->high)
            continue;
        const size_t n = line->high - i < LANES ? line->high - i : LANES;
        vf x = vfirst(masked_vector(line, dtype, kind, i, n, scale, fold), hidden, n);
        if (i < line->low)
            x = vfirst(hidden, x, line->low - i);
        put_float(line->row + i, x);
        largest[v % 2] = vmax(x, largest[v % 2]);
    }
}

#define READ_BLOCK(dtype, kind)                                                                              \
    case (kind) * 2 + ((dtype) == TSQP_BFLOAT16):                                                            \
        read_block(line, dtype, kind, at, plan->job->scale, false, largest);                                 \
        return;

INLINE SIMD void read_any(const struct plan *plan, const struct line *line, size_t at, vf largest[2]) {
    if (plan->fold && plan->job->dtype == TSQP_FLOAT32) {
        read_block(line, TSQP_FLOAT32, TSQP_MASK_NONE, at, 1, true, largest);
        return;
    }
    if (plan->fold) {
        read_block(line, TSQP_BFLOAT16, TSQP_MASK_NONE, at, 1, true, largest);
        return;
    }
    switch (plan->job->mask_kind * 2 + (plan->job->dtype == TSQP_BFLOAT16)) {
        READ_BLOCK(TSQP_FLOAT32, TSQP_MASK_NONE)
        READ_BLOCK(TSQP_FLOAT32, TSQP_MASK_BOOL)
        READ_BLOCK(TSQP_FLOAT32, TSQP_MASK_FLOAT32)
        READ_BLOCK(TSQP_FLOAT32, TSQP_MASK_BFLOAT16)
        READ_BLOCK(TSQP_BFLOAT16, TSQP_MASK_NONE)
        READ_BLOCK(TSQP_BFLOAT16, TSQP_MASK_BOOL)
        READ_BLOCK(TSQP_BFLOAT16, TSQP_MASK_FLOAT32)
        READ_BLOCK(TSQP_BFLOAT16, TSQP_MASK_BFLOAT16)
    }
}

/* ---- second: exponentials and their sum ---- */

INLINE SIMD void exp_vector(float *row, vf largest, vf power, unsigned dtype, vf *sum) {
    vf x = vexp2(vmul(vsub(get_float(row), largest), power), dtype);
    put_float(row, x);
    *sum = vadd(*sum, x);
}

INLINE SIMD void exp_block(const struct line *line, size_t at, float factor, unsigned dtype, vf sum[2]) {
    const vf largest = vset(line->largest), power = vset(factor);
    if (at >= line->start && at + BLOCK <= line->high) {
        for (unsigned v = 0; v < BLOCK_VECTORS; v++)
            exp_vector(line->row + at + v * LANES, largest, power, dtype, &sum[v % 2]);
        return;
    }
    for (unsigned v = 0; v < BLOCK_VECTORS; v++)
        if (at + v * LANES >= line->start && at + v * LANES < line->high)
            exp_vector(line->row + at + v * LANES, largest, power, dtype, &sum[v % 2]);
}

/* ---- third: write ---- */

INLINE SIMD vf probability(const struct line *line, size_t i, vf factor) {
    return i >= line->start && i < line->high ? vmul(get_float(line->row + i), factor) : vset(0);
}

INLINE SIMD void write_block(const struct line *line, size_t at, size_t keys, unsigned dtype, bool stream) {
    const vf factor = vset(line->factor);
    uint8_t *out = line->out + at * width_of(dtype);
    if (at + BLOCK <= keys) {
        const bool visible = at >= line->start && at + BLOCK <= line->high;
        for (unsigned v = 0; v < BLOCK_VECTORS; v += 2) {
            const size_t i = at + v * LANES;
            vf x = visible ? vmul(get_float(line->row + i), factor) : probability(line, i, factor);
            vf y = visible ? vmul(get_float(line->row + i + LANES), factor)
                           : probability(line, i + LANES, factor);
            vput2(out + v * LANES * width_of(dtype), dtype, x, y, stream);
        }
        return;
    }
    for (size_t i = at; i < keys; i += LANES)
        vput(out + (i - at) * width_of(dtype), dtype, probability(line, i, factor),
             keys - i < LANES ? keys - i : LANES, false);
}

INLINE SIMD void write_any(const struct plan *plan, const struct line *line, size_t at, bool stream) {
    const size_t keys = plan->job->keys;
    if (plan->job->out_dtype == TSQP_FLOAT32 && stream)
        write_block(line, at, keys, TSQP_FLOAT32, true);
    else if (plan->job->out_dtype == TSQP_FLOAT32)
        write_block(line, at, keys, TSQP_FLOAT32, false);
    else if (stream)
        write_block(line, at, keys, TSQP_BFLOAT16, true);
    else
        write_block(line, at, keys, TSQP_BFLOAT16, false);
}

/* ---- all three ---- */

/* A row of nothing visible takes no part: in reading and computing; `last->out` is NULL for none to write. */
static SIMD void work_on(const struct plan *plan, struct line *next, struct line *line,
                         const struct line *last) {
    vf largest[2] = {vset(-INFINITY), vset(-INFINITY)}, sum[2] = {vset(0), vset(0)};
    const bool stream = streamable(last->out, plan->stream);
    const bool rough = plan->job->out_dtype == TSQP_BFLOAT16;
    for (size_t at = 0; at < plan->job->keys; at += BLOCK) {
        if (at < next->high && at + BLOCK > next->start)
            read_any(plan, next, at, largest);
        if (at < line->high && at + BLOCK > line->start) {
            if (rough)
                exp_block(line, at, plan->power, TSQP_BFLOAT16, sum);
            else
                exp_block(line, at, plan->power, TSQP_FLOAT32, sum);
        }
        if (last->out)
            write_any(plan, last, at, stream);
    }
    next->largest = vlargest(vmax(largest[0], largest[1]));
    line->factor = 1.0f / vsum(vadd(sum[0], sum[1]));
}

/* What is visible of a row that holds no numbers is NaN, and nothing beside it. */
static SIMD void spoil(struct line *line) {
    for (size_t i = line->start; i < line->high || i % LANES; i++)
        line->row[i] = i >= line->low && i < line->high ? NAN : 0;
    line->factor = 1;
}

/* The keys a query at `position` may see. */
static void find_visible(const struct tsqp_softmax *job, size_t position, struct line *line) {
    line->low = job->window && position >= job->window ? position - job->window + 1 : 0;
    line->high = job->causal && position < job->keys ? position + 1 : job->keys;
    if (line->low > line->high)
        line->low = line->high;
    line->start = line->low - line->low % LANES;
}

INLINE struct line line_at(const struct tsqp_softmax *job, const struct cursor *cursor,
                           const struct cursor *ahead, float *row) {
    const int64_t width = (int64_t)width_of(job->dtype), out_width = (int64_t)width_of(job->out_dtype);
    const int64_t mask_width = job->mask_kind == TSQP_MASK_BOOL      ? 1
                               : job->mask_kind == TSQP_MASK_FLOAT32 ? 4
                                                                     : 2;
    struct line line = {.row = row,
                        .scores = (const uint8_t *)job->scores + cursor->offset[0] * width,
                        .ahead = (const uint8_t *)job->scores + ahead->offset[0] * width,
                        .mask =
                            job->mask ? (const uint8_t *)job->mask + cursor->offset[2] * mask_width : NULL,
                        .out = (uint8_t *)job->out + cursor->offset[1] * out_width};
    find_visible(job, job->first + cursor->index[job->ndim - 1], &line);
    return line;
}

static SIMD void softmax(const struct tsqp_softmax *job, size_t begin, size_t end, float *scratch,
                         bool stream) {
    struct cursor cursor = {.shape = job->shape,
                            .strides = {job->strides, job->out_strides, job->mask_strides},
                            .ndim = job->ndim,
                            .tensors = 3};
    /* Folding needs a scale that moves no finite score to infinity, and leaves the largest the largest. */
    struct plan plan = {.job = job, .power = LOG2_E, .stream = stream};
    plan.fold = job->mask_kind == TSQP_MASK_NONE && job->scale > 0x1p-20f && job->scale < 0x1p20f;
    plan.power = plan.fold ? LOG2_E * job->scale : LOG2_E;
    struct line next, line = {0}, last = {0};
    cursor_seek(&cursor, begin);
    struct cursor ahead = cursor;
    cursor_next(&ahead);
    for (size_t i = begin; i < end + 2; i++) {
        next = (struct line){0};
        if (i < end)
            next = line_at(job, &cursor, &ahead, scratch + i % SOFTMAX_ROWS * scratch_row(job->keys));
        work_on(&plan, &next, &line, &last);
        if (isnan(line.factor))
            spoil(&line);
        last = line, line = next;
        cursor_next(&cursor), cursor_next(&ahead);
    }
    if (stream)
        vfence();
}

#define KERNEL_SET(set, title)                                                                               \
    const struct tsqp_kernel_set tsqp_kernels_##set = {title,   rms_norm, silu_mul, rotary,                  \
                                                       softmax, move,     exp_all};
