/* convert_kernels.h: conversions between float32, bfloat16, float16 and int8 in private memory (convert.c
 * only).
 *
 * Each kernel exists as portable C, for AVX2 and for AVX-512; the constructor picks one set. All give the
 * same bits: they use no operation whose result an instruction set may choose (no estimate of a reciprocal,
 * no fused multiply-add, no bfloat16 instruction, which would flush denormals).
 */
#ifndef TSQP_CONVERT_KERNELS_H
#define TSQP_CONVERT_KERNELS_H

#include "layout.h"

#include <assert.h>
#include <float.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static_assert(FLT_EVAL_METHOD == 0, "float32 arithmetic is done in float32: each set rounds alike");

#define INLINE static inline __attribute__((always_inline))

#define MAGNITUDE UINT32_C(0x7fffffff)
#define INFINITE UINT32_C(0x7f800000)
#define QUIET_NAN UINT32_C(0x7fc00000)
#define SMALLEST_NORMAL UINT32_C(0x00800000)
/* 112 exponents between float16 and float32 */
#define HALF_BIAS UINT32_C(0x38000000)

/* Adding it leaves a small number's nearest integer, ties to even, in the sum's lowest bits. */
#define TO_INTEGER 0x1.8p+23f
#define TO_INTEGER_BITS UINT32_C(0x4b400000)

/* On the elements of one row or one piece, of any alignment. */
struct kernels {
    void (*narrow)(uint8_t *dst, const uint8_t *src, size_t count); /* float32 -> bfloat16 */
    void (*widen)(uint8_t *dst, const uint8_t *src, size_t count);  /* bfloat16 -> float32 */
    /* The bits of the largest magnitude: as integers, NaN > Inf > any number. */
    uint32_t (*largest)(const uint8_t *src, unsigned dtype, size_t count);
    void (*quantize)(int8_t *dst, const uint8_t *src, unsigned dtype, size_t count, float scale);
    void (*dequantize)(uint8_t *dst, unsigned dtype, const int8_t *src, size_t count, float scale);
};

/* ---- one element; `dtype` is a constant wherever these are inlined ---- */

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE size_t item_bytes(unsigned dtype) {
    return dtype == TSQP_FLOAT32 ? 4 : 2;
}

INLINE uint16_t to_bfloat16(uint32_t bits) {
    if ((bits & MAGNITUDE) > INFINITE)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Both candidates of each are computed and one is picked, which lets the compiler work on vectors. */
INLINE uint16_t to_float16(uint32_t bits) {
    uint32_t magnitude = bits & MAGNITUDE, sign = bits >> 16 & 0x8000;
    /* Below 2^-14 the step is 2^-24, as it is of numbers around 0.5: adding that rounds. */
    uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - HALF_BIAS) >> 13;
    uint32_t half = magnitude < 0x38800000 ? small : normal;
    half = magnitude >= 0x47800000 ? 0x7c00 : half; /* 2^16 */
    half = magnitude > INFINITE ? 0x7e00 | (magnitude >> 13 & 0x3ff) : half;
    return (uint16_t)(sign | half);
}

INLINE uint32_t from_float16(uint16_t half) {
    uint32_t magnitude = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t normal = (magnitude << 13) + HALF_BIAS;
    /* With the exponent of 2^-14 and its implicit bit, which is then taken away. */
    uint32_t small = bits_of(float_of((magnitude << 13) + 0x38800000) - 0x1p-14f);
    uint32_t bits = magnitude < 0x400 ? small : normal;
    bits = magnitude >= 0x7c00 ? magnitude << 13 | INFINITE : bits;
    bits = magnitude > 0x7c00 ? bits | QUIET_NAN : bits;
    return sign | bits;
}

INLINE uint32_t load_element(const uint8_t *src, unsigned dtype) {
    uint32_t word;
    uint16_t half;
    if (dtype == TSQP_FLOAT32) {
        memcpy(&word, src, sizeof word);
        return word;
    }
    memcpy(&half, src, sizeof half);
    return dtype == TSQP_BFLOAT16 ? (uint32_t)half << 16 : from_float16(half);
}

