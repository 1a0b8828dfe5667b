/* Generation on one rank: the cache against computing everything again, batches and chunks against
 * single texts, draws against their distribution. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>

#include "tests/model/generate_fixture.h"

enum { LONG = 8 * SMALL_CONTEXT };

static moe_comm *world;
static moe_device *dev;

static void open_world(void) {
  small_world_open(1, &dev, &world);
}

static void close_world(void) {
  small_world_close(dev, world);
}

TestSuite(generate, .init = open_world, .fini = close_world, .timeout = 60);

static float *floats(int64_t n) {
  float *x = malloc((size_t)n * sizeof *x);
  for (int64_t i = 0; i < n; i++) x[i] = NAN;
  return x;
}

/* Row by row: no logit may be off by more than `tolerance` of the row's largest. */
static void expect_rows(const float *got, const float *want, int64_t rows, double tolerance,
                        const char *what) {
  for (int64_t t = 0; t < rows; t++) {
    double largest = 0.0, worst = 0.0;
    for (int64_t v = 0; v < SMALL_VOCAB; v++) {
      double a = (double)want[t * SMALL_VOCAB + v], b = (double)got[t * SMALL_VOCAB + v];
      largest = fmax(largest, fabs(a));
      if (!(fabs(a - b) <= worst)) worst = fabs(a - b);
    }
    cr_assert(largest > 0.1 && worst <= tolerance * largest,
              "%s, position %lld: logits off by %g of %g", what, (long long)t, worst, largest);
  }
}

/* Feed the tokens in parts of the given sizes (the last is repeated) and compare all logits. */
static void expect_same_as_the_model(double alpha, int64_t n, const int64_t *parts, int count,
                                     int64_t chunk) {
  int32_t tokens[LONG];
  float *want = floats(n * SMALL_VOCAB), *got = floats(n * SMALL_VOCAB);
  small_tokens(tokens, n, 1);
  model_logits(dev, world, alpha, NULL, tokens, n, want);
  small_generator *s = small_open(
      dev, world, (small_options){.alpha = alpha, .batch = 1, .room = n, .chunk = chunk});
  for (int64_t at = 0, i = 0; at < n; i++) {
    int64_t part = parts[i < count ? i : count - 1];
    if (part > n - at) part = n - at;
    GENERATE_OK(moe_generator_feed(s->g, 0, 1, tokens + at, part, got + at * SMALL_VOCAB));
    at += part;
  }
  expect_rows(got, want, n, 2e-5, "cached");
  small_close(s);
  free(want);
  free(got);
}

Test(generate, with_the_cache_equals_computing_everything_again) {
  expect_same_as_the_model(1.0, SMALL_CONTEXT, (int64_t[]){1}, 1, 64);
  expect_same_as_the_model(1.0, SMALL_CONTEXT, (int64_t[]){5, 1}, 2, 64);
}

Test(generate, equals_it_far_beyond_the_training_length) {
  expect_same_as_the_model(8.0, LONG, (int64_t[]){1}, 1, 64);
  expect_same_as_the_model(8.0, LONG, (int64_t[]){100, 3, 1}, 3, 64);
}

Test(generate, reads_a_prompt_in_chunks_of_any_size) {
  const int64_t chunks[] = {1, 3, 32, 33, 64, 127, 128, 1000};
  for (int i = 0; i < 8; i++) expect_same_as_the_model(8.0, LONG, (int64_t[]){LONG}, 1, chunks[i]);
}

Test(generate, uses_the_selection_bias) {
  enum { N = 12 };
  int32_t tokens[N];
  float bias[2 * SMALL_EXPERTS], *want = floats(N * SMALL_VOCAB), *got = floats(N * SMALL_VOCAB);
  float *plain = floats(N * SMALL_VOCAB);
  for (int i = 0; i < 2 * SMALL_EXPERTS; i++) bias[i] = 0.3f * (float)(i % 5) - 0.5f;
  small_tokens(tokens, N, 2);
  model_logits(dev, world, 1.0, bias, tokens, N, want);
  model_logits(dev, world, 1.0, NULL, tokens, N, plain);
  small_generator *s =
      small_open(dev, world, (small_options){.batch = 1, .room = N, .chunk = 8, .bias = true});
  GENERATE_OK(moe_generator_set_router_bias(s->g, bias));
  GENERATE_OK(moe_generator_feed(s->g, 0, 1, tokens, N, got));
  expect_rows(got, want, N, 2e-5, "biased");
  double differ = 0.0;
  for (int i = 0; i < N * SMALL_VOCAB; i++)
    differ = fmax(differ, fabs((double)(got[i] - plain[i])));
  cr_assert(differ > 1e-2, "the bias changed nothing");
  small_close(s);
}

