/* Products with few rows, c [m, n] = a [m, k] b [n, k]^T + beta c with m at most 32. cuBLAS's tiles
 * would leave most of the chip idle. A small b waits for its first byte, so a block takes 16 rows
 * of b and only 8 of a (skinny.cuh): more blocks, of which later readers of b find it in the L2
 * cache. A large b is read once: by blocks for 16 of its rows, or on Hopper as a stream
 * (stream.cuh).
 *
 * b may be the result of the kernel before, so ahead of it b is only prefetched. With a small b the
 * rows of a may be norms, which every block works out for itself. */
#include "kernels/cuda/gemv.h"

#include "kernels/cuda/norm_few.cuh"
#include "kernels/cuda/stream.cuh"

namespace {

constexpr int gemv_batch = 6;            /* chunks a warp has in flight: all of k = 768 */
constexpr int64_t gemv_large = 16 << 20; /* bytes of b, from here on */

struct gemv_args {
  const void *a, *b;
  void *c;
  int m, n, k;
  float beta;
};

/* c's element for row `slot` of a and `row` of b. */
template <typename C>
__device__ __forceinline__ void gemv_put(const gemv_args &p, int slot, int row, float value) {
  C *to = static_cast<C *>(p.c) + (int64_t)slot * p.n + row;
  if (row < p.n) *to = from_float<C>(p.beta != 0.0f ? value + to_float(*to) : value);
}

template <typename T, typename C, int TILES, bool NORM>
__global__ void __launch_bounds__(skinny_threads) gemv_kernel(gemv_args p, norm_few norm) {
  __shared__ skinny_sums<TILES> sums;
  __shared__ alignas(16) T norms[NORM ? 8 * TILES : 1][NORM ? norm_few_most + 8 : 1];
  if constexpr (mma_built<T>()) {
    int g = (int)threadIdx.x % 32 / 4, row = (int)blockIdx.x * skinny_rows + g;
    const T *b = static_cast<const T *>(p.b) + (int64_t)row * p.k, *a = static_cast<const T *>(p.a);
    const T *low = row < p.n ? b : nullptr, *high = row + 8 < p.n ? b + 8LL * p.k : nullptr;
    skinny_range r = {(int)threadIdx.x / 32, (int)div_up(p.k, skinny_chunk), p.k};
#pragma unroll
    for (int u = 0; u < gemv_batch; u++) {
      if (r.at(u) < 0) break;
      if (low != nullptr) prefetch_line(low + r.at(u));
      if (high != nullptr) prefetch_line(high + r.at(u));
    }
    launch_wait();
    launch_release();

    int first = (int)blockIdx.y * 8 * TILES, m = min(8 * TILES, p.m - first);
    skinny_batch<T, gemv_batch> batch;
    batch.load(low, high, r);
    if constexpr (NORM) {
      for (int i = (int)threadIdx.x / 32; i < m; i += skinny_warps)
        norm_few_row<T>(norms[i], norm, first + i, blockIdx.x == 0);
      __syncthreads();
    }
    const T *rows[TILES];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      const T *from = NORM ? norms[NORM ? j * 8 + g : 0] : a + (int64_t)(first + j * 8 + g) * p.k;
      rows[j] = j * 8 + g < m ? from : nullptr;
    }
    float c[TILES][4];
    skinny_product(c, batch, low, high, rows, m, r);
    skinny_finish<TILES>(sums, c, m, [&](int slot, float x, float y) {
      gemv_put<C>(p, first + slot, row, x);
      gemv_put<C>(p, first + slot, row + 8, y);
    });
  }
}

