/* 8 floats, tables by gathers. */
#define WIDTH 8
#define VECTORS 4

typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm;

APOT_INLINE vf v_set(float value) { return _mm256_set1_ps(value); }
APOT_INLINE vf v_load(const float *from) { return _mm256_loadu_ps(from); }
APOT_INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
APOT_INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
APOT_INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
APOT_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
APOT_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
APOT_INLINE vm v_is_nan(vf a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
APOT_INLINE vm v_within(vf x, vf low, vf high) {
  return _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), _mm256_cmp_ps(x, high, _CMP_LE_OQ));
}
APOT_INLINE vf v_select(vm mask, vf a, vf b) { return _mm256_blendv_ps(b, a, mask); }
APOT_INLINE vi v_zero_where(vm mask, vi a) {
  return _mm256_andnot_si256(_mm256_castps_si256(mask), a);
}
APOT_INLINE vi v_ceil(vf a) { return _mm256_cvtps_epi32(_mm256_ceil_ps(a)); }
APOT_INLINE vf v_float(vi a) { return _mm256_cvtepi32_ps(a); }
APOT_INLINE vi v_half(vi a) { return _mm256_srai_epi32(a, 1); }
APOT_INLINE vi v_add_int(vi a, int32_t b) { return _mm256_add_epi32(a, _mm256_set1_epi32(b)); }
APOT_INLINE vf v_gather(const float *table, vi place) {
  return _mm256_i32gather_ps(table, place, 4);
}
APOT_INLINE vi v_gather_int(const int32_t *table, vi place) {
  return _mm256_i32gather_epi32(table, place, 4);
}

APOT_INLINE vf v_load_as(const void *from, int64_t at, int dtype) {
  if (dtype == APOT_F32) return _mm256_loadu_ps((const float *)from + at);
  __m128i bits = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + at));
  if (dtype == APOT_F16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* The low halves of eight integers, each in 0 … 65535. */
APOT_INLINE __m128i v_narrow(vi a) {
  return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}

APOT_INLINE void v_store_as(void *to, int64_t at, vf value, int dtype) {
  if (dtype == APOT_F32) {
    _mm256_storeu_ps((float *)to + at, value);
    return;
  }
  __m128i *place = (__m128i *)((uint16_t *)to + at);
  if (dtype == APOT_F16) {
    _mm_storeu_si128(place, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  vi bits = _mm256_castps_si256(value);
  vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  vi near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  vi nan = _mm256_castps_si256(v_is_nan(value));
  near = _mm256_blendv_epi8(near, _mm256_set1_epi32(0x7fc00000), nan);
  _mm_storeu_si128(place, v_narrow(_mm256_srli_epi32(near, 16)));
}

APOT_INLINE vi v_load_index(const uint8_t *from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
APOT_INLINE void v_store_index(uint8_t *to, vi index) {
  __m128i narrow = v_narrow(index);
  _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(narrow, narrow));
}

APOT_INLINE int v_any_nan(const vf a[VECTORS]) {
  vm found = _mm256_or_ps(_mm256_cmp_ps(a[0], a[1], _CMP_UNORD_Q),
                          _mm256_cmp_ps(a[2], a[3], _CMP_UNORD_Q));
  return _mm256_movemask_ps(found) != 0;
}

#define HAS_BYTES 1
#define BYTES_FIT(set) ((set)->high - (set)->low < 128)

/* 32 half-units from `low` on, as bytes: in each 128-bit lane four of each vector. What converts to
 * INT_MIN from +2^31 on must be kept away before; the rest saturates. */
APOT_INLINE vi bytes_of(const apot_set *set, const vf x[VECTORS], const vf scale[VECTORS]) {
  vf high = v_set((float)set->high);
  vi half[VECTORS], bytes;
  for (int part = 0; part < VECTORS; part++)
    half[part] = v_ceil(v_min(v_mul(x[part], scale[part]), high));
  bytes = _mm256_packs_epi16(_mm256_packs_epi32(half[0], half[1]),
                             _mm256_packs_epi32(half[2], half[3]));
  vi low = _mm256_set1_epi8((char)set->low);
  return _mm256_sub_epi8(_mm256_max_epi8(bytes, low), low);
}

/* Tables of 16: a place that is another's sets the top bit, and the shuffle gives 0. */
APOT_INLINE vi look_up_bytes(const apot_set *set, const void *table, vi place) {
  vi found = _mm256_setzero_si256();
  for (int first = 0; first <= set->high - set->low; first += 16) {
    __m128i lane = _mm_loadu_si128((const __m128i *)((const char *)table + first));
    vi own = _mm256_sub_epi8(place, _mm256_set1_epi8((char)first));
    own = _mm256_adds_epu8(own, _mm256_set1_epi8(0x70));
    vi part = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(lane), own);
    found = _mm256_or_si256(found, part);
  }
  return found;
}

/* fl(level · step): both factors are shifted by 2^24, which is exact. */
APOT_INLINE void v_values_by_bytes(const apot_set *set, const vf x[VECTORS],
                                   const vf scale[VECTORS], const vf step[VECTORS],
                                   vf out[VECTORS]) {
  vi level = look_up_bytes(set, set->level_line, bytes_of(set, x, scale));
  for (int part = 0; part < VECTORS; part++) {
    char at = (char)(4 * part);
    __m128i lane = _mm_setr_epi8(-1, -1, -1, at, -1, -1, -1, (char)(at + 1), -1, -1, -1,
                                 (char)(at + 2), -1, -1, -1, (char)(at + 3));
    vi top = _mm256_shuffle_epi8(level, _mm256_broadcastsi128_si256(lane));
    out[part] = v_mul(v_float(top), v_mul(step[part], v_set(0x1p-24f)));
  }
}
APOT_INLINE void v_indices_by_bytes(const apot_set *set, const vf x[VECTORS],
                                    const vf scale[VECTORS], uint8_t *to) {
  vi found = look_up_bytes(set, set->index_line, bytes_of(set, x, scale));
  vi order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i *)to, _mm256_permutevar8x32_epi32(found, order));
}

