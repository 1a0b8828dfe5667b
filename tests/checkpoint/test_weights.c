/* Sources of weights: a checkpoint's values, their rounding, and the forward pass that streams
 * them, which must be the model's. */
#include <math.h>

#include "checkpoint/crew.h"
#include "checkpoint/proof.h"
#include "checkpoint/reshard.h"
#include "core/model/model.h"
#include "tests/checkpoint/fixture.h"
#include "tests/checkpoint/model.h"

TestSuite(weights, .init = open_world, .fini = close_world, .timeout = 60);

static moe_weights *open_model(moe_config *c) {
  moe_weights *w;
  save_model(c, 5, 1);
  EXPECT_OK(moe_weights_open_checkpoint(in_step(1, ""), &w));
  return w;
}

Test(weights, of_a_checkpoint_are_its_masters) {
  moe_config *c = model_config(2, MOE_PRECISION_BF16);
  moe_weights *w = open_model(c);
  expect_values(w, MOE_F32);
  cr_assert_eq(w->dims.experts, 5);
  cr_assert_eq(w->context, 40);
  cr_assert_float_eq(moe_weights_theta(w), 500.0, 1e-9);
  moe_weights_close(w);
  free(c);
}

Test(weights, rounded_to_bf16_leave_norms_and_routers_alone) {
  moe_config *c = model_config(1, MOE_PRECISION_FP32);
  moe_weights *w = open_model(c), *r;
  EXPECT_OK(moe_weights_round(w, MOE_BF16, &r));
  expect_values(r, MOE_BF16);
  moe_weights_close(r);
  moe_weights_close(w);
  free(c);
}

Test(weights, read_any_range_of_a_tensor) {
  moe_config *c = model_config(2, MOE_PRECISION_BF16);
  moe_weights *w = open_model(c);
  const moe_param *p = moe_params_find(&w->params, "lm_head.weight");
  float *all = model_values(p, 5), got[700];
  for (int64_t begin = 0; begin + 700 <= p->count; begin += 331) {
    EXPECT_OK(moe_weights_read(w, p, begin, 700, got));
    cr_assert_arr_eq(got, all + begin, sizeof got);
  }
  cr_assert_eq(moe_weights_read(w, p, p->count - 1, 2, got), MOE_INVALID);
  cr_assert_eq(moe_weights_read(w, p, -1, 1, got), MOE_INVALID);
  free(all);
  moe_weights_close(w);
  free(c);
}

/* Tensor i of a source in parts that fit nothing, which must be those of seed 5. Tensors are as
 * many as times they are read: others read the same one meanwhile. */
static moe_status read_in_parts(void *context, int worker, int64_t i) {
  moe_weights *w = context;
  const moe_param *p = &w->params.list[i % w->params.count];
  float *expected = model_values(p, 5), *got = malloc((size_t)p->count * sizeof *got);
  moe_status status = MOE_OK;
  (void)worker;
  for (int64_t at = 0, n; at < p->count && status == MOE_OK; at += n) {
    n = p->count - at < 37 + i % 11 ? p->count - at : 37 + i % 11;
    status = moe_weights_read(w, p, at, n, got + at);
  }
  if (status == MOE_OK && memcmp(got, expected, (size_t)p->count * sizeof *got) != 0)
    status = moe_fail(MOE_FAILED, "%s has other values", p->name);
  free(expected);
  free(got);
  return status;
}

Test(weights, are_read_by_many_threads_from_more_files_than_stay_open) {
  static const volatile sig_atomic_t go_on = 0;
  char many[128], step[192];
  moe_weights *w = open_model(model_config(2, MOE_PRECISION_FP32));
  EXPECT_OK(moe_crew_work(MOE_CREW_MOST, 3 * w->params.count, read_in_parts, w));
  moe_weights_close(w);
  snprintf(many, sizeof many, "%s/many", run);
  snprintf(step, sizeof step, "%s/checkpoints/step-00000001", many);
  EXPECT_OK(moe_reshard(world, in_step(1, ""), many, 150, &go_on));
  EXPECT_OK(moe_weights_open_checkpoint(step, &w));
  EXPECT_OK(moe_crew_work(MOE_CREW_MOST, 3 * w->params.count, read_in_parts, w));
  moe_weights_close(w);
}