/* A warp per 16 rows of b and all rows of a. */
template <typename T, typename C, int TILES>
__global__ void __launch_bounds__(stream_threads, 2) gemv_stream_kernel(gemv_args p) {
  extern __shared__ uint4 memory[];
  __shared__ uint64_t barriers[stream_warps];
  if constexpr (mma_built<T>()) {
    stream_place place(memory, barriers);
    int lane = (int)threadIdx.x % 32, items = (int)div_up(p.n, skinny_rows);
    auto ask = [&](int item, int k0) {
      int row = item * skinny_rows + lane;
      const T *from = static_cast<const T *>(p.b) + (int64_t)row * p.k + k0;
      place.ask(lane < skinny_rows && row < p.n ? from : nullptr, min(stream_segment, p.k - k0));
    };
    launch_wait();
    launch_release();
    const T *rows[TILES];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      int slot = j * 8 + lane / 4;
      rows[j] = slot < p.m ? static_cast<const T *>(p.a) + (int64_t)slot * p.k : nullptr;
    }
    int item = stream_first();
    if (item < items) ask(item, 0);
    for (; item < items; item += stream_all()) {
      stream_sums<TILES> sums;
      sums.clear();
      for (int k0 = 0; k0 < p.k; k0 += stream_segment) {
        sums.multiply(place, rows, (p.m + 7) / 8, k0, min(stream_segment, p.k - k0));
        if (k0 + stream_segment < p.k)
          ask(item, k0 + stream_segment);
        else if (item + stream_all() < items)
          ask(item + stream_all(), 0);
      }
#pragma unroll
      for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int slot = j * 8 + lane % 4 * 2 + i, row = item * skinny_rows + lane / 4;
          if (slot >= p.m) continue;
          gemv_put<C>(p, slot, row, sums.total(j, 0, i));
          gemv_put<C>(p, slot, row + 8, sums.total(j, 1, i));
        }
    }
  }
}

template <typename T, typename C, int TILES>
moe_status start_large(moe_device *dev, const gemv_args &p) {
  if (stream_fits(dev))
    return stream_start(dev, gemv_stream_kernel<T, C, TILES>, dim3((unsigned)cuda_of(dev)->sms), p);
  dim3 grid((unsigned)div_up(p.n, skinny_rows));
  return cuda_start(dev, gemv_kernel<T, C, TILES, false>, grid, skinny_threads, 0, p, norm_few{});
}

bool is_large(int64_t n, int64_t k) {
  return 2 * n * k >= gemv_large;
}

template <typename T, typename C, bool NORM>
moe_status start_small(moe_device *dev, const gemv_args &p, const norm_few &norm) {
  dim3 grid((unsigned)div_up(p.n, skinny_rows), (unsigned)div_up(p.m, 8));
  return cuda_start(dev, gemv_kernel<T, C, 1, NORM>, grid, skinny_threads, 0, p, norm);
}

/* Which way depends on b alone, and all add a row's products in an order that only k decides. */
template <typename T, typename C> moe_status start(moe_device *dev, const gemv_args &p) {
  if (!is_large(p.n, p.k)) return start_small<T, C, false>(dev, p, norm_few{});
  if (p.m <= 8) return start_large<T, C, 1>(dev, p);
  if (p.m <= 16) return start_large<T, C, 2>(dev, p);
  return start_large<T, C, 4>(dev, p);
}

} /* namespace */

bool cuda_gemv_fits(const moe_device *dev, moe_gemm_form form, moe_tensor a, moe_tensor b) {
  return form == MOE_NT && a.shape[0] >= 1 && a.shape[0] <= skinny_most && b.shape[0] >= 1 &&
         a.shape[1] >= 1 && skinny_fits(dev, a.dtype, a.shape[1], b.data, a.data);
}

moe_status cuda_gemv(moe_device *dev, moe_tensor a, moe_tensor b, float beta, moe_tensor c) {
  gemv_args p = {a.data, b.data, c.data, (int)a.shape[0], (int)b.shape[0], (int)a.shape[1], beta};
  bool wide = c.dtype == MOE_F32;
  if (a.dtype == MOE_F16)
    return wide ? start<__half, float>(dev, p) : start<__half, __half>(dev, p);
  return wide ? start<__nv_bfloat16, float>(dev, p) : start<__nv_bfloat16, __nv_bfloat16>(dev, p);
}

moe_status moe_cuda_norm_gemm(moe_device *dev, moe_norm norm, moe_tensor b, moe_tensor c,
                              bool *done) {
  static const bool plain = cuda_plain("gemv");
  *done = !plain && !cuda_of(dev)->own_gemm && cuda_gemv_fits(dev, MOE_NT, norm.x, b) &&
          norm.x.shape[0] <= 8 && norm_few_fits(norm) && !is_large(b.shape[0], b.shape[1]);
  if (!*done) return MOE_OK;
  gemv_args p = {nullptr,         b.data,          c.data, (int)norm.x.shape[0],
                 (int)b.shape[0], (int)b.shape[1], 0.0f};
  norm_few n = norm_few_of(norm);
  bool wide = c.dtype == MOE_F32;
  if (norm.x.dtype == MOE_F16)
    return (wide ? start_small<__half, float, true> : start_small<__half, __half, true>)(dev, p, n);
  return (wide ? start_small<__nv_bfloat16, float, true>
               : start_small<__nv_bfloat16, __nv_bfloat16, true>)(dev, p, n);
}
