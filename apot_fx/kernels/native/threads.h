/* Items of work shared out among the threads of torch's own OpenMP runtime. */
#ifndef APOT_THREADS_H
#define APOT_THREADS_H

#include <stdint.h>

/* Calls work(context, item) once for every item; which thread takes which is left to chance. */
void apot_share_out(void (*work)(void *, int64_t), void *context, int64_t items, int threads);

#endif
