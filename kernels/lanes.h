/* Lanes: queues of one device that run beside each other, so that what travels between ranks hides
 * behind arithmetic: EXCHANGE carries tokens, which someone waits for, REDUCE sums gradients and
 * carries updated weights, which have time. Operations go to the current lane, which is MAIN unless
 * someone changed it for a few calls. On a CPU all lanes are one: work is done when its call
 * returns.
 *
 *   moe_lane before = moe_device_use_lane(dev, MOE_LANE_EXCHANGE);
 *   MOE_TRY(moe_device_wait_lane(dev, MOE_LANE_MAIN));       what it needs is there
 *   ...queue the exchange...
 *   moe_device_use_lane(dev, before);
 *   ...queue work that covers it...
 *   MOE_TRY(moe_device_wait_lane(dev, MOE_LANE_EXCHANGE));   before the result is used
 *
 * A graph (device.h) is recorded and launched on MAIN. Another lane takes part in it from where it
 * waits for MAIN to where MAIN waits for it; what it was given before is not in the graph, which
 * does not wait for that: a mark can (moe_device_follow).
 *
 * Operations that need scratch memory or partial sums (products, attention, reductions) belong on
 * MAIN: there is one such buffer. moe_sum_rows has its own, for one lane at a time. All calls are
 * local. */
#ifndef MOE_KERNELS_LANES_H
#define MOE_KERNELS_LANES_H

#include "kernels/device.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { MOE_LANE_MAIN, MOE_LANE_EXCHANGE, MOE_LANE_REDUCE, MOE_LANES } moe_lane;

/* What is queued from now on goes to `lane`. Returns the one it went to before. */
moe_lane moe_device_use_lane(moe_device *dev, moe_lane lane);
/* What is queued on the current lane from now on starts after what is on `other` by now. */
moe_status moe_device_wait_lane(moe_device *dev, moe_lane other);
/* The same after `mark`, which was made on another lane (device.h). In a graph that is recorded:
 * after the mark as it was made last before a launch; it must have been made, and not in there. */
moe_status moe_device_follow(moe_device *dev, const moe_mark *mark);
/* From now on kernels that would keep every multiprocessor to their end leave this many to REDUCE,
 * whose own would else wait for that end and then hold them up. 0, as at first: none. */
void moe_device_lend(moe_device *dev, int multiprocessors);

#ifdef __cplusplus
}
#endif
#endif
