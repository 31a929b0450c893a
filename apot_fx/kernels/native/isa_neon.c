/* NEON, which every 64-bit ARM has. */
#include "apot.h"

#if defined(__aarch64__)
#include "vector_neon.h"

#include "body.h"

const apot_kernels apot_neon = APOT_KERNELS("neon");
#endif
