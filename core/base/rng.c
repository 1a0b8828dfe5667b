/* Philox4x32-10 and what is drawn with it. The loops of the normal draws are free of branches and
 * calls so that the compiler vectorises them. */
#include "core/base/rng.h"

#include <stdbool.h>
#include <string.h>

#include "core/base/normal.h"

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

/* Draws [CHUNK * chunk, CHUNK * (chunk + 1)). */
static void normal_chunk(uint64_t seed, uint64_t stream, uint64_t chunk, double std, float *out) {
  uint32_t word[4][CHUNK / 4];
  for (int i = 0; i < CHUNK / 4; i++) {
    moe_philox_block b = moe_philox_draw(seed, chunk * (CHUNK / 4) + (uint64_t)i, stream);
    for (int w = 0; w < 4; w++) word[w][i] = b.word[w];
  }
  for (int i = 0; i < CHUNK / 4; i++)
    moe_normal_pair(word[0][i], word[1][i], std, &out[4 * i], &out[4 * i + 1]);
  for (int i = 0; i < CHUNK / 4; i++)
    moe_normal_pair(word[2][i], word[3][i], std, &out[4 * i + 2], &out[4 * i + 3]);
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
