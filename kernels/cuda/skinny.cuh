/* Many rows of weights times few rows of x, on tensor cores, with the weights read once and
 * straight into registers: what generation spends its time on.
 *
 *     c [16, 8 TILES] = w [16, k] x [8 TILES, k]^T          by the warps of a block, k shared out
 *
 * The one idea: a sum does not care in which order its k come, as long as both sides agree. So a
 * lane loads 16 consecutive bytes, elements 8 t to 8 t + 7 of a chunk of 32 (t = lane % 4), of its
 * rows g and g + 8 (g = lane / 4) of w and row g of x, and takes pairs (0 1)(2 3), then (4 5)(6 7),
 * for what m16n8k16 calls (2t, 2t+1)(2t+8, 2t+9): see mma.cuh. No shared memory, no shuffles, and
 * all loads of a batch are in flight at once.
 *
 * Which chunks a warp adds up, and the order of warps, depend on k alone: a row of x gives the same
 * bits whatever rows stand beside it. */
#ifndef MOE_KERNELS_CUDA_SKINNY_CUH
#define MOE_KERNELS_CUDA_SKINNY_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"

constexpr int skinny_chunk = 32, skinny_rows = 16, skinny_warps = 4,
              skinny_threads = 32 * skinny_warps;
constexpr int64_t skinny_most = 32; /* rows of x */

/* Whether the GPU has the tensor cores, and rows of k elements may be read in whole words. */
static inline bool skinny_fits(const moe_device *dev, moe_dtype dtype, int64_t k, const void *w,
                               const void *x) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(w) | reinterpret_cast<uintptr_t>(x);
  return cuda_has_mma(dev, dtype) && k % 8 == 0 && bits % 16 == 0;
}

/* 16 bytes that are not needed again soon; zeros when not `inside`. A predicate, not a branch, so
 * that many are in flight. */
__device__ __forceinline__ uint4 load_once(const void *p, bool inside) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm volatile("{\n.reg .pred inside;\nsetp.ne.u32 inside, %5, 0;\n"
               "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
               "@inside ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
               : "l"(p), "r"((uint32_t)inside)
               : "memory");
  return v;
#else
  return inside ? *static_cast<const uint4 *>(p) : uint4{};
#endif
}

/* One warp's share of k: chunks first, first + warps, ... before `end` (of a row of k elements). */
struct skinny_range {
  int first, end, k;
  /* Where this lane's 8 elements of a batch's u-th chunk begin; -1: nothing there. */
  __device__ __forceinline__ int at(int u) const {
    int chunk = first + u * skinny_warps, i = chunk * skinny_chunk + (int)threadIdx.x % 4 * 8;
    return chunk < end && i < k ? i : -1;
  }
};

/* Up to U chunks of this lane's two rows of weights. */
template <typename T, int U> struct skinny_batch {
  uint4 low[U], high[U];
  /* NULL rows count as zeros. */
  __device__ __forceinline__ void load(const T *low_row, const T *high_row, skinny_range r) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      int i = r.at(u);
      low[u] = load_once(low_row + i, i >= 0 && low_row != nullptr);
      high[u] = load_once(high_row + i, i >= 0 && high_row != nullptr);
    }
  }
  /* c += this times the first n rows of x, of which row[j] is the lane's in tile j (or NULL). */
  template <int TILES>
  __device__ __forceinline__ void multiply(float (&c)[TILES][4], const T *const (&row)[TILES],
                                           int n, skinny_range r) const {
#pragma unroll
    for (int u = 0; u < U; u++) {
      int i = r.at(u);
#pragma unroll
      for (int j = 0; j < TILES; j++) {
        if (j > 0 && j * 8 >= n) break; /* the same for the whole warp */
        uint4 x =
            i >= 0 && row[j] != nullptr ? *reinterpret_cast<const uint4 *>(row[j] + i) : uint4{};
        uint32_t a[4] = {low[u].x, high[u].x, low[u].y, high[u].y};
        uint32_t b[4] = {low[u].z, high[u].z, low[u].w, high[u].w};
        mma<T>(c[j], a, x.x, x.y);
        mma<T>(c[j], b, x.z, x.w);
      }
    }
  }
};

/* Chunks [begin, end) of the block's two rows per lane times n rows of x; the first batch has been
 * loaded already. */
template <typename T, int U, int TILES>
__device__ __forceinline__ void
skinny_product(float (&c)[TILES][4], skinny_batch<T, U> &batch, const T *low, const T *high,
               const T *const (&row)[TILES], int n, skinny_range r) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) c[j][i] = 0.0f;
  while (true) {
    batch.multiply(c, row, n, r);
    r.first += U * skinny_warps;
    if (r.first >= r.end) return;
    batch.load(low, high, r);
  }
}

/* The i-th (of two) row of x whose results this lane finishes: warp j has tile j. */
__device__ __forceinline__ int skinny_slot(int i) {
  return (int)threadIdx.x / 32 * 8 + (int)threadIdx.x % 4 * 2 + i;
}

/* Sum c over the block's warps, in their order, and call put(slot, low, high) with the elements of
 * rows g and g + 8 for row `slot` < n of x. All threads of the block must call; `sums` is shared
 * memory. */
template <int TILES> using skinny_sums = float[skinny_warps][TILES * 4][32];

template <int TILES, typename F>
__device__ __forceinline__ void skinny_finish(skinny_sums<TILES> &sums, const float (&c)[TILES][4],
                                              int n, F put) {
  static_assert(TILES <= skinny_warps, "a warp for each tile");
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  __syncthreads(); /* an earlier call's readers are done */
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (j * 8 < n) sums[warp][j * 4 + i][lane] = c[j][i];
  __syncthreads();
  if (warp >= TILES || warp * 8 >= n) return;
  float total[4] = {};
#pragma unroll
  for (int w = 0; w < skinny_warps; w++)
#pragma unroll
    for (int i = 0; i < 4; i++) total[i] += sums[w][warp * 4 + i][lane];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int slot = skinny_slot(i);
    if (slot < n) put(slot, total[i], total[2 + i]);
  }
}

#endif
