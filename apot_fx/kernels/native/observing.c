/* What observers keep of a tensor: its ends, and counts of magnitudes. */
#include <stdlib.h>

#include "job.h"

/* Bins of a histogram: 32 an octave, from 2^-40 to 2^40, per sign. */
#define BINS (80 << APOT_SUB_BITS)
#define FIRST ((127 - 40) << APOT_SUB_BITS)
#define PATTERNS (256 << APOT_SUB_BITS) /* of exponent and leading bits, per sign */

typedef struct {
  const void *x;
  int64_t count, item;
  int in;
  void (*kernel)(const apot_span *);
  float *ends;      /* two for each item */
  uint32_t *counts; /* APOT_COUNTS for each item, or NULL */
} seen;

static void seen_item(void *context, int64_t item) {
  const seen *all = context;
  int64_t at = item * all->item;
  apot_span s = {.in = all->in, .ends = all->ends + 2 * item};
  s.x = apot_from(all->x, at, size_of(all->in));
  s.count = all->count - at < all->item ? all->count - at : all->item;
  s.counts = all->counts ? all->counts + item * APOT_COUNTS : NULL;
  all->kernel(&s);
}

static void no_ends(float ends[2]) {
  ends[0] = __builtin_inff();
  ends[1] = -__builtin_inff();
}
static void widen(float *low, float *high, const float by[2]) {
  if (by[0] < *low) *low = by[0];
  if (by[1] > *high) *high = by[1];
}

/* The smallest and largest finite value; inf and -inf where none is. */
static void join_ends(const seen *all, int64_t items, float ends[2]) {
  no_ends(ends);
  for (int64_t item = 0; item < items; item++) widen(&ends[0], &ends[1], all->ends + 2 * item);
}

APOT_PUBLIC int apot_ends(const void *x, int64_t count, int in, float ends[2], int threads) {
  int64_t items = (count + APOT_ITEM - 1) / APOT_ITEM;
  seen all = {.x = x, .count = count, .item = APOT_ITEM, .in = in, .kernel = apot_current->ends};
  float few[2 * 64]; /* a small tensor needs no memory */
  all.ends = items <= 64 ? few : malloc(2 * sizeof(float) * (size_t)items);
  if (!all.ends) return 0;
  apot_share_out(seen_item, &all, items, count < APOT_WORTH_THREADS ? 1 : threads);
  join_ends(&all, items, ends);
  if (all.ends != few) free(all.ends);
  return 1;
}

/* Patterns below 2^-40 go to the first bin, from 2^40 on to the last; inf and NaN to none. */
static void join_counts(const seen *all, int64_t items, int64_t *out) {
  for (int64_t item = 0; item < items; item++) {
    const uint32_t *counts = all->counts + item * APOT_COUNTS;
    for (int64_t place = 0; place < 2 * PATTERNS; place++) {
      int64_t pattern = place % PATTERNS, bin = pattern - FIRST, found = 0;
      if (pattern >> APOT_SUB_BITS == 255) continue;
      for (int copy = 0; copy < APOT_COPIES; copy++) found += counts[APOT_COPIES * place + copy];
      if (!found) continue;
      bin = bin < 0 ? 0 : bin >= BINS ? BINS - 1 : bin;
      out[place / PATTERNS * BINS + bin] += found;
    }
  }
}

/* Ends as above and, added to `out`, how many positive, then negative values fall into each bin. */
APOT_PUBLIC int apot_histogram(const void *x, int64_t count, int in, float ends[2], int64_t *out,
                               int threads) {
  if (count < APOT_WORTH_THREADS) threads = 1;
  int64_t least = (count + threads - 1) / threads, most = INT64_C(1) << 31; /* of uint32_t */
  seen all = {.x = x, .count = count, .in = in, .kernel = apot_current->histogram};
  all.item = least < most ? (least ? least : 1) : most;
  int64_t items = (count + all.item - 1) / all.item;
  all.ends = malloc(2 * sizeof(float) * (size_t)(items + 1));
  all.counts = calloc((size_t)(items + 1) * APOT_COUNTS, sizeof(uint32_t));
  int done = all.ends && all.counts;
  if (done) {
    apot_share_out(seen_item, &all, items, threads);
    join_ends(&all, items, ends);
    join_counts(&all, items, out);
  }
  free(all.ends);
  free(all.counts);
  return done;
}

