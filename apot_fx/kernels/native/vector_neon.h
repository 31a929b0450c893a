/* 4 floats; tables are read one lane at a time. */
#include <arm_neon.h>

#define WIDTH 4
#define VECTORS 8

typedef float32x4_t vf;
typedef int32x4_t vi;
typedef uint32x4_t vm;

APOT_INLINE vf v_set(float value) { return vdupq_n_f32(value); }
APOT_INLINE vf v_load(const float *from) { return vld1q_f32(from); }
APOT_INLINE vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
APOT_INLINE vf v_sub(vf a, vf b) { return vsubq_f32(a, b); }
APOT_INLINE vf v_div(vf a, vf b) { return vdivq_f32(a, b); }
APOT_INLINE vf v_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
APOT_INLINE vf v_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
APOT_INLINE vm v_is_nan(vf a) { return vmvnq_u32(vceqq_f32(a, a)); }
APOT_INLINE vm v_within(vf x, vf low, vf high) {
  return vandq_u32(vcgeq_f32(x, low), vcleq_f32(x, high));
}
APOT_INLINE vf v_select(vm mask, vf a, vf b) { return vbslq_f32(mask, a, b); }
APOT_INLINE vi v_zero_where(vm mask, vi a) { return vbicq_s32(a, vreinterpretq_s32_u32(mask)); }
APOT_INLINE vi v_ceil(vf a) { return vcvtpq_s32_f32(a); }
APOT_INLINE vf v_float(vi a) { return vcvtq_f32_s32(a); }
APOT_INLINE vi v_half(vi a) { return vshrq_n_s32(a, 1); }
APOT_INLINE vi v_add_int(vi a, int32_t b) { return vaddq_s32(a, vdupq_n_s32(b)); }
APOT_INLINE vf v_gather(const float *table, vi place) {
  int32_t at[4];
  vst1q_s32(at, place);
  float found[4] = {table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
  return vld1q_f32(found);
}
APOT_INLINE vi v_gather_int(const int32_t *table, vi place) {
  int32_t at[4];
  vst1q_s32(at, place);
  int32_t found[4] = {table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
  return vld1q_s32(found);
}

APOT_INLINE vf v_load_as(const void *from, int64_t at, int dtype) {
  if (dtype == APOT_F32) return vld1q_f32((const float *)from + at);
  uint16x4_t bits = vld1_u16((const uint16_t *)from + at);
  if (dtype == APOT_F16) return vcvt_f32_f16(vreinterpret_f16_u16(bits));
  return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}
APOT_INLINE void v_store_as(void *to, int64_t at, vf value, int dtype) {
  if (dtype == APOT_F32) {
    vst1q_f32((float *)to + at, value);
    return;
  }
  uint16_t *place = (uint16_t *)to + at;
  if (dtype == APOT_F16) {
    vst1_u16(place, vreinterpret_u16_f16(vcvt_f16_f32(value)));
    return;
  }
  uint32x4_t bits = vreinterpretq_u32_f32(value);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t near = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  near = vbslq_u32(v_is_nan(value), vdupq_n_u32(0x7fc00000), near);
  vst1_u16(place, vshrn_n_u32(near, 16));
}
APOT_INLINE vi v_load_index(const uint8_t *from) {
  int32_t index[4] = {from[0], from[1], from[2], from[3]};
  return vld1q_s32(index);
}
APOT_INLINE void v_store_index(uint8_t *to, vi index) {
  int32_t at[4];
  vst1q_s32(at, index);
  for (int lane = 0; lane < 4; lane++) to[lane] = (uint8_t)at[lane];
}

APOT_INLINE int v_any_nan(const vf a[VECTORS]) {
  vm found = v_is_nan(a[0]);
  for (int part = 1; part < VECTORS; part++) found = vorrq_u32(found, v_is_nan(a[part]));
  return vmaxvq_u32(found) != 0;
}

typedef struct {
  float64x2_t lane[16];
} vsum;

APOT_INLINE void sum_clear(vsum *sum) {
  for (int part = 0; part < 16; part++) sum->lane[part] = vdupq_n_f64(0);
}
APOT_INLINE void sum_add(vsum *sum, const vf value[VECTORS]) {
  for (int part = 0; part < VECTORS; part++) {
    float64x2_t low = vcvt_f64_f32(vget_low_f32(value[part]));
    sum->lane[2 * part] = vaddq_f64(sum->lane[2 * part], low);
    sum->lane[2 * part + 1] = vaddq_f64(sum->lane[2 * part + 1], vcvt_high_f64_f32(value[part]));
  }
}
APOT_INLINE void sum_store(const vsum *sum, double lanes[APOT_LANES]) {
  for (int part = 0; part < 16; part++) vst1q_f64(lanes + 2 * part, sum->lane[part]);
}
APOT_INLINE void v_add_double(double *to, vf value) {
  vst1q_f64(to, vaddq_f64(vld1q_f64(to), vcvt_f64_f32(vget_low_f32(value))));
  vst1q_f64(to + 2, vaddq_f64(vld1q_f64(to + 2), vcvt_high_f64_f32(value)));
}
APOT_INLINE float v_least(vf a) { return vminvq_f32(a); }
APOT_INLINE float v_largest(vf a) { return vmaxvq_f32(a); }
