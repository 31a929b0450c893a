/* 8 floats as an array: plain C, which the compiler vectorises as far as it can. */
#include <math.h>
#include <string.h>

#define WIDTH 8
#define VECTORS 4
#define EACH for (int at = 0; at < WIDTH; at++)

typedef struct {
  float lane[WIDTH];
} vf;
typedef struct {
  int32_t lane[WIDTH];
} vi;
typedef vi vm;

APOT_INLINE vf v_set(float value) {
  vf made;
  EACH made.lane[at] = value;
  return made;
}
APOT_INLINE vf v_load(const float *from) {
  vf made;
  memcpy(made.lane, from, sizeof made.lane);
  return made;
}
#define LANE_BY_LANE(name, expression) \
  APOT_INLINE vf name(vf a, vf b) {    \
    EACH a.lane[at] = expression;      \
    return a;                          \
  }
LANE_BY_LANE(v_mul, a.lane[at] * b.lane[at])
LANE_BY_LANE(v_sub, a.lane[at] - b.lane[at])
LANE_BY_LANE(v_div, a.lane[at] / b.lane[at])
LANE_BY_LANE(v_min, a.lane[at] < b.lane[at] ? a.lane[at] : b.lane[at])
LANE_BY_LANE(v_max, a.lane[at] > b.lane[at] ? a.lane[at] : b.lane[at])

APOT_INLINE vm v_is_nan(vf a) {
  vm made;
  EACH made.lane[at] = a.lane[at] != a.lane[at];
  return made;
}
APOT_INLINE vm v_within(vf x, vf low, vf high) {
  vm made;
  EACH made.lane[at] = x.lane[at] >= low.lane[at] && x.lane[at] <= high.lane[at];
  return made;
}
APOT_INLINE vf v_select(vm mask, vf a, vf b) {
  EACH a.lane[at] = mask.lane[at] ? a.lane[at] : b.lane[at];
  return a;
}
APOT_INLINE vi v_zero_where(vm mask, vi a) {
  EACH a.lane[at] = mask.lane[at] ? 0 : a.lane[at];
  return a;
}
APOT_INLINE vi v_ceil(vf a) {
  vi made;
  EACH {
    int32_t down = (int32_t)a.lane[at]; /* towards zero */
    made.lane[at] = down + (a.lane[at] > (float)down);
  }
  return made;
}
APOT_INLINE vf v_float(vi a) {
  vf made;
  EACH made.lane[at] = (float)a.lane[at];
  return made;
}
APOT_INLINE vi v_half(vi a) {
  EACH a.lane[at] >>= 1;
  return a;
}
APOT_INLINE vi v_add_int(vi a, int32_t b) {
  EACH a.lane[at] += b;
  return a;
}
APOT_INLINE vf v_gather(const float *table, vi place) {
  vf made;
  EACH made.lane[at] = table[place.lane[at]];
  return made;
}
APOT_INLINE vi v_gather_int(const int32_t *table, vi place) {
  EACH place.lane[at] = table[place.lane[at]];
  return place;
}

APOT_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
APOT_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
APOT_INLINE float from_half(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) { /* zero or subnormal: a multiple of 2^-24 */
    float value = (float)rest * 0x1p-24f;
    return sign ? -value : value;
  }
  return float_of_bits(sign | ((rest << 13) + 0x38000000));
}
APOT_INLINE uint16_t to_half(float value) {
  uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
  if (rest >= 0x47800000) return (uint16_t)(sign | 0x7c00);
  if (rest < 0x38800000) { /* subnormal: adding 1/2 rounds at 2^-24, to even */
    float shifted = float_of_bits(rest) + 0.5f;
    return (uint16_t)(sign | (bits_of_float(shifted) - 0x3f000000));
  }
  uint32_t near = rest - 0x38000000 + 0xfff + (rest >> 13 & 1);
  return (uint16_t)(sign | near >> 13);
}
APOT_INLINE uint16_t to_bfloat(float value) {
  uint32_t bits = bits_of_float(value);
  if (value != value) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

APOT_INLINE vf v_load_as(const void *from, int64_t first, int dtype) {
  if (dtype == APOT_F32) return v_load((const float *)from + first);
  const uint16_t *bits = (const uint16_t *)from + first;
  vf made;
  EACH made.lane[at] =
      dtype == APOT_F16 ? from_half(bits[at]) : float_of_bits((uint32_t)bits[at] << 16);
  return made;
}
APOT_INLINE void v_store_as(void *to, int64_t first, vf value, int dtype) {
  if (dtype == APOT_F32) {
    memcpy((float *)to + first, value.lane, sizeof value.lane);
    return;
  }
  uint16_t *bits = (uint16_t *)to + first;
  EACH bits[at] = dtype == APOT_F16 ? to_half(value.lane[at]) : to_bfloat(value.lane[at]);
}
APOT_INLINE vi v_load_index(const uint8_t *from) {
  vi made;
  EACH made.lane[at] = from[at];
  return made;
}
APOT_INLINE void v_store_index(uint8_t *to, vi index) { EACH to[at] = (uint8_t)index.lane[at]; }

APOT_INLINE int v_any_nan(const vf a[VECTORS]) {
  int found = 0;
  for (int part = 0; part < VECTORS; part++)
    EACH found |= a[part].lane[at] != a[part].lane[at];
  return found;
}

typedef struct {
  double lane[APOT_LANES];
} vsum;

APOT_INLINE void sum_clear(vsum *sum) { memset(sum, 0, sizeof *sum); }
APOT_INLINE void sum_add(vsum *sum, const vf value[VECTORS]) {
  for (int part = 0; part < VECTORS; part++)
    EACH sum->lane[WIDTH * part + at] += (double)value[part].lane[at];
}
APOT_INLINE void sum_store(const vsum *sum, double lanes[APOT_LANES]) {
  memcpy(lanes, sum->lane, sizeof sum->lane);
}
APOT_INLINE void v_add_double(double *to, vf value) { EACH to[at] += (double)value.lane[at]; }
APOT_INLINE float v_least(vf a) {
  float least = a.lane[0];
  EACH least = a.lane[at] < least ? a.lane[at] : least;
  return least;
}
APOT_INLINE float v_largest(vf a) {
  float most = a.lane[0];
  EACH most = a.lane[at] > most ? a.lane[at] : most;
  return most;
}
