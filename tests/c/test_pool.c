/* Result memory: classes, reuse, limit, trim, alignment, threads; and DLPack tensors over it. */
#include "check.h"
#include "dlpack.h"
#include "tsqp.h"

#include <pthread.h>
#include <string.h>

#define KIB UINT64_C(1024)
#define MIB (KIB * KIB)
#define DEFAULT_LIMIT (256 * MIB)

static void fresh_pool(void) {
    tsqp_pool_limit(DEFAULT_LIMIT);
    tsqp_pool_trim();
    CHECK_EQ(tsqp_pool_idle_bytes(), 0);
}

static struct tsqp_buffer *filled(uint64_t nbytes) {
    struct tsqp_buffer *buffer = tsqp_buffer_new(nbytes);
    CHECK(buffer != NULL);
    CHECK_EQ((uintptr_t)tsqp_buffer_data(buffer) % 64, 0);
    memset(tsqp_buffer_data(buffer), 0x5a, nbytes);
    return buffer;
}

static void every_size_is_aligned_and_writable(void) {
    fresh_pool();
    for (uint64_t nbytes = 0; nbytes < 9000; nbytes += nbytes < 200 ? 1 : 61)
        tsqp_buffer_release(filled(nbytes));
    for (uint64_t nbytes = 10 * KIB; nbytes < 20 * MIB; nbytes = nbytes * 5 / 4 + 1)
        tsqp_buffer_release(filled(nbytes));
    fresh_pool();
}

/* What lies idle after one release is the buffer's capacity. */
static void classes_waste_at_most_a_quarter(void) {
    uint64_t state = 3;
    for (int i = 0; i < 4000; i++) {
        unsigned bits = 12 + (unsigned)(check_random(&state) % 15);
        uint64_t nbytes = (UINT64_C(1) << bits) + check_random(&state) % (UINT64_C(1) << bits);
        fresh_pool();
        struct tsqp_buffer *buffer = tsqp_buffer_new(nbytes);
        CHECK(buffer != NULL);
        tsqp_buffer_release(buffer);
        uint64_t capacity = tsqp_pool_idle_bytes(), needed = nbytes + 64;
        CHECK(capacity >= needed);
        CHECK(capacity <= (needed + 63) / 64 * 64 * 5 / 4);
    }
    fresh_pool();
}

static void class_borders_hold_their_sizes(void) {
    for (unsigned bits = 12; bits < 24; bits++)
        for (uint64_t quarter = 4; quarter <= 8; quarter++)
            for (int64_t delta = -65; delta <= 1; delta++) {
                uint64_t nbytes = (quarter << (bits - 2)) + (uint64_t)delta;
                fresh_pool();
                struct tsqp_buffer *buffer = tsqp_buffer_new(nbytes);
                CHECK(buffer != NULL);
                ((volatile uint8_t *)tsqp_buffer_data(buffer))[nbytes - 1] = 1;
                tsqp_buffer_release(buffer);
                uint64_t idle = tsqp_pool_idle_bytes();
                CHECK(idle >= nbytes + 64 || (nbytes + 64 <= 4096 && idle == 0));
            }
    fresh_pool();
}

static void freed_buffer_is_reused_within_its_class(void) {
    fresh_pool();
    struct tsqp_buffer *first = filled(MIB);
    tsqp_buffer_release(first);
    struct tsqp_buffer *again = filled(MIB + 1000), *other = filled(MIB);
    CHECK(again == first);
    CHECK(other != first);
    CHECK_EQ(tsqp_pool_idle_bytes(), 0);
    tsqp_buffer_release(again);
    struct tsqp_buffer *smaller = filled(MIB / 2);
    CHECK(smaller != first);
    tsqp_buffer_release(smaller);
    tsqp_buffer_release(other);
    fresh_pool();
}

static void small_buffers_are_not_kept(void) {
    fresh_pool();
    tsqp_buffer_release(filled(3000));
    CHECK_EQ(tsqp_pool_idle_bytes(), 0);
}

static void limit_bounds_what_is_kept(void) {
    fresh_pool();
    struct tsqp_buffer *buffers[8];
    tsqp_pool_limit(3 * MIB);
    for (int i = 0; i < 8; i++)
        buffers[i] = filled(MIB - 64);
    for (int i = 0; i < 8; i++) {
        tsqp_buffer_release(buffers[i]);
        CHECK(tsqp_pool_idle_bytes() <= 3 * MIB);
    }
    CHECK_EQ(tsqp_pool_idle_bytes(), 3 * MIB);
    tsqp_pool_limit(MIB);
    CHECK_EQ(tsqp_pool_idle_bytes(), MIB);
    tsqp_pool_limit(0);
    CHECK_EQ(tsqp_pool_idle_bytes(), 0);
    tsqp_buffer_release(filled(MIB));
    CHECK_EQ(tsqp_pool_idle_bytes(), 0);
    fresh_pool();
}

