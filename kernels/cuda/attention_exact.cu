/* Attention in float32 arithmetic, for any element type and head size: forward, dQ, dK and dV.
 *
 * A block of 16 x 16 threads keeps R rows (queries; keys in the dK/dV kernel) in shared memory and
 * streams C rows of the other side past them. Everything is then two products of shared tiles:
 *
 *     nt:  S [R, C] = A [R, D] B [C, D]^T        scores, dP
 *     nn:  O [R, D] += P [R, C] B [C, D]         outputs, gradients
 *
 * of which thread (ty, tx) owns rows ty + 16 i and columns tx + 16 j, in registers. So a row's 16
 * owners are half a warp, which reduces it by shuffles and passes P through shared memory without
 * waiting for others. Head sizes are padded to a power of two with zeros.
 *
 * forward   online softmax over key blocks                                    arXiv:1805.02867
 * dQ        P again from lse; dS = P (dP - delta); dQ = scale dS K            arXiv:2205.14135
 * dK, dV    the same with keys as rows, over all query heads that read them, so nothing is added
 *           atomically: dV = P^T dO, dK = scale dS^T Q                         arXiv:1911.02150 */
#include "kernels/cuda/attention.cuh"

namespace {

constexpr int side = 16, threads = side * side;

/* Rows that stay and rows that stream by, chosen so that 64 KiB of shared memory hold them (up to
 * D = 128). */
template <int D> struct forward_tile {
  static constexpr int rows = D <= 128 ? 64 : 32, cols = D <= 64 ? 64 : D <= 128 ? 32 : 16;
  static constexpr int shared = 4 * ((rows + cols) * (D + 4) + rows * (cols + 4));
};
template <int D> struct backward_tile {
  static constexpr int rows = D <= 128 ? 32 : 16, cols = D <= 64 ? 32 : 16;
  static constexpr int shared =
      4 * (2 * (rows + cols) * (D + 4) + 2 * rows * (cols + 4) + 2 * cols);
};

__device__ __forceinline__ int lane_x() {
  return (int)threadIdx.x % side;
}
__device__ __forceinline__ int lane_y() {
  return (int)threadIdx.x / side;
}

/* ---- tiles --------------------------------------------------------------------------------- */

/* tile [ROWS, D + 4] = rows [first, first + ROWS) as floats; zero past the sequence and past d. */
template <int ROWS, int D, typename T>
__device__ __forceinline__ void load_tile(float *tile, attention_rows<const T> from, int first,
                                          int seq, int d) {
  for (int at = (int)threadIdx.x; at < ROWS * D; at += threads) {
    int r = at / D, c = at % D;
    bool inside = first + r < seq && c < d;
    tile[r * (D + 4) + c] = inside ? to_float(from.data[(first + r) * from.stride + c]) : 0.0f;
  }
}

/* s [R/16, C/16] = this thread's part of a b^T; rows of both tiles are D + 4 apart. */
template <int D, int R, int C>
__device__ __forceinline__ void product_nt(float (&s)[R][C], const float *a, const float *b) {
  constexpr int ld = D + 4;
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int j = 0; j < C; j++) s[i][j] = 0.0f;
#pragma unroll 2
  for (int k = 0; k < D; k += 4) {
    float4 x[R], y[C];
#pragma unroll
    for (int i = 0; i < R; i++)
      x[i] = *reinterpret_cast<const float4 *>(a + (lane_y() + side * i) * ld + k);
#pragma unroll
    for (int j = 0; j < C; j++)
      y[j] = *reinterpret_cast<const float4 *>(b + (lane_x() + side * j) * ld + k);
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
      for (int j = 0; j < C; j++) {
        float sum = s[i][j];
        sum = fmaf(x[i].x, y[j].x, sum);
        sum = fmaf(x[i].y, y[j].y, sum);
        sum = fmaf(x[i].z, y[j].z, sum);
        s[i][j] = fmaf(x[i].w, y[j].w, sum);
      }
  }
}

/* o [R/16, D/16] += this thread's part of a b; rows of a [R, K] are K + 4 apart, of b [K, D] D + 4.
 */
template <int K, int D, int R, int C>
__device__ __forceinline__ void product_nn(float (&o)[R][C], const float *a, const float *b) {
#pragma unroll 2
  for (int k = 0; k < K; k += 4) {
    float4 x[R];
#pragma unroll
    for (int i = 0; i < R; i++)
      x[i] = *reinterpret_cast<const float4 *>(a + (lane_y() + side * i) * (K + 4) + k);
#pragma unroll
    for (int j = 0; j < C; j++) {
      const float *column = b + k * (D + 4) + lane_x() + side * j;
      float y0 = column[0], y1 = column[D + 4], y2 = column[2 * (D + 4)], y3 = column[3 * (D + 4)];
#pragma unroll
      for (int i = 0; i < R; i++) {
        float sum = o[i][j];
        sum = fmaf(x[i].x, y0, sum);
        sum = fmaf(x[i].y, y1, sum);
        sum = fmaf(x[i].z, y2, sum);
        o[i][j] = fmaf(x[i].w, y3, sum);
      }
    }
  }
}

