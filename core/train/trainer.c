/* The main job: steps, evaluation, checkpoints. */
#include "core/train/trainer.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/log.h"
#include "core/base/place.h"
#include "core/base/process_memory.h"
#include "core/base/startup.h"
#include "core/train/matrix_rate.h"
#include "core/train/metrics.h"
#include "core/train/run_dir.h"
#include "core/train/run_saves.h"
#include "core/train/schedule.h"
#include "core/train/step.h"
#include "core/train/stop_signal.h"
#include "parallel/watchdog.h"

/* Bytes per second of a save before one has been measured. */
static const double SLOW_DISK = 500e6;

typedef enum { STOP_NO, STOP_CLOCK, STOP_SIGNAL } stop_reason;

typedef struct {
  moe_engine engine;
  moe_run_lock *lock;
  moe_run_saves saves;
  moe_loader *loader, *valid;
  moe_metrics *metrics;
  moe_schedule schedule;
  moe_dims dims;
  int64_t step; /* done */
  int64_t tokens, step_tokens;
  int nonfinite_in_a_row;
  moe_wall_clock clock;
  stop_reason stop;
  moe_step_record record;
} trainer;

static moe_run_position position(const trainer *t) {
  moe_run_position at = {.step = t->step, .tokens = t->tokens};
  at.samples = t->step_tokens / t->engine.config.data.sequence_length * t->step;
  at.data_fingerprint = moe_loader_fingerprint(t->loader);
  return at;
}

/* ---- one step
 * ------------------------------------------------------------------------------------ */

/* Auxiliary-loss-free balancing: move each expert's selection bias against its load. Wang et al.
 * 2024, arXiv:2408.15664. */
static moe_status update_router_bias(trainer *t, const double *load) {
  moe_engine *e = &t->engine;
  float *bias = moe_model_router_bias(e->model);
  if (!bias) return MOE_OK;
  double mean = 1.0 / (double)t->dims.experts, rate = e->config.train.bias_update_rate;
  for (int64_t i = 0; i < t->dims.layers * t->dims.experts; i++) {
    bias[i] += (float)(load[i] < mean ? rate : load[i] > mean ? -rate : 0.0);
  }
  return moe_model_router_bias_changed(e->model);
}

static moe_status record_step(trainer *t, const moe_step_result *r, double lr, double seconds) {
  moe_step_record *m = &t->record;
  double exchanged = 0.0;
  moe_model_exchange_cost(t->engine.model, &m->part_seconds[MOE_PART_EXCHANGE], &exchanged);
  moe_step_clock_read(&t->engine.clock, m->part_seconds);
  m->step = t->step;
  m->tokens = t->tokens;
  m->step_tokens = t->step_tokens;
  m->loss = r->losses.loss;
  m->ce = r->losses.ce;
  m->aux = r->losses.aux;
  m->z = r->losses.z;
  m->lr = lr;
  m->grad_norm = r->grad_norm;
  m->skipped = !r->finite;
  m->seconds = seconds;
  m->flops = (double)t->step_tokens *
             moe_dims_flops_per_token(&t->dims, t->engine.config.data.sequence_length);
  m->expert_load = r->losses.load;
  m->dropped = r->losses.dropped;
  return moe_metrics_record(t->metrics, m);
}

static moe_status train_step(trainer *t) {
  double start = moe_clock_s();
  double lr = moe_schedule_lr(&t->schedule, t->step + 1);
  moe_engine *e = &t->engine;
  moe_step_result result;
  moe_place_enter(MOE_PHASE_STEP, t->step + 1);
  memset(t->record.part_seconds, 0, sizeof t->record.part_seconds);
  MOE_TRY(moe_step_begin(e, lr, t->step + 1));
  for (int64_t i = 0; i < e->accumulation; i++) {
    moe_batch batch;
    MOE_TRY(moe_loader_next(t->loader, &batch));
    MOE_TRY(moe_step_micro_batch(e, &batch));
  }
  MOE_TRY(moe_step_end(e, &result));
  if (result.finite) MOE_TRY(update_router_bias(t, result.losses.load));
  t->step++;
  t->tokens += t->step_tokens;
  t->nonfinite_in_a_row = result.finite ? 0 : t->nonfinite_in_a_row + 1;
  MOE_TRY(record_step(t, &result, lr, moe_clock_s() - start));
  int64_t limit = e->config.train.nonfinite_limit;
  if (t->nonfinite_in_a_row < limit) return MOE_OK;
  MOE_TRY(moe_run_saves_go_on(&t->saves, t->step, true));
  return moe_fail(MOE_DIVERGED,
                  "training diverged: the gradient was not finite in %" PRId64
                  " steps in a row, up to step %" PRId64
                  ": resume from the last checkpoint with a lower optim.lr or a smaller optim.clip",
                  limit, t->step);
}

