/* Drawing the next token: the procedure of kernels/cpu/decode.c, one block per row; a cluster where
 * the largest is all that is wanted.
 *
 * That file says what is drawn; here is how the same comes out in parallel. A thread owns a run of
 * consecutive indices, so "index order" is thread order. Weights are whole numbers: w in [0, 1]
 * times 2^shift, the largest power that V of them cannot overflow (2^47 for 32000), so sums are
 * exact in any order, shared-memory atomics included. Against sums in f64 a boundary moves by less
 * than 1e-10 of the mass. */
#include <climits>
#include <cmath>

#include "core/base/philox.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/launch.cuh"

constexpr int sample_threads = 1024;

typedef unsigned long long whole; /* what 64-bit atomics take */

struct sample_args {
  const float *logits;
  int32_t *token;
  int64_t count; /* V */
  double temperature, top_p;
  int64_t top_k;
  int shift;
  uint64_t seed;
  const uint32_t *streams, *positions; /* [rows] which draw is whose */
};

/* One row of logits and what is left of it, as this thread sees it. */
struct choice {
  const float *logit;
  int64_t begin, end; /* my indices */
  float largest;
  double temperature;
  int shift;
  uint32_t cut;              /* keys above it stay; */
  int64_t ties, ties_before; /* of those equal, the first `ties`; how many come before mine */

  __device__ float value(int64_t i) const {
    float v = logit[i];
    return v != v ? -INFINITY : v + 0.0f;
  }
  /* Unsigned order = order of floats. */
  static __device__ uint32_t order(float v) {
    uint32_t bits = __float_as_uint(v);
    return bits >> 31 ? ~bits : bits | 1u << 31;
  }
  __device__ uint32_t key(int64_t i) const {
    return order(value(i));
  }
  __device__ whole weight(int64_t i) const {
    float v = value(i);
    double w = v == largest ? 1.0 : exp(((double)v - (double)largest) / temperature);
    return (whole)__double2ll_rn(ldexp(w, shift));
  }
  /* Call f(i, key) for each of my indices that stays. */
  template <typename F> __device__ void each(F f) const {
    int64_t seen = ties_before;
    for (int64_t i = begin; i < end; i++) {
      uint32_t k = key(i);
      if (k > cut || (k == cut && seen++ < ties)) f(i, k);
    }
  }
};

static __device__ whole total_weight(const choice &c) {
  whole sum = 0;
  c.each([&](int64_t i, uint32_t) { sum += c.weight(i); });
  return block_sum(sum);
}

struct op_larger {
  __device__ __forceinline__ whole operator()(whole a, whole b) const {
    return a > b ? a : b;
  }
};

/* The largest logit's index, ties to the lower, of those that threads `first`, first + step, ...
 * look at: key above, inverted index below, so that the maximum is what we want. */
static __device__ whole largest_of(const choice &c, int64_t count, int64_t first, int64_t step) {
  constexpr int batch = 8; /* on their way at once */
  whole best = 0;
  for (int64_t i = first; i < count; i += batch * step) {
    float v[batch];
#pragma unroll
    for (int u = 0; u < batch; u++) v[u] = i + u * step < count ? c.value(i + u * step) : -INFINITY;
#pragma unroll
    for (int u = 0; u < batch; u++) {
      uint32_t at = (uint32_t)(i + u * step);
      if (at < count) best = op_larger{}(best, (whole)choice::order(v[u]) << 32 | (uint32_t)~at);
    }
  }
  return block_reduce(best, op_larger{}, (whole)0);
}

static __device__ int64_t index_of(whole best) {
  return (int64_t)(uint32_t) ~(uint32_t)best;
}

/* What a cut's passes share. */
struct cut_state {
  whole bin[256];
  unsigned size[256];
  double above;
  uint32_t prefix;
};

/* The bin in which the sum from the top reaches `need`. One thread. */
static __device__ void pick_bin(cut_state *s, double need, double unit) {
  int at = 255, lowest = 0;
  while (s->size[lowest] == 0) lowest++;
  while (at > lowest && (s->size[at] == 0 || s->above + (double)s->bin[at] * unit < need))
    s->above += (double)s->bin[at--] * unit;
  s->prefix = s->prefix << 8 | (uint32_t)at;
}

/* Keep the shortest beginning of the order that reaches `need`: in numbers of tokens, or in
 * weight. */
static __device__ void cut_at(choice *c, double need, bool by_weight) {
  __shared__ cut_state s;
  double unit = by_weight ? ldexp(1.0, -c->shift) : 1.0;
  __syncthreads();
  if (threadIdx.x == 0) s.above = 0.0, s.prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int b = (int)threadIdx.x; b < 256; b += (int)blockDim.x) s.bin[b] = 0, s.size[b] = 0;
    __syncthreads();
    c->each([&](int64_t i, uint32_t k) {
      if (shift < 24 && k >> (shift + 8) != s.prefix) return;
      atomicAdd(&s.bin[k >> shift & 255], by_weight ? c->weight(i) : (whole)1);
      atomicAdd(&s.size[k >> shift & 255], 1u);
    });
    __syncthreads();
    if (threadIdx.x == 0) pick_bin(&s, need, unit);
  }
  __syncthreads();
  int64_t members = s.size[s.prefix & 255], ties = 1;
  double each = (double)s.bin[s.prefix & 255] * unit / (double)members;
  while (ties < members && s.above + (double)ties * each < need) ties++;
  c->cut = s.prefix;
  c->ties = ties;
  int64_t equal = 0, all;
  for (int64_t i = c->begin; i < c->end; i++) equal += c->key(i) == c->cut;
  c->ties_before = block_scan(equal, &all);
}

