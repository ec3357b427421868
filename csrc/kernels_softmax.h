/* kernels_softmax.h: scaled and masked softmax of rows, in the vectors of the source that includes it.
 *
 * A row of scores is read once, into scratch, where its maximum, exponentials and sum are taken (stable
 * softmax; the scratch stays in the nearest cache); then it is written once. Three rows are at work side by
 * side, strip by strip: while a row's exponentials are computed, the next is read and the last is written, so
 * that neither the memory nor the core waits for the other. A strip's steps are short loops of their own,
 * which the core runs into each other; what bounds a strip is how many instructions it takes.
 *
 * The memory's part is to be asked early: rows are fetched long before they are read, evenly over the work,
 * as a row may be a page, at whose end the machine's own prefetching stops, and as causal rows differ in
 * length.
 */

#define PAIR ((size_t)2 * LANES)
/* Elements of a strip: pairs of vectors, and not many strips in a row, as each takes some 20 cycles by
 * itself. */
#define STRIP ((size_t)512)
/* How far ahead rows are fetched: what the nearest cache has room for beside the scratch of a row of 4 KB. */
#define AHEAD_BYTES ((size_t)12288)
#define LINE_BYTES 64
#define PAGE_BYTES ((size_t)4096)

/* A row in work. Where it has vectors that are visible in part, the rest of them counts as -inf. */
struct line {
    float *row; /* scratch */
    const uint8_t *scores, *mask;
    uint8_t *out;        /* NULL: no row */
    size_t low, high;    /* the visible keys */
    size_t start, end;   /* the same in whole vectors */
    float shift, factor; /* of the exponents, which makes the largest 0; of the result */
};

/* What the rows of a call have in common. `fold`: the scale is applied with the exponential. */
struct plan {
    const struct tsqp_softmax *job;
    float power;        /* e^(scale x) = 2^(power x), x being what is in scratch */
    size_t rows, ahead; /* to the row that is fetched while one is read: in rows, in bytes */
    size_t strips;
    bool fold, stream;
};

INLINE size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}
INLINE size_t most(size_t a, size_t b) {
    return a > b ? a : b;
}

/* ---- first: read, mask, maximum ---- */

INLINE SIMD vf masked_vector(const struct line *line, unsigned dtype, enum tsqp_mask kind, size_t at,
                             size_t n, vf scale, bool fold) {
    vf x = vget(line->scores + at * width_of(dtype), dtype, n);
    if (kind == TSQP_MASK_FLOAT32)
        return vfma(x, scale, vget(line->mask + at * 4, TSQP_FLOAT32, n));
    if (kind == TSQP_MASK_BFLOAT16)
        return vfma(x, scale, vget(line->mask + at * 2, TSQP_BFLOAT16, n));
    x = fold ? x : vmul(x, scale);
    return kind == TSQP_MASK_BOOL ? vvisible(line->mask + at, x, vset(-FLT_MAX), n) : x;
}

/* A vector that may be visible in part. */
INLINE SIMD vf edge_vector(const struct line *line, unsigned dtype, enum tsqp_mask kind, size_t at, vf scale,
                           bool fold) {
    const vf hidden = vset(-INFINITY);
    const size_t n = least(line->high - at, LANES);
    vf x = vfirst(masked_vector(line, dtype, kind, at, n, scale, fold), hidden, n);
    return at < line->low ? vfirst(hidden, x, line->low - at) : x;
}

/* A NaN does not become the maximum: it spoils the sum. */
INLINE SIMD void read_strip(const struct line *line, unsigned dtype, enum tsqp_mask kind, size_t at,
                            float factor, bool fold, size_t distance, vf largest[2]) {
    const uintptr_t ahead = (uintptr_t)line->scores + distance;
    const vf scale = vset(factor);
    const size_t end = least(at + STRIP, line->end), whole = least(end, line->high);
    size_t i = most(at, line->start);
    vf x, y, a = largest[0], b = largest[1];
    if (i < line->low && i < end) {
        x = edge_vector(line, dtype, kind, i, scale, fold);
        put_float(line->row + i, x);
        a = vmax(x, a);
        i += LANES;
    }
    for (; i + PAIR <= whole; i += PAIR) {
        if (kind != TSQP_MASK_NONE) /* the rows are alike: takes less here than in fetch() */
            for (size_t byte = 0; byte < PAIR * width_of(dtype); byte += LINE_BYTES)
                __builtin_prefetch((const void *)(ahead + i * width_of(dtype) + byte));
        x = masked_vector(line, dtype, kind, i, LANES, scale, fold);
        y = masked_vector(line, dtype, kind, i + LANES, LANES, scale, fold);
        put_float(line->row + i, x);
        put_float(line->row + i + LANES, y);
        a = vmax(x, a);
        b = vmax(y, b);
    }
    for (; i < end; i += LANES) {
        x = edge_vector(line, dtype, kind, i, scale, fold);
        put_float(line->row + i, x);
        b = vmax(x, b);
    }
    largest[0] = a, largest[1] = b;
}

