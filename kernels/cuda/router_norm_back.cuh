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

constexpr int joint_columns = 64, joint_warps = 12, joint_threads = 32 * joint_warps; /* at most */
constexpr int joint_tile = 16, joint_ahead = 2, joint_most = 16; /* tokens; tiles; experts */

struct joint_args {
  back_args b; /* x: the norm's; dx: the norm's; partial: of dW */
  const __nv_bfloat16 *dh;
  const float *gain, *rstd;
  float *gain_partial; /* [blocks, D] */
};

struct joint_shared {
  uint4 dh[joint_ahead][4][joint_threads], x[joint_ahead][4][joint_threads];
  uint4 weight[12][joint_threads];
  float grad[back_tokens][16 + 8]; /* as back_shared has it */
  float rstd[back_tokens], gain[joint_warps * joint_columns];
  float dot[2][joint_warps][joint_tile];
};

/* A thread's piece i of a tile: rows lane / 4 and 8 more, 8 columns in each half of its warp's. */
__device__ __forceinline__ back_place joint_place(int i) {
  int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
  return {lane / 4 + i % 2 * 8, warp * joint_columns + i / 2 * 32 + lane % 4 * 8};
}

/* Eight neighbours of a row in shared memory, as they lie. */
__device__ __forceinline__ void joint_gain(const joint_shared &s, int column, float (&gain)[8]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float4 v = *reinterpret_cast<const float4 *>(s.gain + column + 4 * i);
    gain[4 * i] = v.x, gain[4 * i + 1] = v.y, gain[4 * i + 2] = v.z, gain[4 * i + 3] = v.w;
  }
}

__device__ __forceinline__ void joint_unpack(const uint4 &from, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t word = reinterpret_cast<const uint32_t *>(&from)[i];
    v[2 * i] = low(word), v[2 * i + 1] = high(word);
  }
}
__device__ __forceinline__ uint4 joint_pack(const float (&v)[8]) {
  return {pack<__nv_bfloat16>(v[0], v[1]), pack<__nv_bfloat16>(v[2], v[3]),
          pack<__nv_bfloat16>(v[4], v[5]), pack<__nv_bfloat16>(v[6], v[7])};
}

/* What all tiles need: gains, rstd, and W's fragments for each thread's columns. */
__device__ __forceinline__ void joint_prepare(const joint_args &a, int64_t token, joint_shared &s) {
  for (int i = (int)threadIdx.x; i < a.b.width; i += (int)blockDim.x) s.gain[i] = a.gain[i];
  for (int i = (int)threadIdx.x; i < back_tokens; i += (int)blockDim.x)
    s.rstd[i] = token + i < a.b.g.tokens ? a.rstd[token + i] : 0.0f;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t w[1][4][2][3];
    back_weights<1>(a.b, (int)threadIdx.x / 32 * joint_columns + half * 32, w);
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
    back_dx_rows<1>(s.grad + tile * joint_tile, w, dh[half]);
  }
}

/* dW += the tile's. Token 4 i + lane % 4 at columns 8 (lane / 4) lies where joint_place put it. */
__device__ __forceinline__ void joint_dw(const joint_shared &s, int tile, float (&dw)[1][8][4]) {
  int lane = (int)threadIdx.x % 32, first = (int)threadIdx.x - lane, group = lane / 4;
  float gain[8];
  uint4 h[4];
  joint_gain(s, first / 32 * joint_columns + group * 8, gain);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int t = 4 * i + lane % 4;
    float v[8], rstd = s.rstd[tile * joint_tile + t];
    joint_unpack(s.x[tile % joint_ahead][group / 4 * 2 + i / 2][first + t % 8 * 4 + group % 4], v);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = gain[j] * (v[j] * rstd);
    h[i] = joint_pack(v);
  }
  back_dw_tokens<1>(s.grad + tile * joint_tile, h, dw);
}

/* The warp's part of the sums of g x over each row. */
__device__ __forceinline__ void joint_dots(joint_shared &s, int tile, const uint4 (&dh)[2][2],
                                           const uint4 (&x)[2][2]) {
  float dot[2] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float gain[8];
    joint_gain(s, joint_place(2 * half).column, gain);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float d[8], v[8];
      joint_unpack(dh[half][r], d);
      joint_unpack(x[half][r], v);
#pragma unroll
      for (int j = 0; j < 8; j++) dot[r] += d[j] * gain[j] * v[j];
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    dot[r] += __shfl_xor_sync(full_warp, dot[r], 1);
    dot[r] += __shfl_xor_sync(full_warp, dot[r], 2);
    if (threadIdx.x % 4 == 0) s.dot[tile % 2][threadIdx.x / 32][joint_place(r).token] = dot[r];
  }
}

