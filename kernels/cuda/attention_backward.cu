/* Attention backward on tensor cores (bf16, f16): dQ by one kernel, dK and dV by another.
 *
 * Both make P again from lse, P = exp2(scale log2(e) S - log2(e) lse), and
 *
 *     dS = P (dP - delta),   dP = dO V^T,   delta = sum over d of dO O
 *
 * dQ      rows are queries, key blocks pass by:   dQ = scale dS K
 * dK, dV  rows are keys, the query blocks of all heads that read them pass by, so that the sums
 *         stay in registers:   S^T = K Q^T,  dP^T = V dO^T,  dV = P^T dO,  dK = scale dS^T Q
 *
 * Two shared buffers, one being read while the next arrives. Nothing is added atomically, so the
 * bits are the same every time. Source: Dao 2023, arXiv:2307.08691. */
#include "kernels/cuda/attention_mma.cuh"

namespace {

constexpr int warps = 4, threads = 32 * warps, rows = 16 * warps;

/* ---- dQ ------------------------------------------------------------------------------------ */

template <int D> struct query_shape {
  static constexpr int keys = D <= 64 ? 32 : 16;
  static constexpr int tile = keys * tile_row<D>; /* elements */
  static constexpr int shared = 2 * 2 * tile * 2; /* K and V, twice, 2 bytes */
};

/* s becomes dS, of two rows' terms; dp is dP. */
template <int N>
__device__ __forceinline__ void differentiate_rows(float (&s)[N][4], const float (&dp)[N][4],
                                                   const float (&lse2)[2], const float (&delta)[2],
                                                   float scale2) {
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      s[j][e] = exp2_fast(fmaf(s[j][e], scale2, -lse2[e / 2])) * (dp[j][e] - delta[e / 2]);
}

template <typename T, int D>
__device__ __forceinline__ void query_block(const attention_args &p, T *memory) {
  using shape = query_shape<D>;
  constexpr int N = shape::keys;
  int64_t batch = blockIdx.x / p.heads;
  int head = (int)(blockIdx.x % p.heads), kv_head = head / p.rep;
  int m0 = (int)(gridDim.y - 1 - blockIdx.y) * rows; /* the longest first */
  int row0 = m0 + 16 * warp_of(), row_last = min(row0 + 15, p.seq - 1);
  const T *qkv = static_cast<const T *>(p.qkv);
  auto keys = qkv_rows(p, qkv, batch, p.heads + kv_head);
  auto values = qkv_rows(p, qkv, batch, p.heads + p.kv_heads + kv_head);
  auto start = [&](int n0, int buffer) {
    T *tile = memory + 2 * buffer * shape::tile;
    start_tile<N, D, threads>(tile, keys, n0, p.seq, p.d);
    start_tile<N, D, threads>(tile + shape::tile, values, n0, p.seq, p.d);
  };

  int begin = first_key(p, batch, m0) / N * N, end = min(m0 + rows, p.seq);
  start(begin, 0);
  left_rows<T, D, true> q, grad;
  load_rows<D>(q.a, qkv_rows(p, qkv, batch, head), row0, p.seq, p.d);
  load_rows<D>(grad.a, out_rows(p, static_cast<const T *>(p.dout), batch, head), row0, p.seq, p.d);
  float lse2[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int64_t row = (int64_t)blockIdx.x * p.seq + min(row0 + lane_of() / 4 + 8 * half, p.seq - 1);
    lse2[half] = p.lse[row] * log2_e;
    delta[half] = p.delta[row];
  }
  int all_first = first_key(p, batch, row_last); /* all the warp's rows see [all_first, row0] */

  float dq[D / 8][4] = {};
  for (int n0 = begin, buffer = 0; n0 < end; n0 += N, buffer ^= 1) {
    copy_wait();
    __syncthreads(); /* this buffer has arrived, and all are done with the other */
    if (n0 + N < end) start(n0 + N, buffer ^ 1);
    if (n0 > row_last) continue; /* beyond this warp's rows, not the block's */
    const T *tile = memory + 2 * buffer * shape::tile;
    float s[N / 8][4], dp[N / 8][4];
    product_nt<N>(s, q, tile);
    product_nt<N>(dp, grad, tile + shape::tile);
    differentiate_rows(s, dp, lse2, delta, p.scale * log2_e);
    if (n0 < all_first || n0 + N - 1 > row0)
      each_hidden<N / 8>(p, batch, row0, n0, [&](int j, int e) { s[j][e] = 0.0f; });
    uint32_t ds[N / 16][4];
    round_rows<T>(ds, s);
    product_nn<D, N>(dq, ds, tile);
  }

  auto out = qkv_rows(p, static_cast<T *>(p.dqkv), batch, head);
  each_pair(dq, row0, p.seq, p.d, [&](int i, int c, float x, float y) {
    store_pair(out.data + i * out.stride + c, x * p.scale, y * p.scale);
  });
}

/* ---- dK, dV -------------------------------------------------------------------------------- */

template <int D> struct key_shape {
  static constexpr bool kept = D <= 64; /* K and V in registers; else in shared memory */
  static constexpr int queries = D <= 64 ? 32 : 16;
  static constexpr int tile = queries * tile_row<D>;            /* elements */
  static constexpr int buffer = 2 * tile * 2 + 2 * queries * 4; /* bytes */
  static constexpr int shared = 2 * buffer + (kept ? 0 : 2 * rows * tile_row<D> * 2);
};

/* s becomes P and dp dS, of key rows key0 + g, key0 + g + 8 and query columns from m0 on. */
template <int N>
__device__ __forceinline__ void
differentiate_columns(const attention_args &p, int64_t batch, float (&s)[N][4], float (&dp)[N][4],
                      const float *lse, const float *delta, int key0, int m0, bool masked) {
  float scale2 = p.scale * log2_e;
#pragma unroll
  for (int j = 0; j < N; j++) {
    int column = j * 8 + lane_of() % 4 * 2;
    float2 lse_of = *reinterpret_cast<const float2 *>(lse + column);
    float2 delta_of = *reinterpret_cast<const float2 *>(delta + column);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      s[j][e] = exp2_fast(fmaf(s[j][e], scale2, -log2_e * (e % 2 ? lse_of.y : lse_of.x)));
      dp[j][e] = s[j][e] * (dp[j][e] - (e % 2 ? delta_of.y : delta_of.x));
    }
    if (!masked) continue;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int query = m0 + column + e % 2, key = key0 + lane_of() / 4 + e / 2 * 8;
      if (query >= p.seq || key > query || key < first_key(p, batch, query))
        s[j][e] = dp[j][e] = 0.0f;
    }
  }
}