INLINE void store_element(uint8_t *dst, unsigned dtype, uint32_t bits) {
    if (dtype == TSQP_FLOAT32) {
        memcpy(dst, &bits, sizeof bits);
        return;
    }
    uint16_t half = dtype == TSQP_BFLOAT16 ? to_bfloat16(bits) : to_float16(bits);
    memcpy(dst, &half, sizeof half);
}

/* ---- portable ---- */

INLINE void convert_each(uint8_t *dst, unsigned to, const uint8_t *src, unsigned from, size_t count) {
    for (size_t i = 0; i < count; i++)
        store_element(dst + i * item_bytes(to), to, load_element(src + i * item_bytes(from), from));
}

INLINE uint32_t largest_each(const uint8_t *src, unsigned dtype, size_t count) {
    uint32_t largest = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t magnitude = load_element(src + i * item_bytes(dtype), dtype) & MAGNITUDE;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

INLINE void quantize_each(int8_t *dst, const uint8_t *src, unsigned dtype, size_t count, float scale) {
    for (size_t i = 0; i < count; i++) {
        float steps = float_of(load_element(src + i * item_bytes(dtype), dtype)) / scale;
        dst[i] = (int8_t)(uint8_t)(bits_of(steps + TO_INTEGER) - TO_INTEGER_BITS);
    }
}

INLINE void dequantize_each(uint8_t *dst, unsigned dtype, const int8_t *src, size_t count, float scale) {
    for (size_t i = 0; i < count; i++)
        store_element(dst + i * item_bytes(dtype), dtype, bits_of((float)src[i] * scale));
}

/* The kernels of one instruction set from its four loops, one loop for each dtype. */
#define KERNELS(set, attributes)                                                                             \
    attributes static void narrow_##set(uint8_t *dst, const uint8_t *src, size_t count) {                    \
        convert_##set(dst, TSQP_BFLOAT16, src, TSQP_FLOAT32, count);                                         \
    }                                                                                                        \
    attributes static void widen_##set(uint8_t *dst, const uint8_t *src, size_t count) {                     \
        convert_##set(dst, TSQP_FLOAT32, src, TSQP_BFLOAT16, count);                                         \
    }                                                                                                        \
    attributes static uint32_t largest_of_##set(const uint8_t *src, unsigned dtype, size_t count) {          \
        if (dtype == TSQP_FLOAT32)                                                                           \
            return largest_##set(src, TSQP_FLOAT32, count);                                                  \
        if (dtype == TSQP_BFLOAT16)                                                                          \
            return largest_##set(src, TSQP_BFLOAT16, count);                                                 \
        return largest_##set(src, TSQP_FLOAT16, count);                                                      \
    }                                                                                                        \
    attributes static void quantize_of_##set(int8_t *dst, const uint8_t *src, unsigned dtype, size_t count,  \
                                             float scale) {                                                  \
        if (dtype == TSQP_FLOAT32)                                                                           \
            quantize_##set(dst, src, TSQP_FLOAT32, count, scale);                                            \
        else if (dtype == TSQP_BFLOAT16)                                                                     \
            quantize_##set(dst, src, TSQP_BFLOAT16, count, scale);                                           \
        else                                                                                                 \
            quantize_##set(dst, src, TSQP_FLOAT16, count, scale);                                            \
    }                                                                                                        \
    attributes static void dequantize_of_##set(uint8_t *dst, unsigned dtype, const int8_t *src,              \
                                               size_t count, float scale) {                                  \
        if (dtype == TSQP_FLOAT32)                                                                           \
            dequantize_##set(dst, TSQP_FLOAT32, src, count, scale);                                          \
        else if (dtype == TSQP_BFLOAT16)                                                                     \
            dequantize_##set(dst, TSQP_BFLOAT16, src, count, scale);                                         \
        else                                                                                                 \
            dequantize_##set(dst, TSQP_FLOAT16, src, count, scale);                                          \
    }                                                                                                        \
    static const struct kernels kernels_##set = {narrow_##set, widen_##set, largest_of_##set,                \
                                                 quantize_of_##set, dequantize_of_##set};

KERNELS(each, )

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

/* ---- AVX-512: 16 elements a step, the last step masked (a masked store to a line that is not in the cache
 * costs twice a whole one) ---- */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

