/* Marks between the parts of a step, used again in every step. */
#include "core/train/step_clock.h"

#include <stdlib.h>

moe_status moe_step_clock_create(moe_device *dev, int64_t laps, moe_step_clock *out) {
  *out = (moe_step_clock){.dev = dev, .room = laps};
  out->laps = calloc((size_t)laps, sizeof *out->laps);
  return out->laps ? MOE_OK : moe_fail(MOE_NO_MEMORY, "out of memory: the step's clock");
}

void moe_step_clock_destroy(moe_step_clock *c) {
  if (!c->laps) return;
  moe_device_forget(c->dev, &c->start);
  for (int64_t i = 0; i < c->room; i++) moe_device_forget(c->dev, &c->laps[i].end);
  free(c->laps);
  c->laps = NULL;
}

void moe_step_clock_start(moe_step_clock *c) {
  c->count = 0;
  moe_device_mark(c->dev, &c->start);
}

void moe_step_clock_lap(moe_step_clock *c, moe_step_part part) {
  if (c->count == c->room) return;
  moe_step_lap *lap = &c->laps[c->count++];
  lap->part = part;
  moe_device_mark(c->dev, &lap->end);
}

void moe_step_clock_read(const moe_step_clock *c, double seconds[MOE_STEP_PARTS]) {
  const moe_mark *from = &c->start;
  for (int64_t i = 0; i < c->count; i++) {
    seconds[c->laps[i].part] += moe_device_between(c->dev, from, &c->laps[i].end);
    from = &c->laps[i].end;
  }
}
