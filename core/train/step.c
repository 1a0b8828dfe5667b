/* One training step: what it queues, recorded where that is always the same.
 *
 * Whatever differs from step to step lies in memory when a graph is launched: the batch
 * (moe_model_load), the learning rate and the step's number (moe_optimizer_set), selection biases.
 * What a graph holds as numbers, the loss scale alone changes, and then it is recorded anew. */
#include "core/train/step.h"

#include <math.h>

#include "core/base/log.h"
#include "kernels/profile.h"

moe_status moe_step_begin(moe_engine *e, double lr, int64_t step) {
  moe_step_clock_start(&e->clock);
  e->micro = 0;
  return moe_optimizer_set(e->optimizer, lr, step);
}

static bool is_last(const moe_engine *e) {
  return e->micro + 1 == e->accumulation;
}

/* Updated weights go to the other replicas beside what comes next, which for a graph means after
 * all of it. So the update then comes after the graph. */
static bool update_is_apart(const moe_engine *e) {
  return moe_model_gather(e->model, MOE_POOL_EXPERT) != NULL;
}

static moe_status queue_update(moe_engine *e) {
  MOE_TRY(moe_optimizer_step(e->optimizer, 1.0 / e->loss_scale));
  moe_step_clock_lap(&e->clock, MOE_PART_OPTIMIZER);
  return moe_model_step_end(e->model);
}

static moe_status queue(moe_engine *e) {
  moe_step_clock_lap(&e->clock, MOE_PART_DATA);
  if (e->micro == 0) MOE_TRY(moe_model_step_begin(e->model));
  MOE_TRY(moe_model_forward(e->model, e->micro, e->loss_scale / (double)e->accumulation));
  moe_step_clock_lap(&e->clock, MOE_PART_FORWARD);
  MOE_TRY(moe_model_backward(e->model));
  moe_step_clock_lap(&e->clock, MOE_PART_BACKWARD);
  if (!is_last(e)) return MOE_OK;
  MOE_TRY(moe_optimizer_reduce(e->optimizer));
  moe_step_clock_lap(&e->clock, MOE_PART_GRAD_SYNC);
  return update_is_apart(e) ? MOE_OK : queue_update(e);
}

/* ---- recorded -----------------------------------------------------------------------------------
 */

/* A graph saves the host's launches: a thousand and more per pass. What tokens' exchanges carry is
 * planned by the host, so experts must be on every rank; sums of gradients are always the same. All
 * ranks come to the same answer. */
static bool can_record(const moe_engine *e) {
  return e->records && e->warm && e->mesh.ep == 1 && moe_device_has_graphs(e->dev) &&
         !moe_profile_is_on(e->dev);
}

static moe_status record_here(moe_engine *e, moe_recorded *r) {
  MOE_TRY(moe_device_graph_begin(e->dev));
  moe_status recorded = queue(e), ended = moe_device_graph_end(e->dev, &r->graph);
  r->laps = moe_step_clock_rewind(&e->clock, r->first_lap);
  if (recorded == MOE_OK) return ended;
  moe_graph_destroy(e->dev, r->graph); /* of a part of it */
  r->graph = NULL;
  return recorded;
}

/* Expert products by cuBLAS and the like read sizes back and cannot be recorded: never mind, if no
 * rank can. Where only some fail, groups have counted different numbers of calls on their ranks,
 * which would wait for each other for ever. */
static moe_status record(moe_engine *e, moe_recorded *r) {
  moe_graph_destroy(e->dev, r->graph);
  *r = (moe_recorded){.loss_scale = e->loss_scale, .first_lap = e->clock.count};
  moe_status mine = record_here(e, r);
  int64_t failed = mine != MOE_OK;
  MOE_TRY(moe_comm_host_all_reduce_i64(e->world, &failed, 1, MOE_SUM));
  if (failed == 0) return MOE_OK;
  moe_status status = moe_agree(e->world, mine);
  if (failed < moe_comm_size(e->world)) {
    moe_warn("some ranks could not record a step as a device graph: run.graphs = false has none");
    return status;
  }
  moe_info("steps are not recorded as device graphs: %s", moe_error_message());
  moe_error_clear();
  e->records = false;
  return MOE_OK;
}

static moe_status launch(moe_engine *e) {
  moe_recorded *r = &e->recorded[e->micro > 0][is_last(e)];
  if (!r->graph || r->loss_scale != e->loss_scale) MOE_TRY(record(e, r));
  if (!e->records) return queue(e);
  moe_device_label(e->dev, "the recorded step", -1);
  moe_step_clock_repeat(&e->clock, r->first_lap, r->laps);
  return moe_device_graph_launch(e->dev, r->graph);
}

moe_status moe_step_micro_batch(moe_engine *e, const moe_batch *batch) {
  MOE_TRY(moe_model_load(e->model, batch));
  MOE_TRY(can_record(e) ? launch(e) : queue(e));
  if (is_last(e) && update_is_apart(e)) MOE_TRY(queue_update(e));
  MOE_TRY(moe_model_keep_stats(e->model, e->micro));
  e->micro++;
  return MOE_OK;
}

/* ---- the end ------------------------------------------------------------------------------------
 */

/* Dynamic loss scaling: halve after a non-finite step, double after a window of finite ones. */
static void adapt_loss_scale(moe_engine *e, bool finite) {
  const moe_config *c = &e->config;
  if (c->precision.dtype != MOE_PRECISION_FP16) return;
  e->good_steps = finite ? e->good_steps + 1 : 0;
  if (!finite && e->loss_scale > 1.0) e->loss_scale *= 0.5;
  if (e->good_steps >= c->precision.loss_scale_window) {
    e->loss_scale *= 2.0;
    e->good_steps = 0;
  }
}

moe_status moe_step_end(moe_engine *e, moe_step_result *out) {
  MOE_TRY(moe_device_sync(e->dev));
  e->warm = true; /* libraries have chosen their algorithms */
  out->grad_norm = moe_optimizer_norm(e->optimizer, 1.0 / e->loss_scale);
  out->finite = isfinite(out->grad_norm);
  adapt_loss_scale(e, out->finite);
  return moe_model_step_losses(e->model, &out->losses);
}
