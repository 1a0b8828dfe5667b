/* The router of few tokens and few experts: where launches cost more than the work.
 *
 * A block per token: a warp multiplies one expert's row of weights with it, one warp chooses, in
 * shared memory; the token may be a norm, worked out there too. The statistics of a single token
 * are at hand there; those of several are added up, tokens in order, by one more block. */
#ifndef MOE_KERNELS_CUDA_ROUTER_SMALL_CUH
#define MOE_KERNELS_CUDA_ROUTER_SMALL_CUH

#include "kernels/cuda/norm_few.cuh"
#include "kernels/cuda/router_choose.cuh"

constexpr int small_tokens = 32, small_experts = 64;
/* Warps of a block; fewer have more registers, for weights that are on their way meanwhile. */
template <bool NORM> constexpr int small_warps = NORM ? 16 : 32;

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

/* A row of weights times x, in every lane; N elements at a time. */
template <typename T, int N>
__device__ __forceinline__ float small_product(const float *w, const T *x, int width) {
  float sum = 0.0f;
#pragma unroll 4
  for (int c = (int)threadIdx.x % 32 * N; c < width; c += 32 * N) {
    float u[N], v[N];
    load<float, N>(u, w + c);
    load<T, N>(v, x + c);
#pragma unroll
    for (int i = 0; i < N; i++) sum = fmaf(u[i], v[i], sum);
  }
  return warp_sum(sum);
}

/* The norm of token t, in `out` of all threads' shared memory and where it is stored; returns the
 * product with this warp's row of weights (NULL: none), which are on their way meanwhile. */
template <typename T>
__device__ __forceinline__ float small_norm(T *out, const norm_few &n, int64_t t, const float *w) {
  int c = (int)threadIdx.x * 8, first = (int)threadIdx.x % 32 * 8;
  float v[8] = {}, u[norm_few_groups][8], squares = 0.0f;
  norm_few_part<T> part;
  if (c < n.width) part.ask(n, c, t * n.width + c);
#pragma unroll
  for (int j = 0; j < norm_few_groups; j++)
    if (w != nullptr && first + 256 * j < n.width) load<float, 8>(u[j], w + first + 256 * j);
  if (c < n.width) part.add(v, n, t * n.width + c, true);
#pragma unroll
  for (int i = 0; i < 8; i++) squares += v[i] * v[i];
  float rstd = norm_few_rstd(n, block_sum(squares)), sum = 0.0f;
  if (c < n.width) {
    part.scale(v, rstd);
    store<T, 8>(out + c, v);
    store<T, 8>(static_cast<T *>(n.out) + t * n.width + c, v);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < norm_few_groups; j++) {
    if (w == nullptr || first + 256 * j >= n.width) break;
    load<T, 8>(v, out + first + 256 * j);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(u[j][i], v[i], sum);
  }
  return warp_sum(sum);
}

template <typename T, int N, bool NORM>
__global__ void __launch_bounds__(32 * small_warps<NORM>, 1)
    small_router_kernel(small_router_args a, norm_few norm) {
  __shared__ float p[small_experts], score[small_experts], lse;
  int warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32, count = a.c.count;
  int64_t t = blockIdx.x;
  for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x) * 32; i < count * a.width;
       i += (int)(gridDim.x * blockDim.x) * 32)
    prefetch_line(a.weight + i);
  launch_wait();
  launch_release();

  const T *x = static_cast<const T *>(a.x) + t * a.width;
  int next = warp;
  if constexpr (NORM) {
    __shared__ alignas(16) T row[norm_few_most];
    const float *w = warp < count ? a.weight + (int64_t)warp * a.width : nullptr;
    float sum = small_norm<T>(row, norm, t, w);
    if (w != nullptr && threadIdx.x % 32 == 0) p[warp] = sum;
    x = row;
    next += warps;
  }
  for (int e = next; e < count; e += warps) {
    float sum = small_product<T, N>(a.weight + (int64_t)e * a.width, x, a.width);
    if (threadIdx.x % 32 == 0) p[e] = sum;
  }
  __syncthreads();
  if (warp == 0) choose_one(a.c, t, p, &lse, score);
  __syncthreads();
  for (int i = (int)threadIdx.x; i < count; i += (int)blockDim.x) a.c.probs[t * count + i] = p[i];
  if (threadIdx.x == 0) a.c.lse[t] = lse;
  if (a.c.tokens > 1) return;
  for (int i = (int)threadIdx.x; i <= 2 * count; i += (int)blockDim.x) {
    int e = i % count; /* what was taken is NaN */
    a.stats[i] = i == 2 * count         ? lse * lse
                 : i >= count           ? p[e]
                 : score[e] != score[e] ? 1.0f
                                        : 0.0f;
  }
}

/* One block. Column c of a group's statistics: assignments, mass, squares of lse. */
__global__ void __launch_bounds__(256) small_stats_kernel(small_router_args a) {
  __shared__ float p[small_tokens * small_experts];
  __shared__ int experts[small_tokens * small_experts];
  launch_wait();
  launch_release();
  int count = a.c.count, k = a.c.k, tokens = (int)a.c.tokens, each = tokens / a.groups;
  int columns = 2 * count + 1;
  for (int i = (int)threadIdx.x; i < tokens * count; i += (int)blockDim.x) p[i] = a.c.probs[i];
  for (int i = (int)threadIdx.x; i < tokens * k; i += (int)blockDim.x) experts[i] = a.c.experts[i];
  __syncthreads();
  for (int i = (int)threadIdx.x; i < a.groups * columns; i += (int)blockDim.x) {
    int group = i / columns, c = i % columns, begin = group * each, end = begin + each;
    double sum = 0;
    if (c < count) {
      int load = 0;
      for (int j = begin * k; j < end * k; j++) load += experts[j] == c;
      sum = load;
    } else {
      for (int t = begin; t < end; t++)
        sum += c < 2 * count ? (double)p[t * count + c - count]
                             : (double)a.c.lse[t] * (double)a.c.lse[t];
    }
    int block = c / count; /* load, mass, squares */
    int at =
        block < 2 ? (block * a.groups + group) * count + c % count : 2 * a.groups * count + group;
    a.stats[at] = (float)sum;
  }
}

/* norm: what makes x, or NULL where it is there. */
static inline moe_status small_router(moe_device *dev, const choose_args &c, const moe_norm *norm,
                                      moe_tensor x, moe_tensor weight, moe_tensor stats) {
  small_router_args a = {c,
                         x.data,
                         cuda_data<float>(weight),
                         cuda_data<float>(stats),
                         (int)x.shape[1],
                         (int)stats.shape[0]};
  int most = 32 * (norm != nullptr ? small_warps<true> : small_warps<false>);
  int threads = 32 * c.count < most ? 32 * c.count : most;
  if (norm != nullptr && threads * 8 < a.width) threads = (int)round_up(div_up(a.width, 8), 32);
  MOE_TRY(cuda_act(x.dtype, [&](auto act) {
    using T = decltype(act);
    if (norm != nullptr)
      return cuda_start(dev, small_router_kernel<T, 8, true>, dim3((unsigned)c.tokens), threads, 0,
                        a, norm_few_of(*norm));
    return cuda_width(
        a.width,
        [&](auto n) {
          return cuda_start(dev, small_router_kernel<T, decltype(n)::value, false>,
                            dim3((unsigned)c.tokens), threads, 0, a, norm_few{});
        },
        (const char *)x.data, (const char *)weight.data);
  }));
  return c.tokens > 1 ? cuda_start(dev, small_stats_kernel, dim3(1), 256, 0, a) : MOE_OK;
}

#endif
