/* The kernels, written once over the vectors of `vector_*.h`; each isa_*.c includes both.
 *
 * Every step works on STEP values. The rest of a span is copied into a buffer of one step, which
 * is filled up with zeros. Dtypes and kinds of tables are constants where a loop is inlined.
 */
#include <math.h>
#include <string.h>

#include "bits.h"

#define STEP (WIDTH * VECTORS)
#define EACH_VECTOR for (int part = 0; part < VECTORS; part++)

APOT_INLINE void load_step(const void *from, int64_t at, int dtype, vf out[VECTORS]) {
  EACH_VECTOR out[part] = v_load_as(from, at + WIDTH * part, dtype);
}
APOT_INLINE void store_step(void *to, int64_t at, const vf value[VECTORS], int dtype) {
  EACH_VECTOR v_store_as(to, at + WIDTH * part, value[part], dtype);
}
/* What α gives: the same for all values, or one for each. */
APOT_INLINE void alpha_step(const float *from, int64_t at, int varies, vf out[VECTORS]) {
  EACH_VECTOR out[part] = varies ? v_load(from + at + WIDTH * part) : v_set(*from);
}

/* clamp(ceil(fl(x · scale)), low, high), counted from `low`; `nan`: NaN may come, as 0. */
APOT_INLINE void places_of(const apot_set *set, const vf x[VECTORS], const vf scale[VECTORS],
                           int from_low, int nan, vi out[VECTORS]) {
  vf low = v_set((float)set->low), high = v_set((float)set->high);
  EACH_VECTOR {
    vf t = v_mul(x[part], scale[part]);
    vi half = v_ceil(v_max(v_min(t, high), low));
    if (nan) half = v_zero_where(v_is_nan(t), half);
    out[part] = from_low ? v_add_int(half, -set->low) : half;
  }
}

/* fl(level · step); `nan` as above. */
APOT_INLINE void values_of(const apot_set *set, int look, const vf x[VECTORS],
                           const vf scale[VECTORS], const vf step[VECTORS], int nan,
                           vf out[VECTORS]) {
#ifdef HAS_BYTES
  if (look == APOT_BYTES && !nan && BYTES_FIT(set)) {
    v_values_by_bytes(set, x, scale, step, out);
    return;
  }
#endif
  vi place[VECTORS];
  places_of(set, x, scale, look != APOT_SHIFT, nan, place);
  EACH_VECTOR {
    vf level =
        look == APOT_SHIFT ? v_float(v_half(place[part])) : v_gather(set->levels, place[part]);
    out[part] = v_mul(level, step[part]);
  }
}

/* Runs `step(at)` over whole steps and `rest(at, count)` over what remains. */
#define OVER_SPAN(count, step, rest)                          \
  do {                                                        \
    int64_t at = 0, end = (count) / STEP * STEP;              \
    for (; at < end; at += STEP) step;                        \
    if (at < (count)) {                                       \
      int64_t left = (count)-at;                              \
      rest;                                                   \
    }                                                         \
  } while (0)

/* fake_quantize */

APOT_INLINE void fake_step(const apot_span *s, const void *x, void *out, int64_t at, int64_t alpha,
                           int in, int to, int look, int varies) {
  vf value[VECTORS], scale[VECTORS], step[VECTORS], y[VECTORS];
  load_step(x, at, in, value);
  alpha_step(s->scale, alpha, varies, scale);
  alpha_step(s->step, alpha, varies, step);
  if (s->careful || v_any_nan(value)) {
    values_of(s->set, look, value, scale, step, 1, y);
    if (!s->nan_to_zero) EACH_VECTOR y[part] = v_select(v_is_nan(value[part]), value[part], y[part]);
  } else {
    values_of(s->set, look, value, scale, step, 0, y);
  }
  store_step(out, at, y, to);
}