#define READ_STRIP(dtype, kind)                                                                              \
    case (kind) * 2 + ((dtype) == TSQP_BFLOAT16):                                                            \
        read_strip(line, dtype, kind, at, plan->job->scale, false, plan->ahead, largest);                    \
        return;

INLINE SIMD void read_any(const struct plan *plan, const struct line *line, size_t at, vf largest[2]) {
    if (plan->fold && plan->job->dtype == TSQP_FLOAT32) {
        read_strip(line, TSQP_FLOAT32, TSQP_MASK_NONE, at, 1, true, plan->ahead, largest);
        return;
    }
    if (plan->fold) {
        read_strip(line, TSQP_BFLOAT16, TSQP_MASK_NONE, at, 1, true, plan->ahead, largest);
        return;
    }
    switch (plan->job->mask_kind * 2 + (plan->job->dtype == TSQP_BFLOAT16)) {
        READ_STRIP(TSQP_FLOAT32, TSQP_MASK_NONE)
        READ_STRIP(TSQP_FLOAT32, TSQP_MASK_BOOL)
        READ_STRIP(TSQP_FLOAT32, TSQP_MASK_FLOAT32)
        READ_STRIP(TSQP_FLOAT32, TSQP_MASK_BFLOAT16)
        READ_STRIP(TSQP_BFLOAT16, TSQP_MASK_NONE)
        READ_STRIP(TSQP_BFLOAT16, TSQP_MASK_BOOL)
        READ_STRIP(TSQP_BFLOAT16, TSQP_MASK_FLOAT32)
        READ_STRIP(TSQP_BFLOAT16, TSQP_MASK_BFLOAT16)
    }
}

/* The largest exponent shall be 0. Any number near it does as well where it is the same for the whole row: in
 * the result it cancels out. So power * x + shift is rounded once, and the shift may be off. That is not so
 * where its steps are no longer small, or it is no number: then what is in scratch is moved first. */
static SIMD void settle(struct line *line, float largest, float power) {
    line->shift = -largest * power;
    if (fabsf(line->shift) <= SHIFT_BOUND)
        return;
    for (size_t i = line->start; i < line->end; i += LANES)
        put_float(line->row + i, vsub(get_float(line->row + i), vset(largest)));
    line->shift = 0;
}

/* ---- second: exponentials and their sum ---- */

INLINE SIMD vf exp_vector(float *row, vf power, vf shift, unsigned dtype) {
    vf x = vexp2(vfma(get_float(row), power, shift), dtype);
    put_float(row, x);
    return x;
}

INLINE SIMD void exp_strip(const struct line *line, size_t at, float factor, unsigned dtype, vf sum[2]) {
    const vf power = vset(factor), shift = vset(line->shift);
    const size_t end = least(at + STRIP, line->end);
    size_t i = most(at, line->start);
    vf a = sum[0], b = sum[1];
    for (; i + 2 * PAIR <= end; i += 2 * PAIR)
        for (size_t v = i; v < i + 2 * PAIR; v += PAIR) {
            a = vadd(a, exp_vector(line->row + v, power, shift, dtype));
            b = vadd(b, exp_vector(line->row + v + LANES, power, shift, dtype));
        }
    for (; i < end; i += LANES)
        a = vadd(a, exp_vector(line->row + i, power, shift, dtype));
    sum[0] = a, sum[1] = b;
}

/* ---- third: write ---- */

INLINE SIMD vf probability(const struct line *line, size_t i) {
    return i >= line->start && i < line->end ? vmul(get_float(line->row + i), vset(line->factor)) : vset(0);
}

