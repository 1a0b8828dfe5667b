/* The router: softmax over experts, the K largest, and the way back.
 *
 * Logits are float32 products of kernels that take x as it is stored and the float32 weights:
 * router_few.cuh's for few experts, else the own tiled one. Then a warp per token: softmax, and K
 * rounds of "largest score, ties to the lower index". For bf16 and at most 32 experts one kernel
 * does all of it (router_mma.cuh), with the norm before it where router_norm.cuh's fits; one block
 * does for up to 32 tokens (router_small.cuh).
 * Whatever is summed over tokens goes through a fixed number of partial sums.
 *
 * The way back (router_gradient.cuh has its formula) is one kernel where router_back.cuh's fits,
 * and the norm's before it is in the same where router_norm_back.cuh's does. */
#include "kernels/cuda/plain.h"
#include "kernels/cuda/router_few.cuh"
#include "kernels/cuda/router_mma.cuh"
#include "kernels/cuda/router_norm.cuh"
#include "kernels/cuda/router_norm_back.cuh"
#include "kernels/cuda/router_small.cuh"
#include "kernels/cuda/tiled.cuh"

/* ---- softmax and choice -------------------------------------------------------------------- */

__global__ void choose_kernel(choose_args a) {
  extern __shared__ float scores[]; /* [warps, E] */
  int warp = (int)threadIdx.x / 32;
  int64_t t = (int64_t)blockIdx.x * (blockDim.x / 32) + warp;
  if (t < a.tokens) choose_one(a, t, a.probs + t * a.count, a.lse + t, scores + warp * a.count);
}

/* Warps per block so that their scores fit 48 KiB of shared memory; 0: not even one. */
static int score_warps(int64_t count) {
  int64_t warps = (48 << 10) / (4 * count);
  return (int)(warps < 4 ? warps : 4);
}

/* ---- stats --------------------------------------------------------------------------------- */

constexpr int stats_threads = 256;

struct stats_args {
  const float *probs, *lse;
  const int32_t *experts;
  double *partial; /* [groups of this call, splits, 2 E + 1]: load, mass, lse^2 */
  float *stats;
  int64_t per_group, per_split, first_group, groups; /* groups: of all */
  int count, k, splits;
};

/* Experts [first, first + columns) over tokens [begin, end): assignments and mass. */
static __device__ void sum_columns(const stats_args &a, int64_t begin, int64_t end, int first,
                                   int columns, double *out) {
  __shared__ int load[stats_threads];
  __shared__ double mass[stats_threads];
  int lanes = stats_threads / columns; /* tokens at a time */
  int c = (int)threadIdx.x % columns, r = (int)threadIdx.x / columns;
  double sum = 0;
  if (r < lanes)
    for (int64_t t = begin + r; t < end; t += lanes)
      sum += (double)a.probs[t * a.count + first + c];
  __syncthreads();
  load[threadIdx.x] = 0;
  mass[threadIdx.x] = sum;
  __syncthreads();
  for (int64_t i = begin * a.k + threadIdx.x; i < end * a.k; i += stats_threads) {
    int j = a.experts[i] - first;
    if (j >= 0 && j < columns) atomicAdd(&load[j], 1); /* whole numbers: any order is the same */
  }
  __syncthreads();
  if (r != 0) return;
  for (int i = 1; i < lanes; i++) sum += mass[i * columns + c];
  out[first + c] = load[c];
  out[a.count + first + c] = sum;
}

/* Block (split, group). */
__global__ void __launch_bounds__(stats_threads) stats_kernel(stats_args a) {
  int64_t group = a.first_group + blockIdx.y;
  int64_t begin = group * a.per_group + blockIdx.x * a.per_split;
  int64_t stop = (group + 1) * a.per_group;
  int64_t end = begin + a.per_split < stop ? begin + a.per_split : stop;
  double *out = a.partial + ((int64_t)blockIdx.y * a.splits + blockIdx.x) * (2 * a.count + 1);
  for (int first = 0; first < a.count; first += stats_threads)
    sum_columns(a, begin, end, first, min(stats_threads, a.count - first), out);
  double squares = 0;
  for (int64_t t = begin + threadIdx.x; t < end; t += stats_threads)
    squares += (double)a.lse[t] * (double)a.lse[t];
  squares = block_sum(squares);
  if (threadIdx.x == 0) out[2 * a.count] = squares;
}

