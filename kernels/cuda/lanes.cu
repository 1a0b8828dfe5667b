/* Lanes: one stream each. The exchange goes first where both could run, since others wait for it;
 * updates of weights go last, in the gaps. */
#include "kernels/cuda/common.cuh"

moe_status cuda_lanes_create(moe_device *dev) {
  cuda_state *s = cuda_of(dev);
  int least = 0, greatest = 0;
  CUDA_TRY(dev, cudaDeviceGetStreamPriorityRange(&least, &greatest));
  const int priority[MOE_LANES] = {(least + greatest) / 2, greatest, least};
  for (int i = 0; i < MOE_LANES; i++) {
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
  for (int i = 0; i < MOE_LANES; i++) {
    if (s->passed[i] != nullptr) cudaEventDestroy(s->passed[i]);
    if (s->lane[i] != nullptr) cudaStreamDestroy(s->lane[i]);
  }
}

void cuda_use_lane(moe_device *dev, moe_lane lane) {
  cuda_of(dev)->stream = cuda_of(dev)->lane[lane];
}

moe_status cuda_wait_lane(moe_device *dev, moe_lane other) {
  cuda_state *s = cuda_of(dev);
  CUDA_TRY(dev, cudaEventRecord(s->passed[other], s->lane[other]));
  CUDA_TRY(dev, cudaStreamWaitEvent(s->stream, s->passed[other], 0));
  return MOE_OK;
}
