/* What a kernel is worth: MOE_PLAIN in the environment names the operations, with commas between
 * them, whose faster kernels stay out of use in favour of the plain ones.
 *
 *   router   the one-pass kernels on tensor cores (router_mma.cuh, router_back.cuh)
 *   joint    two operations in one kernel: routers with norms, both ways (router_norm.cuh,
 *            router_norm_back.cuh), sums of rows with norms (combine.cu), rows with the gates'
 *            gradients (permute.cu)
 *   norm     rms_norm_backward with a warp for a row (norm.cu)
 *   squares  the experts' gradients squared as they are stored (experts_sm90_grad.cu)
 *   gather   rows taken from all over by neighbouring warps (permute.cu)
 *   gemv     products with few rows straight from memory (gemv.cu)
 *   stream   large products with few rows by Hopper's copy engine (stream.cuh)
 *   cluster  attention over short caches in one kernel (attention_cached_few.cuh)
 *   overlap  small kernels that begin before the one before has ended (launch.cuh)
 *
 * The other switches of this kind: MOE_EXPERT_GEMM=cublas (experts.cu), MOE_ATTENTION=cudnn, own,
 * mma or exact (attention.cu), MOE_GEMM=own (device.cu), MOE_LANES=off (lanes.cu), MOE_DEDUP=off
 * (parallel/dispatch.h).
 * tests/bench/ablation.sh takes a training step with each of them alone. */
#ifndef MOE_KERNELS_CUDA_PLAIN_H
#define MOE_KERNELS_CUDA_PLAIN_H

#include <cstdlib>
#include <cstring>

/* Whether the environment's variable has this value. */
static inline bool cuda_wished(const char *variable, const char *value) {
  const char *wish = getenv(variable);
  return wish != nullptr && strcmp(wish, value) == 0;
}

static inline bool cuda_plain(const char *operation) {
  const char *at = getenv("MOE_PLAIN");
  size_t length = strlen(operation);
  while (at != nullptr && *at != '\0') {
    size_t word = strcspn(at, ",");
    if (word == length && strncmp(at, operation, word) == 0) return true;
    at += word + (at[word] == ',');
  }
  return false;
}

#endif
