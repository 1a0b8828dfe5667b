/* Timing of operations on a device: what each took, by name and by where in the model it ran
 * (moe_device_label). For benchmarks: off, it costs nothing.
 *
 * Between start and stop the device's table is replaced by one that marks the stream before and
 * after every operation; on a GPU the marks are events, so nothing waits until stop. Of other lanes
 * only the time that MAIN waits for them is seen (lanes.h); a CPU has one lane. What a graph
 * records is not timed; its launch is, as one operation.
 *
 * With `clocks` a GPU's clock is counted as well, by a small kernel before each operation, which
 * takes some 2 us; an operation's clock is that from its begin to the next one's. */
#ifndef MOE_KERNELS_PROFILE_H
#define MOE_KERNELS_PROFILE_H

#include "kernels/device.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const char *op;    /* "gemm", "attention_backward", "all_to_all", ... */
  const char *label; /* "experts forward", ... */
  int64_t calls;
  double seconds;
  double flops; /* arithmetic of the matrix products and attention, padding included; else 0 */
  double cycles, cycle_seconds; /* of the clock, and in how long: 0 where it was not counted */
} moe_profile_row;

moe_status moe_profile_start(moe_device *dev, bool clocks);
bool moe_profile_is_on(const moe_device *dev);
/* Waits for the device. The rows, most seconds first, at most `room`. */
moe_status moe_profile_stop(moe_device *dev, moe_profile_row *rows, int room, int *count);

/* Time something that is not an operation, such as an exchange. Nothing when not profiling. */
void moe_profile_begin(moe_device *dev, const char *op, double flops);
void moe_profile_end(moe_device *dev);

#ifdef __cplusplus
}
#endif
#endif
