/* Attention over a cache: who computes, how a sequence is split, the plain kernel and the sum of
 * splits. attention_cached.cuh has the idea. */
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_cached.cuh"

#include <cmath>

namespace {

/* ---- float32 arithmetic: any type, any head size up to 256 --------------------------------- */

constexpr int plain_warps = 4, plain_most = 256;

/* A warp takes a row, 32 keys at a time: lanes are keys for the scores, elements for the sums. */
template <typename T, int C>
__global__ void __launch_bounds__(32 * plain_warps) cached_plain_kernel(cached_args p) {
  __shared__ float queries[plain_warps][plain_most];
  launch_wait();
  launch_release();
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, z = (int)blockIdx.y;
  int m0 = (int)blockIdx.x % p.blocks * plain_warps, row = m0 + warp;
  cached_group<T> g(p, (int)blockIdx.x / p.blocks);
  if (z == 0) cached_append<T, 1>(p, g, m0, plain_warps);
  int span = g.span(p), used = g.splits_used(p);
  if (z >= used || !g.computed(p, row)) return;
  float *q = queries[warp];
  const T *query = g.query(p, row);
  for (int c = lane; c < p.d; c += 32) q[c] = to_float(query[c]) * p.scale;
  __syncwarp();

  int begin = z * span, end = min(begin + span, g.position(p, row) + 1);
  float peak = -INFINITY, sum = 0.0f, out[C] = {};
  for (int k0 = begin; k0 < end; k0 += 32) {
    float score = -INFINITY;
    if (k0 + lane < end) {
      const T *key = g.key(k0 + lane);
      score = 0.0f;
      for (int c = 0; c < p.d; c++) score = fmaf(q[c], to_float(key[c]), score);
    }
    float top = warp_reduce(score, op_max{});
    top = op_max{}(top, peak);
    float weight = k0 + lane < end ? expf(score - top) : 0.0f, shrink = expf(peak - top);
    peak = top;
    sum = sum * shrink + warp_sum(weight);
#pragma unroll
    for (int i = 0; i < C; i++) out[i] *= shrink;
    for (int j = 0; j < min(32, end - k0); j++) {
      const T *value = g.value(k0 + j);
      float w = __shfl_sync(full_warp, weight, j);
#pragma unroll
      for (int i = 0; i < C; i++)
        if (lane + 32 * i < p.d) out[i] = fmaf(w, to_float(value[lane + 32 * i]), out[i]);
    }
  }

  int64_t at = g.first_row + row;
  if (used > 1 && lane == 0) *cached_peak(p, at, z) = peak, *cached_sum(p, at, z) = sum;
#pragma unroll
  for (int i = 0; i < C; i++) {
    int c = lane + 32 * i;
    if (c >= p.d) continue;
    if (used > 1)
      cached_part(p, at, z)[c] = out[i];
    else
      g.output(p, row)[c] = from_float<T>(out[i] / sum);
  }
}

moe_status start_plain(moe_device *dev, moe_dtype dtype, const cached_args &p) {
  dim3 grid((unsigned)(p.batch * p.kv_heads * p.blocks), (unsigned)p.splits);
  return cuda_act(dtype, [&](auto act) {
    using T = decltype(act);
    constexpr int threads = 32 * plain_warps;
    if (p.d <= 64) return cuda_start(dev, cached_plain_kernel<T, 2>, grid, threads, 0, p);
    if (p.d <= 128) return cuda_start(dev, cached_plain_kernel<T, 4>, grid, threads, 0, p);
    return cuda_start(dev, cached_plain_kernel<T, 8>, grid, threads, 0, p);
  });
}

/* ---- the sum of splits --------------------------------------------------------------------- */

constexpr int merge_threads = 256;

/* A block per row: weights of the splits first, then groups of threads add every so-many-th split,
 * N elements a thread, and the groups are added in order. */
template <typename T, int N>
__global__ void __launch_bounds__(merge_threads) cached_merge_kernel(cached_args p) {
  __shared__ float weights[cached_most_splits];
  __shared__ float sums[merge_threads][N];
  launch_wait();
  launch_release();
  cached_group<T> g(p, (int)(blockIdx.x / p.rows));
  int row = (int)(blockIdx.x % p.rows), used = g.splits_used(p);
  if (used <= 1 || !g.computed(p, row)) return;
  int64_t at = g.first_row + row;
  used = min(used, g.position(p, row) / g.span(p) + 1); /* later ones hold nothing for this row */

  float top = -INFINITY, total = 0.0f;
  for (int z = (int)threadIdx.x; z < used; z += merge_threads)
    top = op_max{}(top, *cached_peak(p, at, z));
  top = block_reduce(top, op_max{}, -INFINITY);
  for (int z = (int)threadIdx.x; z < used; z += merge_threads) {
    float weight = expf(*cached_peak(p, at, z) - top);
    weights[z] = weight;
    total += weight * *cached_sum(p, at, z);
  }
  total = block_sum(total); /* and the weights are there */

  int lanes = (int)div_up(p.d, N), groups = merge_threads / lanes;
  int group = (int)threadIdx.x / lanes, c = (int)threadIdx.x % lanes * N;
  float sum[N] = {};
  if (group < groups)
#pragma unroll 4
    for (int z = group; z < used; z += groups) {
      float v[N];
      load<float, N>(v, cached_part(p, at, z) + c);
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] = fmaf(weights[z], v[i], sum[i]);
    }
#pragma unroll
  for (int i = 0; i < N; i++) sums[threadIdx.x][i] = sum[i];
  __syncthreads();
  if (group > 0) return;
  for (int other = 1; other < groups; other++)
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] += sums[other * lanes + (int)threadIdx.x][i];
  T *to = g.output(p, row) + c;
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = from_float<T>(sum[i] / total);
}

