/* kernels_avx2.c: the operators on 8 elements at a time. */
#include "kernels_vec.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SIMD __attribute__((target("avx2,fma")))
#define LANES 8
#define SHIFT_BOUND 0x1p16f
typedef __m256 vf;

INLINE SIMD vf vset(float x) {
    return _mm256_set1_ps(x);
}
INLINE SIMD vf vadd(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
INLINE SIMD vf vsub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
INLINE SIMD vf vmul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
INLINE SIMD vf vfma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
/* Of a NaN and a number: b. */
INLINE SIMD vf vmax(vf a, vf b) {
    return _mm256_max_ps(a, b);
}
INLINE SIMD vf vmin(vf a, vf b) {
    return _mm256_min_ps(a, b);
}
INLINE SIMD vf vnearest(vf a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

INLINE SIMD vf power_of_2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

/* In two steps, as 2^n may be no float. A result that may be denormal is 0: making one takes 100 cycles. */
INLINE SIMD vf vscale2(vf a, vf n) {
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    vf normal = _mm256_cmp_ps(n, vset(SMALLEST_POWER), _CMP_NLT_UQ);
    vf first = _mm256_mul_ps(a, power_of_2(half));
    return _mm256_mul_ps(_mm256_and_ps(first, normal), power_of_2(_mm256_sub_epi32(whole, half)));
}

/* The bits of bfloat16 in the lower half of each lane. */
INLINE SIMD __m256i bfloat16_bits(vf x) {
    __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
    __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
}

INLINE SIMD vf vround(vf x, unsigned dtype) {
    return dtype == TSQP_FLOAT32 ? x : _mm256_castsi256_ps(_mm256_slli_epi32(bfloat16_bits(x), 16));
}

/* Each as vround does. */
INLINE SIMD void vround2(vf *x, vf *y, unsigned dtype) {
    *x = vround(*x, dtype);
    *y = vround(*y, dtype);
}

/* To bfloat16, half a step upwards; any NaN has to be one of bfloat16. */
INLINE SIMD vf vround_half_up(vf x) {
    __m256i sum = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(0x8000));
    return _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32((int)0xffff0000)));
}

INLINE SIMD vf vget(const uint8_t *src, unsigned dtype, size_t n) {
    uint8_t whole[LANES * 4];
    if (n != LANES) {
        memset(whole, 0, sizeof whole);
        memcpy(whole, src, n * width_of(dtype));
        src = whole;
    }
    if (dtype == TSQP_FLOAT32)
        return _mm256_loadu_ps((const void *)src);
    __m128i half = _mm_loadu_si128((const void *)src);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE SIMD void vput(uint8_t *dst, unsigned dtype, vf x, size_t n, bool stream) {
    uint8_t whole[LANES * 4], *to = n == LANES ? dst : whole;
    stream = stream && n == LANES;
    if (dtype == TSQP_FLOAT32) {
        if (stream)
            _mm256_stream_ps((void *)to, x);
        else
            _mm256_storeu_ps((void *)to, x);
    } else {
        __m256i bits = bfloat16_bits(x);
        __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        if (stream)
            _mm_stream_si128((void *)to, half);
        else
            _mm_storeu_si128((void *)to, half);
    }
    if (n != LANES)
        memcpy(dst, whole, n * width_of(dtype));
}

/* Two whole vectors, one behind the other. */
INLINE SIMD void vput2(uint8_t *dst, unsigned dtype, vf x, vf y, bool stream) {
    vput(dst, dtype, x, LANES, stream);
    vput(dst + LANES * width_of(dtype), dtype, y, LANES, stream);
}

/* The lanes whose byte is not 0; `other` in the rest. */
INLINE SIMD vf vvisible(const uint8_t *mask, vf x, vf other, size_t n) {
    uint64_t bytes = 0;
    memcpy(&bytes, mask, n);
    __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
    __m256i hidden = _mm256_cmpeq_epi32(wide, _mm256_setzero_si256());
    return _mm256_blendv_ps(x, other, _mm256_castsi256_ps(hidden));
}

/* The first n lanes; `other` in the rest. */
INLINE SIMD vf vfirst(vf x, vf other, size_t n) {
    if (n == LANES)
        return x;
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane);
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(inside));
}

INLINE SIMD float vlargest(vf x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
INLINE SIMD float vsum(vf x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE SIMD vf vminus_abs(vf x) {
    return _mm256_or_ps(x, vset(-0.0f));
}
INLINE SIMD vf vif_negative(vf x, vf yes, vf no) {
    return _mm256_blendv_ps(no, yes, x);
}
/* t - floor(t), and floor(t) for vscale2; t is held where 2^t is 0 or Inf all the same. */
INLINE SIMD vf vfraction(vf t, vf *whole) {
    t = vmin(vset(EXP2_BOUND), vmax(vset(-EXP2_BOUND), t)); /* a NaN passes */
    *whole = _mm256_floor_ps(t);
    return vsub(t, *whole);
}
/* a / b for b >= 1. */
INLINE SIMD vf vdivide_rough(vf a, vf b) {
    return _mm256_div_ps(a, b);
}
/* 1 / x for x in [1, 2]. */
INLINE SIMD vf vinverse(vf x) {
    return _mm256_div_ps(vset(1), x);
}

INLINE SIMD void vfence(void) {
    _mm_sfence();
}

#include "kernels_rows.h"

#include "kernels_softmax.h"

KERNEL_SET(avx2, "AVX2")

#endif