static float larger(float a, float b) { return a > b ? a : b; }

/* α of a range, by the smallest of the set's that holds it. */
static float covering(float low, float high, const apot_set *set) {
  int q_min = set->low / 2, q_max = set->high / 2;
  float alpha = 0;
  if (!(high >= low)) low = high = 0; /* nothing seen */
  if (q_max > 0) alpha = larger(high, 0) * (float)((double)set->unit / q_max);
  if (q_min < 0) alpha = larger(alpha, larger(-low, 0) * (float)((double)set->unit / -q_min));
  return apot_clamped(alpha);
}

static float moved(float kept, float new, float constant) {
  if (__builtin_isinf(new)) return kept;
  return __builtin_isinf(kept) ? new : kept + constant * (new - kept);
}

/* x quantized by one α while its ends are found. */
typedef struct {
  seen all;
  apot_span span;
  size_t out; /* bytes of a result */
  int finds_ends;
} led;

/* Ends first: a block that was read lies in the cache for what follows. */
static void led_item(void *context, int64_t item) {
  const led *l = context;
  int64_t at = item * APOT_ITEM, end = at + APOT_ITEM < l->all.count ? at + APOT_ITEM : l->all.count;
  float *ends = l->all.ends + 2 * item;
  if (l->finds_ends) no_ends(ends);
  for (; at < end; at += APOT_BLOCK) {
    float own[2];
    apot_span s = l->span;
    s.x = apot_from(s.x, at, size_of(s.in));
    s.out = (char *)s.out + (size_t)at * l->out;
    s.count = end - at < APOT_BLOCK ? end - at : APOT_BLOCK;
    s.ends = own;
    if (l->finds_ends) {
      apot_current->ends(&s);
      widen(&ends[0], &ends[1], own);
    }
    apot_current->fake_quantize(&s);
  }
}

static void quantize_led(led *l, float alpha, int64_t items, int threads) {
  apot_clip clip = apot_clip_of(alpha, l->span.set);
  apot_use_clip(&l->span, &clip);
  apot_share_out(led_item, l, items, threads);
}

/* Take x into the range seen so far, or (constant) its moving average, set α by it, and put x on its
 * grid. A range that is seen in full seldom grows, so x is quantized by the last α while its ends
 * are found, and again where they change α. */
APOT_PUBLIC int apot_follow(const void *x, void *out, int64_t count, int in, int to,
                            int nan_to_zero, float *low, float *high, float *alpha,
                            const apot_set *set, float constant, int threads) {
  float few[2 * 64], ends[2];
  int64_t items = (count + APOT_ITEM - 1) / APOT_ITEM;
  led l = {.all = {.x = x, .count = count, .item = APOT_ITEM, .in = in}, .out = size_of(to)};
  l.span = (apot_span){.x = x, .out = out, .set = set, .in = in, .to = to};
  l.span.nan_to_zero = nan_to_zero;
  l.all.kernel = apot_current->ends;
  l.all.ends = items <= 64 ? few : malloc(2 * sizeof(float) * (size_t)items);
  if (!l.all.ends) return 0;
  if (count < APOT_WORTH_THREADS) threads = 1;
  float before = *alpha;
  l.finds_ends = !constant;
  if (constant) apot_share_out(seen_item, &l.all, items, threads);
  else quantize_led(&l, before, items, threads);
  join_ends(&l.all, items, ends);
  if (constant) {
    *low = moved(*low, ends[0], constant);
    *high = moved(*high, ends[1], constant);
  } else {
    widen(low, high, ends);
  }
  *alpha = covering(*low, *high, set);
  l.finds_ends = 0;
  if (constant || *alpha != before) quantize_led(&l, *alpha, items, threads);
  if (l.all.ends != few) free(l.all.ends);
  return 1;
}
