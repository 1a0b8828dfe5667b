/* A matrix product of our own: any types, any sizes, float32 sums in a fixed order.
 *
 * It serves where cuBLASLt does not: the router (act times float32, a skinny result), types a GPU's
 * cuBLAS lacks, and tests. A block computes a BM x BN tile of c from 16-deep slices of a and b in
 * shared memory; a thread owns TM x TN results. Slices of the next step are read into registers
 * while this step computes. With blockIdx.z > 0 the sum over k is split and each part written to
 * `partial`, to be added in order by tiled_sum_kernel. */
#ifndef MOE_KERNELS_CUDA_TILED_CUH
#define MOE_KERNELS_CUDA_TILED_CUH

#include "kernels/cuda/common.cuh"

/* An operand as seen by the product: element (row, k) at data[row * row_step + k * k_step], one of
 * the steps being 1. */
template <typename T> struct tiled_operand {
  const T *data;
  int64_t rows, row_step, k_step;
};

constexpr int tile_depth = 16;

/* This thread's part of one slice: ROWS x tile_depth elements over THREADS threads. */
template <typename T, int ROWS, int THREADS> struct tiled_slice {
  static constexpr int each = ROWS * tile_depth / THREADS;
  static_assert(each * THREADS == ROWS * tile_depth, "the slice divides over the threads");
  float v[each];

  /* Neighbouring threads read neighbouring memory, whichever step is 1. */
  static __device__ __forceinline__ void place(const tiled_operand<T> &o, int i, int *row, int *k) {
    int at = i * THREADS + (int)threadIdx.x;
    *row = o.k_step == 1 ? at / tile_depth : at % ROWS;
    *k = o.k_step == 1 ? at % tile_depth : at / ROWS;
  }
  __device__ __forceinline__ void read(const tiled_operand<T> &o, int64_t row0, int64_t k0,
                                       int64_t k_end) {
#pragma unroll
    for (int i = 0; i < each; i++) {
      int row, k;
      place(o, i, &row, &k);
      bool inside = row0 + row < o.rows && k0 + k < k_end;
      v[i] = inside ? to_float(o.data[(row0 + row) * o.row_step + (k0 + k) * o.k_step]) : 0.0f;
    }
  }
  __device__ __forceinline__ void write(const tiled_operand<T> &o,
                                        float (&shared)[tile_depth][ROWS + 1]) const {
#pragma unroll
    for (int i = 0; i < each; i++) {
      int row, k;
      place(o, i, &row, &k);
      shared[k][row] = v[i];
    }
  }
};

template <typename A, typename B, typename C> struct tiled_problem {
  tiled_operand<A> a;
  tiled_operand<B> b;
  C *c;
  int64_t ldc, k, k_part; /* k_part: how much of k one blockIdx.z takes */
  float beta;
  float *partial; /* [gridDim.z, m, n] when gridDim.z > 1 */
};

template <typename A, typename B, typename C, int BM, int BN, int TM, int TN>
__global__ void __launch_bounds__(BM *BN / (TM * TN))
    tiled_kernel(const __grid_constant__ tiled_problem<A, B, C> p) {
  constexpr int threads = BM * BN / (TM * TN);
  __shared__ float as[tile_depth][BM + 1], bs[tile_depth][BN + 1];
  tiled_slice<A, BM, threads> a;
  tiled_slice<B, BN, threads> b;
  int64_t row0 = (int64_t)blockIdx.x * BM, col0 = (int64_t)blockIdx.y * BN;
  int64_t k0 = (int64_t)blockIdx.z * p.k_part;
  int64_t k_end = k0 + p.k_part < p.k ? k0 + p.k_part : p.k;
  int tx = (int)threadIdx.x % (BN / TN), ty = (int)threadIdx.x / (BN / TN);
  float sum[TM][TN] = {};

  a.read(p.a, row0, k0, k_end);
  b.read(p.b, col0, k0, k_end);
  for (; k0 < k_end; k0 += tile_depth) {
    __syncthreads();
    a.write(p.a, as);
    b.write(p.b, bs);
    __syncthreads();
    a.read(p.a, row0, k0 + tile_depth, k_end);
    b.read(p.b, col0, k0 + tile_depth, k_end);
    float part[TM][TN] = {}; /* summed apart: long sums lose fewer bits in two levels */
#pragma unroll
    for (int k = 0; k < tile_depth; k++) {
      float x[TM], y[TN];
#pragma unroll
      for (int i = 0; i < TM; i++) x[i] = as[k][ty + i * (BM / TM)];
#pragma unroll
      for (int j = 0; j < TN; j++) y[j] = bs[k][tx + j * (BN / TN)];
#pragma unroll
      for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++) part[i][j] = fmaf(x[i], y[j], part[i][j]);
    }
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
      for (int j = 0; j < TN; j++) sum[i][j] += part[i][j];
  }
