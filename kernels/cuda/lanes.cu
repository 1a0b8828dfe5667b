/* Lanes: one stream each. The exchange goes first where several could run, since others wait for
 * it; sums of gradients go next: they are short, and the kernels of MAIN that fill the chip would
 * leave them no place between two of them. MOE_LANES=off in the environment makes all lanes MAIN's
 * stream, to see what they are worth. */
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/common.cuh"

static moe_status are_one(bool *one) {
  const char *wish = getenv("MOE_LANES");
  *one = wish != nullptr && strcmp(wish, "off") == 0;
  if (wish == nullptr || *wish == '\0' || *one) return MOE_OK;
  return moe_fail(MOE_USAGE, "MOE_LANES=%s: is not off: use off, or leave it out", wish);
}

moe_status cuda_lanes_create(moe_device *dev) {
  cuda_state *s = cuda_of(dev);
  bool one = false;
  MOE_TRY(are_one(&one));
  int least = 0, greatest = 0;
  CUDA_TRY(dev, cudaDeviceGetStreamPriorityRange(&least, &greatest));
  const int priority[MOE_LANES] = {least, greatest, (least + greatest) / 2};
  for (int i = 0; i < MOE_LANES; i++) {
    if (one && i != MOE_LANE_MAIN)
      s->lane[i] = s->lane[MOE_LANE_MAIN];
    else
      CUDA_TRY(dev, cudaStreamCreateWithPriority(&s->lane[i], cudaStreamNonBlocking, priority[i]));
    CUDA_TRY(dev, cudaEventCreateWithFlags(&s->passed[i], cudaEventDisableTiming));
  }
  s->stream = s->lane[MOE_LANE_MAIN];
  return MOE_OK;
}

void cuda_lanes_wait(cuda_state *s) {
  for (cudaStream_t stream : s->lane)
    if (stream != nullptr) cudaStreamSynchronize(stream);
}

void cuda_lanes_destroy(cuda_state *s) {
  for (int i = MOE_LANES - 1; i >= 0; i--) {
    if (s->passed[i] != nullptr) cudaEventDestroy(s->passed[i]);
    if (s->lane[i] != nullptr && (i == MOE_LANE_MAIN || s->lane[i] != s->lane[MOE_LANE_MAIN]))
      cudaStreamDestroy(s->lane[i]);
  }
}

void cuda_use_lane(moe_device *dev, moe_lane lane) {
  cuda_of(dev)->stream = cuda_of(dev)->lane[lane];
}

bool moe_cuda_has_lanes(const moe_device *dev) {
  return cuda_of(dev)->lane[MOE_LANE_REDUCE] != cuda_of(dev)->lane[MOE_LANE_MAIN];
}

void cuda_lend(moe_device *dev, int multiprocessors) {
  cuda_of(dev)->lent = moe_cuda_has_lanes(dev) ? multiprocessors : 0;
}

/* Whether a lane has no part in the graph that is being recorded: nothing to wait for in it, and
 * what was queued before cannot be waited for. */
static bool is_left_out(const moe_device *dev, moe_lane lane) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (!dev->recording) return false;
  return cudaStreamIsCapturing(cuda_of(dev)->lane[lane], &status) == cudaSuccess &&
         status == cudaStreamCaptureStatusNone;
}

moe_status cuda_wait_lane(moe_device *dev, moe_lane other) {
  cuda_state *s = cuda_of(dev);
  if (is_left_out(dev, other)) return MOE_OK;
  CUDA_TRY(dev, cudaEventRecord(s->passed[other], s->lane[other]));
  CUDA_TRY(dev, cudaStreamWaitEvent(s->stream, s->passed[other], 0));
  return MOE_OK;
}

moe_status cuda_follow(moe_device *dev, const moe_mark *mark) {
  if (mark->event != nullptr) {
    unsigned kind = dev->recording ? cudaEventWaitExternal : cudaEventWaitDefault;
    CUDA_TRY(dev, cudaStreamWaitEvent(cuda_of(dev)->stream, (cudaEvent_t)mark->event, kind));
    return MOE_OK;
  }
  if (dev->recording)
    return moe_fail(MOE_INVALID, "graph: a mark that was never made cannot be followed in it");
  for (int i = 0; i < MOE_LANES; i++) /* no event was to be had */
    MOE_TRY(cuda_wait_lane(dev, (moe_lane)i));
  return MOE_OK;
}
