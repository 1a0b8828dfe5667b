/* Sampling: cuts exactly, draws by their distribution and by the documented procedure. */
#include <criterion/criterion.h>
#include <math.h>

#include "core/base/rng.h"
#include "tests/support/op_check.h"

enum { DRAWS = 4000 };

/* first, first + 1, ... */
static op_tensor numbers_from(moe_device *dev, const char *name, int64_t n, int64_t first) {
  int32_t *v = op_int32s(n);
  for (int64_t i = 0; i < n; i++) v[i] = (int32_t)(first + i);
  return op_ints(dev, name, OP_SHAPE(n), v);
}

/* Tokens of rows that all hold the same logits: row i draws from stream `stream + i`. */
static const double *sample(moe_device *dev, const double *logits, int64_t v, int64_t rows,
                            moe_sample_args args, int64_t stream) {
  double *all = op_doubles(rows * v);
  for (int64_t i = 0; i < rows * v; i++) all[i] = logits[i % v];
  op_tensor x = op_values(dev, "logits", MOE_F32, OP_SHAPE(rows, v), all);
  op_tensor token = op_output(dev, "token", MOE_I32, OP_SHAPE(rows));
  op_tensor streams = numbers_from(dev, "streams", rows, stream);
  op_tensor positions = op_filled(dev, "positions", MOE_I32, OP_SHAPE(rows), 5.0);
  op_ok(moe_sample(dev, x.t, args, streams.t, positions.t, token.t));
  op_read(&x);
  for (int64_t i = 0; i < rows * v; i++)
    op_require(x.v[i] == op_round(MOE_F32, all[i]) || isnan(all[i]), "logits are only read");
  return op_read(&token);
}

static moe_sample_args args(float temperature, int64_t top_k, float top_p) {
  return (moe_sample_args){temperature, top_k, top_p, 77};
}

/* ---- greedy ---------------------------------------------------------------------------------- */

static void greedy(moe_device *dev) {
  const double ties[] = {-1.0, 3.0, 2.0, 3.0, -5.0}, zeros[] = {-1.0, -0.0, 0.0};
  const double with_nan[] = {NAN, -7.0, NAN, -6.0}, nothing[] = {-INFINITY, -INFINITY};
  op_require(sample(dev, ties, 5, 3, args(0.0f, 0, 1.0f), 1)[2] == 1.0, "the lower index");
  op_require(sample(dev, zeros, 3, 1, args(0.0f, 0, 1.0f), 1)[0] == 1.0, "-0 equals 0");
  op_require(sample(dev, with_nan, 4, 1, args(0.0f, 0, 1.0f), 1)[0] == 3.0, "NaN is never best");
  op_require(sample(dev, nothing, 2, 1, args(0.0f, 0, 1.0f), 1)[0] == 0.0, "some token");
}
Test(decode, greedy_takes_the_first_largest) {
  op_each_device(greedy);
}

/* ---- distribution ---------------------------------------------------------------------------- */

/* Draws of each token; fails when a token outside `want` (probability 0) comes, or when chi-square
 * exceeds its mean by more than 5 deviations. */
static void check_draws(const double *token, const double *want, int64_t v) {
  double count[64] = {0}, chi = 0.0;
  int freedom = -1;
  for (int i = 0; i < DRAWS; i++) {
    op_require(token[i] >= 0.0 && token[i] < (double)v, "token %g", token[i]);
    count[(int)token[i]] += 1.0;
  }
  for (int64_t j = 0; j < v; j++) {
    double expected = want[j] * DRAWS;
    op_require(want[j] > 0.0 || count[j] == 0.0, "token %lld was cut", (long long)j);
    if (want[j] <= 0.0) continue;
    chi += (count[j] - expected) * (count[j] - expected) / expected;
    freedom++;
  }
  op_require(chi < freedom + 5.0 * sqrt(2.0 * freedom) + 1e-9, "chi-square %.1f with %d freedom",
             chi, freedom);
}

/* softmax(logits / temperature) over the tokens in `kept` (a bit each). */
static void softmax(const double *logits, int64_t v, double temperature, unsigned kept, double *p) {
  double sum = 0.0;
  for (int64_t j = 0; j < v; j++) sum += p[j] = kept >> j & 1 ? exp(logits[j] / temperature) : 0.0;
  for (int64_t j = 0; j < v; j++) p[j] /= sum;
}

