/* Plain C, for any machine. */
#include "apot.h"
#include "vector_portable.h"

#include "body.h"

const apot_kernels apot_portable = APOT_KERNELS("portable");
