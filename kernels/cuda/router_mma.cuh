/* The router in one pass on tensor cores: logits of bf16 rows, softmax, choice and the sums over
 * tokens, for at most 32 experts.
 *
 * A float32 weight is the sum of three bf16 numbers, 8 bits each, exactly; so three products with x
 * as it is stored, added up in float32, lose no more than a float32 product does. The parts lie in
 * shared memory. A fragment's K index is permuted, alike for both operands, so that a lane reads 16
 * bytes of a row: what lane q of four calls columns 2q, 2q + 1, 2q + 8, 2q + 9 of two products are
 * columns 8q to 8q + 7 of 32. */
#ifndef MOE_KERNELS_CUDA_ROUTER_MMA_CUH
#define MOE_KERNELS_CUDA_ROUTER_MMA_CUH

#include <cfloat>
#include <climits>
#include <cmath>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"

constexpr int fused_tiles = 8, fused_tokens = 16 * fused_tiles, fused_threads = 64 * fused_tiles;
constexpr int fused_most = 32, fused_ahead = 3; /* experts; 32-column pieces in flight */

struct fused_router_args {
  const __nv_bfloat16 *x;
  const float *weight, *bias;
  float *probs, *lse, *gates;
  int32_t *experts;
  double *partial; /* [blocks, 2 E + 1]: load, mass, lse^2; or NULL */
  int64_t tokens;
  int width, count, k; /* D, E, K */
};

/* Elements between rows of a part in shared memory: rows of neighbouring experts in other banks. */
__host__ __device__ constexpr int fused_stride(int width) {
  return (int)round_up(width, 64) + 32;
}
constexpr int fused_bytes(int width, int experts) {
  return 3 * experts * fused_stride(width) * 2;
}

/* The three parts of [EXPERTS, width], zeros where there is no expert or column. */
template <int EXPERTS>
__device__ __forceinline__ void fused_split(const fused_router_args &a, __nv_bfloat16 *parts) {
  int ld = fused_stride(a.width), columns = (int)round_up(a.width, 32);
  for (int i = (int)threadIdx.x * 4; i < EXPERTS * columns; i += fused_threads * 4) {
    int e = i / columns, c = i % columns;
    float4 w = {};
    if (e < a.count && c < a.width)
      w = *reinterpret_cast<const float4 *>(a.weight + (int64_t)e * a.width + c);
    float v[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int part = 0; part < 3; part++) {
      uint2 packed = {pack<__nv_bfloat16>(v[0], v[1]), pack<__nv_bfloat16>(v[2], v[3])};
      *reinterpret_cast<uint2 *>(parts + (part * EXPERTS + e) * ld + c) = packed;
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] -= to_float(from_float<__nv_bfloat16>(v[j]));
    }
  }
}

/* A warp's 16 tokens times half of the 32-column pieces: every second one from `first` on.
 * acc[j]: experts 8 j to 8 j + 7, as the product leaves them. */
template <int TILES>
__device__ __forceinline__ void fused_logits(const fused_router_args &a, const __nv_bfloat16 *parts,
                                             int64_t token, int first, float (&acc)[TILES][4]) {
  int lane = (int)threadIdx.x % 32, row = lane / 4, q = lane % 4, ld = fused_stride(a.width);
  int pieces = (int)div_up(a.width, 32);
  const __nv_bfloat16 *from[2];
  bool here[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    here[i] = token + row + 8 * i < a.tokens;
    from[i] = a.x + (here[i] ? token + row + 8 * i : 0) * a.width + 8 * q;
  }
  uint4 v[fused_ahead][2];
  auto fetch = [&](uint4(&to)[2], int piece) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      to[i] = here[i] && piece * 32 + 8 * q < a.width
                  ? __ldg(reinterpret_cast<const uint4 *>(from[i] + piece * 32))
                  : uint4{};
  };
