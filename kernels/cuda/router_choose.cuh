/* The router's choice of experts for one token, by one warp: softmax, then K rounds of "largest
 * score, ties to the lower index". */
#ifndef MOE_KERNELS_CUDA_ROUTER_CHOOSE_CUH
#define MOE_KERNELS_CUDA_ROUTER_CHOOSE_CUH

#include <cfloat>
#include <climits>
#include <cmath>

#include "kernels/cuda/common.cuh"

struct choose_args {
  float *probs; /* [T, E] logits in, probabilities out */
  const float *bias;
  float *lse, *gates;
  int32_t *experts;
  int64_t tokens;
  int count, k; /* E, K */
};

/* Logits of one token become probabilities; `score` gets what the choice goes by. */
static __device__ void soften(float *p, const float *bias, int count, float *lse, float *score) {
  int lane = (int)threadIdx.x % 32;
  float top = -INFINITY, sum = 0;
  for (int j = lane; j < count; j += 32) top = op_max{}(top, score[j] = p[j]);
  top = warp_reduce(top, op_max{});
  for (int j = lane; j < count; j += 32) sum += score[j] = expf(score[j] - top);
  sum = warp_sum(sum);
  for (int j = lane; j < count; j += 32) {
    float probability = score[j] / sum, s = bias ? probability + bias[j] : probability;
    p[j] = probability;
    score[j] = s == s ? s : -INFINITY; /* NaN marks what is taken */
  }
  if (lane == 0) *lse = top + logf(sum);
}

/* The untaken index with the largest score, the lower of equals. */
static __device__ int largest(const float *score, int count) {
  int lane = (int)threadIdx.x % 32, best = INT_MAX;
  float most = -INFINITY;
  for (int j = lane; j < count; j += 32)
    if (score[j] > most || (score[j] == most && j < best)) most = score[j], best = j;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    float other = __shfl_xor_sync(full_warp, most, step);
    int at = __shfl_xor_sync(full_warp, best, step);
    if (other > most || (other == most && at < best)) most = other, best = at;
  }
  return best;
}

/* All K choices of at most 32 experts at once: a score's place is how many are ahead of it. */
static __device__ void choose_narrow(const choose_args &a, int64_t t, const float *p,
                                     float *score) {
  int lane = (int)threadIdx.x % 32, place = 0;
  __syncwarp();
  float mine = lane < a.count ? score[lane] : -INFINITY;
#pragma unroll 8
  for (int j = 0; j < a.count; j++) {
    float other = __shfl_sync(full_warp, mine, j);
    place += other > mine || (other == mine && j < lane);
  }
  bool taken = lane < a.count && place < a.k;
  float probability = taken ? p[lane] : 0.0f, sum = warp_sum(probability);
  if (!taken) return;
  score[lane] = NAN;
  a.experts[t * a.k + place] = lane;
  a.gates[t * a.k + place] = sum < FLT_MIN ? 1.0f / (float)a.k : probability / sum;
}

/* Token t: its logits `p` [E] become probabilities; lse, experts and gates are written. score [E]
 * is shared memory: afterwards what was taken is NaN there. */
static __device__ void choose_one(const choose_args &a, int64_t t, float *p, float *lse,
                                  float *score) {
  int lane = (int)threadIdx.x % 32;
  float sum = 0, *gates = a.gates + t * a.k;
  soften(p, a.bias, a.count, lse, score);
  if (a.count <= 32) return choose_narrow(a, t, p, score);
  for (int k = 0; k < a.k; k++) {
    __syncwarp();
    int best = largest(score, a.count);
    float probability = p[best];
    sum += probability;
    __syncwarp(); /* all have looked */
    if (lane == 0) {
      score[best] = NAN;
      a.experts[t * a.k + k] = best;
      gates[k] = probability;
    }
  }
  __syncwarp();
  for (int k = lane; k < a.k; k += 32) /* a bias may choose experts whose p is zero */
    gates[k] = sum < FLT_MIN ? 1.0f / (float)a.k : gates[k] / sum;
}

#endif
