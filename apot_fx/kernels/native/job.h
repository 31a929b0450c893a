/* A tensor as runs of values that share an α, and the spans that kernels get of it.
 *
 * In memory order it is `outer` × `channels` × `inner` values, α running along `channels`. With
 * `row`, a channel is one group of `inner` values of a row of `row` values, whose last group may be
 * short.
 */
#ifndef APOT_JOB_H
#define APOT_JOB_H

#include "apot.h"
#include "threads.h"

/* Values of one item of work: two such arrays stay in a core's cache. */
#define APOT_ITEM 32768
/* Fewer values than this are not worth a second thread. */
#define APOT_WORTH_THREADS 32768

#define ALPHA_MIN 0x1p-40f
#define ALPHA_MAX 0x1p40f

typedef struct {
  int64_t outer, channels, inner, row;
} apot_layout;

/* Rows of `row` values that start `stride` values apart; or `row` 0, one after the other. */
typedef struct {
  int64_t row, stride;
} apot_gaps;

/* What the kernels need of an α. */
typedef struct {
  float scale, step, alpha;
} apot_clip;

typedef struct {
  apot_layout l;
  apot_span span; /* of the whole tensor */
  const float *alpha;
  void (*kernel)(const apot_span *);
  int64_t item, count; /* values of an item, and of all */
  apot_gaps gaps;      /* of x; results have none */
  size_t in, out;      /* bytes of a value */
  int bits;            /* quantize: pack indices of so many bits, or 0 */
  float *clips;        /* is_last: scale, step and α of every channel, padded */
  int careful;         /* is_last: some α is NaN */
  double *totals;      /* backward: of every block, or (is_last) of every channel */
} apot_job;

int64_t apot_values_of(const apot_layout *l);

/* Whether every value along the last axis has an α of its own. */
APOT_INLINE int apot_is_last(const apot_layout *l) {
  return !l->row && l->inner == 1 && l->channels > 1;
}

APOT_INLINE float apot_clamped(float alpha) {
  return alpha < ALPHA_MIN ? ALPHA_MIN : alpha > ALPHA_MAX ? ALPHA_MAX : alpha;
}

apot_clip apot_clip_of(float alpha, const apot_set *set);

APOT_INLINE const void *apot_from(const void *memory, int64_t at, size_t size) {
  return memory ? (const char *)memory + (size_t)at * size : NULL;
}

/* `count` values from value `at` on. */
apot_span apot_part_of(const apot_job *j, int64_t at, int64_t count);
void apot_use_clip(apot_span *s, const apot_clip *c);

/* Scale, step and α of every channel; 0 where memory is short. */
int apot_make_clips(apot_job *j);
void apot_use_clips(apot_span *s, const apot_job *j, int64_t channel);

#endif
