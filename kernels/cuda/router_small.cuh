/* The router of few tokens and few experts in one block: where launches cost more than the work.
 *
 * A warp multiplies one expert's row of weights with up to eight tokens; then a warp chooses for
 * each token, in shared memory; then a thread adds up each of the statistics, tokens in order. */
#ifndef MOE_KERNELS_CUDA_ROUTER_SMALL_CUH
#define MOE_KERNELS_CUDA_ROUTER_SMALL_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/router_choose.cuh"

constexpr int small_tokens = 32, small_experts = 64, small_together = 8, small_warps = 32;

struct small_router_args {
  choose_args c;
  const void *x;
  const float *weight;
  float *stats;
  int width, groups;
};

static inline bool small_router_fits(int64_t tokens, int64_t experts, int64_t k) {
  return tokens >= 1 && tokens <= small_tokens && experts <= small_experts && k <= experts;
}

/* Expert e's logits of tokens [first, first + small_together). */
template <typename T, int N>
static __device__ __forceinline__ void small_logits(const small_router_args &a, int e, int first,
                                                    float (*logits)[small_experts]) {
  const float *w = a.weight + (int64_t)e * a.width;
  const T *x = static_cast<const T *>(a.x) + (int64_t)first * a.width;
  float sum[small_together] = {};
  int n = min(small_together, (int)a.c.tokens - first);
#pragma unroll 4
  for (int c = (int)threadIdx.x % 32 * N; c < a.width; c += 32 * N) {
    float u[N], v[N];
    load<float, N>(u, w + c);
#pragma unroll
    for (int t = 0; t < small_together; t++) {
      if (t >= n) break;
      load<T, N>(v, x + (int64_t)t * a.width + c);
#pragma unroll
      for (int i = 0; i < N; i++) sum[t] = fmaf(u[i], v[i], sum[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < small_together; t++) {
    if (t >= n) break;
    float total = warp_sum(sum[t]);
    if (threadIdx.x % 32 == 0) logits[first + t][e] = total;
  }
}

/* Column c of a group's statistics: assignments, mass, squares of lse. */
static __device__ float small_stat(const small_router_args &a, int group, int c,
                                   const float (*p)[small_experts],
                                   const float (*score)[small_experts], const float *lse) {
  int each = (int)a.c.tokens / a.groups, e = c % a.c.count;
  double sum = 0;
  for (int t = group * each; t < (group + 1) * each; t++) {
    if (c < a.c.count)
      sum += score[t][e] != score[t][e] ? 1.0 : 0.0; /* taken */
    else
      sum += c < 2 * a.c.count ? (double)p[t][e] : (double)lse[t] * (double)lse[t];
  }
  return (float)sum;
}

template <typename T, int N>
__global__ void __launch_bounds__(32 * small_warps) small_router_kernel(small_router_args a) {
  __shared__ float p[small_tokens][small_experts], score[small_tokens][small_experts];
  __shared__ float lse[small_tokens];
  int warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32, count = a.c.count;
  int tokens = (int)a.c.tokens;
  for (int i = (int)threadIdx.x * 32; i < count * a.width; i += (int)blockDim.x * 32)
    prefetch_line(a.weight + i);
  launch_wait();
  launch_release();

  int parts = (int)div_up(tokens, small_together);
  for (int task = warp; task < count * parts; task += warps)
    small_logits<T, N>(a, task % count, task / count * small_together, p);
  __syncthreads();
  for (int t = warp; t < tokens; t += warps) choose_one(a.c, t, p[t], lse + t, score[t]);
  __syncthreads();
  for (int i = (int)threadIdx.x; i < tokens * count; i += (int)blockDim.x)
    a.c.probs[i] = p[i / count][i % count];
  for (int t = (int)threadIdx.x; t < tokens; t += (int)blockDim.x) a.c.lse[t] = lse[t];
  int columns = 2 * count + 1;
  for (int i = (int)threadIdx.x; i < a.groups * columns; i += (int)blockDim.x) {
    int group = i / columns, c = i % columns, block = c / count; /* load, mass, squares */
    int at =
        block < 2 ? (block * a.groups + group) * count + c % count : 2 * a.groups * count + group;
    a.stats[at] = small_stat(a, group, c, p, score, lse);
  }
}

static inline moe_status small_router(moe_device *dev, const choose_args &c, moe_tensor x,
                                      moe_tensor weight, moe_tensor stats) {
  small_router_args a = {c,
                         x.data,
                         cuda_data<float>(weight),
                         cuda_data<float>(stats),
                         (int)x.shape[1],
                         (int)stats.shape[0]};
  int64_t tasks = c.count * div_up(c.tokens, small_together);
  if (tasks < c.tokens) tasks = c.tokens;
  int threads = 32 * (int)(tasks < small_warps ? tasks : small_warps);
  return cuda_act(x.dtype, [&](auto act) {
    using T = decltype(act);
    return cuda_width(
        a.width,
        [&](auto n) {
          return cuda_start(dev, small_router_kernel<T, decltype(n)::value>, dim3(1), threads, 0,
                            a);
        },
        (const char *)x.data, (const char *)weight.data);
  });
}

#endif
