/* AVX-512 with VBMI: tables of bytes in registers. */
#include "apot.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,f16c")
#endif
#define APOT_VBMI 1
#include "vector_avx512.h"

#include "body.h"

const apot_kernels apot_avx512vbmi = APOT_KERNELS("avx512vbmi");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