/* ---- between steps
 * -------------------------------------------------------------------------------- */

/* What any rank was asked for, or the clock of any says, all do. */
static moe_status agree_to_stop(trainer *t, bool clock_is_up) {
  int64_t reason = moe_stop_requested() ? STOP_SIGNAL : clock_is_up ? STOP_CLOCK : t->stop;
  MOE_TRY(moe_comm_host_all_reduce_i64(t->engine.world, &reason, 1, MOE_MAX));
  t->stop = (stop_reason)reason;
  return MOE_OK;
}

/* Asked to stop, it is left without a record: a run that goes on has others. */
static moe_status evaluate(trainer *t) {
  moe_engine *e = &t->engine;
  double start = moe_clock_s(), sums[2] = {0.0, 0.0};
  moe_place_enter(MOE_PHASE_EVALUATION, t->step);
  MOE_TRY(moe_loader_seek(t->valid, 0));
  for (int64_t i = 0; i < e->config.train.eval_batches; i++) {
    moe_batch batch;
    MOE_TRY(agree_to_stop(t, false));
    if (t->stop) return MOE_OK;
    MOE_TRY(moe_loader_next(t->valid, &batch));
    MOE_TRY(moe_model_evaluate(e->model, &batch, sums));
  }
  MOE_TRY(moe_comm_host_all_reduce_f64(e->world, sums, 2, MOE_SUM));
  double ce = sums[0] / sums[1];
  moe_eval_record record = {.step = t->step,
                            .ce = ce,
                            .perplexity = exp(ce),
                            .seconds = moe_clock_s() - start,
                            .tokens = (int64_t)sums[1]};
  return moe_metrics_eval(t->metrics, &record);
}

static bool due(int64_t step, int64_t interval) {
  return interval > 0 && step % interval == 0;
}

static moe_status stop_here(trainer *t) {
  moe_run_position at = position(t);
  MOE_TRY(moe_run_saves_now(&t->saves, &at));
  return moe_fail(MOE_STOPPED,
                  "stopped %s after step %" PRId64 " of %" PRId64
                  ": %s: run the same command again to go on",
                  t->stop == STOP_SIGNAL ? "on request" : "by run.wall_clock_limit", t->step,
                  t->engine.config.train.steps, t->step > 0 ? "saved" : "nothing to save yet");
}

static moe_status between_steps(trainer *t) {
  const moe_config *c = &t->engine.config;
  MOE_TRY(agree_to_stop(t, moe_wall_clock_is_up(&t->clock)));
  if (!t->stop && due(t->step, c->train.eval_interval)) MOE_TRY(evaluate(t));
  /* Not while the gradient is non-finite: the state worth keeping is the one before. */
  if (!t->stop && due(t->step, c->checkpoint.interval) && t->nonfinite_in_a_row == 0) {
    moe_run_position at = position(t);
    MOE_TRY(moe_run_saves_begin(&t->saves, &at));
    MOE_TRY(agree_to_stop(t, false)); /* a step later would need a save of its own */
  }
  if (t->stop && t->step < c->train.steps) return stop_here(t); /* done is better than stopped */
  return moe_run_saves_go_on(&t->saves, t->step, false);
}

/* Bytes of the device the model lives on: a host also holds the copies that saves are made from. */
static int64_t planned_bytes(const trainer *t) {
  const moe_engine *e = &t->engine;
  return moe_engine_planned_bytes(e) + (moe_device_is_host(e->dev) ? t->saves.plan.memory : 0);
}