INLINE AVX512 __mmask16 mask_of(size_t count) {
    return (__mmask16)(count >= 16 ? 0xffff : (1u << count) - 1);
}

INLINE AVX512 __m512 load_avx512(const uint8_t *src, unsigned dtype, __mmask16 mask) {
    if (dtype == TSQP_FLOAT32)
        return _mm512_maskz_loadu_ps(mask, src);
    __m256i half = _mm256_maskz_loadu_epi16(mask, src);
    if (dtype == TSQP_FLOAT16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE AVX512 __m256i to_bfloat16_avx512(__m512i bits) {
    __m512i sum = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    sum = _mm512_mask_add_epi32(sum, odd, sum, _mm512_set1_epi32(1));
    __mmask16 nan = _mm512_fpclass_ps_mask(_mm512_castsi512_ps(bits), 0x81); /* quiet, signalling */
    sum = _mm512_mask_or_epi32(sum, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}

INLINE AVX512 void store_avx512(uint8_t *dst, unsigned dtype, __mmask16 mask, __m512 x) {
    if (dtype == TSQP_FLOAT32)
        _mm512_mask_storeu_ps(dst, mask, x);
    else if (dtype == TSQP_BFLOAT16)
        _mm256_mask_storeu_epi16(dst, mask, to_bfloat16_avx512(_mm512_castps_si512(x)));
    else
        _mm256_mask_storeu_epi16(dst, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE AVX512 void convert_avx512(uint8_t *dst, unsigned to, const uint8_t *src, unsigned from,
                                  size_t count) {
    size_t i = 0;
    for (; i + 16 <= count; i += 16)
        store_avx512(dst + i * item_bytes(to), to, 0xffff,
                     load_avx512(src + i * item_bytes(from), from, 0xffff));
    __mmask16 mask = mask_of(count - i);
    if (mask)
        store_avx512(dst + i * item_bytes(to), to, mask, load_avx512(src + i * item_bytes(from), from, mask));
}

INLINE AVX512 uint32_t largest_avx512(const uint8_t *src, unsigned dtype, size_t count) {
    __m512i largest = _mm512_setzero_si512(), magnitude = _mm512_set1_epi32(MAGNITUDE);
    for (size_t i = 0; i < count; i += 16) {
        __m512 x = load_avx512(src + i * item_bytes(dtype), dtype, mask_of(count - i));
        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(x), magnitude));
    }
    return (uint32_t)_mm512_reduce_max_epi32(largest);
}

INLINE AVX512 __m512i steps_avx512(const uint8_t *src, unsigned dtype, __mmask16 mask, __m512 step) {
    return _mm512_cvtps_epi32(_mm512_div_ps(load_avx512(src, dtype, mask), step));
}

/* 64 at a time: the copy that follows reads whole lines, which waits for stores of less. */
INLINE AVX512 void quantize_avx512(int8_t *dst, const uint8_t *src, unsigned dtype, size_t count,
                                   float scale) {
    /* Packing works on each quarter of a register by itself. */
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const size_t bytes = 16 * item_bytes(dtype);
    __m512 step = _mm512_set1_ps(scale);
    size_t i = 0;
    for (; i + 64 <= count; i += 64, src += 4 * bytes) {
        __m512i low = _mm512_packs_epi32(steps_avx512(src, dtype, 0xffff, step),
                                         steps_avx512(src + bytes, dtype, 0xffff, step));
        __m512i high = _mm512_packs_epi32(steps_avx512(src + 2 * bytes, dtype, 0xffff, step),
                                          steps_avx512(src + 3 * bytes, dtype, 0xffff, step));
        _mm512_storeu_si512(dst + i, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
    }
    for (; i < count; i += 16, src += bytes) {
        __mmask16 mask = mask_of(count - i);
        _mm_mask_storeu_epi8(dst + i, mask, _mm512_cvtepi32_epi8(steps_avx512(src, dtype, mask, step)));
    }
}

INLINE AVX512 __m512 values_avx512(__m128i q, __m512 step) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), step);
}

INLINE AVX512 void dequantize_avx512(uint8_t *dst, unsigned dtype, const int8_t *src, size_t count,
                                     float scale) {
    __m512 step = _mm512_set1_ps(scale);
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m128i q = _mm_loadu_si128((const __m128i *)(src + i));
        store_avx512(dst + i * item_bytes(dtype), dtype, 0xffff, values_avx512(q, step));
    }
    __mmask16 mask = mask_of(count - i);
    if (mask) {
        __m128i q = _mm_maskz_loadu_epi8(mask, src + i);
        store_avx512(dst + i * item_bytes(dtype), dtype, mask, values_avx512(q, step));
    }
}

