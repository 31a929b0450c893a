/* fake_quantize, quantize and dequantize: a value for every value. */
#include <stdlib.h>

#include "job.h"

/* The run that holds value `at`: which α, and how many values from `at` on. */
static int64_t run_at(const apot_layout *l, int64_t at, int64_t *left) {
  if (!l->row) {
    int64_t run = at / l->inner;
    *left = l->inner - at % l->inner;
    return run % l->channels;
  }
  int64_t place = at % l->row, group = place / l->inner;
  int64_t groups = (l->row + l->inner - 1) / l->inner;
  int64_t end = (group + 1) * l->inner;
  *left = (end < l->row ? end : l->row) - place;
  return at / l->row * groups + group;
}

static void forward_item(void *context, int64_t item) {
  const apot_job *j = context;
  int64_t first = item * j->item, end = first + j->item < j->count ? first + j->item : j->count;
  uint8_t indices[APOT_ITEM];
  for (int64_t at = first, left; at < end; at += left) {
    apot_clip own;
    apot_span s;
    if (j->clips) {
      left = j->l.channels;
      s = apot_part_of(j, at, left);
      apot_use_clips(&s, j, 0);
    } else {
      int64_t channel = run_at(&j->l, at, &left);
      int64_t row = j->gaps.row;
      if (left > end - at) left = end - at;
      if (row && left > row - at % row) left = row - at % row;
      own = apot_clip_of(j->alpha[channel], j->span.set);
      s = apot_part_of(j, at, left);
      apot_use_clip(&s, &own);
    }
    if (j->bits) s.out = indices + (at - first);
    j->kernel(&s);
  }
  if (j->bits)
    apot_current->pack(indices, end - first, j->bits,
                       (uint8_t *)j->span.out + first / 8 * j->bits);
}

static int forward(apot_job *j, int threads) {
  j->count = apot_values_of(&j->l);
  if (!j->count) return 1;
  j->item = APOT_ITEM;
  if (apot_is_last(&j->l)) {
    if (!apot_make_clips(j)) return 0;
    int64_t rows = APOT_ITEM / j->l.channels;
    j->item = (rows ? rows : 1) * j->l.channels;
  }
  if (j->count < APOT_WORTH_THREADS) threads = 1;
  apot_share_out(forward_item, j, (j->count + j->item - 1) / j->item, threads);
  free(j->clips);
  return 1;
}

APOT_PUBLIC int apot_fake_quantize(const void *x, void *out, const float *alpha,
                                   const apot_set *set, int64_t outer, int64_t channels,
                                   int64_t inner, int64_t row, int64_t gap_row,
                                   int64_t gap_stride, int in, int to, int nan_to_zero,
                                   int threads) {
  apot_job j = {.l = {outer, channels, inner, row}, .alpha = alpha, .kernel = apot_current->fake_quantize};
  j.span = (apot_span){
      .x = x, .out = out, .set = set, .in = in, .to = to, .nan_to_zero = nan_to_zero};
  j.in = size_of(in);
  j.out = size_of(to);
  j.gaps = (apot_gaps){gap_row, gap_stride};
  return forward(&j, threads);
}

/* With `bits`, indices are packed, so many bits each; then not with an α for each value. */
APOT_PUBLIC int apot_quantize(const void *x, void *out, const float *alpha, const apot_set *set,
                              int64_t outer, int64_t channels, int64_t inner, int64_t row,
                              int64_t gap_row, int64_t gap_stride, int in, int bits, int threads) {
  apot_job j = {.l = {outer, channels, inner, row}, .alpha = alpha, .bits = bits};
  j.kernel = apot_current->quantize;
  j.span = (apot_span){.x = x, .out = out, .set = set, .in = in};
  j.in = size_of(in);
  j.out = 1;
  j.gaps = (apot_gaps){gap_row, gap_stride};
  return forward(&j, threads);
}

APOT_PUBLIC int apot_dequantize(const void *index, void *out, const float *alpha,
                                const apot_set *set, int64_t outer, int64_t channels,
                                int64_t inner, int64_t row, int64_t gap_row, int64_t gap_stride,
                                int threads) {
  apot_job j = {.l = {outer, channels, inner, row}, .alpha = alpha, .kernel = apot_current->dequantize};
  j.span = (apot_span){.x = index, .out = out, .set = set};
  j.in = 1;
  j.out = sizeof(float);
  j.gaps = (apot_gaps){gap_row, gap_stride};
  return forward(&j, threads);
}

