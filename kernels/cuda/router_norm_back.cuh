/* The router's way back and that of the norm before it in one pass, for bf16 rows and few experts:
 *
 *     dh += dlogits W      dW += dlogits^T h                    h = n gain,  n = x rstd
 *     dx += rstd (g - n mean(g n))      dgain += sum over rows dh n          g = dh gain
 *
 * h is made again, to the bit, so rows are read of dh, x and dx only, each once, and dh is not
 * written. A block has whole rows, a warp 64 columns of them, in which it does both products for 16
 * tokens at a time by the fragments of router_back.cuh; warps meet for the mean alone. W's
 * fragments wait in shared memory. What a thread multiplies it copies ahead itself; h, whose
 * product runs over tokens, it makes of what its neighbours copied. */
#ifndef MOE_KERNELS_CUDA_ROUTER_NORM_BACK_CUH
#define MOE_KERNELS_CUDA_ROUTER_NORM_BACK_CUH

#include "kernels/cuda/router_back.cuh"
#include "kernels/cuda/row_pieces.cuh"

constexpr int joint_ahead = 2, joint_most = 16; /* tiles; experts */

struct joint_args {
  back_args b; /* x: the norm's; dx: the norm's; partial: of dW */
  const __nv_bfloat16 *dh;
  const float *gain, *rstd;
  float *gain_partial; /* [blocks, D] */
};

struct joint_shared {
  uint4 dh[joint_ahead][4][piece_threads], x[joint_ahead][4][piece_threads];
  uint4 dx[4][piece_threads], weight[12][piece_threads];
  float grad[back_tokens][16 + 8]; /* as back_shared has it */
  float rstd[back_tokens], gain[piece_warps * piece_columns];
  float dot[2][piece_warps][piece_tile];
};

/* What all tiles need: gains, rstd, and W's fragments for each thread's columns. */
__device__ __forceinline__ void joint_prepare(const joint_args &a, int64_t token, joint_shared &s) {
  for (int i = (int)threadIdx.x; i < a.b.width; i += (int)blockDim.x) s.gain[i] = a.gain[i];
  for (int i = (int)threadIdx.x; i < back_tokens; i += (int)blockDim.x)
    s.rstd[i] = token + i < a.b.g.tokens ? a.rstd[token + i] : 0.0f;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t w[1][4][2][3];
    back_weights<1>(a.b, (int)threadIdx.x / 32 * piece_columns + half * 32, w);
#pragma unroll
    for (int i = 0; i < 6; i++)
      s.weight[6 * half + i][threadIdx.x] = reinterpret_cast<const uint4 *>(w)[i];
  }
}

/* dh's pieces become what they are after the router's gradient. */
__device__ __forceinline__ void joint_dh(const joint_shared &s, int tile, uint4 (&dh)[2][2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    alignas(16) uint32_t w[1][4][2][3];
#pragma unroll
    for (int i = 0; i < 6; i++)
      reinterpret_cast<uint4 *>(w)[i] = s.weight[6 * half + i][threadIdx.x];
#pragma unroll
    for (int r = 0; r < 2; r++) dh[half][r] = s.dh[tile % joint_ahead][2 * half + r][threadIdx.x];
    back_dx_rows<1>(s.grad + tile * piece_tile, w, dh[half]);
  }
}

/* dW += the tile's. Token 4 i + lane % 4 at columns 8 (lane / 4) lies where piece_place put it. */
__device__ __forceinline__ void joint_dw(const joint_shared &s, int tile, float (&dw)[1][8][4]) {
  int lane = (int)threadIdx.x % 32, first = (int)threadIdx.x - lane, group = lane / 4;
  uint4 h[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int t = 4 * i + lane % 4;
    const uint4 &x = s.x[tile % joint_ahead][group / 4 * 2 + i / 2][first + t % 8 * 4 + group % 4];
    h[i] = piece_normed(s.gain, first / 32 * piece_columns + group * 8, x,
                        s.rstd[tile * piece_tile + t]);
  }
  back_dw_tokens<1>(s.grad + tile * piece_tile, h, dw);
}

/* The warp's part of the sums of g x over each row. */
__device__ __forceinline__ void joint_dots(joint_shared &s, int tile, const uint4 (&dh)[2][2],
                                           const uint4 (&x)[2][2]) {
  float dot[2] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float gain[8];
    piece_gain(s.gain, piece_place(2 * half).column, gain);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float d[8], v[8];
      piece_unpack(dh[half][r], d);
      piece_unpack(x[half][r], v);
#pragma unroll
      for (int j = 0; j < 8; j++) dot[r] += d[j] * gain[j] * v[j];
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    dot[r] = quad_reduce(dot[r], op_sum{});
    if (threadIdx.x % 4 == 0) s.dot[tile % 2][threadIdx.x / 32][piece_place(r).token] = dot[r];
  }
}

/* dx's piece and its part of dgain. mean: of g n over the row. */
__device__ __forceinline__ void joint_dx(const joint_shared &s, int column, float rstd, float mean,
                                         const uint4 &dh, const uint4 &x, uint4 &dx,
                                         float (&dgain)[8]) {
  float gain[8], d[8], v[8], out[8];
  piece_gain(s.gain, column, gain);
  piece_unpack(dh, d);
  piece_unpack(x, v);
  piece_unpack(dx, out);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    float n = v[j] * rstd;
    dgain[j] += d[j] * n;
    out[j] += rstd * (d[j] * gain[j] - n * mean);
  }
  dx = piece_pack(out);
}

