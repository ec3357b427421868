/* kernels_avx512bf16.c: kernels_avx512.c where the machine rounds to bfloat16 in one instruction (AMD since
 * Zen 4, Intel since Sapphire Rapids). */
#define TSQP_BF16
#include "kernels_avx512.c"
