/* 16 floats; with APOT_VBMI tables of bytes are looked up 64 at a time. */
#define WIDTH 16
#define VECTORS 4

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

APOT_INLINE vf v_set(float value) { return _mm512_set1_ps(value); }
APOT_INLINE vf v_load(const float *from) { return _mm512_loadu_ps(from); }
APOT_INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
APOT_INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
APOT_INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
APOT_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
APOT_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
APOT_INLINE vm v_is_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
APOT_INLINE vm v_within(vf x, vf low, vf high) {
  return _mm512_cmp_ps_mask(x, low, _CMP_GE_OQ) & _mm512_cmp_ps_mask(x, high, _CMP_LE_OQ);
}
APOT_INLINE vf v_select(vm mask, vf a, vf b) { return _mm512_mask_blend_ps(mask, b, a); }
APOT_INLINE vi v_zero_where(vm mask, vi a) { return _mm512_mask_set1_epi32(a, mask, 0); }
APOT_INLINE vi v_ceil(vf a) {
  return _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}
APOT_INLINE vf v_float(vi a) { return _mm512_cvtepi32_ps(a); }
APOT_INLINE vi v_half(vi a) { return _mm512_srai_epi32(a, 1); }
APOT_INLINE vi v_add_int(vi a, int32_t b) { return _mm512_add_epi32(a, _mm512_set1_epi32(b)); }
APOT_INLINE vf v_gather(const float *table, vi place) {
  return _mm512_i32gather_ps(place, table, 4);
}
APOT_INLINE vi v_gather_int(const int32_t *table, vi place) {
  return _mm512_i32gather_epi32(place, table, 4);
}

APOT_INLINE vf v_load_as(const void *from, int64_t at, int dtype) {
  if (dtype == APOT_F32) return _mm512_loadu_ps((const float *)from + at);
  __m256i bits = _mm256_loadu_si256((const __m256i *)((const uint16_t *)from + at));
  if (dtype == APOT_F16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

APOT_INLINE void v_store_as(void *to, int64_t at, vf value, int dtype) {
  if (dtype == APOT_F32) {
    _mm512_storeu_ps((float *)to + at, value);
    return;
  }
  __m256i *place = (__m256i *)((uint16_t *)to + at);
  if (dtype == APOT_F16) {
    _mm256_storeu_si256(place, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return;
  }
  vi bits = _mm512_castps_si512(value);
  vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  vi near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  near = _mm512_mask_blend_epi32(v_is_nan(value), near, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(place, _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16)));
}

APOT_INLINE vi v_load_index(const uint8_t *from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
}
APOT_INLINE void v_store_index(uint8_t *to, vi index) {
  _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(index));
}

/* Whether any value of two vectors is NaN, for all pairs. */
APOT_INLINE int v_any_nan(const vf a[VECTORS]) {
  __mmask16 found = _mm512_cmp_ps_mask(a[0], a[1], _CMP_UNORD_Q);
  return (found | _mm512_cmp_ps_mask(a[2], a[3], _CMP_UNORD_Q)) != 0;
}

#define HAS_BYTES 1
#ifdef APOT_VBMI
#define BYTES_FIT(set) 1
/* The look-up of 64 half-units at once. Conversion and packing saturate, so that only +2^31 and
 * above, which convert to INT_MIN, must be kept away before; tables are indexed by the half-unit's
 * byte itself, negative ones from their end. In each 128-bit lane lie four of each vector. */
APOT_INLINE vi bytes_of(const apot_set *set, const vf x[VECTORS], const vf scale[VECTORS]) {
  vf high = _mm512_set1_ps((float)set->high);
  vi half[VECTORS];
  for (int part = 0; part < VECTORS; part++)
    half[part] = v_ceil(_mm512_min_ps(_mm512_mul_ps(x[part], scale[part]), high));
  vi front = _mm512_packs_epi32(half[0], half[1]), back = _mm512_packs_epi32(half[2], half[3]);
  return _mm512_max_epi8(_mm512_packs_epi16(front, back), _mm512_set1_epi8((char)set->low));
}

APOT_INLINE vi look_up_bytes(const void *table, vi place, int long_table) {
  const char *bytes = (const char *)table;
  vi a = _mm512_loadu_si512(bytes), b = _mm512_loadu_si512(bytes + 64);
  vi found = _mm512_permutex2var_epi8(a, place, b);
  if (!long_table) return found;
  vi c = _mm512_loadu_si512(bytes + 128), d = _mm512_loadu_si512(bytes + 192);
  vi other = _mm512_permutex2var_epi8(c, place, d);
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(place), found, other);
}

/* The bytes of bytes_of's order, times 2^24, as floats of the four vectors. */
APOT_INLINE void floats_of(vi bytes, vf out[VECTORS]) {
  for (int part = 0; part < VECTORS; part++) {
    char at = (char)(4 * part);
    __m128i lane = _mm_setr_epi8(-1, -1, -1, at, -1, -1, -1, (char)(at + 1), -1, -1, -1,
                                 (char)(at + 2), -1, -1, -1, (char)(at + 3));
    out[part] = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(lane)));
  }
}