/* The plan beside what the process came to hold. */
static moe_status report_memory(trainer *t) {
  moe_engine *e = &t->engine;
  int64_t bytes[2] = {moe_process_peak(), planned_bytes(t)};
  char peak[MOE_TEXT], planned[MOE_TEXT];
  if (!moe_device_is_host(e->dev)) return MOE_OK;
  MOE_TRY(moe_comm_host_all_reduce_i64(e->world, bytes, 2, MOE_MAX));
  moe_info("peak memory %s on the fullest rank, planned %s", moe_text_bytes(peak, (double)bytes[0]),
           moe_text_bytes(planned, (double)bytes[1]));
  return MOE_OK;
}

/* Inside a step nothing agrees: what fails there fails on one rank while others wait for it, so it
 * ends the whole job. What all ranks know (stopped, diverged) is returned. */
static moe_status run(trainer *t) {
  const moe_config *c = &t->engine.config;
  MOE_TRY(agree_to_stop(t, false)); /* the clock grants every run a step */
  if (t->stop && t->step < c->train.steps) return stop_here(t);
  while (t->step < c->train.steps) {
    moe_status status = train_step(t);
    if (status == MOE_OK) status = between_steps(t);
    /* told to stop, all fail alike: their save */
    if (status == MOE_DIVERGED || (status != MOE_OK && t->stop)) return status;
    if (status != MOE_OK) moe_abort(status);
  }
  moe_run_position at = position(t);
  MOE_TRY(c->checkpoint.save_final ? moe_run_saves_now(&t->saves, &at)
                                   : moe_run_saves_go_on(&t->saves, t->step, true));
  return report_memory(t);
}

/* ---- set-up
 * --------------------------------------------------------------------------------------- */

/* The run's folder, once it is known where the run begins. */
static moe_status prepare_folder(trainer *t, const char *from) {
  const moe_config *c = &t->engine.config;
  moe_status status = MOE_OK;
  if (moe_comm_rank(t->engine.world) == 0) {
    status = moe_run_dir_check_disk(c);
    if (status == MOE_OK) status = moe_run_dir_write_config(c);
    if (status == MOE_OK) moe_run_dir_keep_tokenizer(c);
  }
  MOE_TRY(moe_agree(t->engine.world, status));
  return moe_run_dir_record_start(&t->engine, t->step, from);
}

/* Continue from the checkpoint `resume` names, or draw initial weights. */
static moe_status start_state(trainer *t, const char *resume) {
  moe_engine *e = &t->engine;
  char path[MOE_PATH];
  MOE_TRY(moe_checkpoint_find(e->world, e->config.run.dir, resume, path));
  if (!path[0]) {
    MOE_TRY(prepare_folder(t, path));
    moe_info("new run: initial weights from seed %" PRId64, e->config.train.seed);
    return moe_optimizer_init_weights(e->optimizer, (uint64_t)e->config.train.seed);
  }
  moe_run_state state;
  char size[MOE_TEXT];
  moe_info("loading %s, %s", path, moe_text_bytes(size, (double)moe_run_state_bytes(&e->config)));
  MOE_TRY(moe_checkpoint_read_state(e->world, path, &state));
  t->step = t->saves.saved_step = state.step;
  t->tokens = state.tokens;
  moe_status status = moe_run_restore(e, path, &state);
  moe_startup_done("checkpoint");
  if (status == MOE_OK) status = prepare_folder(t, path);
  if (status == MOE_OK && state.samples > 0 &&
      state.data_fingerprint != moe_loader_fingerprint(t->loader)) {
    moe_warn("the token files are not those of the checkpoint: samples may repeat or be skipped");
  }
  moe_run_state_clear(&state);
  if (status == MOE_OK) moe_info("resuming after step %" PRId64 ": %s", t->step, path);
  return status;
}

static moe_status open_data(trainer *t) {
  moe_engine *e = &t->engine;
  int rank = moe_comm_rank(e->world), ranks = moe_comm_size(e->world);
  MOE_TRY(moe_loader_create(&e->config, MOE_SPLIT_TRAIN, rank, ranks, &t->loader));
  if (e->config.train.eval_interval == 0) return MOE_OK;
  return moe_loader_create(&e->config, MOE_SPLIT_VALID, rank, ranks, &t->valid);
}