moe_status merge_splits(moe_device *dev, moe_dtype dtype, const cached_args &p) {
  return cuda_act(dtype, [&](auto act) {
    using T = decltype(act);
    dim3 grid((unsigned)p.rows_all);
    if (p.d % 4 == 0) return cuda_start(dev, cached_merge_kernel<T, 4>, grid, merge_threads, 0, p);
    return cuda_start(dev, cached_merge_kernel<T, 1>, grid, merge_threads, 0, p);
  });
}

/* ---- plan ---------------------------------------------------------------------------------- */

/* How many splits fill the chip: two blocks on every multiprocessor, or four of the small ones that
 * one query's work takes where heads are large. More would wait for a second turn. */
int plan_splits(const moe_device *dev, int64_t blocks, int64_t room, bool small) {
  int64_t fill = cuda_of(dev)->sms * (small ? 4 : 2) / blocks, most = div_up(room, cached_least);
  if (fill > most) fill = most;
  if (fill > cached_most_splits) fill = cached_most_splits;
  return (int)(fill < 1 ? 1 : fill);
}

/* Whether the kernel on tensor cores may rotate by this table, which it reads in pairs. */
bool may_turn(const cached_args &p, moe_tensor table) {
  return p.n == 1 && cuda_attention_cached_mma_turns(p.rows, p.d) &&
         reinterpret_cast<uintptr_t>(table.data) % sizeof(float2) == 0;
}

/* Whether a few blocks, each with some of the keys, do best as a cluster. */
bool near_enough(const moe_device *dev, int64_t rows, int64_t room) {
  static const bool plain = cuda_plain("cluster");
  return cuda_of(dev)->arch >= 90 && !plain && rows <= 16 && room <= cached_near;
}

