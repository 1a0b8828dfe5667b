/* Normal draws from Philox's words, for the host (rng.c) and for CUDA kernels: one text, the same
 * bits.
 *
 * Only IEEE additions, multiplications, divisions and square roots are used, which have one right
 * answer each; the C library's log and sincos differ between versions and processors, and a last
 * bit that differs would make weights depend on the machine. Whoever includes this must be compiled
 * without contraction into fused multiply-adds: -ffp-contract=off, nvcc -fmad=false. */
#ifndef MOE_CORE_BASE_NORMAL_H
#define MOE_CORE_BASE_NORMAL_H

#include <math.h>
#include <string.h>

#include "core/base/philox.h"

/* Natural logarithm of 0 < x < 1 (normal), to 1e-14 relative: x = m 2^k with m near 1, then
 * log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172. */
MOE_EVERYWHERE double moe_normal_log(double x) {
  uint64_t bits, m_bits, k_bits;
  memcpy(&bits, &x, sizeof bits);
  /* Split at sqrt(1/2) rather than 1, so that m - 1 loses nothing to cancellation. */
  uint64_t shifted = bits - 0x3FE6A09E667F3BCDu + (1023ull << 52);
  m_bits = bits - (shifted & 0xFFF0000000000000u) + (1023ull << 52);
  k_bits = shifted >> 52 | 0x4330000000000000u; /* 2^52 + k + 1023: integer to double by hand */
  double m, k;
  memcpy(&m, &m_bits, sizeof m);
  memcpy(&k, &k_bits, sizeof k);
  k -= 0x1p52 + 1023.0;
  double s = (m - 1.0) / (m + 1.0);
  double z = s * s;
  double series = 1.0 / 17.0;
  series = series * z + 1.0 / 15.0;
  series = series * z + 1.0 / 13.0;
  series = series * z + 1.0 / 11.0;
  series = series * z + 1.0 / 9.0;
  series = series * z + 1.0 / 7.0;
  series = series * z + 1.0 / 5.0;
  series = series * z + 1.0 / 3.0;
  series = series * z + 1.0;
  return k * 0.69314718055994530942 + 2.0 * s * series;
}

/* sin and cos of a, |a| <= pi/4: Taylor series to 1e-16. */
MOE_EVERYWHERE double moe_normal_sine(double a) {
  double z = a * a;
  double p = -1.0 / 1307674368000.0;
  p = p * z + 1.0 / 6227020800.0;
  p = p * z - 1.0 / 39916800.0;
  p = p * z + 1.0 / 362880.0;
  p = p * z - 1.0 / 5040.0;
  p = p * z + 1.0 / 120.0;
  p = p * z - 1.0 / 6.0;
  return a + a * (z * p);
}

MOE_EVERYWHERE double moe_normal_cosine(double a) {
  double z = a * a;
  double p = 1.0 / 20922789888000.0;
  p = p * z - 1.0 / 87178291200.0;
  p = p * z + 1.0 / 479001600.0;
  p = p * z - 1.0 / 3628800.0;
  p = p * z + 1.0 / 40320.0;
  p = p * z - 1.0 / 720.0;
  p = p * z + 1.0 / 24.0;
  return 1.0 - 0.5 * z + z * z * p;
}

/* Two normal draws from two words (Box and Muller 1958):
 *
 *     r = sqrt(-2 log u),  r cos t and r sin t,  u = (radius + 1/2) / 2^32,  t = 2 pi turn / 2^32
 *
 * The largest |draw| is 6.8 deviations. */
MOE_EVERYWHERE void moe_normal_pair(uint32_t radius, uint32_t turn, double std, float *first,
                                    float *second) {
  uint64_t u_bits = radius | 0x4330000000000000u;
  double u;
  memcpy(&u, &u_bits, sizeof u);
  u = (u - 0x1p52 + 0.5) * 0x1p-32;
  double r = std * sqrt(-2.0 * moe_normal_log(u));

  uint32_t quadrant = (turn + 0x20000000u) >> 30;
  double a = (double)(int32_t)(turn - (quadrant << 30)) * (6.28318530717958647693 * 0x1p-32);
  double s = moe_normal_sine(a), c = moe_normal_cosine(a);
  /* A quarter turn swaps them: (c, s) -> (-s, c) -> (-c, -s) -> (s, -c). */
  double x = quadrant & 1u ? s : c;
  double y = quadrant & 1u ? c : s;
  x = (quadrant + 1u) & 2u ? -x : x;
  y = quadrant & 2u ? -y : y;
  *first = (float)(r * x);
  *second = (float)(r * y);
}

#endif
