/* A run's saves, as a person reads about them. */
#include "core/train/run_saves.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "core/base/log.h"
#include "core/base/place.h"

moe_status moe_run_saves_create(moe_engine *engine, moe_wall_clock *clock, moe_run_saves *out) {
  const moe_config *c = &engine->config;
  moe_keep keep = {(int)c->checkpoint.keep, c->checkpoint.keep_every, c->checkpoint.keep_hours};
  *out = (moe_run_saves){.engine = engine, .clock = clock};
  MOE_TRY(moe_save_plan_make(engine, &out->plan));
  if (moe_comm_rank(engine->world) == 0) moe_save_plan_print(&out->plan, stderr);
  return moe_saver_create(engine->world, engine->dev, c->run.dir, keep, out->plan.memory,
                          &out->saver);
}

void moe_run_saves_destroy(moe_run_saves *s) {
  moe_saver_destroy(s->saver);
  *s = (moe_run_saves){0};
}

static void report(moe_run_saves *s, const moe_saved *saved) {
  char size[MOE_TEXT], writing[MOE_TEXT], verifying[MOE_TEXT], held[64] = "";
  double bytes = (double)saved->bytes;
  if (s->plan.memory > 0) snprintf(held, sizeof held, ", training held for %.2f s", saved->held_s);
  moe_info("checkpoint of step %" PRId64 " saved: %s in %.1f s: written in %.2f s (%s/s), verified "
           "in %.2f s (%s/s)%s",
           saved->step, moe_text_bytes(size, bytes), saved->seconds, saved->write_s,
           moe_text_bytes(writing, bytes / fmax(saved->write_s, 1e-9)), saved->verify_s,
           moe_text_bytes(verifying, bytes / fmax(saved->verify_s, 1e-9)), held);
  s->saved_step = saved->step;
  moe_wall_clock_saved(s->clock, saved->seconds);
}

static void warn(const moe_run_saves *s, int64_t step, const char *why) {
  if (moe_comm_rank(s->engine->world) == 0)
    moe_warn("checkpoint of step %" PRId64 " was not saved: %s; training goes on", step, why);
}

moe_status moe_run_saves_go_on(moe_run_saves *s, int64_t step, bool wait) {
  moe_saved saved;
  if (wait && moe_saver_busy(s->saver)) moe_place_enter(MOE_PHASE_SAVE, step);
  MOE_TRY(moe_saver_poll(s->saver, wait, &saved));
  if (!saved.news) return MOE_OK;
  if (saved.status == MOE_OK)
    report(s, &saved);
  else
    warn(s, saved.step, saved.message);
  return MOE_OK;
}

/* One save at a time: wait for the one before. */
static moe_status begin(moe_run_saves *s, const moe_run_position *at) {
  double start = moe_clock_s();
  MOE_TRY(moe_run_saves_go_on(s, at->step, true));
  if (moe_clock_s() - start > 1.0)
    moe_info("training waited %.1f s for the checkpoint before: a longer checkpoint.interval or a "
             "faster disk would avoid it",
             moe_clock_s() - start);
  moe_place_enter(MOE_PHASE_SAVE, at->step);
  return moe_run_save(s->engine, s->saver, at);
}

moe_status moe_run_saves_begin(moe_run_saves *s, const moe_run_position *at) {
  if (begin(s, at) == MOE_OK) return moe_run_saves_go_on(s, at->step, false);
  warn(s, at->step, moe_error_message());
  moe_error_clear();
  return MOE_OK;
}

moe_status moe_run_saves_now(moe_run_saves *s, const moe_run_position *at) {
  moe_saved saved;
  MOE_TRY(moe_run_saves_go_on(s, at->step, true));
  if (s->saved_step == at->step) return MOE_OK;
  MOE_TRY(begin(s, at));
  MOE_TRY(moe_saver_poll(s->saver, true, &saved));
  if (saved.status != MOE_OK) return moe_fail(saved.status, "%s", saved.message);
  report(s, &saved);
  return MOE_OK;
}
