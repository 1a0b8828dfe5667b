/* The thread that samples, and the arithmetic of its samples. */
#include "kernels/power.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "core/base/log.h"
#include "kernels/backend.h"

enum { PERIOD_NS = 10 * 1000 * 1000 };

struct moe_power {
  moe_nvml *gpu;
  moe_device *dev; /* NULL: no count of cycles */
  uint64_t *count; /* [2][2] of the device: at begin, at end */
  pthread_t thread;
  bool running;
  atomic_bool stop;
  double begin_s;
  moe_power_sum sum; /* the thread's until it is joined */
};

/* ---- arithmetic ------------------------------------------------------------------------------ */

/* Energy counts only between two moments at which the counter was seen to move: what it showed
 * before had been reached at an unknown time. A counter that went back began anew. */
static void count_energy(moe_power_sum *sum, double now_s, int64_t millijoules) {
  if (millijoules < 0 || (sum->samples > 0 && millijoules == sum->millijoules)) return;
  bool moved = sum->samples > 0;
  if (moved && sum->stepped && millijoules > sum->millijoules) {
    sum->counted_j += 1e-3 * (double)(millijoules - sum->millijoules);
    sum->counted_s += now_s - sum->step_s;
  }
  sum->millijoules = millijoules;
  sum->step_s = now_s;
  sum->stepped = moved;
}

void moe_power_add(moe_power_sum *sum, double now_s, const moe_nvml_sample *sample) {
  count_energy(sum, now_s, sample->millijoules);
  sum->samples++;
  sum->powers += sample->watts > 0.0;
  sum->watts += sample->watts;
  sum->set_mhz += sample->sm_mhz;
  sum->memory_mhz += sample->memory_mhz;
  sum->capped += (sample->reasons & MOE_CLOCK_POWER_CAP) != 0;
  sum->slowed += (sample->reasons & MOE_CLOCK_SLOWED) != 0;
}

moe_power_use moe_power_total(const moe_power_sum *sum, double seconds) {
  moe_power_use use = {.samples = sum->samples, .seconds = seconds};
  if (sum->samples == 0) return use;
  if (sum->counted_s > 0.0)
    use.watts = sum->counted_j / sum->counted_s;
  else if (sum->powers > 0)
    use.watts = sum->watts / sum->powers;
  use.joules = use.watts * seconds;
  use.set_mhz = sum->set_mhz / sum->samples;
  use.memory_mhz = sum->memory_mhz / sum->samples;
  use.capped = (double)sum->capped / sum->samples;
  use.slowed = (double)sum->slowed / sum->samples;
  return use;
}

/* ---- sampling -------------------------------------------------------------------------------- */

/* A reading is of the moment between asking and being answered. */
static void *watch(void *meter) {
  moe_power *p = meter;
  const struct timespec period = {.tv_nsec = PERIOD_NS};
  while (!atomic_load(&p->stop)) {
    double asked = moe_clock_s();
    moe_nvml_sample sample = moe_nvml_read(p->gpu);
    moe_power_add(&p->sum, 0.5 * (asked + moe_clock_s()), &sample);
    nanosleep(&period, NULL);
  }
  return NULL;
}

static void count(moe_power *p, int which) {
  if (p->count) p->dev->backend->count_cycles(p->dev, p->count + 2 * which);
}

/* Between the two counts; 0 when either was missed. */
static double counted_mhz(moe_power *p) {
  uint64_t at[2][2] = {{0}, {0}};
  count(p, 1);
  if (!p->count || moe_device_download(p->dev, at, p->count, sizeof at) != MOE_OK ||
      moe_device_sync(p->dev) != MOE_OK || at[0][1] == 0 || at[1][1] <= at[0][1])
    return 0.0;
  return 1e3 * (double)(at[1][0] - at[0][0]) / (double)(at[1][1] - at[0][1]);
}

void moe_power_begin(moe_power *p) {
  if (!p || p->running) return;
  p->sum = (moe_power_sum){0};
  atomic_store(&p->stop, false);
  p->running = pthread_create(&p->thread, NULL, watch, p) == 0;
  p->begin_s = moe_clock_s();
  count(p, 0);
}

moe_power_use moe_power_end(moe_power *p) {
  if (!p || !p->running) return (moe_power_use){0};
  double mhz = counted_mhz(p), seconds = moe_clock_s() - p->begin_s;
  atomic_store(&p->stop, true);
  pthread_join(p->thread, NULL);
  p->running = false;
  moe_power_use use = moe_power_total(&p->sum, seconds);
  use.mhz = mhz;
  use.limit_watts = moe_nvml_limit_watts(p->gpu);
  use.max_mhz = moe_nvml_max_sm_mhz(p->gpu);
  return use;
}

/* ---- repeated work --------------------------------------------------------------------------- */

enum { BATCH_MS = 10 };

/* The host keeps a batch ahead of the device, so that the device never waits. */
static moe_status end_batch(moe_power_run *run) {
  moe_mark done = run->mark[0];
  run->mark[0] = run->mark[1];
  run->mark[1] = done;
  moe_device_mark(run->dev, &run->mark[1]);
  if (run->marked) MOE_TRY(moe_device_wait(run->dev, &run->mark[0]));
  run->marked = true;
  double now = moe_clock_s();
  if (now - run->batch_begin_s < 1e-3 * BATCH_MS) run->batch *= 2;
  run->batch_begin_s = now;
  run->queued = 0;
  return MOE_OK;
}

static void finish(moe_power_run *run) {
  double seconds = moe_clock_s() - run->begin_s; /* the meter's thread takes some ms to end */
  run->use = moe_power_end(run->meter);
  run->use.seconds = seconds;
  for (int i = 0; i < 2; i++) moe_device_forget(run->dev, &run->mark[i]);
}

bool moe_power_goes_on(moe_power_run *run) {
  if (run->batch == 0) {
    run->batch = 1;
    run->begin_s = run->batch_begin_s = moe_clock_s();
    return true;
  }
  run->calls++;
  if (++run->queued < run->batch) return true;
  run->status = end_batch(run);
  double passed = moe_clock_s() - run->begin_s;
  if (run->status == MOE_OK && passed < (run->settled ? run->seconds : 0.5 * run->seconds))
    return true;
  if (run->status == MOE_OK) run->status = moe_device_sync(run->dev);
  if (run->settled || run->status != MOE_OK) {
    finish(run);
    return false;
  }
  run->settled = true;
  run->calls = 0;
  moe_power_begin(run->meter);
  run->begin_s = moe_clock_s();
  return true;
}

/* ---- opening --------------------------------------------------------------------------------- */

moe_power *moe_power_open_at(const char *library, const char *bus_id) {
  static atomic_bool said;
  const char *why = "out of memory";
  moe_power *p = calloc(1, sizeof *p);
  if (p) p->gpu = moe_nvml_open(library, bus_id, &why);
  if (p && p->gpu) return p;
  free(p);
  if (!atomic_exchange(&said, true)) moe_info("power and clocks: not available: %s", why);
  return NULL;
}

moe_power *moe_power_open(moe_device *dev) {
  moe_power *p = dev->bus_id[0] ? moe_power_open_at("libnvidia-ml.so.1", dev->bus_id) : NULL;
  if (!p || !dev->backend->count_cycles) return p;
  p->dev = dev;
  p->count = moe_device_alloc(dev, 4 * (int64_t)sizeof *p->count);
  return p;
}

void moe_power_close(moe_power *p) {
  if (!p) return;
  (void)moe_power_end(p);
  moe_nvml_close(p->gpu);
  if (p->count) moe_device_free(p->dev, p->count);
  free(p);
}
