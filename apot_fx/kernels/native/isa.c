/* Which instruction set's kernels run: the best that this machine has, or one that is asked for. */
#include "apot.h"

extern const apot_kernels apot_avx512vbmi, apot_avx512, apot_avx2, apot_neon, apot_portable;

const apot_kernels *apot_current = &apot_portable;

static const apot_kernels *isa(int place) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  int half = __builtin_cpu_supports("f16c");
  int wide = half && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (place == 0) return wide && __builtin_cpu_supports("avx512vbmi") ? &apot_avx512vbmi : NULL;
  if (place == 1) return wide ? &apot_avx512 : NULL;
  if (place == 2) return half && __builtin_cpu_supports("avx2") ? &apot_avx2 : NULL;
#elif defined(__aarch64__)
  if (place == 3) return &apot_neon;
#endif
  return place == 4 ? &apot_portable : NULL;
}

/* Name of the `place`-th best ISA that there is, NULL where this machine lacks it; 0 … 4. */
APOT_PUBLIC const char *apot_isa(int place) {
  const apot_kernels *found = isa(place);
  return found ? found->name : NULL;
}

APOT_PUBLIC void apot_use_isa(int place) { apot_current = isa(place); }

