/* Philox4x32-10, for the host (rng.c) and for CUDA kernels: one text, the same bits.
 * Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". */
#ifndef MOE_CORE_BASE_PHILOX_H
#define MOE_CORE_BASE_PHILOX_H

#include <stdint.h>

#ifdef __CUDACC__
#define MOE_EVERYWHERE static __host__ __device__ inline
#else
#define MOE_EVERYWHERE static inline
#endif

typedef struct {
  uint32_t word[4];
} moe_philox_block;

MOE_EVERYWHERE moe_philox_block moe_philox_rounds(uint64_t key, uint64_t counter_low,
                                                  uint64_t counter_high, int rounds) {
  uint32_t c0 = (uint32_t)counter_low, c1 = (uint32_t)(counter_low >> 32);
  uint32_t c2 = (uint32_t)counter_high, c3 = (uint32_t)(counter_high >> 32);
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
  for (int round = 0; round < rounds; round++) {
    uint64_t a = (uint64_t)0xD2511F53u * c0;
    uint64_t b = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  moe_philox_block out = {{c0, c1, c2, c3}};
  return out;
}

MOE_EVERYWHERE moe_philox_block moe_philox_draw(uint64_t key, uint64_t counter_low,
                                                uint64_t counter_high) {
  return moe_philox_rounds(key, counter_low, counter_high, 10);
}

/* rng.h, moe_rng_uniform_f64. */
MOE_EVERYWHERE double moe_philox_uniform_f64(uint64_t seed, uint64_t stream, uint64_t index) {
  moe_philox_block b = moe_philox_draw(seed, index, stream);
  uint64_t bits = (uint64_t)b.word[0] << 32 | b.word[1];
  return (double)(bits >> 11) * (1.0 / 9007199254740992.0); /* 2^-53 */
}

#endif
