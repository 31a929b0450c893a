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

/* Most ranges that the items are cut into; more threads than that share some. */
#define RANGES 64

/* On a cache line of its own. */
typedef struct {
  atomic_llong next;
  int64_t end;
  char gap[48];
} range;

typedef struct {
  void (*work)(void *, int64_t);
  void *context;
  int ranges;
  atomic_int arrived;
  range of[RANGES];
} crew;

/* A thread first does a range of its own: two that write to the same fresh page wait for each other.
 * Then it helps where items are left, since cores differ in what else they do. */
static void take_items(void *shared) {
  crew *all = shared;
  int own = atomic_fetch_add_explicit(&all->arrived, 1, memory_order_relaxed);
  for (int turn = 0; turn < all->ranges; turn++) {
    range *r = &all->of[(own + turn) % all->ranges];
    int64_t item;
    while ((item = atomic_fetch_add_explicit(&r->next, 1, memory_order_relaxed)) < r->end)
      all->work(all->context, item);
  }
}

void apot_share_out(void (*work)(void *, int64_t), void *context, int64_t items, int threads) {
  if (items < threads) threads = (int)items;
  if (threads > 1 && run_parallel) {
    crew all = {.work = work, .context = context};
    all.ranges = threads < RANGES ? threads : RANGES;
    for (int place = 0; place < all.ranges; place++) {
      all.of[place].next = items * place / all.ranges;
      all.of[place].end = items * (place + 1) / all.ranges;
    }
    run_parallel(take_items, &all, (unsigned)threads, 0);
    return;
  }
  for (int64_t item = 0; item < items; item++) work(context, item);
}
