/* kernels_each.c: the operators in portable C, 4 elements at a time in the vectors GCC and Clang make of what
 * the machine has (SSE2, NEON). */
#include "kernels_vec.h"

#define SIMD
#define LANES 4
#define SHIFT_BOUND 0 /* a product and a sum are two roundings */
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(8)));

INLINE vf vset(float x) {
    return (vf){x, x, x, x};
}
INLINE vf vadd(vf a, vf b) {
    return a + b;
}
INLINE vf vsub(vf a, vf b) {
    return a - b;
}
INLINE vf vmul(vf a, vf b) {
    return a * b;
}
INLINE vf vfma(vf a, vf b, vf c) {
    return a * b + c;
}
INLINE vf choose(vi condition, vf yes, vf no) {
    return (vf)((condition & (vi)yes) | (~condition & (vi)no));
}
/* Of a NaN and a number: b. */
INLINE vf vmax(vf a, vf b) {
    return choose(a > b, a, b);
}
INLINE vf vmin(vf a, vf b) {
    return choose(a < b, a, b);
}
/* |a| < 2^22 (or NaN): the sum's lowest digit counts ones. */
INLINE vf vnearest(vf a) {
    vf large = vset(0x1.8p+23f);
    return (a + large) - large;
}

INLINE vf power_of_2(vi n) {
    return (vf)((vu)(n + 127) << 23);
}

/* In two steps, as 2^n may be no float. A result that may be denormal is 0: making one takes 100 cycles. */
INLINE vf vscale2(vf a, vf n) {
    /* Also of a NaN: the bits of the sum, of which a few are kept, never a conversion that is undefined. */
    vi whole = ((vi)(n + vset(0x1.8p+23f)) & 0xffff);
    whole = (vi)((vu)whole << 16) >> 16;
    vi half = whole >> 1;
    return choose(n < vset(SMALLEST_POWER), vset(0), a * power_of_2(half)) * power_of_2(whole - half);
}

/* The bits of bfloat16 in the lower half of each lane. */
INLINE vu bfloat16_bits(vf x) {
    vu bits = (vu)x, upper = bits >> 16;
    vu near = (bits + 0x7fff + (upper & 1)) >> 16;
    vu nan = (vu)((vi)(bits & MAGNITUDE) > INFINITE);
    return (nan & (upper | 0x40)) | (~nan & near);
}

INLINE vf vround(vf x, unsigned dtype) {
    return dtype == TSQP_FLOAT32 ? x : (vf)(bfloat16_bits(x) << 16);
}

/* Each as vround does. */
INLINE void vround2(vf *x, vf *y, unsigned dtype) {
    *x = vround(*x, dtype);
    *y = vround(*y, dtype);
}

/* To bfloat16, half a step upwards; any NaN has to be one of bfloat16. */
INLINE vf vround_half_up(vf x) {
    return (vf)(((vu)x + 0x8000) & 0xffff0000);
}

INLINE vf vget(const uint8_t *src, unsigned dtype, size_t n) {
    vf x = {0};
    vh half = {0};
    if (dtype == TSQP_FLOAT32) {
        memcpy(&x, src, n * 4);
        return x;
    }
    memcpy(&half, src, n * 2);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

INLINE void vput(uint8_t *dst, unsigned dtype, vf x, size_t n, bool stream) {
    (void)stream;
    if (dtype == TSQP_FLOAT32) {
        memcpy(dst, &x, n * 4);
        return;
    }
    vh half = __builtin_convertvector(bfloat16_bits(x), vh);
    memcpy(dst, &half, n * 2);
}

/* Two whole vectors, one behind the other. */
INLINE void vput2(uint8_t *dst, unsigned dtype, vf x, vf y, bool stream) {
    vput(dst, dtype, x, LANES, stream);
    vput(dst + LANES * width_of(dtype), dtype, y, LANES, stream);
}

/* The lanes whose byte is not 0; `other` in the rest. */
INLINE vf vvisible(const uint8_t *mask, vf x, vf other, size_t n) {
    vi visible = {0};
    for (size_t i = 0; i < n; i++)
        visible[i] = mask[i] ? -1 : 0;
    return choose(visible, x, other);
}

/* The first n lanes; `other` in the rest. */
INLINE vf vfirst(vf x, vf other, size_t n) {
    const vi lane = {0, 1, 2, 3};
    return n == LANES ? x : choose(lane < (int32_t)n, x, other);
}

INLINE float vlargest(vf x) {
    float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
}
INLINE float vsum(vf x) {
    return x[0] + x[2] + (x[1] + x[3]);
}
INLINE vf vminus_abs(vf x) {
    return (vf)((vu)x | 0x80000000u);
}
INLINE vf vif_negative(vf x, vf yes, vf no) {
    return choose((vi)x < 0, yes, no);
}
/* t - floor(t), and floor(t) for vscale2; t is held where 2^t is 0 or Inf all the same. */
INLINE vf vfraction(vf t, vf *whole) {
    t = vmin(vset(EXP2_BOUND), vmax(vset(-EXP2_BOUND), t)); /* a NaN passes */
    vf n = vnearest(t);
    *whole = choose(n > t, n - 1, n);
    return t - *whole;
}
/* a / b for b >= 1. */
INLINE vf vdivide_rough(vf a, vf b) {
    return a / b;
}
/* 1 / x for x in [1, 2]. */
INLINE vf vinverse(vf x) {
    return vset(1) / x;
}

INLINE void vfence(void) {}

#include "kernels_rows.h"

#include "kernels_softmax.h"

KERNEL_SET(each, "portable")
