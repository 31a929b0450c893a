/* Bit streams of indices, shared out among threads. */
#include "apot.h"
#include "threads.h"

/* Indices of an item of work; a multiple of 8. */
#define ITEM 65536

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
  if (s->unpacks) apot_current->unpack(s->from + byte, count, s->bits, s->to + at);
  else apot_current->pack(s->from + at, count, s->bits, s->to + byte);
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
