/* We link no OpenMP runtime: a second one beside torch's would start threads of its own. Python
 * finds the one that torch has loaded and gives us its GOMP_parallel, which LLVM's and Intel's
 * runtimes have too. */
#include "threads.h"

#include <stdatomic.h>

#include "apot.h"

typedef void (*parallel_region)(void (*)(void *), void *, unsigned, unsigned);

static parallel_region run_parallel;

/* GOMP_parallel of the loaded runtime; NULL: one thread. */
APOT_PUBLIC void apot_use_runtime(void *region) { run_parallel = (parallel_region)region; }

typedef struct {
  void (*work)(void *, int64_t);
  void *context;
  int64_t items;
  atomic_llong next;
} crew;

static void take_items(void *shared) {
  crew *all = shared;
  int64_t item;
  while ((item = atomic_fetch_add_explicit(&all->next, 1, memory_order_relaxed)) < all->items)
    all->work(all->context, item);
}

void apot_share_out(void (*work)(void *, int64_t), void *context, int64_t items, int threads) {
  if (threads > 1 && items > 1 && run_parallel) {
    crew all = {work, context, items, 0};
    run_parallel(take_items, &all, (unsigned)(items < threads ? items : threads), 0);
    return;
  }
  for (int64_t item = 0; item < items; item++) work(context, item);
}
