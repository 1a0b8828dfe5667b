/* A run's saves: when one begins, what it waits for, what is said about it.
 *
 * A failed save is a warning: the last checkpoint is intact, and the next save tries again at its
 * time. Only where a run ends is it an error. All functions but the last are collective. */
#ifndef MOE_CORE_TRAIN_RUN_SAVES_H
#define MOE_CORE_TRAIN_RUN_SAVES_H

#include "core/train/run_state.h"
#include "core/train/save_plan.h"
#include "core/train/stop_signal.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  moe_engine *engine;
  moe_saver *saver;
  moe_save_plan plan;
  moe_wall_clock *clock; /* is told how long a save takes */
  int64_t saved_step;    /* of the last checkpoint */
} moe_run_saves;

/* engine and clock are borrowed. */
moe_status moe_run_saves_create(moe_engine *engine, moe_wall_clock *clock, moe_run_saves *out);
/* At a step boundary: bring a save forward, with `wait` to its end, and say what became of it. */
moe_status moe_run_saves_go_on(moe_run_saves *s, int64_t step, bool wait);
/* Begin to save this step; waits for the save before. */
moe_status moe_run_saves_begin(moe_run_saves *s, const moe_run_position *at);
/* Have this step saved: the end of a run or of a job. */
moe_status moe_run_saves_now(moe_run_saves *s, const moe_run_position *at);
/* Local; a zeroed one is fine. */
void moe_run_saves_destroy(moe_run_saves *s);

#ifdef __cplusplus
}
#endif
#endif