/* Sizes; the tensors are the caller's. */
cached_args plan(const moe_device *dev, moe_attention_shape s, int64_t room, bool by_mma) {
  cached_args p = {};
  p.batch = (int)s.batch, p.n = (int)s.seq, p.kv_heads = (int)s.kv_heads, p.d = (int)s.head_dim;
  p.rep = (int)(s.heads / s.kv_heads);
  p.rows = p.n * p.rep;
  p.rows_all = s.batch * s.kv_heads * p.rows;
  p.room = room;
  int rows = by_mma ? cuda_attention_cached_mma_rows(p.rows, p.d) : plain_warps;
  p.blocks = (int)div_up(p.rows, rows);
  p.splits = plan_splits(dev, s.batch * s.kv_heads * p.blocks, room, rows <= 16 && p.d > 64);
  p.together = by_mma && p.splits > 1 && near_enough(dev, rows, room);
  if (p.together) { /* a power of two; all blocks at once, two on a multiprocessor */
    int64_t fill = 2 * cuda_of(dev)->sms / (s.batch * s.kv_heads * p.blocks);
    int64_t most = div_up(room, cached_near_least) < fill ? div_up(room, cached_near_least) : fill;
    for (p.splits = cached_cluster; p.splits > 2 && p.splits > most; p.splits /= 2) {
    }
  }
  p.scale = (float)(1.0 / sqrt((double)s.head_dim));
  return p;
}

/* Whether the splits meet in memory. */
bool apart(const cached_args &p) {
  return p.splits > 1 && !p.together;
}

int64_t part_bytes(const cached_args &p) {
  return apart(p) ? 4 * p.splits * p.rows_all * (p.d + 2) : 0;
}

} /* namespace */

int64_t moe_cuda_attention_cached_scratch(moe_device *dev, moe_attention_shape shape, int64_t room,
                                          moe_dtype dtype) {
  if (shape.batch == 0 || shape.seq == 0 || room == 0) return 0;
  int64_t plain = part_bytes(plan(dev, shape, room, false)); /* rows may turn out misaligned */
  int64_t mma =
      attention_mma_fits(dev, shape.head_dim, dtype) ? part_bytes(plan(dev, shape, room, true)) : 0;
  return plain > mma ? plain : mma;
}

moe_status moe_cuda_attention_cached(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                                     moe_tensor positions, moe_tensor table, moe_tensor keys,
                                     moe_tensor values, moe_tensor lengths, moe_tensor out) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(qkv.data) | reinterpret_cast<uintptr_t>(keys.data) |
                   reinterpret_cast<uintptr_t>(values.data);
  bool by_mma = attention_mma_fits(dev, shape.head_dim, qkv.dtype) && bits % 16 == 0 &&
                !cuda_wished("MOE_ATTENTION", "exact");
  if (shape.head_dim > plain_most || shape.batch * shape.seq * shape.heads > INT32_MAX)
    return moe_fail(MOE_INVALID,
                    "cuda: attention over a cache for %lld tokens of %lld heads of size %lld is "
                    "beyond the kernels: head sizes go up to %d",
                    (long long)(shape.batch * shape.seq), (long long)shape.heads,
                    (long long)shape.head_dim, plain_most);
  cached_args p = plan(dev, shape, keys.shape[1], by_mma);
  p.qkv = qkv.data, p.keys = keys.data, p.values = values.data, p.out = out.data;
  p.lengths = cuda_data<int32_t>(lengths);
  if (moe_tensor_present(table) && by_mma && may_turn(p, table)) {
    p.table = cuda_data<float>(table), p.turns = (int)table.shape[0];
    p.positions = cuda_data<int32_t>(positions);
  } else if (moe_tensor_present(table)) {
    MOE_TRY(moe_cuda_rope(dev, qkv, positions, table, shape.heads, shape.kv_heads, 1));
  }
  p.partial = static_cast<float *>(moe_device_scratch(dev, part_bytes(p)));
  if (apart(p) && p.partial == nullptr)
    return moe_fail(MOE_NO_MEMORY,
                    "cuda: kernel scratch is too small: attention over a cache needs %lld bytes: "
                    "plan it with moe_attention_cached_scratch",
                    (long long)part_bytes(p));
  MOE_TRY(by_mma ? cuda_attention_cached_mma(dev, qkv.dtype, p) : start_plain(dev, qkv.dtype, p));
  return apart(p) ? merge_splits(dev, qkv.dtype, p) : MOE_OK;
}