static void what_was_used_last_is_kept(void) {
    fresh_pool();
    tsqp_pool_limit(8 * MIB);
    struct tsqp_buffer *large[4], *small = filled(64 * KIB), *middle = filled(MIB - 64);
    for (int i = 0; i < 4; i++)
        large[i] = filled(2 * MIB - 64);
    tsqp_buffer_release(middle);
    for (int i = 0; i < 4; i++)
        tsqp_buffer_release(large[i]); /* 8 MiB: the middle one has gone */
    CHECK_EQ(tsqp_pool_idle_bytes(), 8 * MIB);
    for (int i = 0; i < 100; i++) {
        struct tsqp_buffer *before = small;
        tsqp_buffer_release(small);
        CHECK(tsqp_pool_idle_bytes() <= 8 * MIB);
        small = filled(64 * KIB);
        CHECK(small == before);
    }
    CHECK_EQ(tsqp_pool_idle_bytes(), 6 * MIB); /* the one large buffer that was freed first */
    struct tsqp_buffer *again[3];
    for (int i = 0; i < 3; i++) {
        again[i] = filled(2 * MIB - 64);
        CHECK(again[i] == large[3 - i]);
    }
    for (int i = 0; i < 3; i++)
        tsqp_buffer_release(again[i]);
    tsqp_buffer_release(small);
    fresh_pool();
}

static void trim_gives_everything_back(void) {
    fresh_pool();
    for (uint64_t nbytes = 8 * KIB; nbytes < 8 * MIB; nbytes *= 2)
        tsqp_buffer_release(filled(nbytes));
    CHECK(tsqp_pool_idle_bytes() > 8 * MIB);
    tsqp_pool_trim();
    CHECK_EQ(tsqp_pool_idle_bytes(), 0);
    tsqp_pool_trim();
}

static void absurd_sizes_are_refused(void) {
    CHECK(tsqp_buffer_new(UINT64_MAX) == NULL);
    CHECK(tsqp_buffer_new((UINT64_C(1) << 48) + 1) == NULL);
    CHECK(tsqp_buffer_new(UINT64_C(1) << 48) ==
          NULL); /* no machine has it, and it is an answer, not a crash */
    tsqp_buffer_release(NULL);
}

#ifdef __linux__
static uint64_t mapped_bytes(void) {
    unsigned long pages = 0;
    FILE *file = fopen("/proc/self/statm", "re");
    CHECK(file != NULL);
    int fields = fscanf(file, "%lu", &pages);
    fclose(file);
    CHECK_EQ(fields, 1);
    return (uint64_t)pages * 4096;
}

/* Mapped buffers are out of a leak checker's sight. */
static void mapped_buffers_do_not_leak(void) {
    fresh_pool();
    tsqp_pool_limit(4 * MIB);
    tsqp_buffer_release(filled(3 * MIB));
    uint64_t before = mapped_bytes();
    for (int i = 0; i < 400; i++) {
        struct tsqp_buffer *kept = tsqp_buffer_new(3 * MIB), *dropped = tsqp_buffer_new(5 * MIB);
        CHECK(kept && dropped);
        tsqp_buffer_release(kept);
        tsqp_buffer_release(dropped);
    }
    CHECK(mapped_bytes() < before + 64 * MIB);
    fresh_pool();
}
#endif

/* ---- threads ---- */

static void *hammer(void *seed) {
    uint64_t state = (uint64_t)(uintptr_t)seed;
    struct tsqp_buffer *held[8] = {NULL};
    for (int i = 0; i < 20000; i++) {
        unsigned at = (unsigned)(check_random(&state) % 8);
        if (held[at]) {
            uint64_t *words = tsqp_buffer_data(held[at]);
            if (words[0] != (uintptr_t)held[at] || words[1] != (uintptr_t)seed)
                return "a buffer was handed out twice";
            tsqp_buffer_release(held[at]);
            held[at] = NULL;
            continue;
        }
        held[at] = tsqp_buffer_new(4096 << check_random(&state) % 6);
        if (!held[at])
            return "no memory";
        uint64_t *words = tsqp_buffer_data(held[at]);
        words[0] = (uintptr_t)held[at];
        words[1] = (uintptr_t)seed;
        if (i % 1000 == 0)
            tsqp_pool_trim();
    }
    for (int i = 0; i < 8; i++)
        tsqp_buffer_release(held[i]);
    return NULL;
}