Test(generate, scores_several_texts_as_the_model_does) {
  enum { N = 40, TEXTS = 3 };
  int32_t tokens[TEXTS * N], targets[TEXTS * N];
  double loss[2] = {0}, want = 0.0, counted = 0.0;
  float *logits = floats(N * SMALL_VOCAB);
  for (int text = 0; text < TEXTS; text++) {
    small_tokens(tokens + text * N, N, text);
    for (int i = 0; i < N; i++) targets[text * N + i] = i % 7 == text ? -1 : (i * 5 + text) % 97;
    model_logits(dev, world, 8.0, NULL, tokens + text * N, N, logits);
    for (int i = 0; i < N; i++) {
      const float *row = logits + i * SMALL_VOCAB;
      double sum = 0.0;
      if (targets[text * N + i] < 0) continue;
      for (int v = 0; v < SMALL_VOCAB; v++) sum += exp((double)row[v]);
      want += log(sum) - (double)row[targets[text * N + i]];
      counted += 1.0;
    }
  }
  small_generator *s =
      small_open(dev, world, (small_options){.alpha = 8.0, .batch = TEXTS, .room = N, .chunk = 50});
  GENERATE_OK(moe_generator_score(s->g, 0, TEXTS, tokens, targets, N, loss));
  cr_assert_eq(loss[1], counted);
  cr_assert(fabs(loss[0] - want) < 1e-5 * want, "%.9g, not %.9g", loss[0], want);
  small_close(s);
  free(logits);
}

/* ---- texts ----------------------------------------------------------------------------------- */

enum { TEXTS = 7, NEW = 24 };

typedef struct {
  int64_t count[TEXTS];
  int32_t ids[TEXTS][NEW];
  int32_t stop; /* -1: none */
} texts;

static moe_status take(void *context, int64_t prompt, int32_t token, bool *end) {
  texts *t = context;
  cr_assert(t->count[prompt] < NEW, "text %lld goes on after its end", (long long)prompt);
  t->ids[prompt][t->count[prompt]++] = token;
  *end = token == t->stop;
  return MOE_OK;
}

/* Prompts of 1 to 40 tokens, some with fewer new tokens. */
static void ragged_prompts(moe_prompt *out, int32_t *ids) {
  for (int i = 0; i < TEXTS; i++) {
    int64_t n = 1 + (i * 17) % 41;
    small_tokens(ids + 64 * i, n, i);
    out[i] = (moe_prompt){.ids = ids + 64 * i, .count = n, .max_new = NEW - (i % 3) * 5};
  }
}

static void generate_texts(texts *out, int64_t batch, int64_t chunk, moe_sample_args sample) {
  static int32_t ids[64 * TEXTS];
  moe_prompt prompts[TEXTS];
  moe_generation_rates rates;
  ragged_prompts(prompts, ids);
  memset(out->count, 0, sizeof out->count);
  small_generator *s = small_open(
      dev, world,
      (small_options){.alpha = 8.0, .batch = batch, .room = 64, .chunk = chunk, .sample = sample});
  GENERATE_OK(moe_generate(s->g, prompts, TEXTS, take, out, &rates));
  int64_t drawn = 0, fed = 0;
  for (int i = 0; i < TEXTS; i++) drawn += out->count[i], fed += prompts[i].count;
  cr_assert_eq(rates.tokens, drawn);
  cr_assert_eq(rates.prompt_tokens, fed);
  cr_assert_eq(rates.step_tokens, drawn - TEXTS);
  small_close(s);
}

static void expect_same_texts(const texts *a, const texts *b, const char *what) {
  for (int i = 0; i < TEXTS; i++) {
    cr_assert_eq(a->count[i], b->count[i], "%s: text %d", what, i);
    for (int64_t j = 0; j < a->count[i]; j++)
      cr_assert_eq(a->ids[i][j], b->ids[i][j], "%s: text %d, token %lld", what, i, (long long)j);
  }
}