constexpr int stats_sum_warps = 4;

/* Partial sums, in a fixed order, into the three blocks of stats. A warp for each sum. */
__global__ void stats_sum_kernel(stats_args a, int64_t groups_here) {
  int64_t width = 2 * a.count + 1, warps = (int64_t)gridDim.x * stats_sum_warps;
  launch_wait();
  launch_release();
  for (int64_t i = (int64_t)blockIdx.x * stats_sum_warps + threadIdx.x / 32;
       i < groups_here * width; i += warps) {
    int64_t here = i / width, c = i % width, group = a.first_group + here;
    double sum = 0;
#pragma unroll 4
    for (int s = (int)threadIdx.x % 32; s < a.splits; s += 32)
      sum += a.partial[(here * a.splits + s) * width + c];
    sum = warp_sum(sum);
    int64_t block = c / a.count; /* 0 load, 1 mass, 2 squares */
    int64_t at = block < 2 ? (block * a.groups + group) * a.count + c % a.count
                           : 2 * a.groups * a.count + group;
    if (threadIdx.x % 32 == 0) a.stats[at] = (float)sum;
  }
}

static moe_status add_stats(moe_device *dev, const stats_args &a, int64_t groups_here) {
  int64_t sums = groups_here * (2 * a.count + 1);
  dim3 blocks(cuda_blocks(dev, 32 * sums, 32 * stats_sum_warps));
  return cuda_start(dev, stats_sum_kernel, blocks, 32 * stats_sum_warps, 0, a, groups_here);
}

static moe_status sum_stats(moe_device *dev, stats_args a) {
  cuda_state *s = cuda_of(dev);
  int64_t width = 8 * (2 * (int64_t)a.count + 1), fit = s->partial_bytes / width;
  int64_t splits = div_up(a.per_group, 256), at_once;
  if (splits > 64) splits = 64;
  if (splits * a.groups > fit) splits = fit / a.groups;
  a.splits = (int)(splits < 1 ? 1 : splits);
  a.per_split = div_up(a.per_group, a.splits);
  at_once = fit / a.splits < 65535 ? fit / a.splits : 65535;
  for (a.first_group = 0; a.first_group < a.groups; a.first_group += at_once) {
    int64_t here = a.groups - a.first_group < at_once ? a.groups - a.first_group : at_once;
    stats_kernel<<<dim3((unsigned)a.splits, (unsigned)here), stats_threads, 0, s->stream>>>(a);
    CUDA_LAUNCHED(dev);
    MOE_TRY(add_stats(dev, a, here));
  }
  return MOE_OK;
}

static moe_status find_logits(moe_device *dev, moe_tensor x, moe_tensor weight, moe_tensor logits) {
  int64_t tokens = x.shape[0], d = x.shape[1], e = weight.shape[0];
  const float *w = cuda_data<float>(weight);
  float *to = cuda_data<float>(logits);
  return cuda_act(x.dtype, [&](auto act) {
    using T = decltype(act);
    const T *from = cuda_data<T>(x);
    return cuda_width(
        d,
        [&](auto width) {
          if constexpr (decltype(width)::value > 1)
            if (e <= few_most && d > 0) return few_logits<T>(dev, from, w, to, {tokens, d, (int)e});
          return tiled_matmul<T, float, float>(dev, MOE_NT, tokens, e, d, from, d, w, d, 0.0f, to,
                                               e);
        },
        from, w);
  });
}

static moe_status choose(moe_device *dev, const choose_args &c) {
  int warps = score_warps(c.count);
  if (warps < 1)
    return moe_fail(MOE_INVALID, "cuda: router: %d experts are more than 12288", c.count);
  choose_kernel<<<(unsigned)div_up(c.tokens, warps), 32 * warps, (size_t)(4 * warps * c.count),
                  cuda_of(dev)->stream>>>(c);
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}

/* Whether the kernels that do all of it at once stay out of use. */
static bool router_in_steps(void) {
  static const bool in_steps = cuda_plain("router");
  return in_steps;
}

static choose_args choice_of(moe_tensor bias, moe_tensor probs, moe_tensor lse, moe_tensor experts,
                             moe_tensor gates) {
  return {cuda_data<float>(probs), cuda_data<float>(bias),      cuda_data<float>(lse),
          cuda_data<float>(gates), cuda_data<int32_t>(experts), probs.shape[0],
          (int)probs.shape[1],     (int)experts.shape[1]};
}