static void threads_share_the_pool(void) {
    pthread_t threads[4];
    fresh_pool();
    for (uintptr_t i = 0; i < 4; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, hammer, (void *)(i + 1)), 0);
    const char *worst = NULL;
    for (int i = 0; i < 4; i++) {
        void *result;
        pthread_join(threads[i], &result);
        worst = result ? result : worst;
    }
    if (worst)
        printf("%s\n", worst);
    CHECK(worst == NULL);
    fresh_pool();
}

/* ---- DLPack tensors ---- */

static struct tsqp_tensor_desc desc(unsigned dtype, unsigned ndim, const int64_t *shape) {
    struct tsqp_tensor_desc out = {.dtype = (uint8_t)dtype, .ndim = (uint8_t)ndim};
    memcpy(out.shape, shape, ndim * sizeof *shape);
    return out;
}

static void tensor_describes_and_owns_its_buffer(void) {
    fresh_pool();
    struct tsqp_tensor_desc d = desc(TSQP_FLOAT32, 3, (int64_t[]){2, 0, 5});
    struct tsqp_buffer *buffer = filled(64 * KIB);
    DLManagedTensor *tensor = tsqp_tensor_new(&d, tsqp_buffer_data(buffer), buffer, NULL);
    CHECK(tensor != NULL);
    CHECK(tensor->dl_tensor.data == tsqp_buffer_data(buffer));
    CHECK_EQ(tensor->dl_tensor.device.device_type, DL_CPU);
    CHECK_EQ(tensor->dl_tensor.ndim, 3);
    static const int64_t shape[] = {2, 0, 5}, strides[] = {5, 5, 1};
    CHECK(memcmp(tensor->dl_tensor.shape, shape, sizeof shape) == 0);
    CHECK(memcmp(tensor->dl_tensor.strides, strides, sizeof strides) == 0);
    CHECK_EQ(tsqp_pool_idle_bytes(), 0);
    tensor->deleter(tensor);
    CHECK(tsqp_pool_idle_bytes() > 64 * KIB); /* back in the pool */
    fresh_pool();
}

static void tensor_dtypes_map_to_dlpack(void) {
    static const struct {
        unsigned dtype, code, bits;
    } map[] = {
        {TSQP_FLOAT32, DL_FLOAT, 32},     {TSQP_FLOAT16, DL_FLOAT, 16},  {TSQP_BFLOAT16, DL_BFLOAT, 16},
        {TSQP_FLOAT64, DL_FLOAT, 64},     {TSQP_INT8, DL_INT, 8},        {TSQP_INT16, DL_INT, 16},
        {TSQP_INT32, DL_INT, 32},         {TSQP_INT64, DL_INT, 64},      {TSQP_UINT8, DL_UINT, 8},
        {TSQP_UINT16, DL_UINT, 16},       {TSQP_UINT32, DL_UINT, 32},    {TSQP_BOOL, DL_BOOL, 8},
        {TSQP_FLOAT8_E4M3FN, DL_UINT, 8}, {TSQP_FLOAT8_E5M2, DL_UINT, 8}};
    CHECK_EQ(sizeof map / sizeof map[0], TSQP_DTYPE_END - 1);
    for (unsigned i = 0; i < TSQP_DTYPE_END - 1; i++) {
        struct tsqp_tensor_desc d = desc(map[i].dtype, 0, (int64_t[]){0});
        struct tsqp_buffer *buffer = tsqp_buffer_new(8);
        DLManagedTensor *tensor = tsqp_tensor_new(&d, tsqp_buffer_data(buffer), buffer, NULL);
        CHECK(tensor != NULL);
        CHECK_EQ(tensor->dl_tensor.dtype.code, map[i].code);
        CHECK_EQ(tensor->dl_tensor.dtype.bits, map[i].bits);
        CHECK_EQ(tensor->dl_tensor.dtype.lanes, 1);
        CHECK_EQ(tensor->dl_tensor.ndim, 0);
        tsqp_tensor_delete(tensor);
    }
}

int main(void) {
    RUN(every_size_is_aligned_and_writable);
    RUN(classes_waste_at_most_a_quarter);
    RUN(class_borders_hold_their_sizes);
    RUN(freed_buffer_is_reused_within_its_class);
    RUN(small_buffers_are_not_kept);
    RUN(limit_bounds_what_is_kept);
    RUN(what_was_used_last_is_kept);
    RUN(trim_gives_everything_back);
    RUN(absurd_sizes_are_refused);
#ifdef __linux__
    RUN(mapped_buffers_do_not_leak);
#endif
    RUN(threads_share_the_pool);
    RUN(tensor_describes_and_owns_its_buffer);
    RUN(tensor_dtypes_map_to_dlpack);
    tsqp_pool_trim();
    return check_result();
}