static const double eight[] = {0.5, 2.0, -1.0, 1.5, 0.0, 2.0, 1.0, -2.0};

static void check_kept(moe_device *dev, moe_sample_args a, unsigned kept) {
  double want[8];
  softmax(eight, 8, (double)a.temperature, kept, want);
  check_draws(sample(dev, eight, 8, DRAWS, a, 1000), want, 8);
}

static void temperatures(moe_device *dev) {
  check_kept(dev, args(1.0f, 0, 1.0f), 0xff);
  check_kept(dev, args(0.7f, 0, 1.0f), 0xff);
  check_kept(dev, args(3.0f, 8, 1.0f), 0xff);
  check_kept(dev, args(1.0f, 100, 1.0f), 0xff);
}
Test(decode, follows_the_softmax_at_every_temperature) {
  op_each_device(temperatures);
}

static void top_k(moe_device *dev) {
  check_kept(dev, args(1.0f, 1, 1.0f), 0x02); /* 1 and 5 tie: the lower stays */
  check_kept(dev, args(1.0f, 2, 1.0f), 0x22);
  check_kept(dev, args(1.5f, 4, 1.0f), 0x6a);
  check_kept(dev, args(1.0f, 7, 1.0f), 0x7f);
}
Test(decode, top_k_keeps_the_largest_and_the_lower_of_equals) {
  op_each_device(top_k);
}

static void top_p(moe_device *dev) {
  /* sorted: 1, 5 (each 0.293), 3 (0.178), 6 (0.108), 0 (0.065), 4 (0.040), 2 (0.015), 7 (0.005) */
  check_kept(dev, args(1.0f, 0, 1e-6f), 0x02);
  check_kept(dev, args(1.0f, 0, 0.29f), 0x02);
  check_kept(dev, args(1.0f, 0, 0.30f), 0x22);
  check_kept(dev, args(1.0f, 0, 0.60f), 0x2a);
  check_kept(dev, args(1.0f, 0, 0.90f), 0x6b);
  check_kept(dev, args(1.0f, 0, 0.999f), 0xff);
  check_kept(dev, args(1.0f, 3, 0.60f), 0x22); /* of the first three: 0.383, 0.383, 0.233 */
  check_kept(dev, args(1.0f, 3, 0.80f), 0x2a);
}
Test(decode, top_p_keeps_the_shortest_beginning_with_that_mass) {
  op_each_device(top_p);
}

static void equal_logits(moe_device *dev) {
  double logits[20], want[20] = {0};
  for (int j = 0; j < 20; j++) logits[j] = 1.25;
  for (int j = 0; j < 5; j++) want[j] = 0.2;
  check_draws(sample(dev, logits, 20, DRAWS, args(1.0f, 0, 0.22f), 7), want, 20);
  check_draws(sample(dev, logits, 20, DRAWS, args(1.0f, 5, 1.0f), 7), want, 20);
  check_draws(sample(dev, logits, 20, DRAWS, args(1.0f, 10, 0.45f), 7), want, 20);
}
Test(decode, cuts_among_equal_logits_by_index) {
  op_each_device(equal_logits);
}

static void extremes(moe_device *dev) {
  const double infinite[] = {0.0, INFINITY, 1.0}, some[] = {-INFINITY, 0.0, NAN, 0.0};
  const double none[] = {NAN, -INFINITY}, one[] = {-3.0}, far[] = {-3e38, 3e38, 0.0};
  const double half[] = {0.0, 0.5, 0.0, 0.5}, all[] = {0.0, 1.0, 0.0};
  check_draws(sample(dev, infinite, 3, DRAWS, args(1.0f, 0, 0.9f), 3), all, 3);
  check_draws(sample(dev, some, 4, DRAWS, args(1.0f, 3, 1.0f), 3), half, 4);
  check_draws(sample(dev, far, 3, DRAWS, args(1e-30f, 0, 0.5f), 3), all, 3);
  double token = sample(dev, none, 2, 1, args(1.0f, 1, 0.5f), 3)[0];
  op_require(token == 0.0 || token == 1.0, "token %g", token);
  op_require(sample(dev, one, 1, 1, args(1.0f, 1, 0.5f), 3)[0] == 0.0, "the only token");
}
Test(decode, survives_infinite_and_missing_logits) {
  op_each_device(extremes);
}

