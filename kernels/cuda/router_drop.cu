/* Dropping the assignments that are beyond an expert's capacity, the least probable ones. A block
 * per expert finds the probability that its capacity-th assignment has, eight bits at a time. */
#include <climits>

#include "kernels/cuda/common.cuh"

constexpr int drop_threads = 512;

struct drop_args {
  const float *probs;
  int32_t *experts;
  float *gates;
  int64_t pairs, capacity; /* T K */
  int64_t k, count;
  int32_t *lost; /* [E] */
};

/* Probabilities are not negative, so their bits order as they do. False: not this expert's. */
static __device__ __forceinline__ bool bits_of(const drop_args &a, int64_t i, uint32_t *bits) {
  if (i >= a.pairs || a.experts[i] != (int32_t)blockIdx.x) return false;
  *bits = __float_as_uint(a.probs[i / a.k * a.count + blockIdx.x]);
  return true;
}

/* The capacity-th largest of this expert's assignments, eight bits at a time from the top; *ties:
 * how many of those equal to it stay. capacity >= 1, and there are more assignments than that. */
static __device__ uint32_t find_cut(const drop_args &a, int64_t *ties) {
  __shared__ int size[256];
  __shared__ int chosen;
  __shared__ int64_t wanted;
  uint32_t prefix = 0, bits;
  if (threadIdx.x == 0) wanted = a.capacity;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int b = (int)threadIdx.x; b < 256; b += drop_threads) size[b] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < a.pairs; i += drop_threads)
      if (bits_of(a, i, &bits) && (shift == 24 || bits >> (shift + 8) == prefix))
        atomicAdd(&size[bits >> shift & 255], 1);
    __syncthreads();
    if (threadIdx.x == 0) {
      chosen = 255;
      while (wanted > size[chosen]) wanted -= size[chosen--];
    }
    __syncthreads();
    prefix = prefix << 8 | (uint32_t)chosen;
  }
  *ties = wanted;
  return prefix;
}

__global__ void __launch_bounds__(drop_threads) drop_kernel(drop_args a) {
  uint32_t bits = 0, cut = 0xffffffffu;
  int64_t ties = 0, seen = 0;
  int mine = 0;
  for (int64_t i = threadIdx.x; i < a.pairs; i += drop_threads) mine += bits_of(a, i, &bits);
  mine = block_sum(mine);
  if (threadIdx.x == 0) a.lost[blockIdx.x] = mine > a.capacity ? mine - (int)a.capacity : 0;
  if (mine <= a.capacity) return;
  if (a.capacity > 0) cut = find_cut(a, &ties);
  for (int64_t base = 0; base < a.pairs; base += drop_threads) { /* ties in token order */
    bool here = bits_of(a, base + threadIdx.x, &bits), tie = here && bits == cut;
    int total;
    int64_t rank = seen + block_scan((int)tie, &total);
    seen += total;
    if (!here || bits > cut || (tie && rank < ties)) continue;
    a.experts[base + threadIdx.x] = -1;
    a.gates[base + threadIdx.x] = 0.0f;
  }
}

__global__ void drop_total_kernel(const int32_t *lost, int64_t count, float *dropped) {
  int sum = 0;
  for (int64_t j = threadIdx.x; j < count; j += blockDim.x) sum += lost[j];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *dropped = (float)sum;
}

moe_status moe_cuda_router_drop(moe_device *dev, moe_tensor probs, int64_t capacity,
                                moe_tensor experts, moe_tensor gates, moe_tensor dropped) {
  cuda_state *s = cuda_of(dev);
  int64_t e = probs.shape[1];
  if (capacity > INT_MAX) capacity = INT_MAX;
  if (4 * e > s->partial_bytes)
    return moe_fail(MOE_INVALID, "cuda: router_drop: %lld experts are too many", (long long)e);
  drop_args a = {cuda_data<float>(probs),
                 cuda_data<int32_t>(experts),
                 cuda_data<float>(gates),
                 moe_tensor_count(experts),
                 capacity,
                 experts.shape[1],
                 e,
                 (int32_t *)s->partial};
  if (e > 0) drop_kernel<<<(unsigned)e, drop_threads, 0, s->stream>>>(a);
  CUDA_LAUNCHED(dev);
  drop_total_kernel<<<1, 256, 0, s->stream>>>(a.lost, e, cuda_data<float>(dropped));
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}