static stats_args stats_of(moe_device *dev, const choose_args &c, moe_tensor stats) {
  stats_args a = {};
  a.probs = c.probs;
  a.lse = c.lse;
  a.experts = c.experts;
  a.partial = (double *)cuda_of(dev)->partial;
  a.stats = cuda_data<float>(stats);
  a.groups = stats.shape[0];
  a.per_group = c.tokens / a.groups;
  a.count = c.count;
  a.k = c.k;
  return a;
}

/* `start` queues a kernel for all tokens, which leaves the sums of each fused_tokens where it is
 * told, unless that is NULL; then stats. */
template <typename F>
static moe_status route_and_sum(moe_device *dev, const choose_args &c, moe_tensor x,
                                moe_tensor weight, moe_tensor stats, F start) {
  stats_args a = stats_of(dev, c, stats);
  bool sums = a.per_group % fused_tokens == 0 &&
              div_up(c.tokens, fused_tokens) * (2 * c.count + 1) * 8 <= cuda_of(dev)->partial_bytes;
  fused_router_args r = {cuda_data<__nv_bfloat16>(x),
                         cuda_data<float>(weight),
                         c.bias,
                         c.probs,
                         c.lse,
                         c.gates,
                         c.experts,
                         sums ? a.partial : nullptr,
                         c.tokens,
                         (int)x.shape[1],
                         c.count,
                         c.k};
  MOE_TRY(start(r));
  a.splits = (int)(a.per_group / fused_tokens);
  return sums ? add_stats(dev, a, a.groups) : sum_stats(dev, a);
}

moe_status moe_cuda_norm_router(moe_device *dev, moe_norm norm, moe_tensor weight, moe_tensor bias,
                                moe_tensor probs, moe_tensor lse, moe_tensor experts,
                                moe_tensor gates, moe_tensor stats, bool *done) {
  static const bool apart = cuda_plain("joint");
  choose_args c = choice_of(bias, probs, lse, experts, gates);
  bool few = small_router_fits(c.tokens, c.count, c.k) && norm_few_fits(norm) &&
             reinterpret_cast<uintptr_t>(weight.data) % 16 == 0;
  *done = !router_in_steps() && (few || (!apart && many_fits(cuda_of(dev), norm, weight)));
  if (!*done) return MOE_OK;
  if (few) return small_router(dev, c, &norm, norm.out, weight, stats);
  return route_and_sum(dev, c, norm.out, weight, stats, [&](const fused_router_args &r) {
    return many_router(
        dev, {r, cuda_data<__nv_bfloat16>(norm.x), cuda_data<__nv_bfloat16>(norm.residual),
              cuda_data<__nv_bfloat16>(norm.sum), cuda_data<__nv_bfloat16>(norm.out),
              cuda_data<float>(norm.gain), cuda_data<float>(norm.rstd), (float)norm.eps});
  });
}

moe_status moe_cuda_router(moe_device *dev, moe_tensor x, moe_tensor weight, moe_tensor bias,
                           moe_tensor probs, moe_tensor lse, moe_tensor experts, moe_tensor gates,
                           moe_tensor stats) {
  bool in_steps = router_in_steps();
  choose_args c = choice_of(bias, probs, lse, experts, gates);
  if (!in_steps && small_router_fits(c.tokens, c.count, c.k))
    return small_router(dev, c, nullptr, x, weight, stats);
  if (c.tokens > 0 && !in_steps && fused_router_fits(cuda_of(dev), x, weight))
    return route_and_sum(dev, c, x, weight, stats,
                         [&](const fused_router_args &r) { return fused_router(dev, r); });
  if (c.tokens > 0) {
    MOE_TRY(find_logits(dev, x, weight, probs));
    MOE_TRY(choose(dev, c));
  }
  return sum_stats(dev, stats_of(dev, c, stats));
}

/* ---- backward ------------------------------------------------------------------------------ */

/* A warp per token. */
__global__ void router_gradient_kernel(gradient_args a) {
  int64_t t = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (t < a.tokens)
    token_gradient<32>(a, t, [&](int j, float v) { a.dlogits[t * a.count + j] = v; });
}

