/* kernels_vec.h: what the instruction sets share before they define their vectors. */
#ifndef TSQP_KERNELS_VEC_H
#define TSQP_KERNELS_VEC_H

#include "kernels_set.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define MAGNITUDE 0x7fffffff
#define INFINITE 0x7f800000

/* e^x = 2^n e^r with n = round(x log2 e), |r| <= ln2 / 2 and ln 2 in two parts (Cody and Waite 1980); the
 * polynomial for e^r is that of Cephes' expf (Moshier 1989, netlib.org/cephes). Measured over every eighth
 * float32: at most 1.01 ulp off where the result is normal. Denormal results are exact to a step with AVX-512
 * and may be 0 elsewhere; beyond [EXP_LOW, EXP_HIGH] the result is 0 or Inf. */
#define EXP_LOW (-104.0f)
#define EXP_HIGH 89.0f
#define SMALLEST_POWER (-126.0f)
#define LOG2_E 0x1.715476p+0f
#define LN2_HIGH 0x1.63p-1f
#define LN2_LOW (-0x1.bd0106p-13f)
#define EXP_C6 1.9875691500e-4f
#define EXP_C5 1.3981999507e-3f
#define EXP_C4 8.3334519073e-3f
#define EXP_C3 4.1665795894e-2f
#define EXP_C2 1.6666665459e-1f
#define EXP_C1 5.0000001201e-1f

/* 2^f for f in [0, 1): the polynomials with the least relative error whose first coefficient is 1 (for
 * float32) or any (for what is rounded to bfloat16, half a step of which is 2^-9). Rounding included, 6.5e-8
 * and 2^-13.7. */
#define EXP2_BOUND 160.0f
#define EXP2_C1 0x1.62e42cp-1f
#define EXP2_C2 0x1.ebfd58p-3f
#define EXP2_C3 0x1.c68912p-5f
#define EXP2_C4 0x1.3d0b92p-7f
#define EXP2_C5 0x1.46d64cp-10f
#define EXP2_C6 0x1.c54174p-13f
#define ROUGH_C0 0x1.fff632p-1f
#define ROUGH_C1 0x1.64444cp-1f
#define ROUGH_C2 0x1.cefc4cp-3f
#define ROUGH_C3 0x1.3f96a4p-4f

INLINE size_t width_of(unsigned dtype) {
    return dtype == TSQP_FLOAT32 ? 4 : 2;
}

#endif