/* dx's piece and its part of dgain; row: of the block. */
__device__ __forceinline__ void joint_dx(const joint_args &a, const joint_shared &s, int tile,
                                         int row, int column, const uint4 &dh, const uint4 &x,
                                         uint4 &dx, float (&dgain)[8]) {
  float gain[8], d[8], v[8], out[8], dot = 0.0f, rstd = s.rstd[row];
  for (int w = 0; w < (int)blockDim.x / 32; w++) dot += s.dot[tile % 2][w][row % joint_tile];
  float mean = dot * rstd / (float)a.b.width;
  joint_gain(s, column, gain);
  joint_unpack(dh, d);
  joint_unpack(x, v);
  joint_unpack(dx, out);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    float n = v[j] * rstd;
    dgain[j] += d[j] * n;
    out[j] += rstd * (d[j] * gain[j] - n * mean);
  }
  dx = joint_pack(out);
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
      few_store(a.gain_partial + (int64_t)blockIdx.x * a.b.width + joint_place(2 * half).column,
                dgain[half]);
  }
}

/* A block for 128 tokens, a warp for 64 columns. */
static __global__ void __launch_bounds__(joint_threads, 1) joint_kernel(joint_args a) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char memory[];
  joint_shared &s = *reinterpret_cast<joint_shared *>(memory);
  int64_t token = a.b.first + (int64_t)blockIdx.x * back_tokens;
  int tiles = (int)min(div_up(a.b.g.tokens - token, (int64_t)joint_tile),
                       (int64_t)(back_tokens / joint_tile));
  auto here = [&](int tile, int i) {
    return token + tile * joint_tile + joint_place(i).token < a.b.g.tokens;
  };
  auto place = [&](int tile, int i) {
    return (token + tile * joint_tile + joint_place(i).token) * a.b.width + joint_place(i).column;
  };
  auto fetch = [&](int tile) {
    for (int i = 0; i < 4 && tile < tiles; i++) {
      int64_t at = here(tile, i) ? place(tile, i) : 0;
      copy_start<16>(&s.dh[tile % joint_ahead][i][threadIdx.x], a.dh + at, here(tile, i));
      copy_start<16>(&s.x[tile % joint_ahead][i][threadIdx.x], a.b.x + at, here(tile, i));
    }
    copy_group();
  };
  float dw[1][8][4] = {}, dgain[2][8] = {};
  launch_wait();
  launch_release();
#pragma unroll
  for (int tile = 0; tile < joint_ahead; tile++) fetch(tile);
  joint_prepare(a, token, s);
  back_logits<1>(a.b, token, s.grad, true);
  __syncthreads();
#pragma unroll 1
  for (int tile = 0; tile < tiles; tile++) {
    uint4 dh[2][2], x[2][2], dx[2][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      dx[i / 2][i % 2] = uint4{};
      if (here(tile, i))
        dx[i / 2][i % 2] = *reinterpret_cast<const uint4 *>(a.b.dx + place(tile, i));
    }
    copy_wait_but<joint_ahead - 1>();
    __syncwarp();
    joint_dh(s, tile, dh);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i / 2][i % 2] = s.x[tile % joint_ahead][i][threadIdx.x];
    joint_dots(s, tile, dh, x);
    joint_dw(s, tile, dw);
    __syncwarp(); /* all lanes have read their neighbours' pieces */
    fetch(tile + joint_ahead);
    __syncthreads(); /* all warps' sums are there */
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int half = i / 2, r = i % 2;
      joint_dx(a, s, tile, tile * joint_tile + joint_place(i).token, joint_place(i).column,
               dh[half][r], x[half][r], dx[half][r], dgain[half]);
      if (here(tile, i)) *reinterpret_cast<uint4 *>(a.b.dx + place(tile, i)) = dx[half][r];
    }
  }
  back_dw_write<1>(a.b, (int)threadIdx.x / 32 * joint_columns, dw);
  joint_dgain_write(a, dgain);
#endif
}

/* Whether a call may go through here. */
static inline bool joint_fits(const cuda_state *s, const moe_norm_gradient &n, moe_tensor weight) {
  int64_t e = weight.shape[0], d = n.x.shape[1];
  const void *all[] = {n.dout.data, n.x.data, n.dx.data};
  uintptr_t bits = 0;
  for (const void *p : all) bits |= reinterpret_cast<uintptr_t>(p);
  return s->arch >= 80 && n.x.dtype == MOE_BF16 && e > 0 && e <= joint_most && d > 0 &&
         d % joint_columns == 0 && d <= joint_warps * joint_columns && bits % 16 == 0 &&
         4 * (e + 1) * d <= s->partial_bytes && (int)sizeof(joint_shared) <= s->max_shared;
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
