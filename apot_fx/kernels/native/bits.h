/* Indices as a little-endian bit stream, in plain C that each isa_*.c compiles for its machine.
 *
 * Eight indices of a byte each are one word, whose fields are joined pair by pair: first bytes, then
 * halves, then words. Eight indices fill `bits` bytes. Eight words are worked on at a time.
 */
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bit streams are little-endian, and so must the machine be"
#endif

#define BLOCK 64 /* indices */

typedef uint64_t words __attribute__((vector_size(64)));
typedef uint32_t halves __attribute__((vector_size(32)));
typedef uint16_t quarters __attribute__((vector_size(16)));

/* The lower of two fields in every pair of `width` bits each: its low `bits`. */
APOT_INLINE uint64_t low_fields(int width, int bits) {
  uint64_t pairs = width == 8 ? 0x0001000100010001u : width == 16 ? 0x0000000100000001u : 1;
  return ((UINT64_C(1) << bits) - 1) * pairs;
}
#define JOIN(word, width, bits)                 \
  (((word)&low_fields(width, bits)) |           \
   (((word) >> (width)&low_fields(width, bits)) << (bits)))
#define PART(word, width, bits)                 \
  (((word)&low_fields(width, bits)) |           \
   (((word) >> (bits)&low_fields(width, bits)) << (width)))

/* Into 8·bits bytes. */
APOT_INLINE void pack_block(const uint8_t *index, int bits, uint8_t *out) {
  words all;
  memcpy(&all, index, BLOCK);
  all = JOIN(all, 8, bits);
  all = JOIN(all, 16, 2 * bits);
  all = JOIN(all, 32, 4 * bits);
  if (bits == 4) {
    halves found = __builtin_convertvector(all, halves);
    memcpy(out, &found, sizeof found);
  } else if (bits == 2) {
    quarters found = __builtin_convertvector(all, quarters);
    memcpy(out, &found, sizeof found);
  } else {
    uint8_t bytes[BLOCK + 8];
    for (int at = 0; at < 8; at++) {
      uint64_t word = all[at];
      memcpy(bytes + bits * at, &word, 8);
    }
    memcpy(out, bytes, (size_t)(8 * bits));
  }
}

/* Of 8·bits bytes; what else a word holds falls away. */
APOT_INLINE void unpack_block(const uint8_t *packed, int bits, uint8_t *out) {
  words all;
  if (bits == 4) {
    halves given;
    memcpy(&given, packed, sizeof given);
    all = __builtin_convertvector(given, words);
  } else if (bits == 2) {
    quarters given;
    memcpy(&given, packed, sizeof given);
    all = __builtin_convertvector(given, words);
  } else {
    uint8_t bytes[BLOCK + 8];
    memcpy(bytes, packed, (size_t)(8 * bits));
    for (int at = 0; at < 8; at++) {
      uint64_t word;
      memcpy(&word, bytes + bits * at, 8);
      all[at] = word;
    }
  }
  all = PART(all, 32, 4 * bits);
  all = PART(all, 16, 2 * bits);
  all = PART(all, 8, bits);
  memcpy(out, &all, BLOCK);
}

APOT_INLINE void pack_loop(const uint8_t *index, int64_t count, int bits, uint8_t *out) {
  int64_t at = 0;
  for (; at + BLOCK <= count; at += BLOCK) pack_block(index + at, bits, out + at / 8 * bits);
  if (at < count) {
    uint8_t from[BLOCK] = {0}, to[BLOCK];
    memcpy(from, index + at, (size_t)(count - at));
    pack_block(from, bits, to);
    memcpy(out + at / 8 * bits, to, (size_t)((count - at) * bits + 7) / 8);
  }
}

APOT_INLINE void unpack_loop(const uint8_t *packed, int64_t count, int bits, uint8_t *out) {
  int64_t at = 0;
  for (; at + BLOCK <= count; at += BLOCK) unpack_block(packed + at / 8 * bits, bits, out + at);
  if (at < count) {
    uint8_t from[BLOCK] = {0}, to[BLOCK];
    memcpy(from, packed + at / 8 * bits, (size_t)((count - at) * bits + 7) / 8);
    unpack_block(from, bits, to);
    memcpy(out + at, to, (size_t)(count - at));
  }
}

/* A loop for each number of bits, whose masks are constants. */
#define BY_BITS(loop, ...)                    \
  switch (bits) {                             \
    case 1: loop(__VA_ARGS__, 1, out); break; \
    case 2: loop(__VA_ARGS__, 2, out); break; \
    case 3: loop(__VA_ARGS__, 3, out); break; \
    case 4: loop(__VA_ARGS__, 4, out); break; \
    case 5: loop(__VA_ARGS__, 5, out); break; \
    case 6: loop(__VA_ARGS__, 6, out); break; \
    case 7: loop(__VA_ARGS__, 7, out); break; \
    default: memcpy(out, __VA_ARGS__);        \
  }

static void pack(const uint8_t *index, int64_t count, int bits, uint8_t *out) {
  BY_BITS(pack_loop, index, count)
}
static void unpack(const uint8_t *packed, int64_t count, int bits, uint8_t *out) {
  BY_BITS(unpack_loop, packed, count)
}
