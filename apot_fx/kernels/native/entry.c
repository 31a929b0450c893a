/* What Python calls: tensors as runs of values that share an α, shared out among threads.
 *
 * A tensor in memory order is `outer` × `channels` × `inner` values, α running along `channels`.
 * With `row`, a channel is one group of `inner` values of a row of `row` values, whose last group
 * may be short.
 */
#include <stdlib.h>
#include <string.h>

#include "apot.h"
#include "threads.h"

/* Values of one item of work: two such arrays stay in a core's cache. */
#define ITEM 32768
/* Fewer values than this are not worth a second thread. */
#define WORTH_THREADS 32768
/* α's that one item of a backward pass over the last axis sums for. */
#define COLUMNS 256
/* Run totals are added in blocks of so many. */
#define RUNS 64
/* The longest step of any ISA, by which arrays along the channels are longer. */
#define PADDING 64

#define ALPHA_MIN 0x1p-40f
#define ALPHA_MAX 0x1p40f

extern const apot_kernels apot_avx512vbmi, apot_avx512, apot_avx2, apot_neon, apot_portable;

static const apot_kernels *kernels = &apot_portable;

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

APOT_PUBLIC void apot_use_isa(int place) { kernels = isa(place); }

typedef struct {
  int64_t outer, channels, inner, row;
} layout;

static int64_t values_of(const layout *l) {
  if (!l->row) return l->outer * l->channels * l->inner;
  return l->channels / ((l->row + l->inner - 1) / l->inner) * l->row;
}
/* Whether every value along the last axis has an α of its own. */
static int is_last(const layout *l) { return !l->row && l->inner == 1 && l->channels > 1; }

static float clamped(float alpha) {
  return alpha < ALPHA_MIN ? ALPHA_MIN : alpha > ALPHA_MAX ? ALPHA_MAX : alpha;
}

typedef struct {
  float scale, step, alpha;
} clip;

static clip clip_of(float alpha, const apot_set *set) {
  clip made;
  made.alpha = clamped(alpha);
  made.scale = (float)(2 * set->unit) / made.alpha;
  made.step = made.alpha / (float)set->unit;
  return made;
}

typedef struct {
  layout l;
  apot_span span; /* of the whole tensor */
  const float *alpha;
  void (*kernel)(const apot_span *);
  int64_t item, count; /* values of an item, and of all */
  size_t in, out;      /* bytes of a value */
  float *clips;        /* is_last: scale, step and α of every channel, padded */
  int careful;         /* is_last: some α is NaN */
  double *totals;      /* backward: of every block, or (is_last) of every channel */
} job;

static const void *from(const void *memory, int64_t at, size_t size) {
  return memory ? (const char *)memory + (size_t)at * size : NULL;
}

static apot_span part_of(const job *j, int64_t at, int64_t count) {
  apot_span s = j->span;
  s.x = from(s.x, at, j->in);
  s.grad = from(s.grad, at, j->in);
  s.out = (char *)s.out + (size_t)at * j->out;
  s.count = count;
  return s;
}

static void use_clip(apot_span *s, const clip *c) {
  s->scale = &c->scale;
  s->step = &c->step;
  s->alpha = &c->alpha;
  s->careful = c->alpha != c->alpha;
}
static void use_clips(apot_span *s, const job *j, int64_t channel) {
  int64_t padded = j->l.channels + PADDING;
  s->varies = 1;
  s->careful = j->careful;
  s->scale = j->clips + channel;
  s->step = s->scale + padded;
  s->alpha = s->step + padded;
}

/* The run that holds value `at`: which α, and how many values from `at` on. */
static int64_t run_at(const layout *l, int64_t at, int64_t *left) {
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
  const job *j = context;
  int64_t at = item * j->item, end = at + j->item < j->count ? at + j->item : j->count;
  while (at < end) {
    int64_t left, channel;
    clip own;
    apot_span s;
    if (j->clips) {
      left = j->l.channels;
      s = part_of(j, at, left);
      use_clips(&s, j, 0);
    } else {
      channel = run_at(&j->l, at, &left);
      if (left > end - at) left = end - at;
      own = clip_of(j->alpha[channel], j->span.set);
      s = part_of(j, at, left);
      use_clip(&s, &own);
    }
    j->kernel(&s);
    at += left;
  }
}

/* Scale, step and α of every channel; 0 where memory is short. */
static int make_clips(job *j) {
  int64_t padded = j->l.channels + PADDING;
  j->clips = calloc(3 * (size_t)padded, sizeof(float));
  if (!j->clips) return 0;
  for (int64_t channel = 0; channel < j->l.channels; channel++) {
    clip own = clip_of(j->alpha[channel], j->span.set);
    j->careful |= own.alpha != own.alpha;
    j->clips[channel] = own.scale;
    j->clips[channel + padded] = own.step;
    j->clips[channel + 2 * padded] = own.alpha;
  }
  return 1;
}

static int forward(job *j, int threads) {
  j->count = values_of(&j->l);
  if (!j->count) return 1;
  j->item = ITEM;
  if (is_last(&j->l)) {
    if (!make_clips(j)) return 0;
    int64_t rows = ITEM / j->l.channels;
    j->item = (rows ? rows : 1) * j->l.channels;
  }
  if (j->count < WORTH_THREADS) threads = 1;
  apot_share_out(forward_item, j, (j->count + j->item - 1) / j->item, threads);
  free(j->clips);
  return 1;
}