#pragma unroll
  for (int i = 0; i < TM; i++)
#pragma unroll
    for (int j = 0; j < TN; j++) {
      int64_t row = row0 + ty + i * (BM / TM), col = col0 + tx + j * (BN / TN);
      if (row >= p.a.rows || col >= p.b.rows) continue;
      if (p.partial != nullptr) {
        p.partial[((int64_t)blockIdx.z * p.a.rows + row) * p.b.rows + col] = sum[i][j];
      } else {
        C *c = p.c + row * p.ldc + col;
        *c = from_float<C>(p.beta != 0.0f ? sum[i][j] + p.beta * to_float(*c) : sum[i][j]);
      }
    }
}

/* c = sum over parts, in order, + beta c. */
template <typename C>
__global__ void tiled_sum_kernel(const float *partial, int parts, int64_t m, int64_t n, float beta,
                                 C *c, int64_t ldc) {
  int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < m * n; i += step) {
    float sum = 0;
    for (int part = 0; part < parts; part++) sum += partial[part * m * n + i];
    C *to = c + i / n * ldc + i % n;
    *to = from_float<C>(beta != 0.0f ? sum + beta * to_float(*to) : sum);
  }
}

/* Into how many parts to split k so that the tiles fill the chip and the parts fit `partial`. */
static inline int tiled_parts(const moe_device *dev, int64_t tiles, int64_t m, int64_t n,
                              int64_t k) {
  const cuda_state *s = cuda_of(dev);
  int64_t parts = 4 * s->sms / (tiles > 0 ? tiles : 1);
  int64_t by_depth = k / (8 * tile_depth), fits = s->partial_bytes / (4 * m * n);
  if (parts > by_depth) parts = by_depth;
  if (parts > fits) parts = fits;
  if (parts > 256) parts = 256;
  return parts < 2 ? 1 : (int)parts;
}

template <typename A, typename B, typename C, int BM, int BN, int TM, int TN>
static moe_status tiled_launch(moe_device *dev, tiled_problem<A, B, C> p) {
  cuda_state *s = cuda_of(dev);
  int64_t m = p.a.rows, n = p.b.rows;
  dim3 grid((unsigned)div_up(m, BM), (unsigned)div_up(n, BN));
  if (grid.y > 65535)
    return moe_fail(MOE_INVALID, "cuda: a product with %lld columns is beyond the own kernel",
                    (long long)n);
  int parts = tiled_parts(dev, (int64_t)grid.x * grid.y, m, n, p.k);
  p.k_part = round_up(div_up(p.k, parts), tile_depth);
  parts = p.k > 0 ? (int)div_up(p.k, p.k_part) : 1;
  grid.z = (unsigned)parts;
  p.partial = parts > 1 ? reinterpret_cast<float *>(s->partial) : nullptr;
  tiled_kernel<A, B, C, BM, BN, TM, TN><<<grid, BM * BN / (TM * TN), 0, s->stream>>>(p);
  CUDA_LAUNCHED(dev);
  if (parts == 1) return MOE_OK;
  tiled_sum_kernel<C><<<cuda_blocks(dev, m * n, 128), 128, 0, s->stream>>>(p.partial, parts, m, n,
                                                                           p.beta, p.c, p.ldc);
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}

/* c [m, n] = form(a, b) + beta c, all by the own kernel. Narrow results get narrow tiles. */
template <typename A, typename B, typename C>
static moe_status tiled_matmul(moe_device *dev, moe_gemm_form form, int64_t m, int64_t n, int64_t k,
                               const A *a, int64_t lda, const B *b, int64_t ldb, float beta, C *c,
                               int64_t ldc) {
  tiled_problem<A, B, C> p = {};
  p.a = {a, m, form == MOE_TN ? 1 : lda, form == MOE_TN ? lda : 1};
  p.b = {b, n, form == MOE_NT ? ldb : 1, form == MOE_NT ? 1 : ldb};
  p.c = c;
  p.ldc = ldc;
  p.k = k;
  p.beta = beta;
  if (n <= 16) return tiled_launch<A, B, C, 64, 16, 4, 2>(dev, p);
  if (m <= 16) return tiled_launch<A, B, C, 16, 64, 2, 4>(dev, p);
  return tiled_launch<A, B, C, 64, 64, 4, 4>(dev, p);
}

#endif
