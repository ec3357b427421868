/* copy.c: bulk copies between private and shared memory, in whole 64-byte blocks on the shared side.
 *
 * memcpy is not used there: its head and tail may be unaligned or overlapping, which an enclave must not do
 * to untrusted memory, and its choice of instruction by size is slower than one loop at the sizes of a slot.
 */
#include "access.h"
#include "layout.h"

#include <string.h>

#define STAGE_BYTES 4096
#define PREFETCH_BYTES 1024

typedef void copy_blocks_fn(uint8_t *dst, const uint8_t *src, size_t blocks);

#if defined(__x86_64__)
#include <immintrin.h>

/* The destination's lines were last held by the other core: asking for them ahead, for ownership, hides what
 * fetching them one by one costs (measured between two cores: 1 MB 207 -> 189 us round trip, 64 KB 28.8
 * -> 20.7). */
__attribute__((target("prfchw"))) static inline void prefetch_for_write(const uint8_t *dst) {
    __builtin_prefetch(dst + PREFETCH_BYTES, 1, 3);
}

__attribute__((target("avx512f,prfchw"))) static void copy_blocks_avx512(uint8_t *dst, const uint8_t *src,
                                                                         size_t blocks) {
    for (; blocks >= 4; blocks -= 4, dst += 256, src += 256) {
        __m512i a = _mm512_loadu_si512(src), b = _mm512_loadu_si512(src + 64);
        __m512i c = _mm512_loadu_si512(src + 128), d = _mm512_loadu_si512(src + 192);
        for (int line = 0; line < 256; line += 64)
            prefetch_for_write(dst + line);
        _mm512_storeu_si512(dst, a);
        _mm512_storeu_si512(dst + 64, b);
        _mm512_storeu_si512(dst + 128, c);
        _mm512_storeu_si512(dst + 192, d);
    }
    for (; blocks > 0; blocks--, dst += 64, src += 64)
        _mm512_storeu_si512(dst, _mm512_loadu_si512(src));
}

__attribute__((target("avx2,prfchw"))) static void copy_blocks_avx2(uint8_t *dst, const uint8_t *src,
                                                                    size_t blocks) {
    for (; blocks > 0; blocks--, dst += 64, src += 64) {
        prefetch_for_write(dst);
        __m256i a = _mm256_loadu_si256((const __m256i *)src);
        __m256i b = _mm256_loadu_si256((const __m256i *)(src + 32));
        _mm256_storeu_si256((__m256i *)dst, a);
        _mm256_storeu_si256((__m256i *)(dst + 32), b);
    }
}

static void copy_blocks_sse2(uint8_t *dst, const uint8_t *src, size_t blocks) {
    for (; blocks > 0; blocks--, dst += 64, src += 64)
        for (int i = 0; i < 64; i += 16)
            _mm_storeu_si128((__m128i *)(dst + i), _mm_loadu_si128((const __m128i *)(src + i)));
}

static copy_blocks_fn *copy_blocks = copy_blocks_sse2;

__attribute__((constructor)) static void choose_copy(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        copy_blocks = copy_blocks_avx512;
    else if (__builtin_cpu_supports("avx2"))
        copy_blocks = copy_blocks_avx2;
}

#else

/* Volatile: the compiler may neither merge these into a memcpy nor load a word twice. */
typedef volatile uint64_t __attribute__((may_alias, aligned(1))) word_unaligned;

static void copy_blocks(uint8_t *dst, const uint8_t *src, size_t blocks) {
    for (; blocks > 0; blocks--, dst += 64, src += 64)
        for (int i = 0; i < 64; i += 8)
            *(word_unaligned *)(dst + i) = *(const word_unaligned *)(src + i);
}

#endif