Test(weights, are_refused_when_their_bytes_are_not_those_that_were_saved) {
  moe_config *c = model_config(2, MOE_PRECISION_BF16);
  moe_weights *w;
  save_model(c, 5, 1);
  /* a byte amid the data of some tensor */
  SHELL("printf '\\125' | dd of=%s bs=1 seek=30000 conv=notrunc status=none",
        in_step(1, "shard-00000-of-00001.h5"));
  moe_status status = moe_weights_open_checkpoint(in_step(1, ""), &w);
  float *values = malloc(1 << 20);
  for (int i = 0; status == MOE_OK && i < w->params.count; i++)
    status = moe_weights_read(w, &w->params.list[i], 0, w->params.list[i].count, values);
  cr_assert_eq(status, MOE_DAMAGED);
  EXPECT_SAYS("hash");
  free(values);
  moe_weights_close(w);
  free(c);
}

/* ---- the streamed forward pass -----------------------------------------------------------------
 */

enum { BATCH = 3, SEQ = 17, TOKENS = BATCH * SEQ };

/* The same logits by the model that trains. */
static void model_logits(const moe_config *c, moe_weights *w, const int32_t *tokens, float *out) {
  moe_mesh mesh;
  moe_memory memory = {0};
  moe_model *m;
  moe_model_options o = {.config = c, .dev = dev, .mesh = &mesh, .batch = BATCH, .seq = SEQ};
  o.micro_batches = 1;
  EXPECT_OK(moe_mesh_create(world, 1, c->model.num_experts, &mesh));
  moe_memory_measure(&memory);
  EXPECT_OK(moe_model_create(&o, &memory, &m));
  moe_model_destroy(m);
  EXPECT_OK(moe_memory_commit(&memory, moe_device_alloc, dev));
  EXPECT_OK(moe_model_create(&o, &memory, &m));
  for (int i = 0; i < w->params.count; i++) {
    const moe_param *p = &w->params.list[i];
    float *values = malloc((size_t)p->count * sizeof *values);
    EXPECT_OK(moe_weights_read(w, p, 0, p->count, values));
    EXPECT_OK(moe_model_write_param(m, p, 0, p->count, values, moe_tensor_none(), 0));
    free(values);
  }
  int32_t targets[TOKENS], positions[TOKENS];
  for (int i = 0; i < TOKENS; i++) targets[i] = 0, positions[i] = i % SEQ;
  moe_batch batch = {.batch = BATCH, .seq = SEQ};
  batch.tokens = tokens;
  batch.targets = targets;
  batch.positions = positions;
  EXPECT_OK(moe_model_logits(m, &batch, out));
  moe_model_destroy(m);
  moe_mesh_destroy(&mesh);
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) moe_device_free(dev, memory.arena[i].base);
}

static void expect_same_logits(int groups) {
  moe_config *c = model_config(groups, MOE_PRECISION_FP32);
  moe_weights *w = open_model(c);
  int32_t tokens[TOKENS];
  static float got[TOKENS * 101], expected[TOKENS * 101];
  int64_t used[15], assigned = 0;
  for (int i = 0; i < TOKENS; i++) tokens[i] = (i * 37 + i / 7) % 101;
  const moe_weights_pass pass = {.weights = w, .logits = got, .used = used};
  EXPECT_OK(moe_weights_logits(&pass, 1, tokens, BATCH, SEQ, NULL));
  model_logits(c, w, tokens, expected);
  double most = 0.0;
  for (int i = 0; i < TOKENS * 101; i++) {
    cr_assert_float_eq(got[i], expected[i], 2e-5, "logit %d: %g, the model says %g", i, got[i],
                       expected[i]);
    most = fmax(most, fabs(expected[i]));
  }
  cr_assert_gt(most, 0.5); /* the comparison means something */
  for (int i = 0; i < 15; i++) assigned += used[i];
  cr_assert_eq(assigned, TOKENS * 3 * 3);
  moe_weights_close(w);
  free(c);
}

