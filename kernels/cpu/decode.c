/* Drawing the next token from logits, the same on every backend.
 *
 * No list is sorted. Logits map to unsigned keys in the same order, and a cut is a key: what lies
 * above it stays, and of those equal to it the first few by index. A cut is found by four passes
 * over eight bits of the key each. The procedure, which other backends must follow (sums in f64):
 *
 *   1. greedy (temperature 0): the largest logit, ties to the lower index; done.
 *   2. order: logits from the largest down, ties to the lower index; NaN counts as -infinity, -0 as
 *      0.
 *   3. top_k (0 or at least V: all): the first top_k of the order stay.
 *   4. weight of i: w_i = exp((logit_i - largest) / temperature) in f64, 1 where they are equal.
 *   5. top_p (1 or more: all): with W the sum of w over what stays, the shortest beginning of the
 *      order whose weight reaches top_p * W stays, at least one.
 *   6. draw: u = moe_rng_uniform_f64(seed, streams[row], positions[row]); with W' the sum of w over
 * what stays, the first token in INDEX order whose running sum of w exceeds u * W'; if rounding
 *      leaves none, the last that stays and has weight.
 *
 * Sums over what stays run in index order; a pass of a cut sums each of its 256 bins in index
 * order, then the bins from the top; of n equal keys each counts as 1/n of their bin. Source of
 * top-p: Holtzman et al. 2020, arXiv:1904.09751. */
#include <math.h>
#include <string.h>

#include "core/base/rng.h"
#include "kernels/cpu/cpu_blas.h"

/* One row of logits and what is left of it. */
typedef struct {
  const float *logit;
  int64_t count;
  float largest;
  double temperature;
  uint32_t cut; /* keys above it stay; */
  int64_t ties; /* of those equal, the first `ties` */
} choice;

static float value(const choice *c, int64_t i) {
  return isnan(c->logit[i]) ? -INFINITY : c->logit[i] + 0.0f;
}

/* Unsigned order = order of floats. */
static uint32_t key(const choice *c, int64_t i) {
  float v = value(c, i);
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits >> 31 ? ~bits : bits | (uint32_t)1 << 31;
}

static double weight(const choice *c, int64_t i) {
  float v = value(c, i);
  return v == c->largest ? 1.0 : exp(((double)v - (double)c->largest) / c->temperature);
}

/* Whether i stays; to be asked for i = 0, 1, ... with `seen` counting the ties from 0. */
static bool stays(const choice *c, int64_t i, int64_t *seen) {
  uint32_t k = key(c, i);
  return k > c->cut || (k == c->cut && (*seen)++ < c->ties);
}

static double total_weight(const choice *c) {
  double sum = 0.0;
  int64_t seen = 0;
  for (int64_t i = 0; i < c->count; i++)
    if (stays(c, i, &seen)) sum += weight(c, i);
  return sum;
}

/* Keep the shortest beginning of the order that reaches `need`: in numbers of tokens, or in
 * weight. */
static void cut_at(choice *c, double need, bool by_weight) {
  double above = 0.0, each = 0.0; /* what lies over the bins in question; a tie's part */
  uint32_t prefix = 0;
  int64_t members = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    double bin[256] = {0};
    int64_t size[256] = {0}, seen = 0;
    for (int64_t i = 0; i < c->count; i++) {
      uint32_t k = key(c, i);
      if (!stays(c, i, &seen) || (shift < 24 && k >> (shift + 8) != prefix)) continue;
      bin[k >> shift & 255] += by_weight ? weight(c, i) : 1.0;
      size[k >> shift & 255]++;
    }
    int at = 255, lowest = 0;
    while (size[lowest] == 0) lowest++;
    while (at > lowest && (size[at] == 0 || above + bin[at] < need)) above += bin[at--];
    prefix = prefix << 8 | (uint32_t)at;
    members = size[at];
    each = bin[at] / (double)members;
  }
  c->cut = prefix;
  c->ties = 1;
  while (c->ties < members && above + (double)c->ties * each < need) c->ties++;
}

static int64_t greedy(const choice *c) {
  int64_t best = 0;
  for (int64_t i = 1; i < c->count; i++)
    if (value(c, i) > value(c, best)) best = i;
  return best;
}

static int64_t draw(const choice *c, double u) {
  double target = u * total_weight(c), sum = 0.0;
  int64_t last = 0, seen = 0;
  for (int64_t i = 0; i < c->count; i++) {
    if (!stays(c, i, &seen)) continue;
    double w = weight(c, i);
    if (w <= 0.0) continue;
    last = i;
    sum += w;
    if (sum > target) break;
  }
  return last;
}

static int64_t sample_row(const float *logit, int64_t count, moe_sample_args args, uint64_t stream,
                          uint64_t index) {
  choice c = {logit, count, 0.0f, (double)args.temperature, 0, count};
  int64_t best = greedy(&c);
  if (args.temperature <= 0.0f) return best;
  c.largest = value(&c, best);
  if (args.top_k > 0 && args.top_k < count) cut_at(&c, (double)args.top_k, false);
  if (args.top_p < 1.0f) cut_at(&c, (double)args.top_p * total_weight(&c), true);
  return draw(&c, moe_rng_uniform_f64(args.seed, stream, index));
}

moe_status moe_cpu_sample(moe_device *dev, moe_tensor logits, moe_sample_args args,
                          moe_tensor streams, moe_tensor positions, moe_tensor token) {
  int64_t count = logits.shape[1];
  const float *logit = logits.data;
  const uint32_t *stream = streams.data, *position = positions.data;
  int32_t *out = token.data;
#pragma omp parallel for num_threads(moe_cpu_threads(dev))
  for (int64_t row = 0; row < logits.shape[0]; row++)
    out[row] = (int32_t)sample_row(logit + row * count, count, args, stream[row], position[row]);
  return MOE_OK;
}

moe_status moe_cpu_advance(moe_device *dev, moe_tensor counts, moe_tensor by) {
  (void)dev;
  for (int64_t i = 0; i < counts.shape[0]; i++)
    ((int32_t *)counts.data)[i] += ((const int32_t *)by.data)[i];
  return MOE_OK;
}
