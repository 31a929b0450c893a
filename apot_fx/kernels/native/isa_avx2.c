/* AVX2 with F16C. */
#include "apot.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif
#include "vector_avx2.h"

#include "body.h"

const apot_kernels apot_avx2 = APOT_KERNELS("avx2");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