/* ---- the procedure --------------------------------------------------------------------------- */

/* The documented draw, with the order made by sorting. */
static int64_t by_procedure(const double *logit, int64_t v, moe_sample_args a, uint64_t stream,
                            uint64_t index) {
  int64_t *order = (int64_t *)op_doubles(v), kept = a.top_k > 0 && a.top_k < v ? a.top_k : v;
  double *w = op_doubles(v), total = 0.0, sum = 0.0;
  for (int64_t i = 0; i < v; i++) { /* insertion keeps equal logits in index order */
    int64_t at = i;
    for (; at > 0 && logit[i] > logit[order[at - 1]]; at--) order[at] = order[at - 1];
    order[at] = i;
  }
  for (int64_t i = 0; i < v; i++) w[i] = exp((logit[i] - logit[order[0]]) / (double)a.temperature);
  for (int64_t i = 0; i < kept; i++) total += w[order[i]];
  int64_t length = 0;
  while (length < kept && (length == 0 || sum < (double)a.top_p * total)) sum += w[order[length++]];
  if (a.top_p >= 1.0f) length = kept;
  double *left = op_doubles(v);
  for (int64_t i = 0; i < length; i++) left[order[i]] = w[order[i]];
  total = sum = 0.0;
  for (int64_t i = 0; i < v; i++) total += left[i];
  double target = moe_rng_uniform_f64(a.seed, stream, index) * total;
  for (int64_t i = 0; i < v; i++)
    if ((sum += left[i]) > target) return i;
  return -1;
}

static void procedure(moe_device *dev) {
  enum { V = 2000, ROWS = 40 };
  op_tensor x = op_random(dev, "logits", MOE_F32, OP_SHAPE(ROWS, V), 2.0);
  for (int64_t i = 0; i < x.count; i += 3) x.v[i] = round(x.v[i] * 4.0) / 4.0; /* many ties */
  x = op_values(dev, "logits", MOE_F32, OP_SHAPE(ROWS, V), x.v);
  const moe_sample_args list[] = {args(1.0f, 0, 1.0f), args(0.8f, 50, 0.9f), args(1.3f, 0, 0.95f),
                                  args(1.0f, 7, 1.0f)};
  op_tensor streams = numbers_from(dev, "streams", ROWS, 300);
  op_tensor positions = numbers_from(dev, "positions", ROWS, 11);
  for (int n = 0; n < 4; n++) {
    op_tensor token = op_output(dev, "token", MOE_I32, OP_SHAPE(ROWS));
    op_ok(moe_sample(dev, x.t, list[n], streams.t, positions.t, token.t));
    op_read(&token);
    for (int64_t row = 0; row < ROWS; row++) {
      int64_t want =
          by_procedure(x.v + row * V, V, list[n], 300 + (uint64_t)row, 11 + (uint64_t)row);
      op_require(token.v[row] == (double)want, "row %lld, case %d: %g, not %lld", (long long)row, n,
                 token.v[row], (long long)want);
    }
  }
}
Test(decode, follows_the_documented_procedure_for_seed_stream_and_index) {
  op_each_device(procedure);
}

static void batches(moe_device *dev) {
  double together[6];
  const double *all = sample(dev, eight, 8, 6, args(1.0f, 0, 1.0f), 40);
  for (int i = 0; i < 6; i++) together[i] = all[i];
  for (int i = 0; i < 6; i++)
    op_require(sample(dev, eight, 8, 1, args(1.0f, 0, 1.0f), 40 + i)[0] == together[i],
               "row %d alone", i);
}
Test(decode, draws_the_same_alone_and_in_a_batch) {
  op_each_device(batches);
}

static void advance(moe_device *dev) {
  const int32_t lengths[] = {0, 7, -3, 100000}, running[] = {1, 0, 5, 1};
  const double after[] = {1, 7, 2, 100001};
  op_tensor counts = op_ints(dev, "lengths", OP_SHAPE(4), lengths);
  op_tensor by = op_ints(dev, "running", OP_SHAPE(4), running);
  op_ok(moe_advance(dev, counts.t, by.t));
  op_equal(counts, after);
}
Test(decode, advances_the_lengths_of_running_sequences) {
  op_each_device(advance);
}
