/* Stochastic rounding of the optimizer's moments to bf16, for the CPU and for CUDA kernels: one
 * text, the same bits.
 *
 * A value between two neighbours of bf16 goes to the upper one with the probability that makes its
 * mean exact: 16 random bits are added below the kept ones, and the carry decides. The bits of
 * element i at step t are a pure function of (t, i); one draw of Philox serves four elements.
 * Source: Gupta et al. 2015, arXiv:1502.02551. */
#ifndef MOE_KERNELS_ROUNDING_H
#define MOE_KERNELS_ROUNDING_H

#include "core/base/philox.h"

/* Seven rounds are the fewest that pass all of TestU01's BigCrush (Salmon et al. 2011, table 2);
 * they are a good part of what an update computes. Words 0 to 3 belong to elements 4 group .. 4
 * group + 3: the low half rounds m, the high half v.
 */
MOE_EVERYWHERE moe_philox_block moe_rounding_draw(int64_t step, int64_t group) {
  const uint64_t purpose = 0x6d6f6d656e747321u; /* a fixed seed: runs differ by what is rounded */
  return moe_philox_rounds(purpose, (uint64_t)group, (uint64_t)step, 7);
}

/* f32 bits to bf16 bits; `random` below 2^16. Infinities and NaNs stay what they are. */
MOE_EVERYWHERE uint16_t moe_rounding_bf16(uint32_t bits, uint32_t random) {
  int nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return (uint16_t)((nan ? bits | 0x400000u : bits + random) >> 16);
}

#endif