template <int C, int R, int N>
__device__ __forceinline__ void put_tile(float *tile, const float (&s)[R][N]) {
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int j = 0; j < N; j++)
      tile[(lane_y() + side * i) * (C + 4) + lane_x() + side * j] = s[i][j];
}

/* Over the half warp that owns a row. */
template <typename Op> __device__ __forceinline__ float row_reduce(float x, Op op) {
#pragma unroll
  for (int step = side / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(full_warp, x, step));
  return x;
}

/* ---- forward ------------------------------------------------------------------------------- */

/* A row's softmax so far. */
template <int R> struct running { float most[R], sum[R]; };

/* Scores of keys [n0, n0 + 16 C) become exp(score - most) and go to `tile`; o follows a raised
 * maximum. first[i], last[i]: what row i sees. */
template <int R, int C, int RD>
__device__ __forceinline__ void soften(float (&s)[R][C], running<R> &r, float (&o)[R][RD],
                                       const int (&first)[R], const int (&last)[R], int n0,
                                       float scale) {
#pragma unroll
  for (int i = 0; i < R; i++) {
    float top = r.most[i];
#pragma unroll
    for (int j = 0; j < C; j++) {
      int key = n0 + lane_x() + side * j;
      s[i][j] = key >= first[i] && key <= last[i] ? s[i][j] * scale : -INFINITY;
      top = fmaxf(top, s[i][j]);
    }
    top = row_reduce(top, [](float a, float b) { return fmaxf(a, b); });
    float base = top == -INFINITY ? 0.0f : top; /* nothing seen yet */
    float shrink = expf(r.most[i] - base), added = 0.0f;
#pragma unroll
    for (int j = 0; j < C; j++) {
      s[i][j] = expf(s[i][j] - base);
      added += s[i][j];
    }
    r.sum[i] = r.sum[i] * shrink + row_reduce(added, op_sum{});
    r.most[i] = top;
#pragma unroll
    for (int c = 0; c < RD; c++) o[i][c] *= shrink;
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(threads) exact_forward_kernel(attention_args p) {
  using tile = forward_tile<D>;
  constexpr int R = tile::rows / side, C = tile::cols / side, RD = D / side;
  extern __shared__ float4 memory[];
  float *q = reinterpret_cast<float *>(memory), *kv = q + tile::rows * (D + 4);
  float *probs = kv + tile::cols * (D + 4);

  int64_t batch = blockIdx.x / p.heads;
  int head = (int)(blockIdx.x % p.heads), kv_head = head / p.rep;
  int m0 = (int)(gridDim.y - 1 - blockIdx.y) * tile::rows;
  const T *qkv = static_cast<const T *>(p.qkv);
  auto keys = qkv_rows(p, qkv, batch, p.heads + kv_head);
  auto values = qkv_rows(p, qkv, batch, p.heads + p.kv_heads + kv_head);
  load_tile<tile::rows, D>(q, qkv_rows(p, qkv, batch, head), m0, p.seq, p.d);

  running<R> r;
  float o[R][RD] = {};
  int first[R], last[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    r.most[i] = -INFINITY;
    r.sum[i] = 0.0f;
    last[i] = min(m0 + lane_y() + side * i, p.seq - 1); /* rows past the end repeat the last one */
    first[i] = first_key(p, batch, last[i]);
  }
  int end = min(m0 + tile::rows, p.seq);
  for (int n0 = first_key(p, batch, m0) / tile::cols * tile::cols; n0 < end; n0 += tile::cols) {
    float s[R][C];
    __syncthreads(); /* the last block's values are done with */
    load_tile<tile::cols, D>(kv, keys, n0, p.seq, p.d);
    __syncthreads();
    product_nt<D>(s, q, kv);
    soften(s, r, o, first, last, n0, p.scale);
    put_tile<tile::cols>(probs, s);
    __syncthreads();
    load_tile<tile::cols, D>(kv, values, n0, p.seq, p.d);
    __syncthreads();
    product_nn<tile::cols, D>(o, probs, kv);
  }

  auto out = out_rows(p, static_cast<T *>(p.out), batch, head);
#pragma unroll
  for (int i = 0; i < R; i++) {
    int row = m0 + lane_y() + side * i;
    if (row >= p.seq) continue;
#pragma unroll
    for (int c = 0; c < RD; c++)
      if (lane_x() + side * c < p.d)
        out.data[row * out.stride + lane_x() + side * c] = from_float<T>(o[i][c] / r.sum[i]);
    if (lane_x() == 0) p.lse[(int64_t)blockIdx.x * p.seq + row] = r.most[i] + logf(r.sum[i]);
  }
}

/* ---- backward ------------------------------------------------------------------------------ */

/* dQ of `rows` queries of one head. */
template <typename T, int D>
__global__ void __launch_bounds__(threads) exact_query_kernel(attention_args p) {
  using tile = backward_tile<D>;
  constexpr int R = tile::rows / side, C = tile::cols / side, RD = D / side;
  extern __shared__ float4 memory[];
  float *q = reinterpret_cast<float *>(memory), *grad = q + tile::rows * (D + 4);
  float *k = grad + tile::rows * (D + 4), *v = k + tile::cols * (D + 4);
  float *ds = v + tile::cols * (D + 4);

  int64_t batch = blockIdx.x / p.heads;
  int head = (int)(blockIdx.x % p.heads), kv_head = head / p.rep;
  int m0 = (int)(gridDim.y - 1 - blockIdx.y) * tile::rows;
  const T *qkv = static_cast<const T *>(p.qkv);
  auto keys = qkv_rows(p, qkv, batch, p.heads + kv_head);
  auto values = qkv_rows(p, qkv, batch, p.heads + p.kv_heads + kv_head);
  load_tile<tile::rows, D>(q, qkv_rows(p, qkv, batch, head), m0, p.seq, p.d);
  load_tile<tile::rows, D>(grad, out_rows(p, static_cast<const T *>(p.dout), batch, head), m0,
                           p.seq, p.d);

  float dq[R][RD] = {}, lse[R], delta[R];
  int first[R], last[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    last[i] = min(m0 + lane_y() + side * i, p.seq - 1);
    first[i] = first_key(p, batch, last[i]);
    lse[i] = p.lse[(int64_t)blockIdx.x * p.seq + last[i]];
    delta[i] = p.delta[(int64_t)blockIdx.x * p.seq + last[i]];
  }
  int end = min(m0 + tile::rows, p.seq);
  for (int n0 = first_key(p, batch, m0) / tile::cols * tile::cols; n0 < end; n0 += tile::cols) {
    float s[R][C], dp[R][C];
    __syncthreads(); /* the last block's keys are done with */
    load_tile<tile::cols, D>(k, keys, n0, p.seq, p.d);
    load_tile<tile::cols, D>(v, values, n0, p.seq, p.d);
    __syncthreads();
    product_nt<D>(s, q, k);
    product_nt<D>(dp, grad, v);
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
      for (int j = 0; j < C; j++) {
        int key = n0 + lane_x() + side * j;
        bool seen = key >= first[i] && key <= last[i];
        float prob = seen ? expf(s[i][j] * p.scale - lse[i]) : 0.0f;
        dp[i][j] = seen ? prob * (dp[i][j] - delta[i]) : 0.0f;
      }
    put_tile<tile::cols>(ds, dp);
    __syncwarp(); /* a row's owners are in one warp */
    product_nn<tile::cols, D>(dq, ds, k);
  }

  auto out = qkv_rows(p, static_cast<T *>(p.dqkv), batch, head);
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int c = 0; c < RD; c++) {
      int row = m0 + lane_y() + side * i, col = lane_x() + side * c;
      if (row < p.seq && col < p.d)
        out.data[row * out.stride + col] = from_float<T>(dq[i][c] * p.scale);
    }
}

/* dK and dV of `rows` keys, over the query heads of one part. */
template <typename T, int D>
__global__ void __launch_bounds__(threads) exact_key_kernel(attention_args p) {
  using tile = backward_tile<D>;
  constexpr int R = tile::rows / side, C = tile::cols / side, RD = D / side;
  extern __shared__ float4 memory[];
  float *k = reinterpret_cast<float *>(memory), *v = k + tile::rows * (D + 4);
  float *q = v + tile::rows * (D + 4), *grad = q + tile::cols * (D + 4);
  float *probs = grad + tile::cols * (D + 4), *ds = probs + tile::rows * (tile::cols + 4);
  float *lse = ds + tile::rows * (tile::cols + 4), *delta = lse + tile::cols;

  int part = (int)(blockIdx.x % p.parts), kv_head = (int)(blockIdx.x / p.parts % p.kv_heads);
  int64_t batch = blockIdx.x / p.parts / p.kv_heads;
  int n0 = (int)blockIdx.y * tile::rows, n_last = n0 + tile::rows - 1;
  int heads = p.rep / p.parts, head0 = kv_head * p.rep + part * heads;
  const T *qkv = static_cast<const T *>(p.qkv), *dout = static_cast<const T *>(p.dout);
  load_tile<tile::rows, D>(k, qkv_rows(p, qkv, batch, p.heads + kv_head), n0, p.seq, p.d);
  load_tile<tile::rows, D>(v, qkv_rows(p, qkv, batch, p.heads + p.kv_heads + kv_head), n0, p.seq,
                           p.d);

  float dk[R][RD] = {}, dv[R][RD] = {};
  for (int head = head0; head < head0 + heads; head++) {
    const int64_t row0 = (batch * p.heads + head) * p.seq;
    auto queries = qkv_rows(p, qkv, batch, head);
    auto grads = out_rows(p, dout, batch, head);
    for (int m0 = n0 / tile::cols * tile::cols; m0 < p.seq; m0 += tile::cols) {
      if (first_key(p, batch, m0) > n_last) break; /* nor do later queries see these keys */
      float s[R][C], dp[R][C];
      __syncthreads(); /* the last block's queries are done with */
      load_tile<tile::cols, D>(q, queries, m0, p.seq, p.d);
      load_tile<tile::cols, D>(grad, grads, m0, p.seq, p.d);
      if (threadIdx.x < tile::cols && m0 + (int)threadIdx.x < p.seq) {
        lse[threadIdx.x] = p.lse[row0 + m0 + threadIdx.x];
        delta[threadIdx.x] = p.delta[row0 + m0 + threadIdx.x];
      }
      __syncthreads();
      product_nt<D>(s, k, q);
      product_nt<D>(dp, v, grad);
#pragma unroll
      for (int j = 0; j < C; j++) {
        int column = lane_x() + side * j, query = m0 + column;
        int first = query < p.seq ? first_key(p, batch, query) : INT_MAX;
#pragma unroll
        for (int i = 0; i < R; i++) {
          int key = n0 + lane_y() + side * i;
          bool seen = key >= first && key <= query;
          s[i][j] = seen ? expf(s[i][j] * p.scale - lse[column]) : 0.0f;
          dp[i][j] = seen ? s[i][j] * (dp[i][j] - delta[column]) : 0.0f;
        }
      }
      put_tile<tile::cols>(probs, s);
      put_tile<tile::cols>(ds, dp);
      __syncwarp();
      product_nn<tile::cols, D>(dv, probs, grad);
      product_nn<tile::cols, D>(dk, ds, q);
    }
  }

  auto to_k = key_sink<T>(p, batch, kv_head, part, 0),
       to_v = key_sink<T>(p, batch, kv_head, part, 1);
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int c = 0; c < RD; c++) {
      int row = n0 + lane_y() + side * i, col = lane_x() + side * c;
      if (row >= p.seq || col >= p.d) continue;
      to_k.put(row, col, dk[i][c] * p.scale);
      to_v.put(row, col, dv[i][c]);
    }
}