APOT_INLINE void fake_loop(const apot_span *s, int in, int to, int look, int varies) {
  uint32_t x[STEP] = {0}, y[STEP];
  OVER_SPAN(s->count, fake_step(s, s->x, s->out, at, at, in, to, look, varies), {
    memcpy(x, (const char *)s->x + at * size_of(in), left * size_of(in));
    fake_step(s, x, y, 0, at, in, to, look, varies);
    memcpy((char *)s->out + at * size_of(to), y, left * size_of(to));
  });
}

/* quantize */

APOT_INLINE void index_step(const apot_span *s, const void *x, uint8_t *out, int64_t at,
                            int64_t alpha, int in, int look, int varies) {
  const apot_set *set = s->set;
  vf value[VECTORS], scale[VECTORS];
  vi place[VECTORS];
  load_step(x, at, in, value);
  alpha_step(s->scale, alpha, varies, scale);
#ifdef HAS_BYTES
  if (look == APOT_BYTES && BYTES_FIT(set) && !s->careful && !v_any_nan(value)) {
    v_indices_by_bytes(set, value, scale, out + at);
    return;
  }
#endif
  places_of(set, value, scale, look != APOT_SHIFT, 1, place);
  EACH_VECTOR {
    vi index = look == APOT_SHIFT ? v_add_int(v_half(place[part]), -(set->low / 2))
                                  : v_gather_int(set->indices, place[part]);
    v_store_index(out + at + WIDTH * part, index);
  }
}

APOT_INLINE void index_loop(const apot_span *s, int in, int look, int varies) {
  uint32_t x[STEP] = {0};
  uint8_t index[STEP];
  OVER_SPAN(s->count, index_step(s, s->x, (uint8_t *)s->out, at, at, in, look, varies), {
    memcpy(x, (const char *)s->x + at * size_of(in), left * size_of(in));
    index_step(s, x, index, 0, at, in, look, varies);
    memcpy((uint8_t *)s->out + at, index, left);
  });
}

/* dequantize */

APOT_INLINE void value_step(const apot_span *s, const uint8_t *x, float *out, int64_t at,
                            int64_t alpha, int look, int varies) {
  const apot_set *set = s->set;
  vf step[VECTORS], level[VECTORS];
  alpha_step(s->step, alpha, varies, step);
#ifdef APOT_VBMI
  if (look == APOT_BYTES) v_levels_by_bytes(set, x + at, level);
  else
#endif
    EACH_VECTOR {
      vi index = v_load_index(x + at + WIDTH * part);
      level[part] = look == APOT_SHIFT ? v_float(v_add_int(index, set->low / 2))
                                       : v_gather(set->by_index, index);
    }
  EACH_VECTOR level[part] = v_mul(level[part], step[part]);
  store_step(out, at, level, APOT_F32);
}

APOT_INLINE void value_loop(const apot_span *s, int look, int varies) {
  uint8_t index[STEP] = {0};
  float value[STEP];
  OVER_SPAN(s->count, value_step(s, (const uint8_t *)s->x, (float *)s->out, at, at, look, varies), {
    memcpy(index, (const uint8_t *)s->x + at, left);
    value_step(s, index, value, 0, at, look, varies);
    memcpy((float *)s->out + at, value, left * sizeof(float));
  });
}

/* backward: dx, and for α Σ grad · (q/M − x/α inside); without `total` dx alone */

