/* Worker: steps of several ranks give the same bits recorded and as they are.
 *
 *     mpi_recorded     2 ranks or more; with MOE_TEST_BACKEND=cuda as many GPUs
 *
 * A CPU records nothing. Here it plays at it: what is recorded is done at once, so that nothing is
 * left for the first launch. That will do for a run's second step, and shows who records what, and
 * what becomes of it when that fails. */
#include <math.h>

#include "core/train/step.h"
#include "kernels/backend.h"
#include "tests/mpi/worker.h"

enum { SEQ = 64, BATCH = 2, VOCAB = 192, MOST_STEPS = 9, OTHER_BATCH = 1000 };

/* ---- playing ------------------------------------------------------------------------------- */

static struct {
  moe_backend table;
  const moe_backend *real;
  int recordings, launches, updates, follows; /* the last two: in recordings */
  bool fails;                                 /* to end a recording */
} play;

static moe_status play_begin(moe_device *dev) {
  (void)dev;
  play.recordings++;
  return MOE_OK;
}

static moe_status play_end(moe_device *dev, moe_graph **out) {
  (void)dev;
  if (play.fails) return moe_fail(MOE_INVALID, "graph: not today");
  *out = (moe_graph *)&play; /* which nobody looks into */
  return MOE_OK;
}

static moe_status play_launch(moe_device *dev, moe_graph *graph) {
  (void)dev, (void)graph;
  play.launches++;
  return MOE_OK;
}

static void play_destroy(moe_device *dev, moe_graph *graph) {
  (void)dev, (void)graph;
}

static moe_status play_follow(moe_device *dev, const moe_mark *mark) {
  (void)mark;
  play.follows += dev->recording;
  return MOE_OK;
}

static moe_status play_adamw(moe_device *dev, moe_adamw_args args, moe_tensor now, moe_tensor grad,
                             moe_tensor scale, moe_tensor master, moe_tensor m, moe_tensor v,
                             moe_tensor weight) {
  play.updates += dev->recording;
  return play.real->adamw(dev, args, now, grad, scale, master, m, v, weight);
}

static void start_playing(moe_device *dev) {
  play.real = dev->backend;
  play.table = *dev->backend;
  play.table.graph_begin = play_begin;
  play.table.graph_end = play_end;
  play.table.graph_launch = play_launch;
  play.table.graph_destroy = play_destroy;
  play.table.follow = play_follow;
  play.table.adamw = play_adamw;
  dev->backend = &play.table;
}

/* ---- a run --------------------------------------------------------------------------------- */

typedef struct {
  const char *ep, *dtype;
  bool zero1;
  int micro_batches;
} run_kind;

typedef struct {
  double loss[MOST_STEPS], norm[MOST_STEPS], between,
      after; /* evaluated after step 1, at the end */
  int graphs;
  bool records; /* still, after the run */
} outcome;

static void open_engine(moe_device *dev, int ranks, run_kind kind, bool graphs, moe_engine *e) {
  static const char *const sizes[] = {
      "model.vocab_size=192", "model.hidden_size=128", "model.num_layers=3",  "model.num_heads=2",
      "model.num_kv_heads=1", "model.head_dim=64",     "model.num_experts=4", "model.top_k=2",
      "model.ffn_size=64",    "model.context=64",      "optim.lr=3e-3",       "train.micro_batch=2",
      "train.steps=9",        "optim.warmup_steps=7",  "run.dir=none"};
  static moe_config c; /* large */
  char text[64];
  moe_config_defaults(&c);
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) OK(moe_config_set(&c, sizes[i]));
  snprintf(text, sizeof text, "train.global_batch=%d", BATCH * ranks * kind.micro_batches);
  OK(moe_config_set(&c, text));
  OK(moe_config_set(&c, kind.ep));
  OK(moe_config_set(&c, kind.dtype));
  OK(moe_config_set(&c, kind.zero1 ? "parallel.zero1=true" : "parallel.zero1=false"));
  OK(moe_config_set(&c, graphs ? "run.graphs=true" : "run.graphs=false"));
  OK(moe_config_resolve(&c, ranks));
  OK(moe_engine_create(&c, dev, true, false, e));
  OK(moe_optimizer_init_weights(e->optimizer, 5));
}

static moe_batch batch_number(int64_t number, int rank) {
  static int32_t room[3][BATCH * SEQ];
  int64_t slope = 3 + number % 5, shift = number * 7 + rank * 11;
  for (int64_t i = 0; i < BATCH * SEQ; i++) {
    room[0][i] = (int32_t)((i * slope + shift) % VOCAB);
    room[1][i] = (int32_t)(((i + 1) * slope + shift) % VOCAB);
    room[2][i] = (int32_t)(i % SEQ);
  }
  return (moe_batch){
      .batch = BATCH, .seq = SEQ, .tokens = room[0], .targets = room[1], .positions = room[2]};
}

static double evaluate(moe_engine *e) {
  moe_batch batch = batch_number(OTHER_BATCH, moe_comm_rank(e->world));
  double sums[2] = {0.0, 0.0};
  OK(moe_model_evaluate(e->model, &batch, sums));
  return sums[0] / sums[1];
}

