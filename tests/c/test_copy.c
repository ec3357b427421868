/* Bulk copies: exact on the private side, whole zero-padded 64-byte blocks on the shared side, in each of the
 * instruction sets this machine has. Includes copy.c to reach the variants. */
#include "copy.c"

#include "check.h"

#include <stdbool.h>
#include <sys/mman.h>

#define LENGTHS 1101
#define SHARED_BYTES (64 + 1152 + 64) /* a guard block, room for the longest, a guard block */
#define GUARD 0xa5

static const size_t ALIGNMENTS[] = {0, 1, 3, 8, 17, 31, 32, 33, 63};
#define ALIGNMENT_COUNT (sizeof ALIGNMENTS / sizeof ALIGNMENTS[0])

static uint8_t pattern(size_t i) {
    return (uint8_t)(i * 131 + (i >> 8) * 17 + 1);
}

static size_t padded(size_t nbytes) {
    return (nbytes + 63) / 64 * 64;
}

/* ---- contiguous ---- */

static void to_shared_once(uint8_t *shared, size_t nbytes, size_t alignment) {
    uint8_t *block = check_malloc(alignment + nbytes); /* exactly: a sanitizer sees a read past its end */
    uint8_t *src = block + alignment;
    for (size_t i = 0; i < nbytes; i++)
        src[i] = pattern(i);
    memset(shared, GUARD, SHARED_BYTES);
    tsqp_copy_to_shared(shared + 64, src, nbytes);
    for (size_t i = 0; i < SHARED_BYTES; i++) {
        uint8_t want = GUARD;
        if (i >= 64 && i < 64 + nbytes)
            want = pattern(i - 64);
        else if (i >= 64 && i < 64 + padded(nbytes))
            want = 0;
        if (shared[i] != want)
            CHECK_EQ(shared[i], want);
    }
    free(block);
}

static void from_shared_once(const uint8_t *shared, size_t nbytes, size_t alignment) {
    uint8_t private[SHARED_BYTES + 64];
    memset(private, GUARD, sizeof private);
    tsqp_copy_from_shared(private + 64 + alignment, shared, nbytes);
    for (size_t i = 0; i < sizeof private; i++) {
        bool inside = i >= 64 + alignment && i < 64 + alignment + nbytes;
        uint8_t want = inside ? pattern(i - 64 - alignment) : GUARD;
        if (private[i] != want)
            CHECK_EQ(private[i], want);
    }
}

static void to_shared_writes_whole_zero_padded_blocks(void) {
    uint8_t *shared = aligned_alloc(64, SHARED_BYTES);
    for (size_t nbytes = 0; nbytes < LENGTHS; nbytes++)
        for (size_t a = 0; a < ALIGNMENT_COUNT; a++)
            to_shared_once(shared, nbytes, ALIGNMENTS[a]);
    free(shared);
}

