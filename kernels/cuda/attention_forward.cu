/* Attention forward on tensor cores (bf16, f16).
 *
 * A block takes 16 queries of one head per warp; their rows stay in registers. Key and value blocks
 * pass through two shared buffers, one being read while the next arrives:
 *
 *     S = Q K^T;  P = exp2(scale log2(e) S - peak);  O = shrink O + P V;  sum = shrink sum + P 1
 *
 * where a raised peak shrinks what was summed before it (online softmax). Only blocks at the ends
 * of the visible range are masked. Sources: Dao 2023, arXiv:2307.08691. */
#include "kernels/cuda/attention_mma.cuh"

namespace {

template <int D> struct forward_shape {
  static constexpr int warps = D <= 64 ? 8 : 4, threads = 32 * warps, rows = 16 * warps;
  static constexpr int keys = D <= 64 ? 64 : 32;
  static constexpr int tile = keys * tile_row<D>; /* elements */
  static constexpr int shared = 2 * 2 * tile * 2; /* K and V, twice, 2 bytes */
};

template <typename T, int D>
__device__ __forceinline__ void forward_block(const attention_args &p, T *memory) {
  using shape = forward_shape<D>;
  constexpr int N = shape::keys;
  int64_t batch = blockIdx.x / p.heads;
  int head = (int)(blockIdx.x % p.heads), kv_head = head / p.rep;
  int m0 = (int)(gridDim.y - 1 - blockIdx.y) * shape::rows; /* the longest first */
  int row0 = m0 + 16 * warp_of(), row_last = min(row0 + 15, p.seq - 1);
  const T *qkv = static_cast<const T *>(p.qkv);
  auto keys = qkv_rows(p, qkv, batch, p.heads + kv_head);
  auto values = qkv_rows(p, qkv, batch, p.heads + p.kv_heads + kv_head);
  auto start = [&](int n0, int buffer) {
    T *tile = memory + 2 * buffer * shape::tile;
    start_tile<N, D, shape::threads>(tile, keys, n0, p.seq, p.d);
    start_tile<N, D, shape::threads>(tile + shape::tile, values, n0, p.seq, p.d);
  };

  int begin = first_key(p, batch, m0) / N * N, end = min(m0 + shape::rows, p.seq);
  start(begin, 0);
  left_rows<T, D, true> q;
  load_rows<D>(q.a, qkv_rows(p, qkv, batch, head), row0, p.seq, p.d);
  two_rows r;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    r.peak[half] = -INFINITY;
    r.sum[half] = 0.0f;
  }
  /* Every row of the warp sees all of [all_first, row0]. */
  int all_first = first_key(p, batch, row_last);
  float o[D / 8][4] = {};
  for (int n0 = begin, buffer = 0; n0 < end; n0 += N, buffer ^= 1) {
    copy_wait();
    __syncthreads(); /* this buffer has arrived, and all are done with the other */
    if (n0 + N < end) start(n0 + N, buffer ^ 1);
    if (n0 > row_last) continue; /* beyond this warp's rows, not the block's */
    const T *tile = memory + 2 * buffer * shape::tile;
    float s[N / 8][4];
    product_nt<N>(s, q, tile);
    if (n0 < all_first || n0 + N - 1 > row0)
      each_hidden<N / 8>(p, batch, row0, n0, [&](int j, int e) { s[j][e] = -INFINITY; });
    soften(s, r, o, p.scale * log2_e);
    uint32_t probs[N / 16][4];
    round_rows<T>(probs, s);
    product_nn<D, N>(o, probs, tile + shape::tile);
  }

  float *lse = p.lse + (int64_t)blockIdx.x * p.seq;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = quad_sum(r.sum[half]), inverse = 1.0f / sum;
    int row = row0 + lane_of() / 4 + 8 * half;
    if (lane_of() % 4 == 0 && row < p.seq) lse[row] = r.peak[half] * p.scale + logf(sum);
#pragma unroll
    for (int c = 0; c < D / 8; c++) {
      o[c][2 * half] *= inverse;
      o[c][2 * half + 1] *= inverse;
    }
  }
  auto out = out_rows(p, static_cast<T *>(p.out), batch, head);
  each_pair(o, row0, p.seq, p.d, [&](int i, int c, float x, float y) {
    store_pair(out.data + i * out.stride + c, x, y);
  });
}

template <typename T, int D>
__global__ void __launch_bounds__(forward_shape<D>::threads, D <= 64 ? 2 : 3)
    mma_forward_kernel(attention_args p) {
  extern __shared__ uint4 memory[];
  if constexpr (mma_built<T>()) forward_block<T, D>(p, reinterpret_cast<T *>(memory));
}

} /* namespace */

moe_status cuda_attention_mma(moe_device *dev, moe_dtype dtype, const attention_args &p) {
  return attention_half(dtype, p.d, [&](auto x, auto size) {
    using T = decltype(x);
    constexpr int D = decltype(size)::value;
    using shape = forward_shape<D>;
    return attention_launch(dev, mma_forward_kernel<T, D>, p.batch * p.heads,
                            div_up(p.seq, shape::rows), shape::threads, shape::shared, p);
  });
}