static moe_status train_step(moe_engine *e, int step, outcome *out) {
  moe_step_result result;
  OK(moe_step_begin(e, 1e-3 * step, step));
  for (int64_t i = 0; i < e->accumulation; i++) {
    moe_batch batch = batch_number(step * e->accumulation + i, moe_comm_rank(e->world));
    MOE_TRY(moe_step_micro_batch(e, &batch));
  }
  OK(moe_step_end(e, &result));
  out->loss[step - 1] = result.losses.loss;
  out->norm[step - 1] = result.grad_norm;
  return MOE_OK;
}

/* Steps of such a run up to the first that fails. */
static moe_status train(const worker *w, run_kind kind, bool graphs, outcome *out) {
  moe_engine e;
  moe_status status = MOE_OK;
  *out = (outcome){.graphs = 0};
  open_engine(w->dev, w->size, kind, graphs, &e);
  REQUIRE(e.accumulation == kind.micro_batches);
  int steps = moe_device_is_host(w->dev) ? 2 : MOST_STEPS;
  for (int step = 1; step <= steps && status == MOE_OK; step++) {
    status = train_step(&e, step, out);
    if (step == 1) out->between = evaluate(&e); /* and has waited for all weights */
  }
  if (status == MOE_OK) out->after = evaluate(&e);
  for (int i = 0; i < 4; i++) out->graphs += e.recorded[i / 2][i % 2].graph != NULL;
  out->records = e.records;
  moe_engine_destroy(&e);
  return status;
}

/* ---- what is tried ------------------------------------------------------------------------- */

/* graphs: so many are recorded where this device can. */
static void check_same(const worker *w, run_kind kind, int graphs) {
  outcome a, b;
  play.recordings = play.launches = play.updates = play.follows = 0;
  OK(train(w, kind, true, &a));
  OK(train(w, kind, false, &b));
  for (int i = 0; i < MOST_STEPS; i++) REQUIRE(a.loss[i] == b.loss[i] && a.norm[i] == b.norm[i]);
  REQUIRE(a.between == b.between && a.after == b.after && a.after != a.between);
  REQUIRE(isfinite(a.after) && a.norm[0] > 0.0);
  REQUIRE(a.graphs == (a.records ? graphs : 0) && b.graphs == 0);
}

/* What updated weights wait for is not in a graph, what waits for them is. */
static void check_what_is_recorded(const worker *w) {
  run_kind sharded = {"parallel.ep=1", "precision.dtype=bf16", true, 1}, whole = sharded;
  whole.zero1 = false;
  check_same(w, sharded, 1);
  if (play.real) REQUIRE(play.recordings == 1 && play.launches == 1);
  if (play.real) REQUIRE(play.updates == 0 && play.follows > 0);
  check_same(w, whole, 1);
  if (play.real) REQUIRE(play.recordings == 1 && play.launches == 1);
  if (play.real) REQUIRE(play.updates > 0 && play.follows == 0);
  sharded.micro_batches = whole.micro_batches = 3;
  check_same(w, sharded, 3);
  if (play.real) REQUIRE(play.recordings == 3 && play.updates == 0 && play.follows > 0);
  check_same(w, whole, 3);
}

static void check_what_is_not(const worker *w) {
  run_kind exchanged = {"parallel.ep=2", "precision.dtype=bf16", false, 1};
  if (w->size % 2 == 0) check_same(w, exchanged, 0);
  if (play.real) REQUIRE(play.recordings == 0 || w->size % 2 != 0);
}

/* Where no rank can record, all go on as they are; products of f32 are such a case on a GPU. Where
 * some can, all end, and say who could not. */
static void check_failures(const worker *w) {
  run_kind kind = {"parallel.ep=1", "precision.dtype=fp32", true, 2};
  outcome out;
  play.fails = true;
  check_same(w, kind, 2);
  if (!play.real) return;
  REQUIRE(play.recordings == 1 && play.launches == 0);
  play.fails = w->rank == 1;
  REQUIRE(train(w, kind, true, &out) == MOE_INVALID);
  REQUIRE(strstr(moe_error_message(), "rank 1: graph: not today"));
  play.fails = false;
}

int main(int argc, char **argv) {
  const char *wanted = getenv("MOE_TEST_BACKEND");
  bool gpu = wanted && strcmp(wanted, "cuda") == 0;
  worker w = worker_open(&argc, &argv);
  moe_device_options options = {.kind = gpu ? MOE_DEVICE_CUDA : MOE_DEVICE_CPU,
                                .local_rank = moe_comm_local_rank(),
                                .threads = 1,
                                .deterministic = true};
  moe_device *hosts = w.dev;
  OK(moe_device_open(&options, &w.dev));
  if (!gpu) start_playing(w.dev);
  check_what_is_recorded(&w);
  check_what_is_not(&w);
  check_failures(&w);
  moe_device_close(w.dev);
  w.dev = hosts;
  worker_close(&w);
  return 0;
}
