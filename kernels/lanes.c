/* Lanes: the checked door to the backend's; a backend without them has one. */
#include "kernels/lanes.h"

#include "kernels/backend.h"
#include "kernels/profile.h"

moe_lane moe_device_use_lane(moe_device *dev, moe_lane lane) {
  moe_lane before = dev->lane;
  dev->lane = lane;
  if (dev->backend->use_lane) dev->backend->use_lane(dev, lane);
  return before;
}

void moe_device_lend(moe_device *dev, int multiprocessors) {
  if (dev->backend->lend) dev->backend->lend(dev, multiprocessors);
}

moe_status moe_device_follow(moe_device *dev, const moe_mark *mark) {
  if (!dev->backend->follow) return MOE_OK;
  moe_profile_begin(dev, "exchange", 0.0);
  moe_status status = dev->backend->follow(dev, mark);
  moe_profile_end(dev);
  return status;
}

/* What a profile calls the time a lane spends waiting for another. */
static const char *const waits[MOE_LANES] = {"wait", "exchange", "reduce"};

moe_status moe_device_wait_lane(moe_device *dev, moe_lane other) {
  if (dev->lane == other || !dev->backend->wait_lane) return MOE_OK;
  moe_profile_begin(dev, waits[other], 0.0);
  moe_status status = dev->backend->wait_lane(dev, other);
  moe_profile_end(dev);
  return status;
}