void tsqp_copy_from_shared(void *dst, const void *shared_src, size_t nbytes) {
    size_t whole = nbytes / TSQP_LINE, tail = nbytes % TSQP_LINE;
    copy_blocks(dst, shared_src, whole);
    if (tail) {
        _Alignas(64) uint8_t block[TSQP_LINE];
        copy_blocks(block, (const uint8_t *)shared_src + whole * TSQP_LINE, 1);
        memcpy((uint8_t *)dst + whole * TSQP_LINE, block, tail);
    }
}

void tsqp_copy_to_shared(void *shared_dst, const void *src, size_t nbytes) {
    size_t whole = nbytes / TSQP_LINE, tail = nbytes % TSQP_LINE;
    copy_blocks(shared_dst, src, whole);
    if (tail) {
        /* The padding is zeroed: what lay in a private block before must not leave it. */
        _Alignas(64) uint8_t block[TSQP_LINE] = {0};
        memcpy(block, (const uint8_t *)src + whole * TSQP_LINE, tail);
        copy_blocks((uint8_t *)shared_dst + whole * TSQP_LINE, block, 1);
    }
}

/* ---- strided tensors ---- */

struct packer {
    uint8_t *out;
    size_t used;
    _Alignas(64) uint8_t stage[STAGE_BYTES];
};

static void flush_stage(struct packer *packer) {
    tsqp_copy_to_shared(packer->out, packer->stage, packer->used);
    packer->out += packer->used;
    packer->used = 0;
}

static void put(struct packer *packer, const uint8_t *src, size_t nbytes) {
    while (nbytes > 0) {
        size_t part = STAGE_BYTES - packer->used;
        if (part > nbytes)
            part = nbytes;
        memcpy(packer->stage + packer->used, src, part);
        packer->used += part;
        src += part;
        nbytes -= part;
        if (packer->used == STAGE_BYTES)
            flush_stage(packer);
    }
}

/* Constant sizes let the compiler turn the inner copy into one load and one store. */
static void put_row(struct packer *packer, const uint8_t *src, size_t itemsize, int64_t count,
                    int64_t stride) {
    for (int64_t i = 0; i < count; i++, src += stride) {
        if (packer->used + itemsize > STAGE_BYTES)
            flush_stage(packer);
        uint8_t *dst = packer->stage + packer->used;
        switch (itemsize) {
        case 1:
            *dst = *src;
            break;
        case 2:
            memcpy(dst, src, 2);
            break;
        case 4:
            memcpy(dst, src, 4);
            break;
        default:
            memcpy(dst, src, 8);
        }
        packer->used += itemsize;
    }
}

void tsqp_pack_to_shared(void *shared_dst, const void *src, size_t itemsize, unsigned ndim,
                         const int64_t *shape, const int64_t *strides) {
    struct packer packer = {.out = shared_dst, .used = 0};
    int64_t at[TSQP_MAX_NDIM] = {0};
    const uint8_t *row = src;
    unsigned inner = ndim; /* dimensions from here on are one contiguous run */
    size_t run = itemsize;
    for (unsigned d = 0; d < ndim; d++)
        if (shape[d] == 0)
            return;
    while (inner > 0 && (strides[inner - 1] == (int64_t)run || shape[inner - 1] == 1))
        run *= (size_t)shape[--inner];
    /* Either whole runs are copied per outer index, or, where the last dimension itself is strided, its
     * items. */
    unsigned outer = inner == ndim && ndim > 0 ? ndim - 1 : inner;
    for (;;) {
        if (outer == inner)
            put(&packer, row, run);
        else
            put_row(&packer, row, itemsize, shape[ndim - 1], strides[ndim - 1]);
        unsigned d = outer;
        while (d > 0) {
            d--;
            if (++at[d] < shape[d]) {
                row += strides[d];
                break;
            }
            row -=
                strides[d] * (shape[d] - 1); /* never past the tensor: a dimension of 1 may have any stride */
            at[d] = 0;
            if (d == 0) {
                flush_stage(&packer);
                return;
            }
        }
        if (outer == 0) {
            flush_stage(&packer);
            return;
        }
    }
}
