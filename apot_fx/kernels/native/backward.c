/* Gradients for x and α; α's in an order that does not hang on threads. */
#include <stdlib.h>
#include <string.h>

#include "job.h"

/* α's that one item of a backward pass over the last axis sums for. */
#define COLUMNS 256
/* The longest step of any ISA, by which their totals are longer. */
#define PADDING 64
/* Run totals are added in blocks of so many. */
#define RUNS 64

static int64_t blocks_of(const apot_layout *l) { return (l->inner + APOT_BLOCK - 1) / APOT_BLOCK; }

/* One item: several blocks of APOT_BLOCK values, each within one run. */
static void backward_item(void *context, int64_t item) {
  const apot_job *j = context;
  const apot_layout *l = &j->l;
  int64_t blocks = blocks_of(l), groups = l->row ? (l->row + l->inner - 1) / l->inner : 0;
  int64_t end = (item + 1) * j->item < j->count ? (item + 1) * j->item : j->count;
  for (int64_t place = item * j->item; place < end; place++) {
    int64_t run = place / blocks, within = place % blocks * APOT_BLOCK, length = l->inner;
    int64_t start = run * l->inner, channel = run % l->channels;
    if (l->row) {
      int64_t before = run % groups * l->inner;
      start = run / groups * l->row + before;
      if (length > l->row - before) length = l->row - before;
    }
    if (within >= length) continue; /* its total stays 0 */
    int64_t count = length - within < APOT_BLOCK ? length - within : APOT_BLOCK;
    apot_clip own = apot_clip_of(j->alpha[channel], j->span.set);
    apot_span s = apot_part_of(j, start + within, count);
    apot_use_clip(&s, &own);
    s.total = j->totals ? j->totals + place : NULL;
    j->kernel(&s);
  }
}

/* One item: COLUMNS channels of every run, where each value has an α of its own. */
static void backward_columns(void *context, int64_t item) {
  const apot_job *j = context;
  int64_t first = item * COLUMNS, channels = j->l.channels;
  int64_t count = channels - first < COLUMNS ? channels - first : COLUMNS;
  double block[COLUMNS + PADDING] = {0};
  for (int64_t run = 0; run < j->l.outer; run++) {
    apot_span s = apot_part_of(j, run * channels + first, count);
    apot_use_clips(&s, j, first);
    s.total = j->totals ? block : NULL;
    j->kernel(&s);
    if (j->totals && ((run + 1) % RUNS == 0 || run + 1 == j->l.outer)) {
      for (int64_t at = 0; at < count; at++) j->totals[first + at] += block[at];
      memset(block, 0, sizeof block);
    }
  }
}

/* The sum of a channel's blocks, in the order that docs/arithmetic.md gives. */
static double total_of(const apot_job *j, int64_t channel) {
  int64_t blocks = blocks_of(&j->l);
  double total = 0, some = 0;
  for (int64_t run = 0; run < j->l.outer; run++) {
    const double *block = j->totals + (run * j->l.channels + channel) * blocks;
    double own = 0;
    for (int64_t at = 0; at < blocks; at++) own += block[at];
    some += own;
    if ((run + 1) % RUNS == 0 || run + 1 == j->l.outer) {
      total += some;
      some = 0;
    }
  }
  return total;
}

/* An α outside its limits only takes a gradient that leads it back. */
static float led_back(float gradient, float alpha) {
  if (alpha < ALPHA_MIN && gradient > 0) return 0;
  if (alpha > ALPHA_MAX && gradient < 0) return 0;
  return gradient;
}

/* `dalpha` may be NULL: then no gradient for α is asked for. */
APOT_PUBLIC int apot_backward(const void *x, const void *grad, void *dx, const float *alpha,
                              float *dalpha, const apot_set *set, int64_t outer, int64_t channels,
                              int64_t inner, int64_t row, int in, int threads) {
  apot_job j = {.l = {outer, channels, inner, row}, .alpha = alpha, .kernel = apot_current->backward};
  j.span = (apot_span){.x = x, .grad = grad, .out = dx, .set = set, .in = in};
  j.in = j.out = size_of(in);
  int last = apot_is_last(&j.l), done = 0;
  if (apot_values_of(&j.l) < APOT_WORTH_THREADS) threads = 1;
  j.count = last ? channels : outer * channels * blocks_of(&j.l);
  if (dalpha && j.count) j.totals = calloc((size_t)j.count, sizeof(double));
  if ((dalpha && j.count && !j.totals) || (last && !apot_make_clips(&j))) goto out;
  if (last) {
    apot_share_out(backward_columns, &j, (channels + COLUMNS - 1) / COLUMNS, threads);
  } else if (j.count) {
    int64_t length = inner < APOT_BLOCK ? inner : APOT_BLOCK;
    j.item = APOT_ITEM / length;
    apot_share_out(backward_item, &j, (j.count + j.item - 1) / j.item, threads);
  }
  for (int64_t channel = 0; dalpha && channel < channels; channel++) {
    double total = !j.count ? 0 : last ? j.totals[channel] : total_of(&j, channel);
    dalpha[channel] = led_back((float)total, alpha[channel]);
  }
  done = 1;
out:
  free(j.totals);
  free(j.clips);
  return done;
}