#pragma unroll
  for (int j = 0; j < fused_ahead; j++) fetch(v[j], first + 2 * j);
  for (int base = first; base < pieces; base += 2 * fused_ahead) {
#pragma unroll
    for (int j = 0; j < fused_ahead; j++) {
      int piece = base + 2 * j;
      uint32_t low[4] = {v[j][0].x, v[j][1].x, v[j][0].y, v[j][1].y};
      uint32_t high[4] = {v[j][0].z, v[j][1].z, v[j][0].w, v[j][1].w};
      if (piece >= pieces) break;
      fetch(v[j], piece + 2 * fused_ahead);
#pragma unroll
      for (int part = 2; part >= 0; part--) /* small ones first */
#pragma unroll
        for (int n = 0; n < TILES; n++) {
          uint4 w = *reinterpret_cast<const uint4 *>(parts + (part * 8 * TILES + 8 * n + row) * ld +
                                                     piece * 32 + 8 * q);
          mma<__nv_bfloat16>(acc[n], low, w.x, w.y);
          mma<__nv_bfloat16>(acc[n], high, w.z, w.w);
        }
    }
  }
}

/* One row's logits, of which each of four lanes has 2 TILES (p[i]: expert 8 (i / 2) + 2 q + i % 2),
 * become probabilities; the choice is written, *taken gets its bits. `here`: the row exists. */
template <int TILES>
__device__ __forceinline__ void fused_choose(const fused_router_args &a, int64_t token, bool here,
                                             float (&p)[2 * TILES], float *lse, unsigned *taken) {
  int q = (int)threadIdx.x % 4;
  float top = -INFINITY, sum = 0, score[2 * TILES];
  auto expert = [&](int i) { return 8 * (i / 2) + 2 * q + i % 2; };
#pragma unroll
  for (int i = 0; i < 2 * TILES; i++)
    if (expert(i) < a.count) top = op_max{}(top, p[i]);
  top = quad_reduce(top, op_max{});
#pragma unroll
  for (int i = 0; i < 2 * TILES; i++) sum += p[i] = expert(i) < a.count ? expf(p[i] - top) : 0.0f;
  sum = quad_reduce(sum, op_sum{});
  *lse = top + logf(sum);
#pragma unroll
  for (int i = 0; i < 2 * TILES; i++) {
    p[i] /= sum;
    score[i] = a.bias != nullptr && expert(i) < a.count ? p[i] + a.bias[expert(i)] : p[i];
    if (score[i] != score[i]) score[i] = -INFINITY;
    if (here && expert(i) < a.count) a.probs[token * a.count + expert(i)] = p[i];
  }
  unsigned gone = 0;
  float chosen = 0;
  for (int k = 0; k < a.k; k++) {
    int best = INT_MAX;
    float most = -INFINITY, probability = 0;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++)
      if (!(gone >> i & 1) && expert(i) < a.count &&
          (score[i] > most || (score[i] == most && expert(i) < best)))
        most = score[i], best = expert(i), probability = p[i];
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      float other = __shfl_xor_sync(full_warp, most, step);
      float of_other = __shfl_xor_sync(full_warp, probability, step);
      int at = __shfl_xor_sync(full_warp, best, step);
      if (other > most || (other == most && at < best))
        most = other, best = at, probability = of_other;
    }
    chosen += probability;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) gone |= best == expert(i) ? 1u << i : 0;
    if (here && q == k % 4) {
      a.experts[token * a.k + k] = best;
      a.gates[token * a.k + k] = probability;
    }
  }
  for (int k = q; here && k < a.k; k += 4) /* a bias may choose experts whose p is zero */
    a.gates[token * a.k + k] =
        chosen < FLT_MIN ? 1.0f / (float)a.k : a.gates[token * a.k + k] / chosen;
  *taken = gone;
}

/* What a warp's tokens add to the sums: load and mass for each expert, then lse^2. */
template <int TILES> struct fused_sums {
  int load[fused_tiles][8 * TILES];
  float mass[fused_tiles][8 * TILES];
  double squares[fused_tiles];

  __device__ __forceinline__ void put(int warp, const float (&mass_of)[2 * TILES],
                                      const unsigned (&taken)[2], double lse2) {
    int lane = (int)threadIdx.x % 32, q = lane % 4;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
      float m = mass_of[i];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) m += __shfl_xor_sync(full_warp, m, step);
      unsigned same = 0x11111111u << q;
      int n = __popc(__ballot_sync(full_warp, taken[0] >> i & 1) & same) +
              __popc(__ballot_sync(full_warp, taken[1] >> i & 1) & same);
      if (lane < 4) load[warp][8 * (i / 2) + 2 * q + i % 2] = n;
      if (lane < 4) mass[warp][8 * (i / 2) + 2 * q + i % 2] = m;
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) lse2 += __shfl_xor_sync(full_warp, lse2, step);
    if (lane == 0) squares[warp] = lse2;
  }
  /* By all threads of a block, after a barrier: the warps' sums, in order. */
  __device__ __forceinline__ void write(int count, double *to) const {
    for (int i = (int)threadIdx.x; i < 2 * count + 1; i += (int)blockDim.x) {
      double sum = 0;
      for (int w = 0; w < fused_tiles; w++)
        sum += i < count ? load[w][i] : i < 2 * count ? mass[w][i - count] : squares[w];
      to[i] = sum;
    }
  }
};