Test(generate, gives_the_same_texts_in_any_batch) {
  const moe_sample_args samples[] = {{0.0f, 0, 1.0f, 0}, {0.9f, 40, 0.95f, 11}};
  for (int k = 0; k < 2; k++) {
    texts one = {.stop = -1}, three = {.stop = -1}, all = {.stop = -1};
    generate_texts(&one, 1, 64, samples[k]);
    generate_texts(&three, 3, 16, samples[k]);
    generate_texts(&all, TEXTS, 5, samples[k]);
    expect_same_texts(&one, &three, "three slots");
    expect_same_texts(&one, &all, "a slot each");
  }
}

Test(generate, greedily_takes_the_models_most_likely_token) {
  texts t = {.stop = -1};
  static int32_t ids[64 * TEXTS];
  moe_prompt prompts[TEXTS];
  generate_texts(&t, 3, 32, (moe_sample_args){0.0f, 0, 1.0f, 0});
  ragged_prompts(prompts, ids);
  for (int i = 0; i < TEXTS; i++) {
    int32_t all[64];
    int64_t n = prompts[i].count;
    float *logits = floats((n + NEW) * SMALL_VOCAB);
    memcpy(all, prompts[i].ids, (size_t)n * sizeof *all);
    memcpy(all + n, t.ids[i], (size_t)t.count[i] * sizeof *all);
    model_logits(dev, world, 8.0, NULL, all, n + t.count[i] - 1, logits);
    for (int64_t j = 0; j < t.count[i]; j++) {
      const float *row = logits + (n - 1 + j) * SMALL_VOCAB;
      for (int v = 0; v < SMALL_VOCAB; v++)
        cr_assert(row[v] <= row[all[n + j]] + 1e-4f, "text %d, token %lld", i, (long long)j);
    }
    free(logits);
  }
}

Test(generate, ends_a_text_where_it_is_told_to) {
  texts free_run = {.stop = -1}, stopped = {.stop = -1};
  moe_sample_args sample = {1.0f, 0, 1.0f, 5};
  generate_texts(&free_run, 2, 64, sample);
  stopped.stop = free_run.ids[3][6];
  generate_texts(&stopped, 2, 64, sample);
  for (int i = 0; i < TEXTS; i++) {
    int64_t n = 0;
    while (n < free_run.count[i] && free_run.ids[i][n++] != stopped.stop) {
    }
    cr_assert_eq(stopped.count[i], n, "text %d: %lld tokens, not %lld", i,
                 (long long)stopped.count[i], (long long)n);
    cr_assert_eq(memcmp(stopped.ids[i], free_run.ids[i], (size_t)n * sizeof(int32_t)), 0);
  }
  cr_assert(stopped.count[3] <= 7);
}

Test(generate, differs_with_the_seed_and_between_prompts) {
  texts a = {.stop = -1}, b = {.stop = -1};
  generate_texts(&a, 2, 64, (moe_sample_args){1.0f, 0, 1.0f, 1});
  generate_texts(&b, 2, 64, (moe_sample_args){1.0f, 0, 1.0f, 2});
  cr_assert_neq(memcmp(a.ids[0], b.ids[0], 14 * sizeof(int32_t)), 0);
}

/* ---- distribution ---------------------------------------------------------------------------- */

enum { DRAWS = 3000 };

static moe_status count_first(void *context, int64_t prompt, int32_t token, bool *end) {
  (void)prompt;
  ((double *)context)[token] += 1.0;
  *end = true;
  return MOE_OK;
}

typedef struct {
  double p;
  int token;
} ranked;

static int by_probability(const void *a, const void *b) {
  double x = ((const ranked *)a)->p, y = ((const ranked *)b)->p;
  return (x < y) - (x > y);
}

/* What the options make of the model's logits. */
static void wanted(const float *logits, moe_sample_args a, double *p) {
  ranked r[SMALL_VOCAB];
  double sum = 0.0, mass = 0.0;
  for (int v = 0; v < SMALL_VOCAB; v++)
    r[v] = (ranked){exp((double)logits[v] / (double)a.temperature), v};
  qsort(r, SMALL_VOCAB, sizeof *r, by_probability);
  int kept = a.top_k > 0 ? (int)a.top_k : SMALL_VOCAB, length = 0;
  for (int i = 0; i < kept; i++) sum += r[i].p;
  while (length < kept && mass < (double)a.top_p * sum) mass += r[length++].p;
  for (int v = 0; v < SMALL_VOCAB; v++) p[v] = 0.0;
  for (int i = 0; i < length; i++) p[r[i].token] = r[i].p / mass;
}

