/* The router's way back in one pass on tensor cores, for bf16 rows and at most 32 experts:
 *
 *     dx += dlogits W        dW += dlogits^T x
 *
 * A block makes the gradients of its tokens' logits, then four of its warps bring dx up to date and
 * four sum a part of dW, each of x and dx read once. Float32 operands are sums of three bf16
 * numbers, exactly (router_mma.cuh); of the nine products of two such sums the six that float32
 * would not round away are added up, small ones first.
 *
 * No thread reads what another brought, so rows wait in shared memory only for want of registers:
 * each thread copies ahead what it will itself multiply, and fragments are chosen so that this is
 * 16 bytes of a row. For dx, the numbers 2q, 2q + 1 of tile j are columns 8q + 2j, 8q + 2j + 1. For
 * dW, whose sums run over tokens, pairs of neighbours along them are put together from two rows. */
#ifndef MOE_KERNELS_CUDA_ROUTER_BACK_CUH
#define MOE_KERNELS_CUDA_ROUTER_BACK_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/router_few.cuh"
#include "kernels/cuda/router_gradient.cuh"

constexpr int back_tokens = 128, back_columns = 256, back_threads = 256, back_most = 32;
constexpr int back_steps = 8,
              back_ahead = 3; /* copies of 64 bytes by each thread: all, in flight */

struct back_args {
  gradient_args g;
  const __nv_bfloat16 *x;
  __nv_bfloat16 *dx;
  const float *weight;
  float *partial; /* [blocks, E, D] */
  int64_t first;  /* token of this launch */
  int width;
};

/* KT: sixteens of experts. */
template <int KT> struct back_shared {
  uint4 ring[back_ahead][4][back_threads];
  float grad[back_tokens][16 * KT + 8]; /* of logits; rows in other banks */
};

/* a and b as sums of three bf16 each, in pairs. */
__device__ __forceinline__ void back_split(float a, float b, uint32_t (&part)[3]) {
#pragma unroll
  for (int i = 0; i < 3; i++) {
    part[i] = pack<__nv_bfloat16>(a, b);
    a -= low(part[i]);
    b -= high(part[i]);
  }
}

/* ---- dx: a warp takes 32 columns twice, 32 tokens in a step ---------------------------------- */

/* Where a thread's piece i of a step lies. */
struct back_place {
  int token, column; /* of the block's */
};
__device__ __forceinline__ back_place back_dx_place(int step, int i) {
  int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32 % 4;
  return {step % 4 * 32 + i * 8 + lane / 4, (step / 4 * 4 + warp) * 32 + lane % 4 * 8};
}

/* The fragments of W for this warp's 32 columns from `column` on: pairs run along experts. */
template <int KT>
__device__ __forceinline__ void back_weights(const back_args &a, int column,
                                             uint32_t (&w)[KT][4][2][3]) {
  int row = (int)threadIdx.x / 4 % 8, q = (int)threadIdx.x % 4;
  auto at = [&](int e, int c) {
    return e < a.g.count && c < a.width ? a.weight[(int64_t)e * a.width + c] : 0.0f;
  };
#pragma unroll
  for (int kt = 0; kt < KT; kt++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int e = 16 * kt + 8 * i + 2 * q, c = column + row / 2 * 8 + 2 * j + row % 2;
        back_split(at(e, c), at(e + 1, c), w[kt][j][i]);
      }
}

/* Rows row and row + 8 of 16 tokens, old[0] and old[1], += their gradients times the weights. */
template <int KT>
__device__ __forceinline__ void back_dx_rows(const float (*grad)[16 * KT + 8],
                                             const uint32_t (&w)[KT][4][2][3], uint4 (&old)[2]) {
  int row = (int)threadIdx.x / 4 % 8, q = (int)threadIdx.x % 4;
  float acc[4][4];
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      uint32_t v = reinterpret_cast<const uint32_t *>(&old[r])[j];
      acc[j][2 * r] = low(v);
      acc[j][2 * r + 1] = high(v);
    }
