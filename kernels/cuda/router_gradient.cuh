/* The router's gradient with respect to one token's logits, by LANES neighbouring threads.
 *
 * With p = softmax(l), C the chosen experts, S = sum of p over C, gate_j = p_j / S:
 *     dL/dp_j  = [j in C] (dgate_j - sum_k dgate_k gate_k) / S  +  aux_scale load_j
 *     dL/dl_j  = p_j (dL/dp_j - sum_i p_i dL/dp_i)  +  z_scale 2 lse p_j */
#ifndef MOE_KERNELS_CUDA_ROUTER_GRADIENT_CUH
#define MOE_KERNELS_CUDA_ROUTER_GRADIENT_CUH

#include <cfloat>

#include "kernels/cuda/common.cuh"

struct gradient_args {
  const float *dgates, *probs, *lse, *gates, *load;
  const int32_t *experts;
  float *dlogits;
  int64_t tokens, per_group;
  int count, k; /* E, K */
  float aux_scale, z_scale;
};

/* put(j, gradient) for experts j = lane, lane + LANES, ... of token t, which must exist. All
 * threads of a warp must call. S is what the largest gate remembers of it; where all were dropped,
 * or p was zero, no gradient passes. */
template <int LANES, typename P>
__device__ __forceinline__ void token_gradient(const gradient_args &a, int64_t t, P put) {
  int lane = (int)threadIdx.x % LANES, most = 0;
  const float *p = a.probs + t * a.count, *dgates = a.dgates + t * a.k, *gates = a.gates + t * a.k;
  const float *load = a.load + t / a.per_group * a.count;
  const int32_t *experts = a.experts + t * a.k;
  float mean = 0, dot = 0, inverse = 0;
#pragma unroll 4
  for (int k = 0; k < a.k; k++) {
    if (experts[k] >= 0) mean += dgates[k] * gates[k];
    if (gates[k] > gates[most]) most = k;
  }
  if (experts[most] >= 0 && gates[most] > 0.0f) {
    float mass = p[experts[most]] / gates[most];
    inverse = mass < FLT_MIN ? 0.0f : 1.0f / mass;
  }
#pragma unroll 4
  for (int j = lane; j < a.count; j += LANES) dot += a.aux_scale * load[j] * p[j];
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) dot += __shfl_xor_sync(full_warp, dot, step);
#pragma unroll 4
  for (int k = 0; k < a.k; k++)
    if (experts[k] >= 0) dot += (dgates[k] - mean) * inverse * p[experts[k]];
  float slope = 2.0f * a.z_scale * a.lse[t];
#pragma unroll 4
  for (int j = lane; j < a.count; j += LANES) {
    float dp = a.aux_scale * load[j];
    for (int k = 0; k < a.k; k++)
      if (experts[k] == j) dp += (dgates[k] - mean) * inverse;
    put(j, p[j] * (dp - dot + slope));
  }
}

#endif
