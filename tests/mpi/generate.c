/* Worker: generation with the experts shared out over all ranks gives what one rank gives. */
#include "tests/mpi/worker.h"

#define GENERATE_OK(call) OK(call)
#include <math.h>

#include "tests/model/generate_fixture.h"

enum { N = 50, TEXTS = 5, NEW = 20 };

/* Logits of feeding N tokens, 30 at once and the others one by one. */
static void feed(small_generator *s, float *logits) {
  int32_t tokens[N];
  small_tokens(tokens, N, 3);
  OK(moe_generator_feed(s->g, 0, 1, tokens, 30, logits));
  for (int i = 30; i < N; i++)
    OK(moe_generator_feed(s->g, 0, 1, tokens + i, 1, logits + i * SMALL_VOCAB));
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
  int32_t prompt_ids[TEXTS][N];
  moe_prompt prompts[TEXTS];
  moe_generation_rates rates;
  for (int i = 0; i < TEXTS; i++) {
    small_tokens(prompt_ids[i], N, i);
    prompts[i] = (moe_prompt){prompt_ids[i], 1 + 11 * i, NEW - i};
  }
  memset(ids, 0xff, sizeof(int32_t[TEXTS][NEW]));
  OK(moe_generate(s->g, prompts, TEXTS, keep, ids, &rates));
}

static small_generator *open_on(worker *w, moe_comm *ranks, int precision) {
  small_options o = {.alpha = 8.0, .batch = 2, .room = 80, .chunk = 40, .precision = precision};
  o.sample = (moe_sample_args){0.9f, 0, 0.95f, 17};
  return small_open(w->dev, ranks, o);
}

/* All ranks against this rank alone; then all ranks against rank 0, to the bit. */
static void compare(worker *w, moe_comm *alone, int precision, double tolerance) {
  static float one[N * SMALL_VOCAB], all[N * SMALL_VOCAB], first[N * SMALL_VOCAB];
  int32_t text_one[TEXTS][NEW], text_all[TEXTS][NEW], text_first[TEXTS][NEW];
  small_generator *s = open_on(w, alone, precision);
  feed(s, one);
  write_texts(s, text_one);
  small_close(s);
  s = open_on(w, w->world, precision);
  REQUIRE(moe_range_size(s->mesh.owned) <= SMALL_EXPERTS / w->size + 1);
  feed(s, all);
  write_texts(s, text_all);
  small_close(s);
  double error = 0.0, norm = 0.0;
  for (int i = 0; i < N * SMALL_VOCAB; i++) {
    error += pow((double)all[i] - (double)one[i], 2.0);
    norm += pow((double)one[i], 2.0);
  }
  REQUIRE(norm > 1.0 && sqrt(error) <= tolerance * sqrt(norm));
  memcpy(first, all, sizeof first);
  memcpy(text_first, text_all, sizeof text_first);
  OK(moe_comm_host_broadcast(w->world, first, sizeof first, 0));
  OK(moe_comm_host_broadcast(w->world, text_first, sizeof text_first, 0));
  REQUIRE(memcmp(text_first, text_all, sizeof text_first) == 0);
  if (precision == MOE_PRECISION_FP32) REQUIRE(memcmp(text_one, text_all, sizeof text_one) == 0);
}

int main(int argc, char **argv) {
  worker w = worker_open(&argc, &argv);
  moe_comm *alone;
  OK(moe_comm_split(w.world, w.rank, 0, &alone));
  compare(&w, alone, MOE_PRECISION_FP32, 1e-5);
  compare(&w, alone, MOE_PRECISION_BF16, 0.1);
  moe_comm_destroy(alone);
  worker_close(&w);
  return 0;
}