/* Over the rows that a warp's lanes have, and to memory. */
__device__ __forceinline__ void joint_dgain_write(const joint_args &a, float (&dgain)[2][8]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int step = 4; step < 32; step *= 2)
        dgain[half][j] += __shfl_xor_sync(full_warp, dgain[half][j], step);
    if (threadIdx.x % 32 < 4)
      few_store(a.gain_partial + (int64_t)blockIdx.x * a.b.width + piece_place(2 * half).column,
                dgain[half]);
  }
}

/* A block for 128 tokens, a warp for 64 columns. */
static __global__ void __launch_bounds__(piece_threads, 1) joint_kernel(joint_args a) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char memory[];
  joint_shared &s = *reinterpret_cast<joint_shared *>(memory);
  int64_t token = a.b.first + (int64_t)blockIdx.x * back_tokens;
  int tiles = (int)min(div_up(a.b.g.tokens - token, (int64_t)piece_tile),
                       (int64_t)(back_tokens / piece_tile));
  piece_rows rows = {token, a.b.g.tokens, a.b.width};
  auto fetch = [&](int tile) {
    for (int i = 0; i < 4 && tile < tiles; i++) {
      rows.copy(&s.dh[tile % joint_ahead][i][threadIdx.x], a.dh, tile, i);
      rows.copy(&s.x[tile % joint_ahead][i][threadIdx.x], a.b.x, tile, i);
    }
    copy_group();
  };
  float dw[1][8][4] = {}, dgain[2][8] = {}, per_column = 1.0f / (float)a.b.width;
  launch_wait();
  launch_release();
#pragma unroll
  for (int tile = 0; tile < joint_ahead; tile++) fetch(tile);
  joint_prepare(a, token, s);
  back_logits<1>(a.b, token, s.grad, true);
  __syncthreads();
#pragma unroll 1
  for (int tile = 0; tile < tiles; tile++) {
    uint4 dh[2][2], x[2][2];
    for (int i = 0; i < 4; i++) rows.copy(&s.dx[i][threadIdx.x], a.b.dx, tile, i);
    copy_group();
    copy_wait_but<joint_ahead>();
    __syncwarp();
    joint_dh(s, tile, dh);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i / 2][i % 2] = s.x[tile % joint_ahead][i][threadIdx.x];
    joint_dots(s, tile, dh, x);
    joint_dw(s, tile, dw);
    __syncwarp(); /* all lanes have read their neighbours' pieces */
    fetch(tile + joint_ahead);
    copy_wait_but<1>();
    __syncthreads(); /* all warps' sums are there */
    float rstd[2], mean[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      rstd[r] = s.rstd[tile * piece_tile + piece_place(r).token];
      mean[r] = piece_sum(s.dot[tile % 2], piece_place(r).token) * rstd[r] * per_column;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int half = i / 2, r = i % 2;
      uint4 dx = s.dx[i][threadIdx.x];
      joint_dx(s, piece_place(i).column, rstd[r], mean[r], dh[half][r], x[half][r], dx,
               dgain[half]);
      if (rows.here(tile, i)) *reinterpret_cast<uint4 *>(a.b.dx + rows.place(tile, i)) = dx;
    }
  }
  back_dw_write<1>(a.b, (int)threadIdx.x / 32 * piece_columns, dw);
  joint_dgain_write(a, dgain);
#endif
}

/* Whether a call may go through here. */
static inline bool joint_fits(const cuda_state *s, const moe_norm_gradient &n, moe_tensor weight) {
  int64_t e = weight.shape[0], d = n.x.shape[1];
  const void *all[] = {n.dout.data, n.x.data, n.dx.data};
  return s->arch >= 80 && n.x.dtype == MOE_BF16 && e > 0 && e <= joint_most &&
         piece_fits(d, all, 3) && 4 * (e + 1) * d <= s->partial_bytes &&
         (int)sizeof(joint_shared) <= s->max_shared;
}

/* As many tokens at once as their partial sums fit. */
static inline moe_status joint(moe_device *dev, joint_args a, float *dweight, float *dgain) {
  const cuda_state *s = cuda_of(dev);
  int64_t count = (int64_t)a.b.g.count * a.b.width;
  int64_t fits = s->partial_bytes / (4 * (count + a.b.width));
  a.b.partial = reinterpret_cast<float *>(s->partial);
  for (a.b.first = 0; a.b.first < a.b.g.tokens; a.b.first += fits * back_tokens) {
    int64_t parts = min(div_up(a.b.g.tokens - a.b.first, (int64_t)back_tokens), fits);
    a.gain_partial = a.b.partial + parts * count;
    MOE_TRY(cuda_start(dev, joint_kernel, dim3((unsigned)parts), a.b.width / 2,
                       (int)sizeof(joint_shared), a));
    MOE_TRY(few_sum(dev, {a.b.partial, back_tokens, (int)parts}, count, dweight));
    MOE_TRY(few_sum(dev, {a.gain_partial, back_tokens, (int)parts}, a.b.width, dgain));
  }
  return MOE_OK;
}

#endif