typedef struct {
  __m256d lane[8];
} vsum;

APOT_INLINE void sum_clear(vsum *sum) {
  for (int part = 0; part < 8; part++) sum->lane[part] = _mm256_setzero_pd();
}
APOT_INLINE void sum_add(vsum *sum, const vf value[VECTORS]) {
  for (int part = 0; part < VECTORS; part++) {
    __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(value[part]));
    __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(value[part], 1));
    sum->lane[2 * part] = _mm256_add_pd(sum->lane[2 * part], low);
    sum->lane[2 * part + 1] = _mm256_add_pd(sum->lane[2 * part + 1], high);
  }
}
APOT_INLINE void sum_store(const vsum *sum, double lanes[APOT_LANES]) {
  for (int part = 0; part < 8; part++) _mm256_storeu_pd(lanes + 4 * part, sum->lane[part]);
}
APOT_INLINE void v_add_double(double *to, vf value) {
  __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(value));
  __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1));
  _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), low));
  _mm256_storeu_pd(to + 4, _mm256_add_pd(_mm256_loadu_pd(to + 4), high));
}
APOT_INLINE float v_least(vf a) {
  float lane[WIDTH], least;
  _mm256_storeu_ps(lane, a);
  least = lane[0];
  for (int at = 1; at < WIDTH; at++) least = lane[at] < least ? lane[at] : least;
  return least;
}
APOT_INLINE float v_largest(vf a) {
  float lane[WIDTH], most;
  _mm256_storeu_ps(lane, a);
  most = lane[0];
  for (int at = 1; at < WIDTH; at++) most = lane[at] > most ? lane[at] : most;
  return most;
}
