/* Worker: generation with the experts shared out over all ranks gives what one rank gives, bit for
 * bit, in every compute type. MOE_TEST_BACKEND=cuda: each rank on a GPU. */
#include <math.h>

#include "tests/mpi/worker.h"

#define GENERATE_OK(call) OK(call)
#include "tests/model/generate_fixture.h"

/* Passes of 40 tokens sort them by expert, those of a few do not. */
enum { N = 50, ROOM = 128, CHUNK = 40, TEXTS = 5, LONGEST = 60, NEW = 60, SLOTS = 2 };

typedef struct {
  float logits[N * SMALL_VOCAB];
  double loss[2];
  int32_t ids[TEXTS][NEW];
} results;

/* Logits of feeding N tokens, 40 at once and the others one by one. */
static void feed(small_generator *s, float *logits) {
  int32_t tokens[N];
  small_tokens(tokens, N, 3);
  OK(moe_generator_feed(s->g, 0, 1, tokens, CHUNK, logits));
  for (int i = CHUNK; i < N; i++)
    OK(moe_generator_feed(s->g, 0, 1, tokens + i, 1, logits + i * SMALL_VOCAB));
}

/* What perplexity is made of. */
static void score(small_generator *s, double loss[2]) {
  int32_t tokens[SLOTS * N], targets[SLOTS * N];
  small_tokens(tokens, SLOTS * N, 1);
  small_tokens(targets, SLOTS * N, 2);
  OK(moe_generator_clear(s->g, 0, SLOTS));
  OK(moe_generator_score(s->g, 0, SLOTS, tokens, targets, N, loss));
}

static moe_status keep(void *context, int64_t prompt, int32_t token, bool *end) {
  int32_t(*ids)[NEW] = context;
  int i = 0;
  while (ids[prompt][i] >= 0) i++;
  ids[prompt][i] = token;
  *end = token == 7;
  return MOE_OK;
}

static void write_texts(small_generator *s, int32_t ids[TEXTS][NEW]) {
  int32_t prompt_ids[TEXTS][LONGEST];
  moe_prompt prompts[TEXTS];
  moe_generation_rates rates;
  for (int i = 0; i < TEXTS; i++) {
    small_tokens(prompt_ids[i], LONGEST, i);
    prompts[i] = (moe_prompt){prompt_ids[i], 1 + 14 * i, NEW - i};
  }
  memset(ids, 0xff, sizeof(int32_t[TEXTS][NEW]));
  OK(moe_generator_clear(s->g, 0, SLOTS));
  OK(moe_generate(s->g, prompts, TEXTS, keep, ids, &rates));
}

static void generate(worker *w, moe_comm *ranks, int precision, bool wide, results *out) {
  small_options o = {.alpha = 8.0, .batch = SLOTS, .room = ROOM, .chunk = CHUNK};
  o.precision = precision;
  o.wide = wide;
  o.sample = (moe_sample_args){1.0f, 0, 1.0f, 17};
  memset(out, 0, sizeof *out);
  small_generator *s = small_open(w->dev, ranks, o);
  REQUIRE(moe_range_size(s->mesh.owned) <= SMALL_EXPERTS / moe_comm_size(ranks) + 1);
  feed(s, out->logits);
  score(s, out->loss);
  write_texts(s, out->ids);
  small_close(s);
}

static bool same_bits(const void *a, const void *b, size_t bytes) {
  return memcmp(a, b, bytes) == 0;
}

static void compare(worker *w, moe_comm *alone, int precision, bool wide) {
  static results one, all;
  generate(w, alone, precision, wide, &one);
  generate(w, w->world, precision, wide, &all);
  for (int i = 0; i < N * SMALL_VOCAB; i++) REQUIRE(isfinite(one.logits[i]));
  REQUIRE(same_bits(one.logits, all.logits, sizeof one.logits));
  REQUIRE(one.loss[1] == SLOTS * N && same_bits(one.loss, all.loss, sizeof one.loss));
  REQUIRE(same_bits(one.ids, all.ids, sizeof one.ids));
}

int main(int argc, char **argv) {
  const char *backend = getenv("MOE_TEST_BACKEND");
  bool cuda = backend && strcmp(backend, "cuda") == 0;
  worker w = worker_open_on(cuda ? MOE_DEVICE_CUDA : MOE_DEVICE_CPU, &argc, &argv);
  moe_comm *alone;
  OK(moe_comm_split(w.world, w.rank, 0, &alone));
  for (int p = MOE_PRECISION_FP32; p <= MOE_PRECISION_FP16; p++) {
    compare(&w, alone, p, false);
    compare(&w, alone, p, true);
  }
  moe_comm_destroy(alone);
  worker_close(&w);
  return 0;
}
