/* Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011).
 *
 * A draw is a pure function of (seed, stream, index), so any rank can make any element and all
 * backends and rank counts agree. */
#ifndef MOE_CORE_BASE_RNG_H
#define MOE_CORE_BASE_RNG_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Four 32-bit words for a 128-bit counter and a 64-bit key. */
void moe_philox(uint64_t key, uint64_t counter_low, uint64_t counter_high, uint32_t out[4]);

/* Name a stream: a stable hash of text and two numbers (for example parameter, layer, expert). */
uint64_t moe_rng_stream(const char *text, int64_t a, int64_t b);

/* Uniform in [0, 1), 24 bits (float) or 53 bits (double). */
float moe_rng_uniform(uint64_t seed, uint64_t stream, uint64_t index);
double moe_rng_uniform_f64(uint64_t seed, uint64_t stream, uint64_t index);

/* out[i] = normal draw number begin + i of the stream, mean 0, deviation `std` (Box-Muller in
 * double precision, rounded once: the same bits everywhere). */
void moe_rng_normal_fill(uint64_t seed, uint64_t stream, int64_t begin, int64_t count, float std,
                         float *out);

/* A stateless bijection of [0, n): where `index` goes in the shuffle named by (seed, stream).
 * Cycle-walking Feistel network on Philox; O(1) memory. n >= 1, 0 <= index < n. */
int64_t moe_rng_permute(uint64_t seed, uint64_t stream, int64_t n, int64_t index);

#ifdef __cplusplus
}
#endif
#endif
