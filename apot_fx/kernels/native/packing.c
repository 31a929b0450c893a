/* Eight indices of a byte each are one word, whose fields are joined pair by pair: first bytes, then
 * halves, then words. Eight indices fill `bits` bytes. */
#include "packing.h"

#include <string.h>

#include "apot.h"
#include "threads.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bit streams are little-endian, and so must the machine be"
#endif

/* Indices of an item of work; a multiple of 8. */
#define ITEM 65536

/* The low `bits` of every field of `width` bits. */
APOT_INLINE uint64_t low_bits(int bits, int width) {
  uint64_t field = bits == 64 ? ~0ull : (1ull << bits) - 1, all = 0;
  for (int at = 0; at < 64; at += width) all |= field << at;
  return all;
}

APOT_INLINE uint64_t joined(uint64_t word, int bits) {
  for (int width = 8; width < 64; width *= 2) {
    int kept = bits * (width / 8);
    uint64_t mask = low_bits(kept, 2 * width);
    word = (word & mask) | ((word >> width & mask) << kept);
  }
  return word;
}

APOT_INLINE uint64_t parted(uint64_t word, int bits) {
  for (int width = 32; width >= 8; width /= 2) {
    int kept = bits * (width / 8);
    uint64_t mask = low_bits(kept, 2 * width);
    word = (word & mask) | ((word >> kept & mask) << width);
  }
  return word;
}

APOT_INLINE void pack_loop(const uint8_t *index, int64_t count, int bits, uint8_t *out) {
  int64_t blocks = count / 8, safe = blocks - 8 / bits; /* a block is stored as 8 bytes */
  int64_t block = 0;
  for (; block < blocks; block++) {
    uint64_t word;
    memcpy(&word, index + 8 * block, 8);
    word = joined(word, bits);
    memcpy(out + bits * block, &word, block < safe ? 8 : (size_t)bits);
  }
  if (count % 8) {
    uint64_t word = 0;
    memcpy(&word, index + 8 * block, (size_t)(count % 8));
    word = joined(word, bits);
    memcpy(out + bits * block, &word, (size_t)((count % 8 * bits + 7) / 8));
  }
}

APOT_INLINE void unpack_loop(const uint8_t *packed, int64_t count, int bits, uint8_t *out) {
  int64_t blocks = count / 8, safe = blocks - 8 / bits;
  int64_t block = 0;
  for (; block < blocks; block++) {
    uint64_t word = 0;
    memcpy(&word, packed + bits * block, block < safe ? 8 : (size_t)bits);
    word = parted(word & low_bits(8 * bits, 64), bits);
    memcpy(out + 8 * block, &word, 8);
  }
  if (count % 8) {
    uint64_t word = 0;
    memcpy(&word, packed + bits * block, (size_t)((count % 8 * bits + 7) / 8));
    word = parted(word & low_bits(8 * bits, 64), bits);
    memcpy(out + 8 * block, &word, (size_t)(count % 8));
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

void apot_pack_bytes(const uint8_t *index, int64_t count, int bits, uint8_t *out) {
  BY_BITS(pack_loop, index, count)
}
static void unpack_bytes(const uint8_t *packed, int64_t count, int bits, uint8_t *out) {
  BY_BITS(unpack_loop, packed, count)
}

typedef struct {
  const uint8_t *from;
  uint8_t *to;
  int64_t count;
  int bits, unpacks;
} stream;

static void stream_item(void *context, int64_t item) {
  const stream *s = context;
  int64_t at = item * ITEM, count = s->count - at < ITEM ? s->count - at : ITEM;
  int64_t byte = at / 8 * s->bits;
  if (s->unpacks) unpack_bytes(s->from + byte, count, s->bits, s->to + at);
  else apot_pack_bytes(s->from + at, count, s->bits, s->to + byte);
}

static int over(const stream *s, int threads) {
  stream all = *s;
  apot_share_out(stream_item, &all, (s->count + ITEM - 1) / ITEM, threads);
  return 1;
}

APOT_PUBLIC int apot_pack(const uint8_t *index, uint8_t *out, int64_t count, int bits,
                          int threads) {
  return over(&(stream){index, out, count, bits, 0}, threads);
}
APOT_PUBLIC int apot_unpack(const uint8_t *packed, uint8_t *out, int64_t count, int bits,
                            int threads) {
  return over(&(stream){packed, out, count, bits, 1}, threads);
}
