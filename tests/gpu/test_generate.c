/* Generation on a GPU: the logits and texts of the CPU, as a graph and without. */
#include <criterion/criterion.h>
#include <math.h>

#include "tests/gpu/both.h"
#define GENERATE_OK(call) both_ok((call), #call, __FILE__, __LINE__)
#include "tests/model/generate_fixture.h"

enum { N = 100, TEXTS = 5, NEW = 30 };

static small_generator *open_generator(int side, int precision, bool eager,
                                       moe_sample_args sample) {
  small_options o = {.alpha = 8.0, .batch = 3, .room = 2048, .chunk = 64, .precision = precision};
  o.sample = sample;
  o.eager = eager;
  return small_open(both_dev[side], NULL, o);
}

/* |a - b| / |b| */
static double relative(const float *a, const float *b, int64_t n) {
  double error = 0.0, norm = 0.0;
  for (int64_t i = 0; i < n; i++) {
    error += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    norm += (double)b[i] * (double)b[i];
  }
  return sqrt(error / norm);
}

/* 70 tokens at once (sorted experts), then one by one (decoding). */
static void feed(small_generator *s, float *logits) {
  int32_t tokens[N];
  small_tokens(tokens, N, 6);
  GENERATE_OK(moe_generator_feed(s->g, 0, 1, tokens, 70, logits));
  for (int i = 70; i < N; i++)
    GENERATE_OK(moe_generator_feed(s->g, 0, 1, tokens + i, 1, logits + i * SMALL_VOCAB));
}

Test(gpu_generate, has_the_logits_of_the_cpu, .init = both_open, .fini = both_close) {
  const double tolerance[] = {2e-5, 0.1, 0.02};
  for (int precision = MOE_PRECISION_FP32; precision <= MOE_PRECISION_FP16; precision++) {
    static float logits[SIDES][N * SMALL_VOCAB];
    for (int side = 0; side < SIDES; side++) {
      small_generator *s = open_generator(side, precision, false, (moe_sample_args){0});
      feed(s, logits[side]);
      small_close(s);
    }
    double error = relative(logits[GPU_SIDE], logits[CPU_SIDE], N * SMALL_VOCAB);
    cr_assert(error <= tolerance[precision], "precision %d: %g", precision, error);
  }
}

typedef struct {
  int64_t count[TEXTS];
  int32_t ids[TEXTS][NEW];
} texts;

static moe_status take(void *context, int64_t prompt, int32_t token, bool *end) {
  texts *t = context;
  cr_assert(t->count[prompt] < NEW);
  t->ids[prompt][t->count[prompt]++] = token;
  *end = token == 11;
  return MOE_OK;
}

static texts write_texts(int side, int precision, bool eager, moe_sample_args sample) {
  texts out = {0};
  int32_t ids[TEXTS][N];
  moe_prompt prompts[TEXTS];
  moe_generation_rates rates;
  for (int i = 0; i < TEXTS; i++) {
    small_tokens(ids[i], N, i);
    prompts[i] = (moe_prompt){ids[i], 1 + i * 23, NEW - 4 * i};
  }
  small_generator *s = open_generator(side, precision, eager, sample);
  GENERATE_OK(moe_generate(s->g, prompts, TEXTS, take, &out, &rates));
  small_close(s);
  return out;
}

static void expect_same(texts a, texts b, const char *what) {
  for (int i = 0; i < TEXTS; i++) {
    cr_assert_eq(a.count[i], b.count[i], "%s: text %d", what, i);
    for (int64_t j = 0; j < a.count[i]; j++)
      cr_assert_eq(a.ids[i][j], b.ids[i][j], "%s: text %d, token %lld", what, i, (long long)j);
  }
}

Test(gpu_generate, writes_the_texts_of_the_cpu, .init = both_open, .fini = both_close) {
  const moe_sample_args samples[] = {{0.0f, 0, 1.0f, 0}, {0.8f, 30, 0.9f, 4}};
  for (int i = 0; i < 2; i++)
    expect_same(write_texts(GPU_SIDE, MOE_PRECISION_FP32, false, samples[i]),
                write_texts(CPU_SIDE, MOE_PRECISION_FP32, false, samples[i]), "CPU");
}

Test(gpu_generate, writes_the_same_from_a_graph_and_without, .init = both_open,
     .fini = both_close) {
  const moe_sample_args sample = {0.9f, 0, 0.95f, 8};
  for (int precision = MOE_PRECISION_FP32; precision <= MOE_PRECISION_FP16; precision++)
    expect_same(write_texts(GPU_SIDE, precision, false, sample),
                write_texts(GPU_SIDE, precision, true, sample), "graph");
}
