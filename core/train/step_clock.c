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
  (void)moe_step_clock_rewind(c, 0);
  moe_device_mark(c->dev, &c->start);
}

void moe_step_clock_lap(moe_step_clock *c, moe_step_part part) {
  if (c->count == c->room) return;
  moe_step_lap *lap = &c->laps[c->count++];
  lap->part = part;
  lap->times = 1;
  moe_device_mark(c->dev, &lap->end);
}

int64_t moe_step_clock_rewind(moe_step_clock *c, int64_t first) {
  int64_t laps = c->count - first;
  for (int64_t i = first; i < c->count; i++) c->laps[i].times = 0;
  c->count = first;
  return laps;
}

void moe_step_clock_repeat(moe_step_clock *c, int64_t first, int64_t laps) {
  for (int64_t i = first; i < first + laps; i++) c->laps[i].times++;
  c->count += laps;
}

void moe_step_clock_read(const moe_step_clock *c, double seconds[MOE_STEP_PARTS]) {
  const moe_mark *from = &c->start;
  double known = 0.0;
  for (int64_t i = 0; i < c->count; i++) {
    const moe_step_lap *lap = &c->laps[i];
    if (lap->times == 0) continue;
    if (lap->part != MOE_PART_DATA) {
      double spent = lap->times * moe_device_between(c->dev, from, &lap->end);
      seconds[lap->part] += spent;
      known += spent;
    }
    from = &lap->end;
  }
  double rest = moe_device_between(c->dev, &c->start, from) - known;
  if (rest > 0.0) seconds[MOE_PART_DATA] += rest;
}
