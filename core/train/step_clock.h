/* Where a step's time went, on the device's own clock: work is queued, so the host's would tell how
 * long queueing took. All calls are local. */
#ifndef MOE_CORE_TRAIN_STEP_CLOCK_H
#define MOE_CORE_TRAIN_STEP_CLOCK_H

#include "core/train/metrics.h"
#include "kernels/device.h"

typedef struct {
  moe_mark end;
  moe_step_part part;
} moe_step_lap;

typedef struct {
  moe_device *dev;
  moe_mark start;
  moe_step_lap *laps;
  int64_t count, room;
} moe_step_clock;

/* For steps of at most `laps` laps. MOE_NO_MEMORY. */
moe_status moe_step_clock_create(moe_device *dev, int64_t laps, moe_step_clock *out);
void moe_step_clock_destroy(moe_step_clock *c);
void moe_step_clock_start(moe_step_clock *c);
/* What was queued since the last lap is of this part. */
void moe_step_clock_lap(moe_step_clock *c, moe_step_part part);
/* Adds the laps to seconds[part]. After the device was waited for. */
void moe_step_clock_read(const moe_step_clock *c, double seconds[MOE_STEP_PARTS]);

#endif
