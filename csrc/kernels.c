/* kernels.c: the trusted operators: which instruction set, how many threads, which stores.
 *
 * Work of less than two pieces stays on the calling thread. Results larger than the last-level cache holds
 * beside their inputs are written past the caches: a plain store would first read the line it overwrites.
 */
#include "kernels_set.h"
#include "tsqp.h"

#include <stdio.h>
#include <stdlib.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* Elements of one piece: some 10 µs, several times what waking a thread costs the caller. */
#define PIECE_ELEMENTS ((size_t)1 << 15)
#define PIECES_EACH 32 /* at most, for each thread */
#define STACK_FLOATS 4608
#define CACHE_BYTES ((size_t)32 << 20) /* where the machine does not say */

/* ---- instruction sets ---- */

static const struct tsqp_kernel_set *sets[5];
static size_t stream_bytes = CACHE_BYTES;

static void find_sets(void) {
    size_t count = 0;
#if defined(__x86_64__)
    unsigned eax, ebx, ecx = 0, edx;
    bool fma = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_FMA);
    __builtin_cpu_init();
    bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wide && __builtin_cpu_supports("avx512bf16"))
        sets[count++] = &tsqp_kernels_avx512bf16;
    if (wide)
        sets[count++] = &tsqp_kernels_avx512;
    if (fma && __builtin_cpu_supports("avx2"))
        sets[count++] = &tsqp_kernels_avx2;
#endif
    sets[count] = &tsqp_kernels_each;
}

/* What one core's last cache holds. The C library adds up those of the whole package, hundreds of megabytes
 * on a processor with many of them. */
static size_t cache_bytes(void) {
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "re");
    unsigned long kib = 0;
    if (file) {
        if (fscanf(file, "%luK", &kib) != 1)
            kib = 0;
        fclose(file);
    }
    return kib ? (size_t)kib << 10 : CACHE_BYTES;
}

__attribute__((constructor)) static void look_at_machine(void) {
    find_sets();
    stream_bytes = cache_bytes();
}

const struct tsqp_kernel_set *tsqp_kernel_set(size_t index) {
    return index < sizeof sets / sizeof sets[0] ? sets[index] : NULL;
}

const char *tsqp_kernels_name(void) {
    return sets[0]->name;
}

/* ---- sharing the work ---- */

/* One call: its job, and scratch rows of which each participant has its own. */
struct call {
    const void *job;
    size_t second; /* rotary: where the second job's lines begin */
    float *scratch;
    size_t scratch_floats; /* of each */
    bool stream;
};

/* Of much work longer pieces: a kernel that is at several rows at a time, and fetches others ahead, loses
 * some of that at each end of a piece. */
static size_t rows_per_piece(size_t rows, size_t cols) {
    size_t grain = cols < PIECE_ELEMENTS ? PIECE_ELEMENTS / (cols ? cols : 1) : 1;
    size_t share = rows / (PIECES_EACH * (size_t)tsqp_threads());
    return grain < share ? share : grain;
}

static unsigned participants_for(size_t count, size_t grain) {
    size_t pieces = count / grain;
    unsigned threads = tsqp_threads();
    return pieces < 2 ? 1 : pieces < threads ? (unsigned)pieces : threads;
}

static bool is_dtype(unsigned dtype) {
    return dtype == TSQP_FLOAT32 || dtype == TSQP_BFLOAT16;
}

static size_t bytes_of(unsigned dtype) {
    return dtype == TSQP_FLOAT32 ? 4 : 2;
}

/* Runs `task` over `rows` rows of `cols` elements, each participant with `scratch_rows` rows of scratch. */
static int with_scratch(tsqp_task task, struct call *call, size_t rows, size_t cols, size_t scratch_rows) {
    _Alignas(64) float stack[STACK_FLOATS];
    size_t grain = rows_per_piece(rows, cols);
    unsigned participants = participants_for(rows, grain);
    call->scratch_floats = scratch_row(cols) * scratch_rows;
    float *heap = NULL;
    if (participants > 1 || call->scratch_floats > STACK_FLOATS) {
        heap = aligned_alloc(64, participants * call->scratch_floats * sizeof(float));
        if (!heap)
            return TSQP_NO_MEMORY;
    }
    call->scratch = heap ? heap : stack;
    tsqp_parallel(task, call, rows, grain, participants);
    call->scratch = NULL;
    free(heap);
    return TSQP_OK;
}