APOT_PUBLIC int apot_fake_quantize(const void *x, void *out, const float *alpha,
                                   const apot_set *set, int64_t outer, int64_t channels,
                                   int64_t inner, int64_t row, int in, int to, int nan_to_zero,
                                   int threads) {
  job j = {.l = {outer, channels, inner, row}, .alpha = alpha, .kernel = kernels->fake_quantize};
  j.span = (apot_span){
      .x = x, .out = out, .set = set, .in = in, .to = to, .nan_to_zero = nan_to_zero};
  j.in = size_of(in);
  j.out = size_of(to);
  return forward(&j, threads);
}

APOT_PUBLIC int apot_quantize(const void *x, void *out, const float *alpha, const apot_set *set,
                              int64_t outer, int64_t channels, int64_t inner, int64_t row, int in,
                              int threads) {
  job j = {.l = {outer, channels, inner, row}, .alpha = alpha, .kernel = kernels->quantize};
  j.span = (apot_span){.x = x, .out = out, .set = set, .in = in};
  j.in = size_of(in);
  j.out = 1;
  return forward(&j, threads);
}

APOT_PUBLIC int apot_dequantize(const void *index, void *out, const float *alpha,
                                const apot_set *set, int64_t outer, int64_t channels,
                                int64_t inner, int64_t row, int threads) {
  job j = {.l = {outer, channels, inner, row}, .alpha = alpha, .kernel = kernels->dequantize};
  j.span = (apot_span){.x = index, .out = out, .set = set};
  j.in = 1;
  j.out = sizeof(float);
  return forward(&j, threads);
}

/* backward */

static int64_t blocks_of(const layout *l) { return (l->inner + APOT_BLOCK - 1) / APOT_BLOCK; }

/* One item: several blocks of APOT_BLOCK values, each within one run. */
static void backward_item(void *context, int64_t item) {
  const job *j = context;
  const layout *l = &j->l;
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
    clip own = clip_of(j->alpha[channel], j->span.set);
    apot_span s = part_of(j, start + within, count);
    use_clip(&s, &own);
    s.total = j->totals ? j->totals + place : NULL;
    j->kernel(&s);
  }
}

/* One item: COLUMNS channels of every run, where each value has an α of its own. */
static void backward_columns(void *context, int64_t item) {
  const job *j = context;
  int64_t first = item * COLUMNS, channels = j->l.channels;
  int64_t count = channels - first < COLUMNS ? channels - first : COLUMNS;
  double block[COLUMNS + PADDING] = {0};
  for (int64_t run = 0; run < j->l.outer; run++) {
    apot_span s = part_of(j, run * channels + first, count);
    use_clips(&s, j, first);
    s.total = j->totals ? block : NULL;
    j->kernel(&s);
    if (j->totals && ((run + 1) % RUNS == 0 || run + 1 == j->l.outer)) {
      for (int64_t at = 0; at < count; at++) j->totals[first + at] += block[at];
      memset(block, 0, sizeof block);
    }
  }
}

/* The sum of a channel's blocks, in the order that docs/arithmetic.md gives. */
static double total_of(const job *j, int64_t channel) {
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
  job j = {.l = {outer, channels, inner, row}, .alpha = alpha, .kernel = kernels->backward};
  j.span = (apot_span){.x = x, .grad = grad, .out = dx, .set = set, .in = in};
  j.in = j.out = size_of(in);
  int last = is_last(&j.l), done = 0;
  if (values_of(&j.l) < WORTH_THREADS) threads = 1;
  j.count = last ? channels : outer * channels * blocks_of(&j.l);
  if (dalpha && j.count) j.totals = calloc((size_t)j.count, sizeof(double));
  if ((dalpha && j.count && !j.totals) || (last && !make_clips(&j))) goto out;
  if (last) {
    apot_share_out(backward_columns, &j, (channels + COLUMNS - 1) / COLUMNS, threads);
  } else if (j.count) {
    int64_t length = inner < APOT_BLOCK ? inner : APOT_BLOCK;
    j.item = ITEM / length;
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

/* observing */

typedef struct {
  const void *x;
  int64_t count;
  int in;
  float *ends;
} seen;

static void ends_item(void *context, int64_t item) {
  const seen *all = context;
  int64_t at = item * ITEM;
  apot_span s = {.x = from(all->x, at, size_of(all->in)), .in = all->in, .ends = all->ends + 2 * item};
  s.count = all->count - at < ITEM ? all->count - at : ITEM;
  kernels->ends(&s);
}

/* The smallest and largest finite value, into ends[0] and ends[1]; inf and -inf where none is. */
APOT_PUBLIC int apot_ends(const void *x, int64_t count, int in, float ends[2], int threads) {
  int64_t items = (count + ITEM - 1) / ITEM;
  seen all = {.x = x, .count = count, .in = in};
  all.ends = malloc(2 * sizeof(float) * (size_t)(items + 1));
  if (!all.ends) return 0;
  all.ends[0] = __builtin_inff();
  all.ends[1] = -__builtin_inff();
  apot_share_out(ends_item, &all, items, threads);
  ends[0] = all.ends[0];
  ends[1] = all.ends[1];
  for (int64_t item = 1; item < items; item++) {
    if (all.ends[2 * item] < ends[0]) ends[0] = all.ends[2 * item];
    if (all.ends[2 * item + 1] > ends[1]) ends[1] = all.ends[2 * item + 1];
  }
  free(all.ends);
  return 1;
}