APOT_INLINE void back_step(const apot_span *s, const void *x, const void *grad, void *out,
                           double *total, vsum *sum, int64_t at, int64_t alpha, int in, int look,
                           int varies) {
  const apot_set *set = s->set;
  vf value[VECTORS], given[VECTORS], step[VECTORS], dx[VECTORS];
  vm inside[VECTORS];
  vf least = v_set((float)(set->low / 2)), most = v_set((float)(set->high / 2)), zero = v_set(0);
  load_step(x, at, in, value);
  load_step(grad, at, in, given);
  alpha_step(s->step, alpha, varies, step);
  EACH_VECTOR {
    inside[part] = v_within(value[part], v_mul(least, step[part]), v_mul(most, step[part]));
    dx[part] = v_select(inside[part], given[part], zero);
  }
  store_step(out, at, dx, in);
  if (!s->total) return;
  vf scale[VECTORS], clip[VECTORS], share[VECTORS];
  vf unit = v_set((float)set->unit);
  alpha_step(s->scale, alpha, varies, scale);
  alpha_step(s->alpha, alpha, varies, clip);
  EACH_VECTOR step[part] = v_set(1);
  if (s->careful || v_any_nan(value)) values_of(set, look, value, scale, step, 1, share);
  else values_of(set, look, value, scale, step, 0, share);
  EACH_VECTOR {
    vf within = v_select(inside[part], v_div(value[part], clip[part]), zero);
    share[part] = v_mul(v_sub(v_div(share[part], unit), within), given[part]);
    if (varies) v_add_double(total + at + WIDTH * part, share[part]);
  }
  if (!varies) sum_add(sum, share);
}