/* Many texts of one token each: their streams differ, so they are independent draws. */
static void expect_distribution(moe_sample_args sample) {
  int32_t tokens[5];
  double count[SMALL_VOCAB] = {0}, p[SMALL_VOCAB], chi = 0.0, rest = 0.0, rest_p = 0.0;
  float *logits = floats(5 * SMALL_VOCAB);
  moe_prompt *prompts = calloc(DRAWS, sizeof *prompts);
  moe_generation_rates rates;
  int freedom = -1;
  small_tokens(tokens, 5, 4);
  model_logits(dev, world, 1.0, NULL, tokens, 5, logits);
  wanted(logits + 4 * SMALL_VOCAB, sample, p);
  for (int i = 0; i < DRAWS; i++) prompts[i] = (moe_prompt){tokens, 5, 3};
  small_generator *s =
      small_open(dev, world, (small_options){.batch = 4, .room = 8, .chunk = 5, .sample = sample});
  GENERATE_OK(moe_generate(s->g, prompts, DRAWS, count_first, count, &rates));
  small_close(s);
  for (int v = 0; v < SMALL_VOCAB; v++) {
    cr_assert(p[v] > 0.0 || count[v] == 0.0, "token %d was cut", v);
    if (p[v] * DRAWS < 8.0) { /* rare ones together */
      rest += count[v];
      rest_p += p[v];
      continue;
    }
    chi += (count[v] - p[v] * DRAWS) * (count[v] - p[v] * DRAWS) / (p[v] * DRAWS);
    freedom++;
  }
  if (rest_p * DRAWS >= 8.0) {
    chi += (rest - rest_p * DRAWS) * (rest - rest_p * DRAWS) / (rest_p * DRAWS);
    freedom++;
  }
  cr_assert(freedom > 1 && chi < freedom + 5.0 * sqrt(2.0 * freedom),
            "chi-square %.1f with %d degrees of freedom", chi, freedom);
  free(prompts);
  free(logits);
}

Test(generate, draws_by_temperature_top_k_and_top_p) {
  expect_distribution((moe_sample_args){1.0f, 0, 1.0f, 21});
  expect_distribution((moe_sample_args){0.6f, 0, 1.0f, 22});
  expect_distribution((moe_sample_args){1.5f, 12, 1.0f, 23});
  expect_distribution((moe_sample_args){1.0f, 0, 0.7f, 24});
  expect_distribution((moe_sample_args){0.8f, 20, 0.9f, 25});
}

/* ---- refusals -------------------------------------------------------------------------------- */

Test(generate, refuses_what_does_not_fit) {
  int32_t tokens[] = {1, 2, 97, 4}, first;
  small_generator *s = small_open(dev, world, (small_options){.batch = 2, .room = 3, .chunk = 4});
  cr_assert_eq(moe_generator_feed(s->g, 0, 1, tokens, 3, NULL), MOE_INVALID);
  cr_assert(strstr(moe_error_message(), "token 97 is outside"), "%s", moe_error_message());
  cr_assert_eq(moe_generator_feed(s->g, 0, 1, tokens, 4, NULL), MOE_INVALID);
  cr_assert(strstr(moe_error_message(), "exceed the room of 3"), "%s", moe_error_message());
  cr_assert_eq(moe_generator_feed(s->g, 2, 1, tokens, 1, NULL), MOE_INVALID);
  cr_assert_eq(moe_generator_start(s->g, 0, tokens, 0, 0, &first), MOE_INVALID);
  GENERATE_OK(moe_generator_feed(s->g, 0, 1, tokens, 2, NULL));
  cr_assert_eq(moe_generator_feed(s->g, 0, 2, tokens, 1, NULL), MOE_INVALID);
  small_close(s);
}

Test(generate, refuses_sizes_beyond_any_machine_without_asking_for_memory) {
  static moe_config c;
  moe_mesh mesh;
  moe_memory memory;
  moe_generator *g;
  small_config(&c, 1.0);
  c.model.num_layers = 4096;
  GENERATE_OK(moe_mesh_create(world, 1, SMALL_EXPERTS, &mesh));
  moe_generator_options o = {.config = &c, .dev = dev, .mesh = &mesh, .batch = 1 << 20};
  o.room = 1 << 24;
  o.chunk = 8;
  moe_memory_measure(&memory);
  cr_assert_eq(moe_generator_create(&o, &memory, &g), MOE_NO_MEMORY);
  moe_mesh_destroy(&mesh);
}
