/* A norm and the router of what it makes in one pass, for many bf16 rows and few experts: rows are
 * read and written as the norm alone would, and the router costs no memory of its own.
 *
 * A block has 128 tokens, whole rows of them, a warp 64 columns; 16 tokens are at work at a time. A
 * thread's pieces of a row, normed, are fragments of the product with W's three parts as they are
 * (router_mma.cuh), so warps meet only for the sums of squares and, one tile later, of logits. What
 * follows from the logits is done for all tokens at the end. */
#ifndef MOE_KERNELS_CUDA_ROUTER_NORM_CUH
#define MOE_KERNELS_CUDA_ROUTER_NORM_CUH

#include "kernels/cuda/router_mma.cuh"
#include "kernels/cuda/row_pieces.cuh"

constexpr int many_ahead = 2, many_most = 16; /* tiles; experts */

struct many_args {
  fused_router_args r; /* x: what the norm makes */
  const __nv_bfloat16 *x, *residual;
  __nv_bfloat16 *sum, *out;
  const float *gain;
  float *rstd;
  float eps;
};

struct many_shared {
  uint4 x[many_ahead][4][piece_threads], residual[many_ahead][4][piece_threads];
  float gain[piece_warps * piece_columns];
  float squares[2][piece_warps][piece_tile];
  float part[2][piece_warps][piece_tile][many_most + 4]; /* of logits; rows in other banks */
  float logits[fused_tokens][many_most + 4];
  fused_sums<2> sums;
};

/* The parts of W at this thread's columns, for each half of its warp's and each eight experts. */
__device__ __forceinline__ void many_weights(const fused_router_args &a, uint4 (&w)[2][2][3]) {
  int row = (int)threadIdx.x / 4 % 8;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int n = 0; n < 2; n++) {
      float v[8] = {};
      const float *from = a.weight + (int64_t)(8 * n + row) * a.width;
      if (8 * n + row < a.count) load<float, 8>(v, from + piece_place(2 * half).column);
#pragma unroll
      for (int part = 0; part < 3; part++) {
        w[half][n][part] = piece_pack(v);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] -= to_float(from_float<__nv_bfloat16>(v[j]));
      }
    }
}

/* x plus residual, rounded as it is stored; the sums of its squares over the warp's columns. */
__device__ __forceinline__ void many_add(many_shared &s, int tile, uint4 (&sum)[2][2]) {
  float squares[2] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float v[8], r[8];
    piece_unpack(s.x[tile % many_ahead][i][threadIdx.x], v);
    piece_unpack(s.residual[tile % many_ahead][i][threadIdx.x], r);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] += r[j];
    sum[i / 2][i % 2] = piece_pack(v);
    piece_unpack(sum[i / 2][i % 2], v);
#pragma unroll
    for (int j = 0; j < 8; j++) squares[i % 2] += v[j] * v[j];
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    squares[r] = quad_reduce(squares[r], op_sum{});
    if (threadIdx.x % 4 == 0)
      s.squares[tile % 2][threadIdx.x / 32][piece_place(r).token] = squares[r];
  }
}

/* Rows row and row + 8 of the tile: 1 / sqrt(mean + eps). */
__device__ __forceinline__ void many_rstd(const many_args &a, const many_shared &s, int tile,
                                          float (&rstd)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float squares = piece_sum(s.squares[tile % 2], piece_place(r).token);
    rstd[r] = 1.0f / sqrtf(squares / (float)a.r.width + a.eps);
  }
}

/* The warp's part of the tile's logits, of normed pieces. */
__device__ __forceinline__ void many_product(many_shared &s, int tile, const uint4 (&h)[2][2],
                                             const uint4 (&w)[2][2][3]) {
  float acc[2][4] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint4 *v = h[half];
    uint32_t low[4] = {v[0].x, v[1].x, v[0].y, v[1].y};
    uint32_t high[4] = {v[0].z, v[1].z, v[0].w, v[1].w};
#pragma unroll
    for (int part = 2; part >= 0; part--) /* small ones first */
#pragma unroll
      for (int n = 0; n < 2; n++) {
        mma<__nv_bfloat16>(acc[n], low, w[half][n][part].x, w[half][n][part].y);
        mma<__nv_bfloat16>(acc[n], high, w[half][n][part].z, w[half][n][part].w);
      }
  }
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int n = 0; n < 2; n++)
      *reinterpret_cast<float2 *>(&s.part[tile % 2][threadIdx.x / 32][piece_place(r).token]
                                         [8 * n + 2 * (threadIdx.x % 4)]) =
          make_float2(acc[n][2 * r], acc[n][2 * r + 1]);
}