/* fl(level · step): both factors are shifted by 2^24, which is exact. */
APOT_INLINE void v_values_by_bytes(const apot_set *set, const vf x[VECTORS],
                                   const vf scale[VECTORS], const vf step[VECTORS],
                                   vf out[VECTORS]) {
  int long_table = set->high - set->low >= 128;
  floats_of(look_up_bytes(set->level_bytes, bytes_of(set, x, scale), long_table), out);
  for (int part = 0; part < VECTORS; part++)
    out[part] = _mm512_mul_ps(out[part], _mm512_mul_ps(step[part], _mm512_set1_ps(0x1p-24f)));
}

APOT_INLINE void v_indices_by_bytes(const apot_set *set, const vf x[VECTORS],
                                    const vf scale[VECTORS], uint8_t *to) {
  int long_table = set->high - set->low >= 128;
  vi found = look_up_bytes(set->index_bytes, bytes_of(set, x, scale), long_table);
  vi order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, found));
}

/* Levels of 64 indices in memory. */
APOT_INLINE void v_levels_by_bytes(const apot_set *set, const uint8_t *index,
                                   vf out[VECTORS]) {
  vi order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  vi place = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(index));
  floats_of(look_up_bytes(set->index_levels, place, set->count > 128), out);
  for (int part = 0; part < VECTORS; part++)
    out[part] = _mm512_mul_ps(out[part], _mm512_set1_ps(0x1p-24f));
}
#else
/* 64 levels in four registers, indexed by the half-unit itself, negative ones from their end. */
#define BYTES_FIT(set) ((set)->high < 32 && (set)->low >= -32)
APOT_INLINE vi wide(const void *bytes, int64_t at) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)((const char *)bytes + at)));
}
APOT_INLINE vi half_of(const apot_set *set, vf x, vf scale) {
  vf low = v_set((float)set->low), high = v_set((float)set->high);
  return v_ceil(v_max(v_min(v_mul(x, scale), high), low));
}
/* The table is laid out modulo 128 (or 256): half-units of 0 … 31 at its start, of -32 … -1 at its
 * end. */
APOT_INLINE vi look_up_64(const apot_set *set, const void *bytes, vi half) {
  int end = set->high - set->low < 128 ? 128 : 256;
  vi a = wide(bytes, 0), b = wide(bytes, 16), c = wide(bytes, end - 32), d = wide(bytes, end - 16);
  vi up = _mm512_permutex2var_epi32(a, half, b), down = _mm512_permutex2var_epi32(c, half, d);
  return _mm512_mask_blend_epi32(_mm512_movepi32_mask(half), up, down);
}
APOT_INLINE void v_values_by_bytes(const apot_set *set, const vf x[VECTORS],
                                   const vf scale[VECTORS], const vf step[VECTORS],
                                   vf out[VECTORS]) {
  for (int part = 0; part < VECTORS; part++) {
    vi level = look_up_64(set, set->level_bytes, half_of(set, x[part], scale[part]));
    out[part] = v_mul(v_float(level), step[part]);
  }
}
APOT_INLINE void v_indices_by_bytes(const apot_set *set, const vf x[VECTORS],
                                    const vf scale[VECTORS], uint8_t *to) {
  for (int part = 0; part < VECTORS; part++) {
    vi half = half_of(set, x[part], scale[part]);
    v_store_index(to + WIDTH * part, look_up_64(set, set->index_bytes, half));
  }
}
#endif

typedef struct {
  __m512d lane[4];
} vsum;

APOT_INLINE void sum_clear(vsum *sum) {
  for (int part = 0; part < 4; part++) sum->lane[part] = _mm512_setzero_pd();
}
APOT_INLINE void sum_add(vsum *sum, const vf value[VECTORS]) {
  for (int part = 0; part < VECTORS; part++) {
    __m512d *lane = sum->lane + 2 * (part % 2);
    __m256 high = _mm512_extractf32x8_ps(value[part], 1);
    lane[0] = _mm512_add_pd(lane[0], _mm512_cvtps_pd(_mm512_castps512_ps256(value[part])));
    lane[1] = _mm512_add_pd(lane[1], _mm512_cvtps_pd(high));
  }
}
APOT_INLINE void sum_store(const vsum *sum, double lanes[APOT_LANES]) {
  for (int part = 0; part < 4; part++) _mm512_storeu_pd(lanes + 8 * part, sum->lane[part]);
}
APOT_INLINE void v_add_double(double *to, vf value) {
  __m256 high = _mm512_extractf32x8_ps(value, 1);
  __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(value));
  _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), low));
  _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(to + 8), _mm512_cvtps_pd(high)));
}
APOT_INLINE float v_least(vf a) { return _mm512_reduce_min_ps(a); }
APOT_INLINE float v_largest(vf a) { return _mm512_reduce_max_ps(a); }
