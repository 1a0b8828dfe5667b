/* One training step after another, from device graphs and without: the same to the bit, though the
 * learning rate, the batch and what happens between steps differ each time. On a CPU, where nothing
 * is recorded, the two runs show that a run is repeatable and that its clock adds up. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "core/base/log.h"
#include "core/train/schedule.h"
#include "core/train/step.h"

enum { STEPS = 9, POISONED = 6, EVALUATED = 4, SEQ = 64, BATCH = 2, VOCAB = 192 };

static moe_device *dev;

static void ok(moe_status status) {
  cr_assert(status == MOE_OK, "%s", moe_error_message());
}

static void open_device(void) {
  const char *wanted = getenv("MOE_TEST_BACKEND");
  moe_device_options options = {.threads = 1, .deterministic = true};
  if (wanted) options.kind = strcmp(wanted, "cuda") == 0 ? MOE_DEVICE_CUDA : MOE_DEVICE_CPU;
  moe_log_init("test", 0);
  ok(moe_comm_init(NULL, NULL));
  ok(moe_device_open(&options, &dev));
}

static void close_device(void) {
  moe_device_close(dev);
  moe_comm_finalize();
}

TestSuite(step, .init = open_device, .fini = close_device, .timeout = 120);

/* ---- a run -------------------------------------------------------------------------------------
 */

typedef struct {
  double loss[STEPS], norm[STEPS], evaluated;
  bool finite[STEPS];
  XXH64_hash_t state; /* weights, masters and moments at the end */
  int graphs;         /* recorded */
  bool records;       /* still, after the run */
} outcome;

/* Sizes that every device has kernels for which can be recorded. */
static void open_engine(bool graphs, int accumulation, const char *set, moe_engine *e) {
  static const char *const settings[] = {
      "model.vocab_size=192", "model.hidden_size=128", "model.num_layers=2",   "model.num_heads=2",
      "model.num_kv_heads=1", "model.head_dim=64",     "model.num_experts=4",  "model.top_k=2",
      "model.ffn_size=64",    "model.context=64",      "precision.dtype=bf16", "optim.lr=3e-3",
      "optim.warmup_steps=7", "train.steps=9",         "train.micro_batch=2",  "run.dir=none"};
  static moe_config c; /* large */
  char text[64];
  moe_config_defaults(&c);
  for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++)
    ok(moe_config_set(&c, settings[i]));
  snprintf(text, sizeof text, "train.global_batch=%d", BATCH * accumulation);
  ok(moe_config_set(&c, text));
  ok(moe_config_set(&c, graphs ? "run.graphs=true" : "run.graphs=false"));
  if (set) ok(moe_config_set(&c, set));
  ok(moe_config_resolve(&c, 1));
  ok(moe_engine_create(&c, dev, true, false, e));
  ok(moe_optimizer_init_weights(e->optimizer, 5));
}

static moe_batch batch_number(int64_t number) {
  static int32_t room[3][BATCH * SEQ];
  for (int64_t i = 0; i < BATCH * SEQ; i++) {
    room[0][i] = (int32_t)((i * (3 + number % 5) + number * 7) % VOCAB);
    room[1][i] = (int32_t)(((i + 1) * (3 + number % 5) + number * 7) % VOCAB);
    room[2][i] = (int32_t)(i % SEQ);
  }
  return (moe_batch){
      .batch = BATCH, .seq = SEQ, .tokens = room[0], .targets = room[1], .positions = room[2]};
}

/* Set the head's first weight. */
static void write_head(moe_engine *e, float value) {
  const moe_params *params = moe_model_params(e->model);
  for (int i = 0; i < params->count; i++) {
    const moe_param *p = &params->list[i];
    if (strcmp(p->name, "lm_head.weight") != 0) continue;
    moe_tensor master = moe_optimizer_pool_state(e->optimizer, p->row->pool)->master;
    ok(moe_model_write_param(e->model, p, 0, 1, &value, master, 0));
  }
}

static XXH64_hash_t hash_tensor(moe_tensor x, XXH64_hash_t so_far) {
  if (!moe_tensor_present(x)) return so_far;
  int64_t bytes = moe_tensor_bytes(x);
  void *host = malloc((size_t)bytes);
  cr_assert(host);
  ok(moe_device_download(dev, host, x.data, bytes));
  ok(moe_device_sync(dev));
  XXH64_hash_t hash = XXH64(host, (size_t)bytes, so_far);
  free(host);
  return hash;
}

static XXH64_hash_t hash_state(const moe_engine *e) {
  XXH64_hash_t hash = 0;
  for (int pool = 0; pool < MOE_POOLS; pool++) {
    const moe_optimizer_pool *o = moe_optimizer_pool_state(e->optimizer, (moe_pool_kind)pool);
    hash = hash_tensor(moe_model_weights(e->model, (moe_pool_kind)pool), hash);
    hash = hash_tensor(o->master, hash);
    hash = hash_tensor(o->m, hash);
    hash = hash_tensor(o->v, hash);
  }
  return hash;
}