#pragma unroll
  for (int kt = 0; kt < KT; kt++) {
    uint32_t g[3][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float *from = &grad[row + i % 2 * 8][16 * kt + i / 2 * 8 + 2 * q];
      float2 pair = *reinterpret_cast<const float2 *>(from);
      uint32_t part[3];
      back_split(pair.x, pair.y, part);
      g[0][i] = part[0], g[1][i] = part[1], g[2][i] = part[2];
    }
#pragma unroll
    for (int sum = 2; sum >= 0; sum--)
#pragma unroll
      for (int m = sum; m >= 0; m--)
#pragma unroll
        for (int j = 0; j < 4; j++)
          mma<__nv_bfloat16>(acc[j], g[m], w[kt][j][0][sum - m], w[kt][j][1][sum - m]);
  }
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      reinterpret_cast<uint32_t *>(&old[r])[j] =
          pack<__nv_bfloat16>(acc[j][2 * r], acc[j][2 * r + 1]);
}

/* ---- dW: a warp takes 64 columns, 16 tokens in a step ---------------------------------------- */

__device__ __forceinline__ back_place back_dw_place(int step, int i) {
  int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32 % 4;
  return {step * 16 + i * 4 + lane % 4, warp * 64 + lane / 4 * 8};
}

/* Tile j's column n is 8 n + j; numbers 2q, 2q + 1, 2q + 8, 2q + 9 along K are tokens q, q + 4, q +
 * 8, q + 12. */
template <int KT>
__device__ __forceinline__ void back_dw_tokens(const float (*grad)[16 * KT + 8],
                                               const uint4 (&x)[4], float (&acc)[KT][8][4]) {
  int row = (int)threadIdx.x / 4 % 8, q = (int)threadIdx.x % 4;
#pragma unroll
  for (int kt = 0; kt < KT; kt++) {
    uint32_t g[3][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int e = 16 * kt + i % 2 * 8 + row, t = i / 2 * 8 + q;
      uint32_t part[3];
      back_split(grad[t][e], grad[t + 4][e], part);
      g[0][i] = part[0], g[1][i] = part[1], g[2][i] = part[2];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      auto word = [&](int i) { return reinterpret_cast<const uint32_t *>(&x[i])[j / 2]; };
      uint32_t which = j % 2 == 0 ? 0x5410 : 0x7632;
      uint32_t b0 = __byte_perm(word(0), word(1), which);
      uint32_t b1 = __byte_perm(word(2), word(3), which);
#pragma unroll
      for (int part = 2; part >= 0; part--) mma<__nv_bfloat16>(acc[kt][j], g[part], b0, b1);
    }
  }
}

template <int KT>
__device__ __forceinline__ void back_dw_write(const back_args &a, int column,
                                              const float (&acc)[KT][8][4]) {
  int row = (int)threadIdx.x / 4 % 8, q = (int)threadIdx.x % 4;
#pragma unroll
  for (int kt = 0; kt < KT; kt++)
#pragma unroll
    for (int i = 0; i < 4; i++) { /* expert row or row + 8, column 8 (2q) or 8 (2q + 1) */
      int e = 16 * kt + i / 2 * 8 + row, c = column + (2 * q + i % 2) * 8;
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = acc[kt][j][i];
      if (e < a.g.count && c < a.width)
        few_store(a.partial + ((int64_t)blockIdx.x * a.g.count + e) * a.width + c, v);
    }
}

/* ---- the kernel: block (128 tokens, 256 columns) --------------------------------------------- */

/* Gradients of the block's logits, two threads for a token; zeros where there is none. `keeps`:
 * this block writes dlogits. */
template <int KT>
__device__ __forceinline__ void back_logits(const back_args &a, int64_t token,
                                            float (*grad)[16 * KT + 8], bool keeps) {
  for (int mine = (int)threadIdx.x / 2; mine < back_tokens; mine += (int)blockDim.x / 2) {
    int64_t t = token + mine;
    bool here = t < a.g.tokens;
#pragma unroll
    for (int j = 0; j < 8 * KT; j++) grad[mine][(int)threadIdx.x % 2 + 2 * j] = 0.0f;
    token_gradient<2>(a.g, here ? t : a.g.tokens - 1, [&](int j, float v) {
      if (!here) return;
      grad[mine][j] = v;
      if (keeps) a.g.dlogits[t * a.g.count + j] = v;
    });
  }
}