static moe_status peak_rate(trainer *t, double *tflops) {
  moe_engine *e = &t->engine;
  *tflops = e->config.log.peak_tflops;
  if (*tflops <= 0.0)
    *tflops = moe_device_peak_tflops(e->dev, moe_config_compute_dtype(&e->config));
  if (*tflops > 0.0) return MOE_OK;
  return moe_matrix_rate(e->dev, 1024, MOE_F32, tflops);
}

static moe_status set_up(trainer *t, const char *resume) {
  moe_engine *e = &t->engine;
  t->dims = moe_dims_of(&e->config);
  t->schedule = moe_schedule_of(&e->config);
  MOE_TRY(moe_run_lock_take(e->world, e->config.run.dir, &t->lock));
  MOE_TRY(moe_run_saves_create(e, &t->clock, &t->saves));
  moe_startup_done("room for saves");
  MOE_TRY(moe_agree(e->world, open_data(t)));
  moe_startup_done("data");
  MOE_TRY(moe_agree(e->world, start_state(t, resume)));
  MOE_TRY(moe_agree(e->world, moe_loader_seek(t->loader, t->step)));
  int64_t memory = planned_bytes(t);
  MOE_TRY(moe_comm_host_all_reduce_i64(e->world, &memory, 1, MOE_MAX));
  t->record.memory_bytes = memory;
  t->step_tokens = e->config.train.micro_batch * e->accumulation * moe_comm_size(e->world) *
                   e->config.data.sequence_length;
  t->clock = moe_wall_clock_start(60.0 * e->config.run.wall_clock_limit,
                                  (double)moe_run_state_bytes(&e->config) / SLOW_DISK);
  double peak = 0.0;
  MOE_TRY(moe_agree(e->world, peak_rate(t, &peak)));
  moe_status status =
      moe_metrics_create(&e->config, moe_comm_rank(e->world), moe_comm_size(e->world),
                         t->dims.layers, t->dims.experts, peak, t->step, &t->metrics);
  MOE_TRY(moe_agree(e->world, status));
  moe_startup_done("the rest");
  moe_startup_tell();
  return MOE_OK;
}

/* From here on a rank that hangs ends the job. */
static moe_status watch(const moe_config *config, moe_watchdog **out) {
  double limit_s[MOE_PHASES];
  limit_s[MOE_PHASE_START] = limit_s[MOE_PHASE_END] = (double)config->run.watchdog_start_s;
  limit_s[MOE_PHASE_STEP] = (double)config->run.watchdog_step_s;
  limit_s[MOE_PHASE_SAVE] = (double)config->run.watchdog_save_s;
  limit_s[MOE_PHASE_EVALUATION] = (double)config->run.watchdog_evaluation_s;
  moe_comm *world;
  MOE_TRY(moe_comm_world(NULL, &world));
  moe_status status = moe_watchdog_create(world, limit_s, out);
  moe_comm_destroy(world);
  return status;
}

moe_status moe_train(const moe_config *config, moe_device *dev, const char *resume) {
  trainer t;
  moe_watchdog *watchdog = NULL;
  moe_status status;
  memset(&t, 0, sizeof t);
  moe_stop_listen();
  moe_place_enter(MOE_PHASE_START, 0);
  MOE_TRY_OR(status, done, watch(config, &watchdog));
  MOE_TRY_OR(status, done, moe_engine_create(config, dev, true, false, &t.engine));
  MOE_TRY_OR(status, done, moe_engine_print_plan(&t.engine, stderr));
  MOE_TRY_OR(status, done, set_up(&t, resume));
  MOE_TRY_OR(status, done, run(&t));
done:
  moe_place_enter(MOE_PHASE_END, t.step);
  moe_run_saves_destroy(&t.saves);
  moe_metrics_destroy(t.metrics);
  moe_loader_destroy(t.valid);
  moe_loader_destroy(t.loader);
  moe_run_lock_release(t.lock);
  moe_engine_destroy(&t.engine);
  moe_watchdog_destroy(watchdog);
  return status;
}
