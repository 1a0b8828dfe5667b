/* Power, clocks and energy of the GPU that a device uses, over a span of time.
 *
 *   moe_power *meter = moe_power_open(dev);     NULL where nothing is told; fine everywhere below
 *   moe_power_begin(meter);
 *   work, and wait for it
 *   moe_power_use use = moe_power_end(meter);   use.samples is 0 where nothing is told
 *   moe_power_close(meter);
 *
 * A thread reads the driver's figures each 10 ms between begin and end; else there is none. They
 * are of the whole card, whoever else may use it. An H200's driver renews them each 0.1 s, so a
 * span should be several of these; its first and last do not matter, because joules are the mean
 * power between two changes of the energy times the span.
 *
 * The clock that the driver sets is not what the processors run at: where products load the supply
 * they get a tenth less. So the device also counts the cycles from begin to end. Local. */
#ifndef MOE_KERNELS_POWER_H
#define MOE_KERNELS_POWER_H

#include "kernels/device.h"
#include "kernels/nvml.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  double samples; /* 0: nothing is known. Figures the driver does not tell are 0 */
  double seconds; /* from begin to end */
  double joules;
  double watts, limit_watts;
  double mhz;                          /* what the processors ran at: counted */
  double set_mhz, max_mhz, memory_mhz; /* what the driver told: means, but for max */
  double capped;                       /* share of samples whose clock the power limit held down */
  double slowed;                       /* the same for heat and faults of the supply */
} moe_power_use;

typedef struct moe_power moe_power;

/* NULL for a host, and where the driver tells nothing, which is said once. */
moe_power *moe_power_open(moe_device *dev);
/* The same for any management library and GPU (nvml.h), without a count of cycles. */
moe_power *moe_power_open_at(const char *library, const char *bus_id);
/* A meter may be used again and again, not from two threads. end waits for what is queued. */
void moe_power_begin(moe_power *p);
moe_power_use moe_power_end(moe_power *p);
void moe_power_close(moe_power *p);

/* Work repeated without a pause, as within a step, while its power is measured: after half of
 * `seconds`, in which the driver finds its clock, for `seconds`.
 *
 *   moe_power_run run = {.dev = dev, .meter = meter, .seconds = 0.5};
 *   while (moe_power_goes_on(&run)) MOE_TRY(queue the work);
 *   run.status, run.use, run.use.seconds / run.calls
 *
 * The meter may be NULL; seconds and calls are known even then. */
typedef struct {
  moe_device *dev;
  moe_power *meter;
  double seconds;
  moe_status status;
  moe_power_use use;
  int64_t calls;
  /* private */
  bool settled, marked;
  double begin_s, batch_begin_s;
  int64_t batch, queued;
  moe_mark mark[2];
} moe_power_run;
bool moe_power_goes_on(moe_power_run *run);

/* What samples add up to. Zero at first. */
typedef struct {
  int samples, powers, capped, slowed;
  double watts, set_mhz, memory_mhz; /* sums */
  double counted_j, counted_s;       /* of whole steps of the energy counter */
  int64_t millijoules;               /* the counter's last step, begun at step_s */
  double step_s;
  bool stepped; /* whether a step's begin was seen */
} moe_power_sum;
void moe_power_add(moe_power_sum *sum, double now_s, const moe_nvml_sample *sample);
moe_power_use moe_power_total(const moe_power_sum *sum, double seconds);

#ifdef __cplusplus
}
#endif
#endif
