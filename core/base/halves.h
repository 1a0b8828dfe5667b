/* A float kept as two halves: itself rounded to bf16, and its lower 16 bits. For the host and for
 * CUDA kernels: one text, the same bits.
 *
 * A master weight x and the bf16 weight w it rounds to (to nearest, ties to even) differ by at most
 * half a unit of w's last place. So with its lower half read as a signed number w is enough:
 *
 *     bits of x = (bits of w) 2^16 + low,    -2^15 <= low < 2^15
 *
 * Only a tie that goes down, to the even w below, would need low = 2^15. It gets one less, which
 * moves x by one unit of its last place: one value in 131,072, and w stays its rounding. */
#ifndef MOE_CORE_BASE_HALVES_H
#define MOE_CORE_BASE_HALVES_H

#include "core/base/philox.h" /* MOE_EVERYWHERE */

/* The half that is kept beside w, of a float's bits. */
MOE_EVERYWHERE uint16_t moe_halves_low(uint32_t bits) {
  return (uint16_t)((bits & 0x1ffffu) == 0x8000u ? 0x7fffu : bits);
}

/* The float's bits again. */
MOE_EVERYWHERE uint32_t moe_halves_join(uint16_t w, uint16_t low) {
  return ((uint32_t)w << 16) + low - ((uint32_t)(low & 0x8000u) << 1);
}

#endif
