/* AVX-512: tables by gathers. */
#include "apot.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c")
#endif

#include "vector_avx512.h"

#include "body.h"

const apot_kernels apot_avx512 = APOT_KERNELS("avx512");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
