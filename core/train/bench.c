/* Ceilings, collectives, steps. */
#include "core/train/bench.h"

#include <stdlib.h>
#include <string.h>

#include "core/base/log.h"
#include "core/base/rng.h"
#include "core/train/matrix_rate.h"
#include "core/train/step.h"
#include "kernels/ops.h"
#include "kernels/profile.h"

enum { RUNS = 5, PROFILE_ROWS = 128 };

/* ---- power ----------------------------------------------------------------------------------- */

/* Collective. All figures are doubles; what one rank does not know has no mean. */
static moe_status share_power(moe_comm *world, moe_bench_power *power) {
  enum { FIGURES = sizeof(moe_power_use) / sizeof(double) };
  double mean[FIGURES], least[2] = {power->own.samples, power->own.mhz};
  memcpy(mean, &power->own, sizeof mean);
  MOE_TRY(moe_comm_host_all_reduce_f64(world, least, 2, MOE_MIN));
  MOE_TRY(moe_comm_host_all_reduce_f64(world, mean, FIGURES, MOE_SUM));
  for (int i = 0; i < FIGURES; i++) mean[i] /= moe_comm_size(world);
  memcpy(&power->mean, mean, sizeof mean);
  if (least[1] <= 0.0) power->mean.mhz = 0.0;
  if (least[0] <= 0.0) memset(power, 0, sizeof *power);
  return MOE_OK;
}

/* ---- ceilings -------------------------------------------------------------------------------- */

static moe_status copy_rate(moe_device *dev, double *gbs) {
  bool gpu = moe_device_what(dev) == MOE_DEVICE_CUDA;
  int64_t bytes = gpu ? 4LL << 30 : 256LL << 20;
  void *from = moe_device_alloc(dev, bytes), *to = moe_device_alloc(dev, bytes);
  double runs[RUNS];
  moe_status status = MOE_OK;
  if (!from || !to) status = moe_fail(MOE_NO_MEMORY, "out of memory: measuring the copy rate");
  for (int i = -1; i < RUNS && status == MOE_OK; i++) {
    double start = moe_clock_s();
    status = moe_copy(dev, moe_tensor_1d(to, MOE_F32, bytes / 4),
                      moe_tensor_1d(from, MOE_F32, bytes / 4));
    if (status == MOE_OK) status = moe_device_sync(dev);
    if (i >= 0) runs[i] = moe_clock_s() - start;
  }
  if (status == MOE_OK) *gbs = 2e-9 * (double)bytes / moe_median(runs, RUNS);
  moe_device_free(dev, from);
  moe_device_free(dev, to);
  return status;
}

static moe_status product_power(moe_device *dev, moe_comm *world, moe_dtype dtype,
                                moe_ceilings *out) {
  double tflops = 0.0;
  moe_power *meter = moe_power_open(dev);
  moe_status status = MOE_OK;
  if (meter) status = moe_matrix_power(dev, out->product, dtype, meter, &tflops, &out->power.own);
  moe_power_close(meter);
  MOE_TRY(moe_agree(world, status));
  MOE_TRY(share_power(world, &out->power));
  MOE_TRY(moe_comm_host_all_reduce_f64(world, &tflops, 1, MOE_SUM));
  if (out->power.mean.samples > 0.0) out->sustained_tflops = tflops / moe_comm_size(world);
  return MOE_OK;
}

moe_status moe_bench_ceilings(moe_device *dev, moe_comm *world, moe_dtype dtype,
                              moe_ceilings *out) {
  out->product = moe_device_what(dev) == MOE_DEVICE_CUDA ? 8192 : 2048;
  double rates[2] = {0.0, 0.0};
  MOE_TRY(moe_comm_barrier(world));
  MOE_TRY(moe_agree(world, moe_matrix_rate(dev, out->product, dtype, &rates[0])));
  MOE_TRY(moe_agree(world, copy_rate(dev, &rates[1])));
  MOE_TRY(moe_comm_host_all_reduce_f64(world, rates, 2, MOE_MIN));
  out->product_tflops = rates[0];
  out->copy_gbs = rates[1];
  return product_power(dev, world, dtype, out);
}

/* ---- collectives ----------------------------------------------------------------------------- */

const char *moe_bench_collective_name(int which) {
  static const char *const names[] = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"};
  return names[which];
}

static moe_status run_collective(moe_comm *world, int which, moe_tensor x, moe_tensor y,
                                 const int64_t *rows, const int64_t *at) {
  switch (which) {
  case MOE_BENCH_ALL_REDUCE:
    return moe_comm_all_reduce(world, x, MOE_SUM);
  case MOE_BENCH_ALL_GATHER:
    return moe_comm_all_gather(world, x);
  case MOE_BENCH_REDUCE_SCATTER:
    return moe_comm_reduce_scatter(world, x);
  default:
    return moe_comm_all_to_all(world, x, rows, at, y, rows, at);
  }
}

