/* Indices as a little-endian bit stream. */
#ifndef APOT_PACKING_H
#define APOT_PACKING_H

#include <stdint.h>

/* Indices below 2^bits, bits in 1 … 8, into (count · bits + 7) / 8 bytes. */
void apot_pack_bytes(const uint8_t *index, int64_t count, int bits, uint8_t *out);

#endif