/* dx += dlogits W, dweight += dlogits^T x */
static moe_status pass_back(moe_device *dev, moe_tensor dlogits, moe_tensor x, moe_tensor weight,
                            moe_tensor dx, moe_tensor dweight) {
  int64_t tokens = x.shape[0], d = x.shape[1], e = weight.shape[0];
  const float *grad = cuda_data<float>(dlogits), *w = cuda_data<float>(weight);
  float *dw = cuda_data<float>(dweight);
  few_parts parts = e <= few_most ? few_split(dev, tokens, d, e) : few_parts{};
  return cuda_act(x.dtype, [&](auto act) {
    using T = decltype(act);
    const T *from = cuda_data<T>(x);
    T *to = cuda_data<T>(dx);
    return cuda_width(
        d,
        [&](auto width) {
          if constexpr (decltype(width)::value > 1)
            if (parts.parts > 0)
              return few_backward<T>(dev, from, w, grad, parts, {tokens, d, (int)e}, to, dw);
          MOE_TRY((tiled_matmul<float, float, T>(dev, MOE_NN, tokens, d, e, grad, e, w, d, 1.0f, to,
                                                 d)));
          return tiled_matmul<float, T, float>(dev, MOE_TN, e, d, tokens, grad, e, from, d, 1.0f,
                                               dw, d);
        },
        from, w, to);
  });
}

static gradient_args gradient_of(moe_tensor dgates, moe_tensor probs, moe_tensor lse,
                                 moe_tensor experts, moe_tensor gates, moe_tensor load,
                                 float aux_scale, float z_scale, moe_tensor dlogits) {
  int64_t tokens = probs.shape[0];
  return {cuda_data<float>(dgates),
          cuda_data<float>(probs),
          cuda_data<float>(lse),
          cuda_data<float>(gates),
          cuda_data<float>(load),
          cuda_data<int32_t>(experts),
          cuda_data<float>(dlogits),
          tokens,
          tokens / load.shape[0],
          (int)probs.shape[1],
          (int)experts.shape[1],
          aux_scale,
          z_scale};
}

moe_status moe_cuda_router_backward(moe_device *dev, moe_tensor dgates, moe_tensor x,
                                    moe_tensor weight, moe_tensor probs, moe_tensor lse,
                                    moe_tensor experts, moe_tensor gates, moe_tensor load,
                                    float aux_scale, float z_scale, moe_tensor dlogits,
                                    moe_tensor dx, moe_tensor dweight) {
  if (x.shape[0] == 0 || x.shape[1] == 0) return MOE_OK;
  gradient_args a =
      gradient_of(dgates, probs, lse, experts, gates, load, aux_scale, z_scale, dlogits);
  if (!router_in_steps() && back_fits(cuda_of(dev), x, weight, dx))
    return back(dev,
                {a, cuda_data<__nv_bfloat16>(x), cuda_data<__nv_bfloat16>(dx),
                 cuda_data<float>(weight), nullptr, 0, (int)x.shape[1]},
                cuda_data<float>(dweight));
  router_gradient_kernel<<<(unsigned)div_up(a.tokens, 4), 128, 0, cuda_of(dev)->stream>>>(a);
  CUDA_LAUNCHED(dev);
  return pass_back(dev, dlogits, x, weight, dx, dweight);
}

moe_status moe_cuda_router_norm_backward(moe_device *dev, moe_tensor dgates, moe_tensor x,
                                         moe_tensor weight, moe_tensor probs, moe_tensor lse,
                                         moe_tensor experts, moe_tensor gates, moe_tensor load,
                                         float aux_scale, float z_scale, moe_tensor dlogits,
                                         moe_tensor dweight, moe_norm_gradient norm, bool *done) {
  static const bool apart = cuda_plain("joint");
  *done = !apart && !router_in_steps() && joint_fits(cuda_of(dev), norm, weight);
  if (!*done || x.shape[0] == 0) return MOE_OK;
  gradient_args a =
      gradient_of(dgates, probs, lse, experts, gates, load, aux_scale, z_scale, dlogits);
  return joint(dev,
               {{a, cuda_data<__nv_bfloat16>(norm.x), cuda_data<__nv_bfloat16>(norm.dx),
                 cuda_data<float>(weight), nullptr, 0, (int)x.shape[1]},
                cuda_data<__nv_bfloat16>(norm.dout),
                cuda_data<float>(norm.gain),
                cuda_data<float>(norm.rstd),
                nullptr},
               cuda_data<float>(dweight), cuda_data<float>(norm.dgain));
}