moe_status moe_bench_collective(moe_device *dev, moe_comm *world, int which, int64_t bytes,
                                double *bus_gbs) {
  int ranks = moe_comm_size(world);
  int64_t row = bytes / 4 / ranks, rows[1024], at[1024];
  if (ranks > 1024) return moe_fail(MOE_INVALID, "collectives are measured up to 1024 ranks");
  for (int r = 0; r < ranks; r++) rows[r] = row, at[r] = r * row;
  moe_tensor x = moe_tensor_2d(moe_device_alloc(dev, row * ranks * 4), MOE_F32, row * ranks, 1);
  moe_tensor y = moe_tensor_2d(moe_device_alloc(dev, row * ranks * 4), MOE_F32, row * ranks, 1);
  double runs[RUNS];
  moe_status status = MOE_OK;
  if (!x.data || !y.data) status = moe_fail(MOE_NO_MEMORY, "out of memory: collectives");
  MOE_TRY_OR(status, done, moe_agree(world, status));
  for (int i = -2; i < RUNS; i++) {
    MOE_TRY_OR(status, done, moe_comm_barrier(world));
    double start = moe_clock_s();
    MOE_TRY_OR(status, done, run_collective(world, which, x, y, rows, at));
    MOE_TRY_OR(status, done, moe_device_sync(dev));
    if (i >= 0) runs[i] = moe_clock_s() - start;
  }
  double factor = (double)(ranks - 1) / ranks * (which == MOE_BENCH_ALL_REDUCE ? 2.0 : 1.0);
  *bus_gbs = 1e-9 * factor * (double)(row * ranks * 4) / moe_median(runs, RUNS);
done:
  moe_device_free(dev, x.data);
  moe_device_free(dev, y.data);
  return status;
}

/* ---- steps ----------------------------------------------------------------------------------- */

enum {
  EXPERT_GEMM,
  PROJECTION,
  HEAD,
  ATTENTION,
  ELEMENTWISE,
  ROUTING,
  EXCHANGE,
  GRADIENTS,
  OPTIMIZER,
  REST
};
static const char *const part_names[MOE_BENCH_PARTS] = {"expert GEMMs and SwiGLU",
                                                        "attention projections",
                                                        "head and cross-entropy",
                                                        "attention",
                                                        "norms, RoPE, embedding",
                                                        "router and permutation",
                                                        "exchange (with waiting)",
                                                        "gradient reduction",
                                                        "optimizer",
                                                        "gaps"};

static bool has(const char *text, const char *word) {
  return strstr(text, word) != NULL;
}

/* Which part of the step an operation belongs to. */
static int part_of(const moe_profile_row *r) {
  static const char *const collectives[] = {"all_to_all", "all_gather",      "reduce_scatter",
                                            "all_reduce", "exchange_chunks", "exchange"};
  if (has(r->label, "optimizer")) return OPTIMIZER;
  if (has(r->label, "gradient reduction")) return GRADIENTS;
  for (int i = 0; i < 6; i++) {
    if (strcmp(r->op, collectives[i]) == 0) return EXCHANGE;
  }
  if (has(r->op, "expert_")) return EXPERT_GEMM;
  if (has(r->op, "attention")) return ATTENTION;
  if (has(r->label, "head")) return HEAD;
  if (strcmp(r->op, "gemm") == 0) return PROJECTION;
  bool moves = has(r->op, "router") || has(r->op, "permute") || has(r->op, "gather_") ||
               has(r->op, "combine_") || has(r->op, "gates_") || has(r->op, "localize");
  return moves ? ROUTING : ELEMENTWISE;
}

typedef struct {
  int32_t *tokens; /* [3 T]: tokens, targets, positions */
  moe_batch batch;
} random_batch;

static moe_status random_batch_create(moe_engine *e, random_batch *out) {
  int64_t seq = e->config.data.sequence_length, t = e->config.train.micro_batch * seq;
  out->tokens = malloc((size_t)(3 * t) * sizeof *out->tokens);
  if (!out->tokens) return moe_fail(MOE_NO_MEMORY, "out of memory: random tokens");
  uint64_t rank = (uint64_t)moe_comm_rank(e->world);
  for (int64_t i = 0; i < t; i++) {
    float vocab = (float)e->config.model.vocab_size;
    out->tokens[i] = (int32_t)(moe_rng_uniform(7, rank, (uint64_t)i) * vocab);
    out->tokens[t + i] = (int32_t)(moe_rng_uniform(7, rank, (uint64_t)(t + i)) * vocab);
    out->tokens[2 * t + i] = (int32_t)(i % seq);
  }
  out->batch = (moe_batch){.batch = e->config.train.micro_batch,
                           .seq = seq,
                           .tokens = out->tokens,
                           .targets = out->tokens + t,
                           .positions = out->tokens + 2 * t};
  return MOE_OK;
}

/* Per step, from what each rank has waited for exchanges in `steps` steps. */
static moe_status share_exchange(moe_comm *world, double waited, int steps,
                                 moe_bench_step_result *out) {
  out->exchange = out->exchange_least = waited / steps;
  MOE_TRY(moe_comm_host_all_reduce_f64(world, &out->exchange, 1, MOE_SUM));
  out->exchange /= moe_comm_size(world);
  return moe_comm_host_all_reduce_f64(world, &out->exchange_least, 1, MOE_MIN);
}