/* Pairs of vectors as long as they end by `end`, zeros where they are hidden; how far it came. */
INLINE SIMD size_t write_pairs(const struct line *line, size_t i, size_t end, unsigned dtype, bool hidden,
                               bool stream) {
    const vf factor = vset(line->factor);
    for (; i + PAIR <= end; i += PAIR) {
        vf x = hidden ? vset(0) : vmul(get_float(line->row + i), factor);
        vf y = hidden ? vset(0) : vmul(get_float(line->row + i + LANES), factor);
        vput2(line->out + i * width_of(dtype), dtype, x, y, stream);
    }
    return i;
}

/* A pair with an end of what is visible, as pairs beside it are written: an ordinary store among those past
 * the caches waits for the memory, and all others behind it. */
INLINE SIMD size_t write_edge(const struct line *line, size_t i, size_t end, unsigned dtype, bool stream) {
    if (i + PAIR > end)
        return i;
    vput2(line->out + i * width_of(dtype), dtype, probability(line, i), probability(line, i + LANES), stream);
    return i + PAIR;
}

INLINE SIMD void write_strip(const struct line *line, size_t at, size_t keys, unsigned dtype, bool stream) {
    const size_t end = least(at + STRIP, keys);
    size_t i = write_pairs(line, at, least(end, line->start), dtype, true, stream);
    if (i < line->start)
        i = write_edge(line, i, end, dtype, stream);
    i = write_pairs(line, i, least(end, line->end), dtype, false, stream);
    if (i < line->end)
        i = write_edge(line, i, end, dtype, stream);
    i = write_pairs(line, i, end, dtype, true, stream);
    for (; i < end; i += LANES)
        vput(line->out + i * width_of(dtype), dtype, probability(line, i), least(end - i, LANES), false);
}

INLINE SIMD void write_any(const struct plan *plan, const struct line *line, size_t at, bool stream) {
    const size_t keys = plan->job->keys;
    if (plan->job->out_dtype == TSQP_FLOAT32 && stream)
        write_strip(line, at, keys, TSQP_FLOAT32, true);
    else if (plan->job->out_dtype == TSQP_FLOAT32)
        write_strip(line, at, keys, TSQP_FLOAT32, false);
    else if (stream)
        write_strip(line, at, keys, TSQP_BFLOAT16, true);
    else
        write_strip(line, at, keys, TSQP_BFLOAT16, false);
}

/* ---- all three ---- */

/* A strip's share of the row that is read in a while, which is taken to see as much as `next`; and the page
 * that is written next, as a store past the caches waits for its address. Hints: any address may be given. */
INLINE void fetch(const struct plan *plan, const struct line *next, const struct line *last, size_t strip) {
    const size_t width = width_of(plan->job->dtype), out_width = width_of(plan->job->out_dtype);
    const size_t high = least(next->high + plan->rows, plan->job->keys);
    const size_t lines = next->high && plan->job->mask_kind == TSQP_MASK_NONE
                             ? ((high - next->start) * width + LINE_BYTES - 1) / LINE_BYTES
                             : 0;
    const size_t share = (lines + plan->strips - 1) / plan->strips, end = least((strip + 1) * share, lines);
    const uintptr_t row = (uintptr_t)next->scores + next->start * width + plan->ahead;
    for (size_t i = strip * share; i < end; i++)
        __builtin_prefetch((const void *)(row + i * LINE_BYTES));
    const uintptr_t out = (uintptr_t)last->out + strip * STRIP * out_width;
    if (last->out && -out % PAGE_BYTES < STRIP * out_width)
        __builtin_prefetch((const void *)(out + -out % PAGE_BYTES + PAGE_BYTES), 1);
}