/* The last block ends where readable memory ends: reading a byte beyond it would be a segmentation fault. */
static void from_shared_reads_whole_blocks_and_writes_exactly(void) {
    size_t page = 4096, readable = 2 * page;
    uint8_t *map = mmap(NULL, readable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(map != MAP_FAILED);
    CHECK_EQ(mprotect(map + readable, page, PROT_NONE), 0);
    for (size_t nbytes = 0; nbytes < LENGTHS; nbytes++) {
        uint8_t *shared = map + readable - padded(nbytes);
        for (size_t i = 0; i < padded(nbytes); i++)
            shared[i] = pattern(i);
        for (size_t a = 0; a < ALIGNMENT_COUNT; a++)
            from_shared_once(shared, nbytes, ALIGNMENTS[a]);
    }
    munmap(map, readable + page);
}

static void large_copies_are_exact(void) {
    size_t capacity = 3u << 20;
    uint8_t *shared = aligned_alloc(64, capacity), *src = check_malloc(capacity),
            *dst = check_malloc(capacity);
    for (size_t i = 0; i < capacity; i++)
        src[i] = pattern(i);
    static const size_t lengths[] = {4095, 4096, 65537, (1u << 20) - 1, (1u << 20) + 63, (3u << 20) - 64};
    for (size_t n = 0; n < sizeof lengths / sizeof lengths[0]; n++) {
        memset(shared, GUARD, capacity);
        tsqp_copy_to_shared(shared, src, lengths[n]);
        CHECK(memcmp(shared, src, lengths[n]) == 0);
        CHECK_EQ(shared[padded(lengths[n])], GUARD);
        memset(dst, GUARD, capacity);
        tsqp_copy_from_shared(dst, shared, lengths[n]);
        CHECK(memcmp(dst, src, lengths[n]) == 0);
        CHECK_EQ(dst[lengths[n]], GUARD);
    }
    free(shared);
    free(src);
    free(dst);
}

/* ---- strided ---- */

struct strided {
    unsigned ndim;
    size_t itemsize;
    int64_t shape[TSQP_MAX_NDIM], strides[TSQP_MAX_NDIM]; /* strides in bytes */
    int64_t lowest, highest; /* offsets of the first byte of the outermost items */
    size_t count;
};

/* A view as slicing, flipping, transposing and expanding a contiguous tensor makes them. */
static struct strided random_view(uint64_t *state) {
    struct strided v = {.ndim = check_random(state) % (TSQP_MAX_NDIM + 1), .count = 1};
    v.itemsize = (size_t)1 << check_random(state) % 4;
    unsigned order[TSQP_MAX_NDIM];
    for (unsigned d = 0; d < v.ndim; d++) {
        int64_t limit = v.ndim <= 2 ? 90 : v.ndim <= 4 ? 7 : 3;
        v.shape[d] = 1 + (int64_t)(check_random(state) % (uint64_t)limit);
        if (check_random(state) % 40 == 0)
            v.shape[d] = 0;
        order[d] = d;
    }
    for (unsigned d = v.ndim; d > 1 && check_random(state) % 2; d--) {
        unsigned other = (unsigned)(check_random(state) % d), kept = order[d - 1];
        order[d - 1] = order[other];
        order[other] = kept;
    }
    int64_t step = (int64_t)v.itemsize;
    for (unsigned i = v.ndim; i > 0; i--) {
        unsigned d = order[i - 1];
        uint64_t kind = check_random(state) % 8;
        if (kind == 0)
            step *= 2; /* every other item */
        v.strides[d] = kind == 1 ? 0 : kind == 2 ? -step : step;
        step *= v.shape[d] > 0 ? v.shape[d] : 1;
        if (v.shape[d] == 1 && kind == 3)
            v.strides[d] = (int64_t)check_random(state) >> 8; /* any: it is never used */
        else if (v.shape[d] > 1 && v.strides[d] < 0)
            v.lowest += v.strides[d] * (v.shape[d] - 1);
        else if (v.shape[d] > 1)
            v.highest += v.strides[d] * (v.shape[d] - 1);
        v.count *= (size_t)v.shape[d];
    }
    return v;
}

/* The definition: item (i0, i1, ...) lies at the sum of index times stride; the last index moves fastest. */
static void reference_pack(const struct strided *v, const uint8_t *src, uint8_t *out) {
    for (size_t item = 0; item < v->count; item++) {
        size_t rest = item;
        int64_t offset = 0;
        for (unsigned d = v->ndim; d > 0; d--) {
            offset += (int64_t)(rest % (size_t)v->shape[d - 1]) * v->strides[d - 1];
            rest /= (size_t)v->shape[d - 1];
        }
        memcpy(out + item * v->itemsize, src + offset, v->itemsize);
    }
}

static void check_pack(const struct strided *v) {
    size_t base_bytes = (size_t)(v->highest - v->lowest) + v->itemsize, nbytes = v->count * v->itemsize;
    uint8_t *base = check_malloc(base_bytes), *want = check_malloc(padded(nbytes) + 64);
    uint8_t *shared = aligned_alloc(64, padded(nbytes) + 64);
    for (size_t i = 0; i < base_bytes; i++)
        base[i] = pattern(i);
    memset(want, 0, padded(nbytes));
    memset(want + padded(nbytes), GUARD, 64);
    memset(shared, GUARD, padded(nbytes) + 64);
    const uint8_t *origin = base - v->lowest;
    reference_pack(v, origin, want);
    tsqp_pack_to_shared(shared, origin, v->itemsize, v->ndim, v->shape, v->strides);
    CHECK(memcmp(shared, want, padded(nbytes) + 64) == 0);
    free(base);
    free(want);
    free(shared);
}

static void pack_equals_reference_on_random_views(void) {
    uint64_t state = 2;
    unsigned empty = 0, ranks = 0;
    for (int i = 0; i < 6000; i++) {
        struct strided v = random_view(&state);
        empty += v.count == 0;
        ranks |= 1u << v.ndim;
        check_pack(&v);
    }
    CHECK_EQ(ranks, 0x1ff);
    CHECK(empty > 100);
}

static void check_2d(size_t itemsize, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride) {
    struct strided v = {.ndim = 2, .itemsize = itemsize, .count = (size_t)(rows * columns)};
    v.shape[0] = rows, v.shape[1] = columns;
    v.strides[0] = row_stride, v.strides[1] = column_stride;
    for (int d = 0; d < 2; d++)
        *(v.strides[d] < 0 ? &v.lowest : &v.highest) += v.strides[d] * (v.shape[d] - 1);
    check_pack(&v);
}

/* Rows around the staging buffer's size, contiguous and strided. */
static void pack_crosses_the_staging_buffer(void) {
    for (int64_t row = STAGE_BYTES - 9; row <= STAGE_BYTES + 9; row++) {
        check_2d(1, 5, row, row + 3, 1);
        check_2d(1, 5, row, -(row + 3), 1);
    }
    for (size_t itemsize = 1; itemsize <= 8; itemsize *= 2) {
        int64_t item = (int64_t)itemsize, columns = 3 * STAGE_BYTES / item + 5;
        check_2d(itemsize, 3, columns, 2 * columns * item, 2 * item);
        check_2d(itemsize, 3, columns, columns * item, -item);
        check_2d(itemsize, columns, 3, item, columns * item); /* transposed */
        check_2d(itemsize, 7, columns, 0, item);              /* expanded rows */
        check_2d(itemsize, columns, 7, item, 0);              /* expanded columns */
    }
}

static void run_all(const char *variant) {
    check_group = variant;
    RUN(to_shared_writes_whole_zero_padded_blocks);
    RUN(from_shared_reads_whole_blocks_and_writes_exactly);
    RUN(large_copies_are_exact);
    RUN(pack_equals_reference_on_random_views);
    RUN(pack_crosses_the_staging_buffer);
}

int main(void) {
#if defined(__x86_64__)
    copy_blocks_fn *chosen = copy_blocks;
    copy_blocks = copy_blocks_sse2;
    run_all("sse2 ");
    copy_blocks = copy_blocks_avx2;
    if (__builtin_cpu_supports("avx2"))
        run_all("avx2 ");
    else
        printf("SKIPPED copy_avx2: this processor has no AVX2\n");
    copy_blocks = copy_blocks_avx512;
    if (__builtin_cpu_supports("avx512f"))
        run_all("avx512 ");
    else
        printf("SKIPPED copy_avx512: this processor has no AVX-512F\n");
    copy_blocks = chosen;
#else
    run_all("portable ");
#endif
    return check_result();
}