/* What follows from the logits of a warp's 16 tokens, from `token` on; logit(r, i): of row lane / 4
 * + 8 r for expert 8 (i / 2) + 2 q + i % 2. */
template <int TILES, typename F>
__device__ __forceinline__ void fused_rows(const fused_router_args &a, int64_t token, int tile,
                                           fused_sums<TILES> &sums, F logit) {
  float mass[2 * TILES] = {};
  unsigned taken[2];
  double squares = 0;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int64_t t = token + (int)threadIdx.x % 32 / 4 + 8 * r;
    bool here = t < a.tokens;
    float p[2 * TILES], lse;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) p[i] = logit(r, i);
    fused_choose<TILES>(a, t, here, p, &lse, &taken[r]);
    if (!here) taken[r] = 0;
    if (here && threadIdx.x % 4 == 0) {
      a.lse[t] = lse;
      squares += (double)lse * (double)lse;
    }
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) mass[i] += here ? p[i] : 0.0f;
  }
  if (a.partial != nullptr) sums.put(tile, mass, taken, squares);
}

/* Warps w and w + 8 share 16 tokens: each takes half of the columns, the lower one the rest. */
template <int TILES>
__global__ void __launch_bounds__(fused_threads, 1) fused_router_kernel(fused_router_args a) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char memory[];
  __shared__ float upper[fused_tiles][32][4 * TILES];
  __shared__ fused_sums<TILES> sums;
  __nv_bfloat16 *parts = reinterpret_cast<__nv_bfloat16 *>(memory);
  int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, tile = warp % fused_tiles;
  int64_t token = (int64_t)blockIdx.x * fused_tokens + tile * 16;
  float acc[TILES][4] = {};
  launch_wait();
  launch_release();
  fused_split<8 * TILES>(a, parts);
  __syncthreads();
  fused_logits<TILES>(a, parts, token, warp / fused_tiles, acc);
  if (warp >= fused_tiles) {
#pragma unroll
    for (int i = 0; i < 4 * TILES; i++) upper[tile][lane][i] = acc[i / 4][i % 4];
  }
  __syncthreads();
  if (warp < fused_tiles)
    fused_rows<TILES>(a, token, warp, sums, [&](int r, int i) {
      return acc[i / 2][2 * r + i % 2] + upper[tile][lane][i / 2 * 4 + 2 * r + i % 2];
    });
  if (a.partial == nullptr) return;
  __syncthreads();
  sums.write(a.count, a.partial + (int64_t)blockIdx.x * (2 * a.count + 1));
#endif
}

/* Whether a call may go through here, given its GPU's shared memory. */
static inline bool fused_router_fits(const cuda_state *s, moe_tensor x, moe_tensor weight) {
  int64_t e = weight.shape[0], d = x.shape[1];
  uintptr_t bits = reinterpret_cast<uintptr_t>(x.data) | reinterpret_cast<uintptr_t>(weight.data);
  return s->arch >= 80 && x.dtype == MOE_BF16 && e <= fused_most && d % 8 == 0 && d > 0 &&
         d <= 8192 && bits % 16 == 0 &&
         fused_bytes((int)d, e <= 16 ? 16 : 32) + (24 << 10) <= s->max_shared;
}

static inline moe_status fused_router(moe_device *dev, const fused_router_args &a) {
  auto start = [&](auto tiles) {
    constexpr int N = decltype(tiles)::value;
    return cuda_start(dev, fused_router_kernel<N>, dim3((unsigned)div_up(a.tokens, fused_tokens)),
                      fused_threads, fused_bytes(a.width, 8 * N), a);
  };
  return a.count <= 16 ? start(cuda_int<2>{}) : start(cuda_int<4>{});
}

#endif