/* A row of nothing visible takes no part in reading and computing. */
static SIMD void work_on(const struct plan *plan, struct line *next, struct line *line,
                         const struct line *last) {
    vf largest[2] = {vset(-INFINITY), vset(-INFINITY)}, sum[2] = {vset(0), vset(0)};
    const bool stream = streamable(last->out, plan->stream);
    const bool rough = plan->job->out_dtype == TSQP_BFLOAT16;
    for (size_t strip = 0; strip < plan->strips; strip++) {
        const size_t at = strip * STRIP;
        fetch(plan, next, last, strip);
        if (at < next->end && at + STRIP > next->start)
            read_any(plan, next, at, largest);
        if (at < line->end && at + STRIP > line->start) {
            if (rough)
                exp_strip(line, at, plan->power, TSQP_BFLOAT16, sum);
            else
                exp_strip(line, at, plan->power, TSQP_FLOAT32, sum);
        }
        if (last->out)
            write_any(plan, last, at, stream);
    }
    settle(next, vlargest(vmax(largest[0], largest[1])), plan->power);
    line->factor = 1.0f / vsum(vadd(sum[0], sum[1]));
}

/* What is visible of a row that holds no numbers is NaN, and nothing beside it. */
static SIMD void spoil(struct line *line) {
    for (size_t i = line->start; i < line->end; i++)
        line->row[i] = i >= line->low && i < line->high ? NAN : 0;
    line->factor = 1;
}

/* The keys a query at `position` may see. */
static void find_visible(const struct tsqp_softmax *job, size_t position, struct line *line) {
    line->low = job->window && position >= job->window ? position - job->window + 1 : 0;
    line->high = job->causal && position < job->keys ? position + 1 : job->keys;
    line->low = least(line->low, line->high);
    line->start = line->low - line->low % LANES;
    line->end = line->low < line->high ? (line->high + LANES - 1) / LANES * LANES : line->start;
}

INLINE struct line line_at(const struct tsqp_softmax *job, const struct cursor *cursor, float *row) {
    const int64_t width = (int64_t)width_of(job->dtype), out_width = (int64_t)width_of(job->out_dtype);
    const int64_t mask_width = job->mask_kind == TSQP_MASK_BOOL      ? 1
                               : job->mask_kind == TSQP_MASK_FLOAT32 ? 4
                                                                     : 2;
    struct line line = {.row = row,
                        .scores = (const uint8_t *)job->scores + cursor->offset[0] * width,
                        .mask =
                            job->mask ? (const uint8_t *)job->mask + cursor->offset[2] * mask_width : NULL,
                        .out = (uint8_t *)job->out + cursor->offset[1] * out_width};
    find_visible(job, job->first + cursor->index[job->ndim - 1], &line);
    return line;
}

static struct plan plan_of(const struct tsqp_softmax *job, bool stream) {
    const size_t row_bytes = most(job->keys * width_of(job->dtype), 1);
    struct plan plan = {.job = job, .power = LOG2_E, .stream = stream};
    /* Folding needs a scale that moves no finite score to infinity, and leaves the largest the largest. */
    plan.fold = job->mask_kind == TSQP_MASK_NONE && job->scale > 0x1p-20f && job->scale < 0x1p20f;
    plan.power = plan.fold ? LOG2_E * job->scale : LOG2_E;
    plan.strips = (job->keys + STRIP - 1) / STRIP;
    plan.rows = most(AHEAD_BYTES / row_bytes, 1);
    unsigned d = job->ndim - 1;
    while (d > 0 && job->shape[d] == 1)
        d--;
    plan.ahead = plan.rows * (size_t)job->strides[d] * width_of(job->dtype);
    return plan;
}

static SIMD void softmax(const struct tsqp_softmax *job, size_t begin, size_t end, float *scratch,
                         bool stream) {
    struct cursor cursor = {.shape = job->shape,
                            .strides = {job->strides, job->out_strides, job->mask_strides},
                            .ndim = job->ndim,
                            .tensors = 3};
    const struct plan plan = plan_of(job, stream);
    struct line next, line = {0}, last = {0};
    cursor_seek(&cursor, begin);
    for (size_t i = begin; i < end + 2; i++) {
        next = (struct line){0};
        if (i < end)
            next = line_at(job, &cursor, scratch + i % SOFTMAX_ROWS * scratch_row(job->keys));
        work_on(&plan, &next, &line, &last);
        if (isnan(line.factor))
            spoil(&line);
        last = line, line = next;
        cursor_next(&cursor);
    }
    if (stream)
        vfence();
}

#define KERNEL_SET(set, title)                                                                               \
    const struct tsqp_kernel_set tsqp_kernels_##set = {title,   rms_norm, silu_mul, rotary,                  \
                                                       softmax, move,     exp_all};
