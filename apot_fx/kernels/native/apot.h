/* What the kernels share: a level set's tables, one span of values, and the kernels of one ISA. */
#ifndef APOT_H
#define APOT_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define APOT_PUBLIC __declspec(dllexport)
#else
#define APOT_PUBLIC __attribute__((visibility("default")))
#endif

enum { APOT_F32, APOT_BF16, APOT_F16 };

/* How a half-unit becomes a level: SHIFT where levels are consecutive integers, BYTES where half-units
 * and levels fit signed bytes, else TABLE. */
enum { APOT_SHIFT, APOT_BYTES, APOT_TABLE };

/* Tables of one level set, filled by Python. `levels` and `indices` start at half-unit 2·q_min. */
typedef struct {
  int32_t low, high; /* 2·q_min and 2·q_max */
  int32_t unit;
  int32_t look;
  int32_t count; /* levels */
  const float *levels;        /* level of every half-unit */
  const int32_t *indices;     /* index of every half-unit */
  const float *by_index;      /* level of every index, 256 of them */
  const int8_t *level_bytes;  /* BYTES: level of every half-unit, at its byte modulo 256 (or 128) */
  const uint8_t *index_bytes; /* BYTES: its index, likewise */
  const int8_t *index_levels; /* BYTES: as `by_index`, 256 of them */
  const int8_t *level_line;   /* BYTES: as `levels`, 256 of them */
  const uint8_t *index_line;  /* BYTES: as `indices`, 256 of them */
} apot_set;

/* Contiguous values that share one α, or (varies) have one each. */
typedef struct {
  const void *x;
  const void *grad;
  void *out;
  int64_t count;
  const float *scale; /* fl(2M/α) */
  const float *step;  /* fl(α/M) */
  const float *alpha;
  const apot_set *set;
  int in, to; /* dtypes */
  int varies;
  int nan_to_zero;
  int careful; /* some α is NaN */
  double *total; /* gradient of α: one sum, or (varies) one to add to for each value */
  float *ends;   /* smallest and largest finite value */
  uint32_t *counts; /* histogram: APOT_COUNTS of them, added to */
} apot_span;

typedef struct {
  const char *name;
  void (*fake_quantize)(const apot_span *);
  void (*quantize)(const apot_span *);
  void (*dequantize)(const apot_span *);
  void (*backward)(const apot_span *);
  void (*ends)(const apot_span *);
  void (*histogram)(const apot_span *);
  /* Indices below 2^bits, bits in 1 … 8, into (count · bits + 7) / 8 bytes, and back. */
  void (*pack)(const uint8_t *index, int64_t count, int bits, uint8_t *out);
  void (*unpack)(const uint8_t *packed, int64_t count, int bits, uint8_t *out);
} apot_kernels;

/* Those that run. */
extern const apot_kernels *apot_current;

/* Values whose gradient for α is summed in one go; spans of `backward` are no longer. */
#define APOT_BLOCK 4096
/* Sums run in this many lanes, whatever the width of the machine's vectors. */
#define APOT_LANES 32
/* A histogram takes so many bits of a mantissa, and counts in so many places by turns. */
#define APOT_SUB_BITS 5
#define APOT_COPIES 4
#define APOT_COUNTS (APOT_COPIES * (512 << APOT_SUB_BITS))

#define APOT_INLINE static inline __attribute__((always_inline))

APOT_INLINE size_t size_of(int dtype) { return dtype == APOT_F32 ? 4 : 2; }

#endif
