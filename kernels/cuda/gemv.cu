/* Products with few rows, c [m, n] = a [m, k] b [n, k]^T + beta c with m at most 32: a block per 16
 * rows of b (skinny.cuh). cuBLAS's tiles would leave most of the chip idle.
 *
 * b may be the result of the kernel before, so ahead of it b is only prefetched. */
#include "kernels/cuda/gemv.h"

#include "kernels/cuda/skinny.cuh"

namespace {

constexpr int gemv_batch = 6; /* chunks a warp has in flight: all of k = 768 */

struct gemv_args {
  const void *a, *b;
  void *c;
  int m, n, k;
  float beta;
};

template <typename T, typename C, int TILES>
__global__ void __launch_bounds__(skinny_threads) gemv_kernel(gemv_args p) {
  __shared__ skinny_sums<TILES> sums;
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

    const T *rows[TILES];
#pragma unroll
    for (int j = 0; j < TILES; j++)
      rows[j] = j * 8 + g < p.m ? a + (int64_t)(j * 8 + g) * p.k : nullptr;
    skinny_batch<T, gemv_batch> batch;
    batch.load(low, high, r);
    float c[TILES][4];
    skinny_product(c, batch, low, high, rows, p.m, r);
    skinny_finish<TILES>(sums, c, p.m, [&](int slot, float x, float y) {
      C *to = static_cast<C *>(p.c) + (int64_t)slot * p.n + row;
      if (row < p.n) to[0] = from_float<C>(p.beta != 0.0f ? x + to_float(to[0]) : x);
      if (row + 8 < p.n) to[8] = from_float<C>(p.beta != 0.0f ? y + to_float(to[8]) : y);
    });
  }
}

template <typename T, typename C> moe_status start(moe_device *dev, const gemv_args &p) {
  dim3 grid((unsigned)div_up(p.n, skinny_rows));
  if (p.m <= 8) return cuda_start(dev, gemv_kernel<T, C, 1>, grid, skinny_threads, 0, p);
  if (p.m <= 16) return cuda_start(dev, gemv_kernel<T, C, 2>, grid, skinny_threads, 0, p);
  return cuda_start(dev, gemv_kernel<T, C, 4>, grid, skinny_threads, 0, p);
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