APOT_INLINE void back_loop(const apot_span *s, int in, int look, int varies) {
  uint32_t x[STEP] = {0}, grad[STEP] = {0}, out[STEP];
  double total[STEP] = {0}, lanes[APOT_LANES];
  vsum sum;
  sum_clear(&sum);
  OVER_SPAN(s->count,
            back_step(s, s->x, s->grad, s->out, s->total, &sum, at, at, in, look, varies), {
              memcpy(x, (const char *)s->x + at * size_of(in), left * size_of(in));
              memcpy(grad, (const char *)s->grad + at * size_of(in), left * size_of(in));
              if (varies && s->total) memcpy(total, s->total + at, left * sizeof(double));
              back_step(s, x, grad, out, total, &sum, 0, at, in, look, varies);
              memcpy((char *)s->out + at * size_of(in), out, left * size_of(in));
              if (varies && s->total) memcpy(s->total + at, total, left * sizeof(double));
            });
  if (varies || !s->total) return;
  sum_store(&sum, lanes);
  for (int half = APOT_LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  *s->total = lanes[0];
}

/* the smallest and largest finite value, into s->ends, and how often which pattern comes */

APOT_INLINE void ends_of(const vf x[VECTORS], vf low[VECTORS], vf high[VECTORS]) {
  vf none[VECTORS];
  EACH_VECTOR none[part] = v_mul(x[part], v_set(0)); /* NaN where x is not finite */
  if (v_any_nan(none)) {
    EACH_VECTOR {
      vm odd = v_is_nan(none[part]);
      low[part] = v_min(low[part], v_select(odd, v_set(INFINITY), x[part]));
      high[part] = v_max(high[part], v_select(odd, v_set(-INFINITY), x[part]));
    }
  } else {
    EACH_VECTOR low[part] = v_min(low[part], x[part]);
    EACH_VECTOR high[part] = v_max(high[part], x[part]);
  }
}

/* Sign, exponent and leading bits. Neighbours are counted apart: adding to one place twice in a row
 * takes the time of a store and a load. */
APOT_INLINE void count_step(const vf x[VECTORS], int64_t count, uint32_t *counts) {
  vf plain[VECTORS];
  uint32_t bits[STEP];
  EACH_VECTOR plain[part] = v_sub(x[part], v_set(-0.0f)); /* -0 becomes 0 */
  store_step(bits, 0, plain, APOT_F32);
  for (int64_t at = 0; at < count; at++)
    counts[APOT_COPIES * (bits[at] >> (23 - APOT_SUB_BITS)) + at % APOT_COPIES]++;
}

APOT_INLINE void seen_step(const apot_span *s, const void *from, int64_t at, int64_t count, int in,
                           int counts, vf low[VECTORS], vf high[VECTORS]) {
  vf x[VECTORS];
  load_step(from, at, in, x);
  ends_of(x, low, high);
  if (counts) count_step(x, count, s->counts);
}

APOT_INLINE void seen_loop(const apot_span *s, int in, int counts) {
  vf low[VECTORS], high[VECTORS];
  uint32_t last[STEP];
  EACH_VECTOR low[part] = v_set(INFINITY);
  EACH_VECTOR high[part] = v_set(-INFINITY);
  OVER_SPAN(s->count, seen_step(s, s->x, at, STEP, in, counts, low, high), {
    size_t size = size_of(in);
    const char *rest = (const char *)s->x + at * size;
    /* Filled up with a value that is there. */
    for (int64_t lane = 0; lane < STEP; lane++)
      memcpy((char *)last + lane * size, rest + (lane < left ? lane : 0) * size, size);
    seen_step(s, last, 0, left, in, counts, low, high);
  });
  for (int part = 1; part < VECTORS; part++) {
    low[0] = v_min(low[0], low[part]);
    high[0] = v_max(high[0], high[part]);
  }
  s->ends[0] = v_least(low[0]);
  s->ends[1] = v_largest(high[0]);
}

/* One inlined loop for each kind of table, dtype and α. */

#define BY_ALPHA(loop, ...) s->varies ? loop(s, __VA_ARGS__, 1) : loop(s, __VA_ARGS__, 0)
#ifdef HAS_BYTES
#define BY_LOOK(loop, ...)                                                                  \
  do {                                                                                      \
    int look = s->set->look;                                                                \
    if (look == APOT_SHIFT) (BY_ALPHA(loop, __VA_ARGS__, APOT_SHIFT));                      \
    else if (look == APOT_BYTES) (BY_ALPHA(loop, __VA_ARGS__, APOT_BYTES));                 \
    else (BY_ALPHA(loop, __VA_ARGS__, APOT_TABLE));                                         \
  } while (0)
#else
#define BY_LOOK(loop, ...)                                                   \
  do {                                                                       \
    if (s->set->look == APOT_SHIFT) (BY_ALPHA(loop, __VA_ARGS__, APOT_SHIFT)); \
    else (BY_ALPHA(loop, __VA_ARGS__, APOT_TABLE));                          \
  } while (0)
#endif

static void fake_quantize(const apot_span *s) {
  if (s->in == APOT_F32) BY_LOOK(fake_loop, APOT_F32, APOT_F32);
  else if (s->in == APOT_BF16 && s->to == APOT_BF16) BY_LOOK(fake_loop, APOT_BF16, APOT_BF16);
  else if (s->in == APOT_BF16) BY_LOOK(fake_loop, APOT_BF16, APOT_F32);
  else if (s->to == APOT_F16) BY_LOOK(fake_loop, APOT_F16, APOT_F16);
  else BY_LOOK(fake_loop, APOT_F16, APOT_F32);
}
static void quantize(const apot_span *s) {
  if (s->in == APOT_F32) BY_LOOK(index_loop, APOT_F32);
  else if (s->in == APOT_BF16) BY_LOOK(index_loop, APOT_BF16);
  else BY_LOOK(index_loop, APOT_F16);
}
APOT_INLINE void value_loop_of(const apot_span *s, int unused, int look, int varies) {
  (void)unused;
  value_loop(s, look, varies);
}
static void dequantize(const apot_span *s) { BY_LOOK(value_loop_of, 0); }
static void backward(const apot_span *s) {
  if (s->in == APOT_F32) BY_LOOK(back_loop, APOT_F32);
  else if (s->in == APOT_BF16) BY_LOOK(back_loop, APOT_BF16);
  else BY_LOOK(back_loop, APOT_F16);
}
APOT_INLINE void seen(const apot_span *s, int counts) {
  if (s->in == APOT_F32) seen_loop(s, APOT_F32, counts);
  else if (s->in == APOT_BF16) seen_loop(s, APOT_BF16, counts);
  else seen_loop(s, APOT_F16, counts);
}
static void ends(const apot_span *s) { seen(s, 0); }
static void histogram(const apot_span *s) { seen(s, 1); }

/* Each isa_*.c names the set of these. */
#define APOT_KERNELS(name) \
  { name, fake_quantize, quantize, dequantize, backward, ends, histogram, pack, unpack }