template <int KT>
__global__ void __launch_bounds__(back_threads, KT == 1 ? 3 : 2) back_kernel(back_args a) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char memory[];
  back_shared<KT> &s = *reinterpret_cast<back_shared<KT> *>(memory);
  int64_t token = a.first + (int64_t)blockIdx.x * back_tokens;
  int column = (int)blockIdx.y * back_columns;
  bool sums = threadIdx.x >= back_threads / 2;
  const __nv_bfloat16 *rows = sums ? a.x : a.dx;
  launch_wait();
  launch_release();
  auto fetch = [&](int step) {
    for (int i = 0; i < 4 && step < back_steps; i++) {
      back_place at = sums ? back_dw_place(step, i) : back_dx_place(step, i);
      bool here = token + at.token < a.g.tokens && column + at.column < a.width;
      copy_start<16>(&s.ring[step % back_ahead][i][threadIdx.x],
                     here ? rows + (token + at.token) * a.width + column + at.column : rows, here);
    }
    copy_group();
  };
#pragma unroll
  for (int step = 0; step < back_ahead; step++) fetch(step);
  back_logits<KT>(a, token, s.grad, blockIdx.y == 0);
  __syncthreads();
  if (sums) {
    float acc[KT][8][4] = {};
#pragma unroll 1
    for (int step = 0; step < back_steps; step++) {
      uint4 v[4];
      copy_wait_but<back_ahead - 1>();
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = s.ring[step % back_ahead][i][threadIdx.x];
      back_dw_tokens<KT>(s.grad + step * 16, v, acc);
      fetch(step + back_ahead);
    }
    back_dw_write<KT>(a, column + back_dw_place(0, 0).column / 64 * 64, acc);
    return;
  }
  uint32_t w[KT][4][2][3];
#pragma unroll 1
  for (int step = 0; step < back_steps; step++) {
    back_place at = back_dx_place(step, 0);
    if (step % 4 == 0) back_weights<KT>(a, column + at.column / 32 * 32, w);
    copy_wait_but<back_ahead - 1>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint4 old[2];
#pragma unroll
      for (int r = 0; r < 2; r++) old[r] = s.ring[step % back_ahead][2 * half + r][threadIdx.x];
      back_dx_rows<KT>(s.grad + step % 4 * 32 + half * 16, w, old);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        int64_t t = token + at.token + half * 16 + r * 8;
        if (t < a.g.tokens && column + at.column < a.width)
          *reinterpret_cast<uint4 *>(a.dx + t * a.width + column + at.column) = old[r];
      }
    }
    fetch(step + back_ahead);
  }
#endif
}

/* Whether a call may go through here. */
static inline bool back_fits(const cuda_state *s, moe_tensor x, moe_tensor weight, moe_tensor dx) {
  int64_t e = weight.shape[0], d = x.shape[1];
  uintptr_t bits = reinterpret_cast<uintptr_t>(x.data) | reinterpret_cast<uintptr_t>(dx.data);
  return s->arch >= 80 && x.dtype == MOE_BF16 && e > 0 && e <= back_most && d % 8 == 0 &&
         bits % 16 == 0 && 4 * e * d <= s->partial_bytes && d <= 65535 * back_columns &&
         (int)sizeof(back_shared<2>) <= s->max_shared;
}

/* As many tokens at once as their partial sums fit. */
static inline moe_status back(moe_device *dev, back_args a, float *dweight) {
  const cuda_state *s = cuda_of(dev);
  int64_t count = (int64_t)a.g.count * a.width, fits = s->partial_bytes / (4 * count);
  a.partial = reinterpret_cast<float *>(s->partial);
  for (a.first = 0; a.first < a.g.tokens; a.first += fits * back_tokens) {
    int64_t parts = min(div_up(a.g.tokens - a.first, (int64_t)back_tokens), fits);
    dim3 grid((unsigned)parts, (unsigned)div_up(a.width, back_columns));
    if (a.g.count <= 16)
      MOE_TRY(cuda_start(dev, back_kernel<1>, grid, back_threads, (int)sizeof(back_shared<1>), a));
    else
      MOE_TRY(cuda_start(dev, back_kernel<2>, grid, back_threads, (int)sizeof(back_shared<2>), a));
    MOE_TRY(few_sum(dev, {a.partial, back_tokens, (int)parts}, count, dweight));
  }
  return MOE_OK;
}

#endif