/* ---- the operators ---- */

static void rms_norm_task(void *context, unsigned worker, size_t begin, size_t end) {
    const struct call *call = context;
    sets[0]->rms_norm(call->job, begin, end, call->scratch + worker * call->scratch_floats, call->stream);
}

int tsqp_rms_norm(const struct tsqp_rms_norm *job) {
    if (!is_dtype(job->dtype))
        return TSQP_BAD_DTYPE;
    size_t nbytes = job->rows * job->cols * bytes_of(job->dtype) * (job->residual ? 4 : 2);
    struct call call = {.job = job, .stream = nbytes > stream_bytes};
    return with_scratch(rms_norm_task, &call, job->rows, job->cols, 1);
}

static void softmax_task(void *context, unsigned worker, size_t begin, size_t end) {
    const struct call *call = context;
    sets[0]->softmax(call->job, begin, end, call->scratch + worker * call->scratch_floats, call->stream);
}

int tsqp_softmax(const struct tsqp_softmax *job) {
    if (!is_dtype(job->dtype) || !is_dtype(job->out_dtype))
        return TSQP_BAD_DTYPE;
    size_t rows = 1;
    for (unsigned d = 0; d < job->ndim; d++)
        rows *= job->shape[d];
    size_t nbytes = rows * job->keys * (bytes_of(job->dtype) + bytes_of(job->out_dtype));
    struct call call = {.job = job, .stream = nbytes > stream_bytes};
    return with_scratch(softmax_task, &call, rows, job->keys, SOFTMAX_ROWS);
}

static void silu_mul_task(void *context, unsigned worker, size_t begin, size_t end) {
    (void)worker;
    const struct call *call = context;
    sets[0]->silu_mul(call->job, begin, end, call->stream);
}

int tsqp_silu_mul(const struct tsqp_silu_mul *job) {
    if (!is_dtype(job->dtype))
        return TSQP_BAD_DTYPE;
    struct call call = {.job = job, .stream = job->count * bytes_of(job->dtype) * 3 > stream_bytes};
    tsqp_parallel(silu_mul_task, &call, job->count, PIECE_ELEMENTS,
                  participants_for(job->count, PIECE_ELEMENTS));
    return TSQP_OK;
}

static size_t lines_of(const struct tsqp_rotary *job) {
    size_t lines = 1;
    for (unsigned d = 0; d < TSQP_ROTARY_NDIM; d++)
        lines *= job->shape[d];
    return lines;
}

/* The lines of both jobs, those of the second counted after those of the first. */
static void rotary_task(void *context, unsigned worker, size_t begin, size_t end) {
    (void)worker;
    const struct call *call = context;
    const struct tsqp_rotary *jobs = call->job;
    if (begin < call->second)
        sets[0]->rotary(&jobs[0], begin, end < call->second ? end : call->second);
    if (end > call->second)
        sets[0]->rotary(&jobs[1], begin > call->second ? begin - call->second : 0, end - call->second);
}

int tsqp_rotary(const struct tsqp_rotary *jobs, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!is_dtype(jobs[i].dtype) || jobs[i].dim % 2)
            return TSQP_BAD_DTYPE;
    if (count < 1 || count > 2)
        return TSQP_USAGE;
    struct call call = {.job = jobs, .second = lines_of(&jobs[0])};
    size_t lines = call.second + (count == 2 ? lines_of(&jobs[1]) : 0),
           grain = rows_per_piece(lines, jobs[0].dim);
    tsqp_parallel(rotary_task, &call, lines, grain, participants_for(lines, grain));
    return TSQP_OK;
}

#define BLOCK_BYTES 64

static void move_task(void *context, unsigned worker, size_t begin, size_t end) {
    (void)worker;
    sets[0]->move(context, begin * BLOCK_BYTES, end * BLOCK_BYTES);
}

void tsqp_move(const struct tsqp_move *job) {
    const size_t blocks = job->nbytes / BLOCK_BYTES, grain = PIECE_ELEMENTS * sizeof(float) / BLOCK_BYTES;
    tsqp_parallel(move_task, (void *)job, blocks, grain, participants_for(blocks, grain));
}
