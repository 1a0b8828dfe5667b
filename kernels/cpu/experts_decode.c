/* The experts of a few tokens, for generation: weights are the cost, so each is read once.
 *
 * A task is an expert's (or the output's) few rows of weights times all rows that want them, in
 * passes of TOKENS tokens. No sorting: who wants an expert is found by looking through the pass's
 * choices. Tasks are cut by the sizes alone and experts are added in their order, so the bits do
 * not depend on the number of threads. */
#include "kernels/cpu/cpu_blas.h"
#include "kernels/cpu/cpu_math.h"

enum { TOKENS = 32, ROWS = 16, CHUNK = 512 };

/* One pass: tokens [begin, end) of a call. A pair is a token and one of its choices, number
 * token * K + k. */
typedef struct {
  moe_tensor x, w13, w2, hidden, out;
  const int32_t *experts;
  const float *gates;
  int64_t begin, end, k, count, width, ffn;
} pass;

/* Up to TOKENS pairs of this pass that chose expert e, from number *next on; returns how many. */
static int choose(const pass *p, int64_t e, int64_t *next, int64_t pair[TOKENS]) {
  int n = 0;
  for (; *next < p->end * p->k && n < TOKENS; ++*next)
    if (p->experts[*next] == e) pair[n++] = *next;
  return n;
}

/* sums[i][r] = weights row (row + i) . x row from[r], for `rows` rows of weights and n of x. */
static void products(moe_tensor weights, int64_t row, int64_t rows, moe_tensor x,
                     const int64_t *from, int n, int64_t width, float sums[ROWS][TOKENS]) {
  float w_part[ROWS][CHUNK], x_part[CHUNK];
  for (int64_t i = 0; i < rows; i++) memset(sums[i], 0, sizeof sums[i]);
  for (int64_t c = 0; c < width; c += CHUNK) {
    int64_t here = moe_min64(CHUNK, width - c);
    const float *w[ROWS];
    for (int64_t i = 0; i < rows; i++)
      w[i] = moe_cpu_view(weights, (row + i) * width + c, here, w_part[i]);
    for (int r = 0; r < n; r++) {
      const float *v = moe_cpu_view(x, from[r] * width + c, here, x_part);
      for (int64_t i = 0; i < rows; i++) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < here; j++) sum += w[i][j] * v[j];
        sums[i][r] += sum;
      }
    }
  }
}

/* Columns [f, f + ROWS) of expert e's hidden activations. */
static void up(const pass *p, int64_t e, int64_t f) {
  int64_t rows = moe_min64(ROWS, p->ffn - f), pair[TOKENS], token[TOKENS];
  float gate[ROWS][TOKENS], up[ROWS][TOKENS], hidden[ROWS];
  int64_t next = p->begin * p->k;
  for (int n; (n = choose(p, e, &next, pair)) > 0;) {
    for (int r = 0; r < n; r++) token[r] = pair[r] / p->k;
    products(p->w13, 2 * e * p->ffn + f, rows, p->x, token, n, p->width, gate);
    products(p->w13, (2 * e + 1) * p->ffn + f, rows, p->x, token, n, p->width, up);
    for (int r = 0; r < n; r++) {
      for (int64_t i = 0; i < rows; i++)
        hidden[i] = p->gates[pair[r]] * moe_swigluf(gate[i][r], moe_sigmoidf(gate[i][r]), up[i][r]);
      moe_cpu_store(p->hidden, pair[r] * p->ffn + f, rows, hidden);
    }
  }
}

/* Columns [c, c + ROWS) of every output of the pass. */
static void down(const pass *p, int64_t c) {
  int64_t rows = moe_min64(ROWS, p->width - c), pair[TOKENS];
  float total[TOKENS][ROWS] = {{0}}, sums[ROWS][TOKENS];
  for (int64_t e = 0; e < p->count; e++) {
    int64_t next = p->begin * p->k;
    for (int n; (n = choose(p, e, &next, pair)) > 0;) {
      products(p->w2, e * p->width + c, rows, p->hidden, pair, n, p->ffn, sums);
      for (int r = 0; r < n; r++)
        for (int64_t i = 0; i < rows; i++) total[pair[r] / p->k - p->begin][i] += sums[i][r];
    }
  }
  for (int64_t t = p->begin; t < p->end; t++)
    moe_cpu_store(p->out, t * p->width + c, rows, total[t - p->begin]);
}

moe_status moe_cpu_experts_decode(moe_device *dev, moe_tensor x, moe_tensor experts,
                                  moe_tensor gates, moe_tensor w13, moe_tensor w2,
                                  moe_tensor hidden, moe_tensor out) {
  pass p = {.x = x,
            .w13 = w13,
            .w2 = w2,
            .hidden = hidden,
            .out = out,
            .experts = experts.data,
            .gates = gates.data,
            .k = experts.shape[1],
            .count = w2.shape[0],
            .width = x.shape[1],
            .ffn = w2.shape[2]};
  int64_t tokens = x.shape[0], blocks = (p.ffn + ROWS - 1) / ROWS;
  for (; p.begin < tokens; p.begin += TOKENS) {
    p.end = moe_min64(p.begin + TOKENS, tokens);
#pragma omp parallel num_threads(moe_cpu_threads(dev))
    {
#pragma omp for schedule(dynamic, 8)
      for (int64_t i = 0; i < p.count * blocks; i++) up(&p, i / blocks, i % blocks * ROWS);
#pragma omp for schedule(dynamic)
      for (int64_t c = 0; c < p.width; c += ROWS) down(&p, c);
    }
  }
  return MOE_OK;
}