KERNELS(avx512, AVX512)

/* ---- AVX2: 8 elements a step, what is left one by one ---- */

#define AVX2 __attribute__((target("avx2,f16c")))

INLINE AVX2 __m256 load_avx2(const uint8_t *src, unsigned dtype) {
    if (dtype == TSQP_FLOAT32)
        return _mm256_loadu_ps((const float *)src);
    __m128i half = _mm_loadu_si128((const __m128i *)src);
    if (dtype == TSQP_FLOAT16)
        return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE AVX2 __m128i to_bfloat16_avx2(__m256i bits) {
    __m256i upper = _mm256_srli_epi32(bits, 16);
    __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan =
        _mm256_cmpgt_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(MAGNITUDE)), _mm256_set1_epi32(INFINITE));
    __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    __m256i near = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(near), _mm256_extracti128_si256(near, 1));
}

INLINE AVX2 void store_avx2(uint8_t *dst, unsigned dtype, __m256 x) {
    if (dtype == TSQP_FLOAT32)
        _mm256_storeu_ps((float *)dst, x);
    else if (dtype == TSQP_BFLOAT16)
        _mm_storeu_si128((__m128i *)dst, to_bfloat16_avx2(_mm256_castps_si256(x)));
    else
        _mm_storeu_si128((__m128i *)dst, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE AVX2 void convert_avx2(uint8_t *dst, unsigned to, const uint8_t *src, unsigned from, size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        store_avx2(dst + i * item_bytes(to), to, load_avx2(src + i * item_bytes(from), from));
    convert_each(dst + i * item_bytes(to), to, src + i * item_bytes(from), from, count - i);
}

INLINE AVX2 uint32_t largest_avx2(const uint8_t *src, unsigned dtype, size_t count) {
    __m256i largest = _mm256_setzero_si256(), magnitude = _mm256_set1_epi32(MAGNITUDE);
    size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256i bits = _mm256_castps_si256(load_avx2(src + i * item_bytes(dtype), dtype));
        largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, magnitude));
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    __m128i two = _mm_max_epi32(four, _mm_srli_si128(four, 8));
    uint32_t one = (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_srli_si128(two, 4)));
    uint32_t rest = largest_each(src + i * item_bytes(dtype), dtype, count - i);
    return one > rest ? one : rest;
}

INLINE AVX2 void quantize_avx2(int8_t *dst, const uint8_t *src, unsigned dtype, size_t count, float scale) {
    __m256 step = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256 x = load_avx2(src + i * item_bytes(dtype), dtype);
        __m256i q = _mm256_cvtps_epi32(_mm256_div_ps(x, step));
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        _mm_storel_epi64((__m128i *)(dst + i), _mm_packs_epi16(words, words));
    }
    quantize_each(dst + i, src + i * item_bytes(dtype), dtype, count - i, scale);
}

INLINE AVX2 void dequantize_avx2(uint8_t *dst, unsigned dtype, const int8_t *src, size_t count, float scale) {
    __m256 step = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256i q = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(src + i)));
        store_avx2(dst + i * item_bytes(dtype), dtype, _mm256_mul_ps(_mm256_cvtepi32_ps(q), step));
    }
    dequantize_each(dst + i * item_bytes(dtype), dtype, src + i, count - i, scale);
}

KERNELS(avx2, AVX2)

static bool have_avx2(void) {
    unsigned eax, ebx, ecx = 0, edx;
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

static bool have_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static const struct kernels *kernels = &kernels_each;

__attribute__((constructor)) static void choose_kernels(void) {
    __builtin_cpu_init();
    if (have_avx512())
        kernels = &kernels_avx512;
    else if (have_avx2())
        kernels = &kernels_avx2;
}

#else

static const struct kernels *kernels = &kernels_each;

#endif

#endif