/* ---- launches ------------------------------------------------------------------------------ */

/* Call f with the padded head size. */
template <typename F> moe_status with_size(int d, F f) {
  moe_status status = MOE_OK;
  if (attention_head_size(d, [&](auto size) { status = f(size); })) return status;
  return f(cuda_int<256>{});
}

} /* namespace */

moe_status cuda_attention_exact(moe_device *dev, moe_dtype dtype, const attention_args &p) {
  return cuda_act(dtype, [&](auto x) {
    using T = decltype(x);
    return with_size(p.d, [&](auto size) {
      constexpr int D = decltype(size)::value;
      using tile = forward_tile<D>;
      return attention_launch(dev, exact_forward_kernel<T, D>, p.batch * p.heads,
                              div_up(p.seq, tile::rows), threads, tile::shared, p);
    });
  });
}

moe_status cuda_attention_exact_backward(moe_device *dev, moe_dtype dtype,
                                         const attention_args &p) {
  return cuda_act(dtype, [&](auto x) {
    using T = decltype(x);
    return with_size(p.d, [&](auto size) {
      constexpr int D = decltype(size)::value;
      using tile = backward_tile<D>;
      int64_t blocks = div_up(p.seq, tile::rows);
      MOE_TRY(attention_launch(dev, exact_query_kernel<T, D>, p.batch * p.heads, blocks, threads,
                               tile::shared, p));
      return attention_launch(dev, exact_key_kernel<T, D>, p.batch * p.kv_heads * p.parts, blocks,
                              threads, tile::shared, p);
    });
  });
}