/* By all threads: the warps' parts of a tile's logits. */
__device__ __forceinline__ void many_logits(many_shared &s, int tile) {
  for (int i = (int)threadIdx.x; i < piece_tile * many_most; i += (int)blockDim.x) {
    int t = i / many_most, e = i % many_most;
    float sum = 0.0f;
    for (int w = 0; w < (int)blockDim.x / 32; w++) sum += s.part[tile % 2][w][t][e];
    s.logits[tile * piece_tile + t][e] = sum;
  }
}

/* A block for 128 tokens, a warp for 64 columns. */
static __global__ void __launch_bounds__(piece_threads, 1) many_kernel(many_args a) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char memory[];
  many_shared &s = *reinterpret_cast<many_shared *>(memory);
  int64_t token = (int64_t)blockIdx.x * fused_tokens;
  int warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
  piece_rows rows = {token, a.r.tokens, a.r.width};
  auto fetch = [&](int tile) {
    for (int i = 0; i < 4 && tile < fused_tiles; i++) {
      rows.copy(&s.x[tile % many_ahead][i][threadIdx.x], a.x, tile, i);
      rows.copy(&s.residual[tile % many_ahead][i][threadIdx.x], a.residual, tile, i);
    }
    copy_group();
  };
  uint4 w[2][2][3];
  launch_wait();
  launch_release();
#pragma unroll
  for (int tile = 0; tile < many_ahead; tile++) fetch(tile);
  for (int i = (int)threadIdx.x; i < a.r.width; i += (int)blockDim.x) s.gain[i] = a.gain[i];
  many_weights(a.r, w);
#pragma unroll 1
  for (int tile = 0; tile < fused_tiles; tile++) {
    uint4 v[2][2];
    float rstd[2];
    copy_wait_but<many_ahead - 1>();
    many_add(s, tile, v);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (rows.here(tile, i))
        *reinterpret_cast<uint4 *>(a.sum + rows.place(tile, i)) = v[i / 2][i % 2];
    fetch(tile + many_ahead);
    __syncthreads(); /* the squares are there, and the parts of the tile before */
    if (tile > 0) many_logits(s, tile - 1);
    many_rstd(a, s, tile, rstd);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint4 &piece = v[i / 2][i % 2];
      piece = piece_normed(s.gain, piece_place(i).column, piece, rstd[i % 2]);
      if (rows.here(tile, i)) *reinterpret_cast<uint4 *>(a.out + rows.place(tile, i)) = piece;
      if (rows.here(tile, i) && i < 2 && threadIdx.x % 4 == 0 && warp == 0)
        a.rstd[token + tile * piece_tile + piece_place(i).token] = rstd[i];
    }
    many_product(s, tile, v, w);
  }
  __syncthreads();
  many_logits(s, fused_tiles - 1);
  __syncthreads();
  for (int tile = warp; tile < fused_tiles; tile += warps)
    fused_rows<2>(a.r, token + tile * piece_tile, tile, s.sums, [&](int r, int i) {
      return s.logits[tile * piece_tile + piece_place(r).token]
                     [8 * (i / 2) + 2 * (threadIdx.x % 4) + i % 2];
    });
  if (a.r.partial == nullptr) return;
  __syncthreads();
  s.sums.write(a.r.count, a.r.partial + (int64_t)blockIdx.x * (2 * a.r.count + 1));
#endif
}

/* Whether a call may go through here. */
static inline bool many_fits(const cuda_state *s, const moe_norm &n, moe_tensor weight) {
  int64_t e = weight.shape[0];
  const void *all[] = {n.x.data, n.residual.data, n.sum.data, n.out.data, weight.data};
  return s->arch >= 80 && n.x.dtype == MOE_BF16 && moe_tensor_present(n.residual) && e > 0 &&
         e <= many_most && piece_fits(n.x.shape[1], all, 5) &&
         (int)sizeof(many_shared) <= s->max_shared;
}

static inline moe_status many_router(moe_device *dev, const many_args &a) {
  return cuda_start(dev, many_kernel, dim3((unsigned)div_up(a.r.tokens, fused_tokens)),
                    a.r.width / 2, (int)sizeof(many_shared), a);
}

#endif