static moe_status one_step(moe_engine *e, const moe_batch *batch, int64_t step, double *seconds) {
  moe_step_result result;
  MOE_TRY(moe_comm_barrier(e->world));
  double start = moe_clock_s();
  MOE_TRY(moe_step_begin(e, e->config.optim.lr, step));
  for (int64_t i = 0; i < e->accumulation; i++) MOE_TRY(moe_step_micro_batch(e, batch));
  MOE_TRY(moe_step_end(e, &result));
  *seconds = moe_clock_s() - start;
  return MOE_OK;
}

/* Fold the timed operations into parts of one step, scaled to the median of the steps. */
static void fill_parts(moe_bench_step_result *out) {
  moe_bench_part *part = out->part;
  double known = 0.0, seconds = out->timed_seconds;
  double cycles[MOE_BENCH_PARTS] = {0}, counted[MOE_BENCH_PARTS] = {0};
  for (int i = 0; i < MOE_BENCH_PARTS; i++) part[i] = (moe_bench_part){.name = part_names[i]};
  for (int i = 0; i < out->ops; i++) {
    const moe_profile_row *r = &out->op[i];
    moe_bench_part *p = &part[part_of(r)];
    p->seconds += r->seconds;
    p->flops += r->flops / out->timed_steps;
    cycles[part_of(r)] += r->cycles;
    counted[part_of(r)] += r->cycle_seconds;
    known += r->seconds;
  }
  part[REST].seconds = seconds > known ? seconds - known : 0.0;
  double whole = known + part[REST].seconds;
  for (int i = 0; i < MOE_BENCH_PARTS; i++) {
    part[i].seconds *= out->seconds / whole;
    if (counted[i] > 0.0) part[i].mhz = 1e-6 * cycles[i] / counted[i];
  }
}

/* `steps` steps as they are in training. */
static moe_status plain_steps(moe_engine *e, const moe_batch *batch, int warmup, int steps,
                              double *times, moe_bench_step_result *out) {
  double waited = 0.0, spent = 0.0, bytes = 0.0;
  moe_status status = MOE_OK;
  moe_power *meter = moe_power_open(e->dev);
  for (int i = 0; i < warmup && status == MOE_OK; i++) status = one_step(e, batch, i + 1, &spent);
  moe_model_exchange_cost(e->model, &spent, &bytes); /* the warm-up's */
  moe_power_begin(meter);
  for (int i = 0; i < steps && status == MOE_OK; i++) {
    status = one_step(e, batch, warmup + i + 1, &times[i]);
    moe_model_exchange_cost(e->model, &spent, &bytes);
    waited += spent;
  }
  out->power.own = moe_power_end(meter);
  moe_power_close(meter);
  MOE_TRY(status);
  MOE_TRY(share_power(e->world, &out->power));
  return share_exchange(e->world, waited, steps, out);
}

/* And as many with their operations timed. */
static moe_status timed_steps(moe_engine *e, const moe_batch *batch, int64_t before, int steps,
                              bool clocks, moe_bench_step_result *out) {
  double spent = 0.0;
  moe_status status = MOE_OK;
  out->timed_steps = steps;
  MOE_TRY(moe_profile_start(e->dev, clocks));
  for (int i = 0; i < steps && status == MOE_OK; i++) {
    status = one_step(e, batch, before + i + 1, &spent);
    out->timed_seconds += spent;
  }
  moe_status stopped = moe_profile_stop(e->dev, out->op, MOE_BENCH_OPS, &out->ops);
  return status == MOE_OK ? stopped : status;
}

moe_status moe_bench_step(moe_engine *e, int warmup, int steps, bool clocks,
                          moe_bench_step_result *out) {
  moe_dims d = moe_dims_of(&e->config);
  int64_t seq = e->config.data.sequence_length;
  int ranks = moe_comm_size(e->world);
  random_batch random;
  *out = (moe_bench_step_result){0};
  MOE_TRY(random_batch_create(e, &random));
  double *times = calloc((size_t)steps, sizeof *times);
  moe_status status = MOE_OK;
  if (!times) {
    status = moe_fail(MOE_NO_MEMORY, "out of memory: step times");
    goto done;
  }
  MOE_TRY_OR(status, done, plain_steps(e, &random.batch, warmup, steps, times, out));
  MOE_TRY_OR(status, done, timed_steps(e, &random.batch, warmup + steps, steps, clocks, out));
  out->seconds = moe_median(times, steps);
  out->fastest = times[0];
  out->slowest = times[steps - 1];
  out->tokens = e->config.train.micro_batch * e->accumulation * ranks * seq;
  out->model_tflops =
      1e-12 * (double)out->tokens * moe_dims_flops_per_token(&d, seq) / out->seconds / ranks;
  fill_parts(out);
done:
  free(times);
  free(random.tokens);
  return status;
}
