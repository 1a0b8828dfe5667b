/* Where a step's time went, on the device's own clock: work is queued, so the host's would tell how
 * long queueing took. All calls are local. */
#ifndef MOE_CORE_TRAIN_STEP_CLOCK_H
#define MOE_CORE_TRAIN_STEP_CLOCK_H

#include "core/train/metrics.h"
#include "kernels/device.h"

typedef struct {
  moe_mark end;
  moe_step_part part;
  int times; /* in this step: a recorded lap may come again */
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
/* What was queued since the last lap is of this part; MOE_PART_DATA is whatever is of no other. */
void moe_step_clock_lap(moe_step_clock *c, moe_step_part part);
/* Laps from number `first` on were only recorded (kernels/device.h); returns how many. */
int64_t moe_step_clock_rewind(moe_step_clock *c, int64_t first);
/* A graph that holds these laps, the first of them MOE_PART_DATA, is launched. */
void moe_step_clock_repeat(moe_step_clock *c, int64_t first, int64_t laps);
/* Adds the laps to seconds[part]; laps that came several times have taken as long as the last time.
 * After the device was waited for. */
void moe_step_clock_read(const moe_step_clock *c, double seconds[MOE_STEP_PARTS]);

#endif
