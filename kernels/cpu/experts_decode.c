/* The experts of a few tokens, for generation: weights are the cost, so each is read once.
 *
 * A task is an expert's (or the output's) few rows of weights times all rows that want them, in
 * passes of TOKENS tokens. No sorting: who wants an expert is found by looking through the pass's
 * choices. A term, which is a choice's part of its token, is a dot product of its own, and terms
 * are added in the order of choices. So the bits depend neither on the number of threads nor on
 * which rank made which term. */
#include <omp.h>

#include "kernels/cpu/cpu_blas.h"
#include "kernels/cpu/cpu_math.h"

enum { TOKENS = 32, ROWS = 16, CHUNK = 512 };

/* One pass: tokens [begin, end) of a call. A pair is a token and one of its choices, number
 * token * K + k. */
typedef struct {
  moe_tensor x, w13, w2, hidden, out;
  const int32_t *experts;
  const float *gates;
  int64_t begin, end, k, first, count, width, ffn; /* first: the first expert's number */
  bool apart;                                      /* out is to hold the terms */
} pass;

/* Up to TOKENS pairs of this pass that chose expert e, from number *next on; returns how many. */
static int choose(const pass *p, int64_t e, int64_t *next, int64_t pair[TOKENS]) {
  int n = 0;
  for (; *next < p->end * p->k && n < TOKENS; ++*next)
    if (p->experts[*next] - p->first == e) pair[n++] = *next;
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

/* Columns [c, c + rows) of the pass's terms [pairs, ROWS] to out, for themselves or summed. */
static void put(const pass *p, int64_t c, int64_t rows, const float *terms) {
  for (int64_t t = p->begin; t < p->end; t++) {
    float total[ROWS] = {0};
    for (int64_t pair = t * p->k; pair < (t + 1) * p->k; pair++, terms += ROWS) {
      if (p->apart) moe_cpu_store(p->out, pair * p->width + c, rows, terms);
      for (int64_t i = 0; i < rows; i++) total[i] += terms[i];
    }
    if (!p->apart) moe_cpu_store(p->out, t * p->width + c, rows, total);
  }
}

/* Columns [c, c + ROWS) of every output of the pass. terms [pairs, ROWS]: work. */
static void down(const pass *p, int64_t c, float *terms) {
  int64_t rows = moe_min64(ROWS, p->width - c), first = p->begin * p->k, pair[TOKENS];
  float sums[ROWS][TOKENS];
  memset(terms, 0, (size_t)((p->end - p->begin) * p->k * ROWS) * sizeof *terms);
  for (int64_t e = 0; e < p->count; e++) {
    int64_t next = first;
    for (int n; (n = choose(p, e, &next, pair)) > 0;) {
      products(p->w2, e * p->width + c, rows, p->hidden, pair, n, p->ffn, sums);
      for (int r = 0; r < n; r++)
        for (int64_t i = 0; i < rows; i++) terms[(pair[r] - first) * ROWS + i] = sums[i][r];
    }
  }
  put(p, c, rows, terms);
}

moe_status moe_cpu_experts_decode(moe_device *dev, moe_tensor x, moe_tensor experts,
                                  moe_tensor gates, int64_t first, moe_tensor w13, moe_tensor w2,
                                  moe_tensor hidden, moe_tensor out) {
  pass p = {.x = x,
            .w13 = w13,
            .w2 = w2,
            .hidden = hidden,
            .out = out,
            .experts = experts.data,
            .gates = gates.data,
            .k = experts.shape[1],
            .first = first,
            .count = w2.shape[0],
            .width = x.shape[1],
            .ffn = w2.shape[2],
            .apart = moe_decodes_apart(experts, out)};
  float *panels = ((const moe_cpu_state *)dev->state)->panels;
  int64_t tokens = x.shape[0], blocks = (p.ffn + ROWS - 1) / ROWS;
  /* A pass's terms lie in a thread's panel. */
  int64_t step = moe_min64(TOKENS, moe_cpu_panel_floats() / (p.k * ROWS));
  if (step < 1)
    return moe_fail(MOE_INVALID, "experts_decode: %lld choices of a token are more than %lld",
                    (long long)p.k, (long long)(moe_cpu_panel_floats() / ROWS));
  for (; p.begin < tokens; p.begin += step) {
    p.end = moe_min64(p.begin + step, tokens);
#pragma omp parallel num_threads(moe_cpu_threads(dev))
    {
#pragma omp for schedule(dynamic, 8)
      for (int64_t i = 0; i < p.count * blocks; i++) up(&p, i / blocks, i % blocks * ROWS);
#pragma omp for schedule(dynamic)
      for (int64_t c = 0; c < p.width; c += ROWS)
        down(&p, c, panels + omp_get_thread_num() * moe_cpu_panel_floats());
    }
  }
  return MOE_OK;
}