/* Every part took some of the step's time, and no more than there was. */
static void expect_parts(const moe_engine *e, double seconds, int step) {
  double part[MOE_STEP_PARTS] = {0.0}, sum = 0.0;
  moe_step_clock_read(&e->clock, part);
  for (int i = 0; i < MOE_STEP_PARTS; i++) {
    bool measured = i != MOE_PART_EXCHANGE && i != MOE_PART_DATA;
    cr_assert(measured ? part[i] > 0.0 : part[i] >= 0.0, "step %d, part %d: %g s", step, i,
              part[i]);
    sum += part[i];
  }
  if (e->accumulation <= 3) /* else some are reckoned from others */
    cr_assert(sum <= seconds, "step %d: parts of %g s, in all %g s", step, sum, seconds);
}

static outcome train(bool graphs, int accumulation, const char *set) {
  outcome out = {.graphs = 0};
  moe_engine e;
  open_engine(graphs, accumulation, set, &e);
  moe_schedule schedule = moe_schedule_of(&e.config);
  cr_assert_eq(e.accumulation, accumulation);
  for (int step = 1; step <= STEPS; step++) {
    moe_step_result r;
    if (step == POISONED) write_head(&e, INFINITY);
    double begin = moe_clock_s();
    ok(moe_step_begin(&e, moe_schedule_lr(&schedule, step), step));
    for (int i = 0; i < accumulation; i++) {
      moe_batch batch = batch_number(step * accumulation + i);
      ok(moe_step_micro_batch(&e, &batch));
    }
    ok(moe_step_end(&e, &r));
    expect_parts(&e, moe_clock_s() - begin, step);
    if (step == POISONED) write_head(&e, 0.01f);
    float *bias = moe_model_router_bias(e.model);
    if (bias) bias[step % 8] += 0.02f;
    if (bias) ok(moe_model_router_bias_changed(e.model));
    out.loss[step - 1] = r.losses.loss, out.norm[step - 1] = r.grad_norm;
    out.finite[step - 1] = r.finite;
    double sums[2] = {0.0, 0.0};
    moe_batch other = batch_number(1000);
    if (step == EVALUATED) ok(moe_model_evaluate(e.model, &other, sums));
    if (step == EVALUATED) out.evaluated = sums[0] / sums[1];
  }
  for (int i = 0; i < 4; i++) out.graphs += e.recorded[i / 2][i % 2].graph != NULL;
  out.records = e.records;
  out.state = hash_state(&e);
  moe_engine_destroy(&e);
  return out;
}

/* ---- graphs and none --------------------------------------------------------------------------
 */

static bool same(double a, double b) {
  return a == b || (isnan(a) && isnan(b));
}

static void expect_same(int accumulation, const char *set, int kinds) {
  outcome a = train(true, accumulation, set), b = train(false, accumulation, set);
  for (int i = 0; i < STEPS; i++) {
    cr_assert(same(a.loss[i], b.loss[i]), "loss of step %d: %.17g from graphs, %.17g without",
              i + 1, a.loss[i], b.loss[i]);
    cr_assert(same(a.norm[i], b.norm[i]), "norm of step %d: %.17g from graphs, %.17g without",
              i + 1, a.norm[i], b.norm[i]);
    cr_assert_eq(a.finite[i], i + 1 != POISONED, "step %d", i + 1);
  }
  cr_assert(a.loss[STEPS - 1] < a.loss[0] - 0.1, "nothing was learnt: %g to %g", a.loss[0],
            a.loss[STEPS - 1]);
  cr_assert(same(a.evaluated, b.evaluated), "evaluation");
  cr_assert_eq(a.state, b.state, "the state at the end differs");
  cr_assert_eq(b.graphs, 0);
  if (moe_device_has_graphs(dev) && !a.records)
    cr_log_warn("expert products on %s are not recorded", moe_device_name(dev));
  else
    cr_assert_eq(a.graphs, moe_device_has_graphs(dev) ? kinds : 0, "%d graphs", a.graphs);
}

Test(step, whole_is_one_graph_and_gives_the_same_bits) {
  expect_same(1, NULL, 1);
}

Test(step, with_rounded_state_gives_the_same_bits) {
  expect_same(1, "precision.moment_dtype=bf16", 1);
}

Test(step, of_two_micro_batches_gives_the_same_bits) {
  expect_same(2, NULL, 2);
}

Test(step, of_many_micro_batches_gives_the_same_bits) {
  expect_same(5, NULL, 3);
}

Test(step, with_a_selection_bias_gives_the_same_bits) {
  expect_same(1, "train.bias_update_rate=1e-3", 1);
}

Test(step, runs_as_it_is_where_kernels_cannot_be_recorded) {
  outcome out = train(true, 1, "precision.dtype=fp32"),
          again = train(false, 1, "precision.dtype=fp32");
  cr_assert_eq(out.state, again.state);
  cr_assert_eq(out.graphs, out.records && moe_device_has_graphs(dev) ? 1 : 0);
}
