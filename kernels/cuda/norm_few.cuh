/* The norm of a few rows inside the kernel that wants them (norm.cu's, for generation): a launch
 * and a way to memory less. Each block that needs a row works it out again; one of them stores the
 * sum, which the others must not read in its place. */
#ifndef MOE_KERNELS_CUDA_NORM_FEW_CUH
#define MOE_KERNELS_CUDA_NORM_FEW_CUH

#include "kernels/cuda/launch.cuh"

struct norm_few {
  const void *x, *residual; /* residual may be NULL: then there is no sum */
  void *sum, *out;
  const float *gain;
  int width;
  float eps;
};

/* Elements of a row that a warp holds in its registers, 8 by 8. */
constexpr int norm_few_groups = 4, norm_few_most = norm_few_groups * 32 * 8;

static inline norm_few norm_few_of(const moe_norm &n) {
  return {n.x.data,          n.residual.data, n.sum.data, n.out.data, cuda_data<float>(n.gain),
          (int)n.x.shape[1], (float)n.eps};
}

/* Whether kernels may take these rows in. */
static inline bool norm_few_fits(const moe_norm &n) {
  const void *all[] = {n.x.data, n.residual.data, n.sum.data, n.out.data, n.gain.data};
  uintptr_t bits = 0;
  for (const void *p : all) bits |= reinterpret_cast<uintptr_t>(p);
  return n.x.shape[1] % 8 == 0 && n.x.shape[1] <= norm_few_most && bits % 16 == 0;
}

/* Eight elements of a row on their way: all loads first, since a store may not be overtaken. */
template <typename T> struct norm_few_part {
  cuda_pack<T, 8> x, residual;
  float gain[8];

  /* c: the first element; at: its place in the matrix. */
  __device__ __forceinline__ void ask(const norm_few &n, int c, int64_t at) {
    x.load(static_cast<const T *>(n.x) + at);
    if (n.residual != nullptr) residual.load(static_cast<const T *>(n.residual) + at);
    load<float, 8>(gain, n.gain + c);
  }
  /* With the residual added, and rounded as it is stored. */
  __device__ __forceinline__ void add(float (&v)[8], const norm_few &n, int64_t at,
                                      bool store_sum) const {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_float(x.v[i]);
    if (n.residual == nullptr) return;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_float(from_float<T>(v[i] + to_float(residual.v[i])));
    if (store_sum) store<T, 8>(static_cast<T *>(n.sum) + at, v);
  }
  __device__ __forceinline__ void scale(float (&v)[8], float rstd) const {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = gain[i] * (v[i] * rstd);
  }
};

__device__ __forceinline__ float norm_few_rstd(const norm_few &n, float squares) {
  return 1.0f / sqrtf(squares / (float)n.width + n.eps);
}

/* By one warp: the row's sums to v, and 1 / sqrt(mean of their squares + eps). */
template <typename T, int GROUPS>
__device__ __forceinline__ float norm_few_add(const norm_few_part<T> (&part)[GROUPS],
                                              float (&v)[GROUPS][8], const norm_few &n, int64_t row,
                                              bool store_sum) {
  int first = (int)threadIdx.x % 32 * 8;
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    if (first + 256 * j >= n.width) break;
    part[j].add(v[j], n, row * n.width + first + 256 * j, store_sum);
#pragma unroll
    for (int i = 0; i < 8; i++) squares += v[j][i] * v[j][i];
  }
  return norm_few_rstd(n, warp_sum(squares));
}

/* The norm of a row to `out`, by one warp. */
template <typename T>
__device__ __forceinline__ void norm_few_row(T *out, const norm_few &n, int64_t row,
                                             bool store_sum) {
  int first = (int)threadIdx.x % 32 * 8;
  norm_few_part<T> part[norm_few_groups];
  float v[norm_few_groups][8];
#pragma unroll
  for (int j = 0; j < norm_few_groups; j++)
    if (int c = first + 256 * j; c < n.width) part[j].ask(n, c, row * n.width + c);
  float rstd = norm_few_add(part, v, n, row, store_sum);
#pragma unroll
  for (int j = 0; j < norm_few_groups; j++) {
    if (first + 256 * j >= n.width) break;
    part[j].scale(v[j], rstd);
    store<T, 8>(out + first + 256 * j, v[j]);
  }
}

#endif
