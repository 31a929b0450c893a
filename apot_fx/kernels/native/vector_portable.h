/* 4 floats by GCC's and Clang's vector extension, for any machine; tables lane by lane. */
#include <math.h>
#include <string.h>

#define WIDTH 4
#define VECTORS 8

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef vi vm;

APOT_INLINE vf v_set(float value) { return (vf){value, value, value, value}; }
APOT_INLINE vf v_load(const float *from) {
  vf made;
  memcpy(&made, from, sizeof made);
  return made;
}
APOT_INLINE vf v_mul(vf a, vf b) { return a * b; }
APOT_INLINE vf v_sub(vf a, vf b) { return a - b; }
APOT_INLINE vf v_div(vf a, vf b) { return a / b; }
APOT_INLINE vf v_select(vm mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
APOT_INLINE vf v_min(vf a, vf b) { return v_select(a < b, a, b); }
APOT_INLINE vf v_max(vf a, vf b) { return v_select(a > b, a, b); }
APOT_INLINE vm v_is_nan(vf a) { return a != a; }
APOT_INLINE vm v_within(vf x, vf low, vf high) { return (x >= low) & (x <= high); }
APOT_INLINE vi v_zero_where(vm mask, vi a) { return ~mask & a; }
APOT_INLINE vf v_float(vi a) { return __builtin_convertvector(a, vf); }
APOT_INLINE vi v_ceil(vf a) {
  vi down = __builtin_convertvector(a, vi); /* towards zero */
  return down - (a > v_float(down));        /* true is -1 */
}
APOT_INLINE vi v_half(vi a) { return a >> 1; }
APOT_INLINE vi v_add_int(vi a, int32_t b) { return a + b; }
APOT_INLINE vf v_gather(const float *table, vi place) {
  return (vf){table[place[0]], table[place[1]], table[place[2]], table[place[3]]};
}
APOT_INLINE vi v_gather_int(const int32_t *table, vi place) {
  return (vi){table[place[0]], table[place[1]], table[place[2]], table[place[3]]};
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
static float from_half(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) { /* zero or subnormal: a multiple of 2^-24 */
    float value = (float)rest * 0x1p-24f;
    return sign ? -value : value;
  }
  return float_of_bits(sign | ((rest << 13) + 0x38000000));
}
static uint16_t to_half(float value) {
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
static uint16_t to_bfloat(float value) {
  uint32_t bits = bits_of_float(value);
  if (value != value) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

APOT_INLINE vf v_load_as(const void *from, int64_t first, int dtype) {
  if (dtype == APOT_F32) return v_load((const float *)from + first);
  const uint16_t *bits = (const uint16_t *)from + first;
  vf made;
  for (int at = 0; at < WIDTH; at++)
    made[at] = dtype == APOT_F16 ? from_half(bits[at]) : float_of_bits((uint32_t)bits[at] << 16);
  return made;
}
APOT_INLINE void v_store_as(void *to, int64_t first, vf value, int dtype) {
  if (dtype == APOT_F32) {
    memcpy((float *)to + first, &value, sizeof value);
    return;
  }
  uint16_t *bits = (uint16_t *)to + first;
  for (int at = 0; at < WIDTH; at++)
    bits[at] = dtype == APOT_F16 ? to_half(value[at]) : to_bfloat(value[at]);
}
APOT_INLINE vi v_load_index(const uint8_t *from) { return (vi){from[0], from[1], from[2], from[3]}; }
APOT_INLINE void v_store_index(uint8_t *to, vi index) {
  for (int at = 0; at < WIDTH; at++) to[at] = (uint8_t)index[at];
}
APOT_INLINE int v_any_nan(const vf a[VECTORS]) {
  vm found = v_is_nan(a[0]);
  for (int part = 1; part < VECTORS; part++) found |= v_is_nan(a[part]);
  return (found[0] | found[1] | found[2] | found[3]) != 0;
}

typedef struct {
  double lane[APOT_LANES];
} vsum;

APOT_INLINE void sum_clear(vsum *sum) { memset(sum, 0, sizeof *sum); }
APOT_INLINE void sum_add(vsum *sum, const vf value[VECTORS]) {
  for (int part = 0; part < VECTORS; part++)
    for (int at = 0; at < WIDTH; at++) sum->lane[WIDTH * part + at] += (double)value[part][at];
}
APOT_INLINE void sum_store(const vsum *sum, double lanes[APOT_LANES]) {
  memcpy(lanes, sum->lane, sizeof sum->lane);
}
APOT_INLINE void v_add_double(double *to, vf value) {
  for (int at = 0; at < WIDTH; at++) to[at] += (double)value[at];
}
APOT_INLINE float v_least(vf a) {
  float least = a[0];
  for (int at = 1; at < WIDTH; at++) least = a[at] < least ? a[at] : least;
  return least;
}
APOT_INLINE float v_largest(vf a) {
  float most = a[0];
  for (int at = 1; at < WIDTH; at++) most = a[at] > most ? a[at] : most;
  return most;
}