/* dK or dV of a warp's 16 keys goes to dqkv, or to its part's sums. */
template <typename T, int N>
__device__ __forceinline__ void store_keys(const attention_args &p, int64_t batch, int kv_head,
                                           int part, int which, const float (&o)[N][4], int row0,
                                           float scale) {
  auto sink = key_sink<T>(p, batch, kv_head, part, which);
  each_pair(o, row0, p.seq, p.d,
            [&](int i, int c, float x, float y) { sink.put_pair(i, c, x * scale, y * scale); });
}

/* K and V of the block's keys, where the kernel keeps them: registers, or tiles at `memory`, which
 * the first wait will find arrived. */
template <typename T, int D, bool KEPT>
__device__ __forceinline__ void start_left(left_rows<T, D, KEPT> &left, T *memory,
                                           attention_rows<const T> from, int n0, int seq, int d) {
  if constexpr (KEPT) {
    (void)memory;
    load_rows<D>(left.a, from, n0 + 16 * warp_of(), seq, d);
  } else {
    start_tile<rows, D, threads>(memory, from, n0, seq, d);
    left.rows = memory + 16 * warp_of() * tile_row<D>;
  }
}

/* What the queries of one buffer add to dk and dv of a warp's 16 keys. */
template <int D, typename T, bool KEPT>
__device__ __forceinline__ void
add_queries(const attention_args &p, int64_t batch, const left_rows<T, D, KEPT> &k,
            const left_rows<T, D, KEPT> &v, const char *buffer, int row0, int m0, bool masked,
            float (&dk)[D / 8][4], float (&dv)[D / 8][4]) {
  using shape = key_shape<D>;
  constexpr int N = shape::queries;
  const T *queries = reinterpret_cast<const T *>(buffer), *grads = queries + shape::tile;
  const float *terms = reinterpret_cast<const float *>(buffer + 2 * shape::tile * 2);
  float s[N / 8][4], dp[N / 8][4];
  product_nt<N>(s, k, queries);
  product_nt<N>(dp, v, grads);
  differentiate_columns(p, batch, s, dp, terms, terms + N, row0, m0, masked);
  uint32_t probs[N / 16][4];
  round_rows<T>(probs, s);
  product_nn<D, N>(dv, probs, grads);
  round_rows<T>(probs, dp);
  product_nn<D, N>(dk, probs, queries);
}

