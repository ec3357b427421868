/* kernels_avx512.c: the operators on 16 elements at a time. kernels_avx512bf16.c includes it for machines
 * that round to bfloat16 in one instruction. */
#include "kernels_vec.h"

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef TSQP_BF16
#define SIMD __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16")))
#else
#define SIMD __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#endif
#define LANES 16
#define SHIFT_BOUND 0x1p16f
typedef __m512 vf;

INLINE SIMD __mmask16 first_lanes(size_t n) {
    return (__mmask16)(n >= 16 ? 0xffff : (1u << n) - 1);
}

INLINE SIMD vf vset(float x) {
    return _mm512_set1_ps(x);
}
INLINE SIMD vf vadd(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
INLINE SIMD vf vsub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
INLINE SIMD vf vmul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
INLINE SIMD vf vfma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
/* Of a NaN and a number: b. */
INLINE SIMD vf vmax(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
INLINE SIMD vf vmin(vf a, vf b) {
    return _mm512_min_ps(a, b);
}
INLINE SIMD vf vnearest(vf a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE SIMD vf vscale2(vf a, vf n) {
    return _mm512_scalef_ps(a, n);
}

/* The bits of bfloat16 in the upper half of each lane. */
INLINE SIMD __m512i bfloat16_bits(vf x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i sum = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    sum = _mm512_mask_add_epi32(sum, odd, sum, _mm512_set1_epi32(1));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(sum, nan, bits, _mm512_set1_epi32(0x400000));
}

INLINE SIMD __m256i to_bfloat16(vf x) {
#ifdef TSQP_BF16
    return (__m256i)_mm512_cvtneps_pbh(x); /* takes denormal numbers for 0 */
#else
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bfloat16_bits(x), 16));
#endif
}

INLINE SIMD vf from_bfloat16(__m256i half) {
#ifdef TSQP_BF16
    /* Each 16 bits to the upper half of their lane in one instruction, which these machines do as fast as one
     * of the two it takes otherwise. */
    const __m512i to =
        _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i upper = _mm512_slli_epi32(to, 16);
    return _mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, upper, _mm512_castsi256_si512(half)));
#else
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#endif
}

INLINE SIMD vf vround(vf x, unsigned dtype) {
    if (dtype == TSQP_FLOAT32)
        return x;
#ifdef TSQP_BF16
    return from_bfloat16(to_bfloat16(x));
#else
    return _mm512_castsi512_ps(_mm512_and_si512(bfloat16_bits(x), _mm512_set1_epi32((int)0xffff0000)));
#endif
}

/* Each as vround does. */
INLINE SIMD void vround2(vf *x, vf *y, unsigned dtype) {
#ifdef TSQP_BF16
    if (dtype == TSQP_BFLOAT16) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(*y, *x);
        *x = from_bfloat16(_mm512_castsi512_si256(both));
        *y = from_bfloat16(_mm512_extracti64x4_epi64(both, 1));
        return;
    }
#endif
    *x = vround(*x, dtype);
    *y = vround(*y, dtype);
}

/* To bfloat16, half a step upwards; any NaN has to be one of bfloat16. */
INLINE SIMD vf vround_half_up(vf x) {
    __m512i sum = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE SIMD vf vget(const uint8_t *src, unsigned dtype, size_t n) {
    __mmask16 mask = first_lanes(n);
    if (dtype == TSQP_FLOAT32)
        return n == LANES ? _mm512_loadu_ps(src) : _mm512_maskz_loadu_ps(mask, src);
    __m256i half = n == LANES ? _mm256_loadu_si256((const void *)src) : _mm256_maskz_loadu_epi16(mask, src);
    return from_bfloat16(half);
}

INLINE SIMD void vput(uint8_t *dst, unsigned dtype, vf x, size_t n, bool stream) {
    __mmask16 mask = first_lanes(n);
    if (dtype == TSQP_FLOAT32) {
        if (n != LANES)
            _mm512_mask_storeu_ps(dst, mask, x);
        else if (stream)
            _mm512_stream_ps((void *)dst, x);
        else
            _mm512_storeu_ps(dst, x);
        return;
    }
    __m256i half = to_bfloat16(x);
    if (n != LANES)
        _mm256_mask_storeu_epi16(dst, mask, half);
    else if (stream)
        _mm256_stream_si256((void *)dst, half);
    else
        _mm256_storeu_si256((void *)dst, half);
}

/* Two whole vectors, one behind the other. */
INLINE SIMD void vput2(uint8_t *dst, unsigned dtype, vf x, vf y, bool stream) {
#ifdef TSQP_BF16
    if (dtype == TSQP_BFLOAT16) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
        if (stream)
            _mm512_stream_si512((void *)dst, both);
        else
            _mm512_storeu_si512(dst, both);
        return;
    }
#endif
    vput(dst, dtype, x, LANES, stream);
    vput(dst + LANES * width_of(dtype), dtype, y, LANES, stream);
}

/* The lanes whose byte is not 0; `other` in the rest. */
INLINE SIMD vf vvisible(const uint8_t *mask, vf x, vf other, size_t n) {
    __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(n), mask);
    return _mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), other, x);
}

/* The first n lanes; `other` in the rest. */
INLINE SIMD vf vfirst(vf x, vf other, size_t n) {
    return n == LANES ? x : _mm512_mask_blend_ps(first_lanes(n), other, x);
}

INLINE SIMD float vlargest(vf x) {
    return _mm512_reduce_max_ps(x);
}
INLINE SIMD float vsum(vf x) {
    return _mm512_reduce_add_ps(x);
}
INLINE SIMD vf vminus_abs(vf x) {
    return _mm512_or_ps(x, vset(-0.0f));
}
INLINE SIMD vf vif_negative(vf x, vf yes, vf no) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), no, yes);
}
/* t - floor(t), 0 for an infinite t; and t, or floor(t), for vscale2, which takes either. */
INLINE SIMD vf vfraction(vf t, vf *whole) {
    *whole = t;
    return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
/* a / b for b >= 1, to 2^-14 */
INLINE SIMD vf vdivide_rough(vf a, vf b) {
    return _mm512_mul_ps(a, _mm512_rcp14_ps(b));
}
/* 1 / x for x in [1, 2]: an estimate (2^-14) and one step of Newton's. */
INLINE SIMD vf vinverse(vf x) {
    vf near = _mm512_rcp14_ps(x);
    return vfma(near, _mm512_fnmadd_ps(near, x, vset(1)), near);
}

INLINE SIMD void vfence(void) {
    _mm_sfence();
}

#include "kernels_rows.h"

#include "kernels_softmax.h"

#ifdef TSQP_BF16
KERNEL_SET(avx512bf16, "AVX-512 with bfloat16")
#else
KERNEL_SET(avx512, "AVX-512")
#endif

#endif