/* The first that stays whose running sum exceeds u times the sum; else the last with weight. */
static __device__ int64_t draw(const choice &c, double u) {
  __shared__ unsigned first, last;
  whole sum = 0, total, target;
  unsigned hit = UINT_MAX, latest = 0;
  if (threadIdx.x == 0) first = UINT_MAX, last = 0;
  c.each([&](int64_t i, uint32_t) { sum += c.weight(i); });
  whole before = block_scan(sum, &total);
  target = (whole)(u * (double)total); /* whole numbers exceed it when they exceed its floor */
  c.each([&](int64_t i, uint32_t) {
    whole w = c.weight(i);
    if (w == 0) return;
    before += w;
    latest = (unsigned)i;
    if (before > target && hit == UINT_MAX) hit = (unsigned)i;
  });
  if (hit != UINT_MAX) atomicMin(&first, hit);
  if (latest != 0) atomicMax(&last, latest);
  __syncthreads();
  return first != UINT_MAX ? first : last;
}

__global__ void __launch_bounds__(sample_threads)
    sample_kernel(const __grid_constant__ sample_args p) {
  int64_t each = div_up(p.count, sample_threads), begin = threadIdx.x * each;
  int64_t end = begin + each < p.count ? begin + each : p.count;
  choice c = {p.logits + blockIdx.x * p.count,
              begin,
              end > begin ? end : begin,
              0.0f,
              p.temperature,
              p.shift,
              0,
              p.count,
              0};
  launch_wait();
  launch_release();
  int64_t token = index_of(largest_of(c, p.count, threadIdx.x, sample_threads));
  c.largest = c.value(token);
  if (p.top_k > 0 && p.top_k < p.count) cut_at(&c, (double)p.top_k, false);
  if (p.top_p < 1.0) cut_at(&c, p.top_p * ldexp((double)total_weight(c), -p.shift), true);
  token = draw(c, moe_philox_uniform_f64(p.seed, p.streams[blockIdx.x], p.positions[blockIdx.x]));
  if (threadIdx.x == 0) p.token[blockIdx.x] = (int32_t)token;
}

constexpr int greedy_threads = 512, greedy_blocks = 8;

/* The largest alone. On Hopper a cluster shares a row: each block sends its largest to the first.
 */
__global__ void __launch_bounds__(greedy_threads)
    greedy_kernel(const __grid_constant__ sample_args p) {
  __shared__ whole sent[greedy_blocks];
  __shared__ uint64_t barrier;
  int blocks = (int)gridDim.y, block = (int)blockIdx.y;
  if (blocks > 1) cluster_open(&barrier);
  launch_wait();
  launch_release();
  choice c = {};
  c.logit = p.logits + blockIdx.x * p.count;
  whole best = largest_of(c, p.count, (int64_t)block * greedy_threads + threadIdx.x,
                          (int64_t)blocks * greedy_threads);
  if (blocks > 1) {
    cluster_wait();
    if (threadIdx.x == 0)
      cluster_send(cluster_address(sent + block, 0), cluster_address(&barrier, 0), best);
    if (block > 0 || threadIdx.x > 0) return;
    cluster_await(&barrier, blocks * (int)sizeof best);
    for (int i = 0; i < blocks; i++) best = op_larger{}(best, sent[i]);
  }
  if (threadIdx.x == 0) p.token[blockIdx.x] = (int32_t)index_of(best);
}

moe_status moe_cuda_sample(moe_device *dev, moe_tensor logits, moe_sample_args args,
                           moe_tensor streams, moe_tensor positions, moe_tensor token) {
  int64_t rows = logits.shape[0], count = logits.shape[1];
  if (rows == 0) return MOE_OK;
  if (count > INT_MAX)
    return moe_fail(MOE_INVALID, "cuda: sample: a vocabulary of %lld is too large",
                    (long long)count);
  sample_args p = {};
  p.count = count;
  p.temperature = (double)args.temperature;
  p.top_p = (double)args.top_p;
  p.top_k = args.top_k;
  for (p.shift = 62; count >> (62 - p.shift) > 0; p.shift--) {
  }
  p.logits = cuda_data<float>(logits);
  p.token = cuda_data<int32_t>(token);
  p.seed = args.seed;
  p.streams = cuda_data<uint32_t>(streams);
  p.positions = cuda_data<uint32_t>(positions);
  bool few = rows <= launch_few;
  if (p.temperature > 0.0)
    return cuda_launch(dev, few, sample_kernel, dim3((unsigned)rows), sample_threads, 0, p);
  int blocks = few && cuda_of(dev)->arch >= 90 ? greedy_blocks : 1;
  return cuda_launch_clusters(dev, few, blocks, greedy_kernel,
                              dim3((unsigned)rows, (unsigned)blocks), greedy_threads, 0, p);
}

__global__ void advance_kernel(int32_t *counts, const int32_t *by, int64_t n) {
  stride(n, [=](int64_t i) { counts[i] += by[i]; });
}

moe_status moe_cuda_advance(moe_device *dev, moe_tensor counts, moe_tensor by) {
  int64_t n = counts.shape[0];
  if (n == 0) return MOE_OK;
  advance_kernel<<<cuda_blocks(dev, n, 256), 256, 0, cuda_of(dev)->stream>>>(
      cuda_data<int32_t>(counts), cuda_data<int32_t>(by), n);
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}