template <typename T, int D>
__device__ __forceinline__ void key_block(const attention_args &p, char *memory) {
  using shape = key_shape<D>;
  constexpr int N = shape::queries;
  int part = (int)(blockIdx.x % p.parts), kv_head = (int)(blockIdx.x / p.parts % p.kv_heads);
  int64_t batch = blockIdx.x / p.parts / p.kv_heads;
  int heads = p.rep / p.parts, head0 = kv_head * p.rep + part * heads;
  int n0 = (int)blockIdx.y * rows, row0 = n0 + 16 * warp_of(); /* the longest first */
  const T *qkv = static_cast<const T *>(p.qkv), *dout = static_cast<const T *>(p.dout);

  left_rows<T, D, shape::kept> k, v;
  T *left = reinterpret_cast<T *>(memory + 2 * shape::buffer);
  start_left(k, left, qkv_rows(p, qkv, batch, p.heads + kv_head), n0, p.seq, p.d);
  start_left(v, left + rows * tile_row<D>, qkv_rows(p, qkv, batch, p.heads + p.kv_heads + kv_head),
             n0, p.seq, p.d);

  /* Queries [n0, end) see some of these keys; [n0 + rows - 1, all_end) see them all. */
  int end = end_of_queries<threads>(p, batch, min(n0 + rows, p.seq) - 1, n0 + rows - 1);
  int all_end = end_of_queries<threads>(p, batch, n0, n0);
  auto start = [&](int head, int m0, int buffer) {
    char *at = memory + buffer * shape::buffer;
    T *tile = reinterpret_cast<T *>(at);
    float *terms = reinterpret_cast<float *>(at + 2 * shape::tile * 2);
    start_tile<N, D, threads>(tile, qkv_rows(p, qkv, batch, head), m0, p.seq, p.d);
    start_tile<N, D, threads>(tile + shape::tile, out_rows(p, dout, batch, head), m0, p.seq, p.d);
    int i = (int)threadIdx.x;
    if (i >= N) return;
    bool inside = m0 + i < p.seq;
    int64_t row = (batch * p.heads + head) * p.seq + (inside ? m0 + i : m0);
    copy_start<4>(terms + i, p.lse + row, inside);
    copy_start<4>(terms + N + i, p.delta + row, inside);
  };

  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  int head = head0, m0 = n0;
  start(head, m0, 0);
  for (int buffer = 0; head < head0 + heads; buffer ^= 1) {
    int next_head = head, next_m0 = m0 + N;
    if (next_m0 >= end) next_head++, next_m0 = n0;
    copy_wait();
    __syncthreads(); /* this buffer has arrived, and all are done with the other */
    if (next_head < head0 + heads) start(next_head, next_m0, buffer ^ 1);
    bool masked = m0 < row0 + 15 || m0 + N > all_end;
    if (m0 + N > row0) /* else these queries come before all this warp's keys */
      add_queries<D>(p, batch, k, v, memory + buffer * shape::buffer, row0, m0, masked, dk, dv);
    head = next_head, m0 = next_m0;
  }
  store_keys<T>(p, batch, kv_head, part, 0, dk, row0, p.scale);
  store_keys<T>(p, batch, kv_head, part, 1, dv, row0, 1.0f);
}

/* ---- launches ------------------------------------------------------------------------------ */

template <typename T, int D>
__global__ void __launch_bounds__(threads, D <= 64 ? 3 : 2) mma_query_kernel(attention_args p) {
  extern __shared__ uint4 memory[];
  if constexpr (mma_built<T>()) query_block<T, D>(p, reinterpret_cast<T *>(memory));
}
template <typename T, int D>
__global__ void __launch_bounds__(threads, D <= 64 ? 3 : 2) mma_key_kernel(attention_args p) {
  extern __shared__ uint4 memory[];
  if constexpr (mma_built<T>()) key_block<T, D>(p, reinterpret_cast<char *>(memory));
}

} /* namespace */

moe_status cuda_attention_mma_backward(moe_device *dev, moe_dtype dtype, const attention_args &p) {
  return attention_half(dtype, p.d, [&](auto x, auto size) {
    using T = decltype(x);
    constexpr int D = decltype(size)::value;
    int64_t blocks = div_up(p.seq, rows);
    MOE_TRY(attention_launch(dev, mma_query_kernel<T, D>, p.batch * p.heads, blocks, threads,
                             query_shape<D>::shared, p));
    return attention_launch(dev, mma_key_kernel<T, D>, p.batch * p.kv_heads * p.parts, blocks,
                            threads, key_shape<D>::shared, p);
  });
}
