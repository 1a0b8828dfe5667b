/* Philox4x32-10 and what is drawn with it.
 *
 * The normal draws use only IEEE additions, multiplications, divisions and square roots, which have
 * one right answer each; the C library's log and sincos differ between versions and processors,
 * and a last bit that differs would make weights depend on the machine. The loops are free of
 * branches and calls so that the compiler vectorises them. */
#include "core/base/rng.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "core/base/philox.h"

/* ---- Philox -------------------------------------------------------------------------------- */

void moe_philox(uint64_t key, uint64_t counter_low, uint64_t counter_high, uint32_t out[4]) {
  moe_philox_block b = moe_philox_draw(key, counter_low, counter_high);
  memcpy(out, b.word, sizeof b.word);
}

/* ---- streams and uniform draws ------------------------------------------------------------- */

/* Source: Steele, Lea, Flood 2014, SplitMix64's finaliser. */
static uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

uint64_t moe_rng_stream(const char *text, int64_t a, int64_t b) {
  uint64_t hash = 0xCBF29CE484222325u; /* FNV-1a */
  for (; *text; text++) hash = (hash ^ (unsigned char)*text) * 0x100000001B3u;
  return mix(mix(mix(hash) ^ (uint64_t)a) ^ (uint64_t)b);
}

float moe_rng_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  return (float)(moe_philox_draw(seed, index, stream).word[0] >> 8) * 0x1p-24f;
}

double moe_rng_uniform_f64(uint64_t seed, uint64_t stream, uint64_t index) {
  return moe_philox_uniform_f64(seed, stream, index);
}

/* ---- normal draws -------------------------------------------------------------------------- */

enum { CHUNK = 256 /* draws made at a time: two per word pair, four per Philox block */ };

/* Natural logarithm of 0 < x < 1 (normal), to 1e-14 relative: x = m 2^k with m near 1, then
 * log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172. */
static inline double natural_log(double x) {
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
static inline double sine(double a) {
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

static inline double cosine(double a) {
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
static inline void normal_pair(uint32_t radius, uint32_t turn, double std, float *first,
                               float *second) {
  uint64_t u_bits = radius | 0x4330000000000000u;
  double u;
  memcpy(&u, &u_bits, sizeof u);
  u = (u - 0x1p52 + 0.5) * 0x1p-32;
  double r = std * sqrt(-2.0 * natural_log(u));

  uint32_t quadrant = (turn + 0x20000000u) >> 30;
  double a = (double)(int32_t)(turn - (quadrant << 30)) * (6.28318530717958647693 * 0x1p-32);
  double s = sine(a), c = cosine(a);
  /* A quarter turn swaps them: (c, s) -> (-s, c) -> (-c, -s) -> (s, -c). */
  double x = quadrant & 1u ? s : c;
  double y = quadrant & 1u ? c : s;
  x = (quadrant + 1u) & 2u ? -x : x;
  y = quadrant & 2u ? -y : y;
  *first = (float)(r * x);
  *second = (float)(r * y);
}

/* Draws [CHUNK * chunk, CHUNK * (chunk + 1)). */
static void normal_chunk(uint64_t seed, uint64_t stream, uint64_t chunk, double std, float *out) {
  uint32_t word[4][CHUNK / 4];
  for (int i = 0; i < CHUNK / 4; i++) {
    moe_philox_block b = moe_philox_draw(seed, chunk * (CHUNK / 4) + (uint64_t)i, stream);
    for (int w = 0; w < 4; w++) word[w][i] = b.word[w];
  }
  for (int i = 0; i < CHUNK / 4; i++)
    normal_pair(word[0][i], word[1][i], std, &out[4 * i], &out[4 * i + 1]);
  for (int i = 0; i < CHUNK / 4; i++)
    normal_pair(word[2][i], word[3][i], std, &out[4 * i + 2], &out[4 * i + 3]);
}

void moe_rng_normal_fill(uint64_t seed, uint64_t stream, int64_t begin, int64_t count, float std,
                         float *out) {
  float draws[CHUNK];
  while (count > 0) {
    int64_t skip = begin % CHUNK;
    int64_t take = CHUNK - skip < count ? CHUNK - skip : count;
    bool whole = take == CHUNK;
    normal_chunk(seed, stream, (uint64_t)(begin / CHUNK), (double)std, whole ? out : draws);
    if (!whole) memcpy(out, draws + skip, (size_t)take * sizeof *out);
    begin += take;
    count -= take;
    out += take;
  }
}

/* ---- permutation --------------------------------------------------------------------------- */

/* A balanced Feistel network permutes [0, 4^half); values that fall outside [0, n) are sent through
 * again until one falls inside (cycle walking: Black and Rogaway 2002), about four times at most on
 * average. Domains below 64 would have too few distinct networks to look shuffled. */
int64_t moe_rng_permute(uint64_t seed, uint64_t stream, int64_t n, int64_t index) {
  enum { ROUNDS = 8, HALF_MIN = 3 };
  int half = HALF_MIN;
  while (half < 32 && (uint64_t)n > 1ull << (2 * half)) half++;
  uint64_t mask = (1ull << half) - 1;
  uint64_t x = (uint64_t)index;
  if (n <= 1) return 0;
  do {
    uint64_t left = x >> half, right = x & mask;
    for (uint64_t round = 0; round < ROUNDS; round++) {
      uint64_t next =
          left ^ (moe_philox_draw(seed, right | (round + 1) << 32, stream).word[0] & mask);
      left = right;
      right = next;
    }
    x = left << half | right;
  } while (x >= (uint64_t)n);
  return (int64_t)x;
}