Test(weights, streamed_give_the_logits_of_the_model_with_one_key_head) {
  expect_same_logits(1);
}
Test(weights, streamed_give_the_logits_of_the_model_with_two_key_heads) {
  expect_same_logits(2);
}

/* Passes that go together are those of each source alone, bit for bit, whether a source is read or
 * made of the one before; and all of a tensor's values are seen, once, in order. */
Test(weights, streamed_side_by_side_give_what_each_gives_alone) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  moe_weights *w = open_model(c), *rounded;
  EXPECT_OK(moe_weights_round(w, MOE_BF16, &rounded));
  static float alone[2][TOKENS * 101], together[3][TOKENS * 101];
  int32_t tokens[TOKENS];
  for (int i = 0; i < TOKENS; i++) tokens[i] = (i * 37 + i / 7) % 101;
  moe_weights_seen *seen = calloc((size_t)w->params.count, sizeof *seen);
  const moe_weights_pass one = {.weights = w, .logits = alone[0]},
                         other = {.weights = rounded, .logits = alone[1]};
  const moe_weights_pass all[] = {{.weights = w, .logits = together[0]},
                                  {.weights = rounded, .logits = together[1], .seen = seen},
                                  {.weights = w, .logits = together[2]}};
  EXPECT_OK(moe_weights_logits(&one, 1, tokens, BATCH, SEQ, NULL));
  EXPECT_OK(moe_weights_logits(&other, 1, tokens, BATCH, SEQ, NULL));
  EXPECT_OK(moe_weights_logits(all, 3, tokens, BATCH, SEQ, NULL));
  cr_assert_arr_eq(together[0], alone[0], sizeof alone[0]);
  cr_assert_arr_eq(together[1], alone[1], sizeof alone[1]);
  cr_assert_arr_eq(together[2], alone[0], sizeof alone[0]);
  cr_assert(memcmp(alone[0], alone[1], sizeof alone[0]) != 0);
  for (int i = 0; i < w->params.count; i++) {
    const moe_param *p = &w->params.list[i];
    float *values = malloc((size_t)p->count * sizeof *values);
    EXPECT_OK(moe_weights_read(rounded, p, 0, p->count, values));
    XXH128_hash_t hash = XXH3_128bits(values, (size_t)p->count * sizeof *values);
    cr_assert(seen[i].count == p->count && XXH128_isEqual(seen[i].hash, hash), "%s", p->name);
    free(values);
  }
  free(seen);
  moe_weights_close(rounded);
  moe_weights_close(w);
  free(c);
}

static volatile sig_atomic_t asked;

static void ask_after_half(void *context, int64_t bytes) {
  int64_t *left = context;
  if (__atomic_sub_fetch(left, bytes, __ATOMIC_RELAXED) < 0) asked = 1;
}

Test(weights, streamed_are_stopped_amid_the_model) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  moe_weights *w = open_model(c);
  static float logits[2 * 101];
  int32_t tokens[2] = {5, 100};
  int64_t all = moe_dims_parameters(&w->dims) * 4, left = all / 2;
  const moe_weights_pass pass = {.weights = w, .logits = logits};
  const moe_weights_watch watch = {.passed = ask_after_half, .context = &left, .stop = &asked};
  cr_assert_eq(moe_weights_logits(&pass, 1, tokens, 1, 2, &watch), MOE_STOPPED);
  cr_assert(left < 0 && left > -all / 4, "%d of %d bytes", (int)left, (int)all);
  asked = 0;
  left = all;
  EXPECT_OK(moe_weights_logits(&pass, 1, tokens, 1, 2, &watch));
  cr_assert_eq(left, 0);
  moe_weights_close(w);
  free(c);
}

Test(weights, logits_refuse_tokens_outside_the_vocabulary) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  moe_weights *w = open_model(c);
  static float logits[2 * 101];
  int32_t tokens[2] = {5, 101};
  const moe_weights_pass pass = {.weights = w, .logits = logits};
  cr_assert_eq(moe_weights_logits(&pass, 1, tokens, 1, 2, NULL), MOE_INVALID);
  EXPECT_SAYS("token 101");
  moe_weights_close(w);
  free(c);
}
