/* Hopper: the experts' weight gradients, dw[j] (+)= left_j^T right_j over expert j's rows.
 *
 * Rows are K here and neither operand has them run fastest, so wgmma reads both transposed. How
 * many k-blocks a tile has depends on the routing; which tiles there are does not. Sums leave as
 * float32 or rounded to bf16: stored, or added in memory by the copy engine, one tile for each
 * element, so the result is the same every time.
 *
 * The gradient norm wants the squares of all that is stored, and these matrices are most of what a
 * step stores: each warp sums those of its tiles on the way, which saves reading them again. */
#include "kernels/cuda/plain.h"
#include "kernels/cuda/sm90_gemm.cuh"

namespace sm90 {

/* T: of dw, float or __nv_bfloat16. */
template <typename T> struct weight_grad {
  static constexpr int N = 192, STAGES = 4, A_MN = 1, B_MN = 1;
  static constexpr int WIDE = 64, ACROSS = N / WIDE, BUFFER = 16 * WIDE * (int)sizeof(T);
  static constexpr int BOX = 128 / (int)sizeof(T); /* columns side by side */
  static constexpr bool ROWS_ARE_K = true, FEEDS = false;
  using work = sm90_slabs<2 * BUFFER>;

  struct args : sm90_sizes {
    CUtensorMap left, right, dw;
    int accumulate;
    double *squares; /* [blocks, 8] sums of the consumer warps, or NULL */
  };

  static __device__ __forceinline__ void load(const args &p, const sm90_tile &t, int k,
                                              uint32_t bar, uint32_t a, uint32_t b) {
    tma_load(a, &p.left, bar, 0, k, t.row / 64, 0);
    tma_load(b, &p.right, bar, 0, k, t.column / 64, 0);
  }

  struct epilogue {
    const args &p;
    uint32_t slabs;
    double *squares, sum; /* of this warp, so far: lane 0's */

    __device__ __forceinline__ epilogue(const args &p_, work &w, int place)
        : p(p_), slabs(shared_address(w.slab[place])), sum(0) {
      squares = p.squares != nullptr ? p.squares + 8 * blockIdx.x + place : nullptr;
      if (squares != nullptr && lane_of_warp() == 0) *squares = 0; /* there may be no tile */
    }

    __device__ __forceinline__ void prepare(const sm90_tile &) {}

    __device__ __forceinline__ void finish(const sm90_tile &t, float (&acc)[2][N / 2]) {
      if (p.accumulate && t.rows == 0) return;
      double stored = 0;
#pragma unroll
      for (int s = 0; s < 2 * ACROSS; s++) {
        int row = t.row + s / ACROSS * 64 + warp_of_group() * 16,
            column = t.column + s % ACROSS * WIDE;
        uint32_t slab = slabs + s % 2 * BUFFER;
        slab_free<2>();
        stored += (double)fill(slab, acc[s / ACROSS] + s % ACROSS * (WIDE / 2));
        slab_written();
        if (lane_of_warp() == 0) {
          if (p.accumulate)
            tma_add(&p.dw, slab, 0, row, column / BOX, t.expert);
          else
            tma_store(&p.dw, slab, 0, row, column / BOX, t.expert);
        }
        slab_sent();
      }
      if (squares == nullptr) return;
      sum += warp_sum(stored);
      if (lane_of_warp() == 0) *squares = sum;
    }

    /* 16 rows of WIDE sums, which begin at v in each lane; returns the squares of this lane's. */
    static __device__ __forceinline__ float fill(uint32_t slab, const float *v) {
      float squares = 0;
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int c = 0; c < WIDE / 16; c++) {
          uint32_t b[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            b[i] = pack<__nv_bfloat16>(v[8 * c + 2 * i], v[8 * c + 2 * i + 1]);
            squares = fmaf(low(b[i]), low(b[i]), fmaf(high(b[i]), high(b[i]), squares));
          }
          store_blocks(slab_blocks<128>(slab, c), b);
        }
      } else {
#pragma unroll
        for (int j = 0; j < WIDE / 8; j++) {
          int word = 2 * j + lane_of_warp() % 4 / 2;
          uint32_t half = (uint32_t)lane_of_warp() % 2 * 8;
          store_shared(slab_at<128>(slab, lane_of_warp() / 4, word) + half, v[4 * j], v[4 * j + 1]);
          store_shared(slab_at<128>(slab, lane_of_warp() / 4 + 8, word) + half, v[4 * j + 2],
                       v[4 * j + 3]);
#pragma unroll
          for (int i = 0; i < 4; i++) squares = fmaf(v[4 * j + i], v[4 * j + i], squares);
        }
      }
      return squares;
    }
  };
};

template <typename T>
static moe_status sum_rows(moe_device *dev, moe_tensor left, moe_tensor right, moe_tensor offsets,
                           int accumulate, moe_tensor dw, moe_tensor squares) {
  using op = weight_grad<T>;
  int64_t rows = left.shape[0], m = left.shape[1], n = right.shape[1], e = dw.shape[0];
  typename op::args p = {};
  static_cast<sm90_sizes &>(p) = {
      cuda_data<int32_t>(offsets), (int)e, (int)rows, (int)div_up(m, SM90_M),
      (int)div_up(n, op::N),       0};
  static const bool read_again = cuda_plain("squares");
  bool counts = moe_tensor_present(squares), as_stored = counts && !accumulate && !read_again;
  p.accumulate = accumulate;
  p.squares = as_stored ? reinterpret_cast<double *>(cuda_of(dev)->partial) : nullptr;
  MOE_TRY(sm90_map(
      dev, &p.left,
      {left.data, MOE_BF16, {64, rows, m / 64, 1}, {m, 64}, {64, SM90_K, SM90_M / 64, 1}, 128}));
  MOE_TRY(sm90_map(
      dev, &p.right,
      {right.data, MOE_BF16, {64, rows, n / 64, 1}, {n, 64}, {64, SM90_K, op::N / 64, 1}, 128}));
  MOE_TRY(sm90_map(dev, &p.dw,
                   {dw.data,
                    dw.dtype,
                    {op::BOX, m, n / op::BOX, e},
                    {n, op::BOX, m * n},
                    {op::BOX, 16, op::WIDE / op::BOX, 1},
                    128}));
  MOE_TRY(sm90_launch<op>(dev, p));
  if (as_stored) return cuda_add_partial(dev, p.squares, 8 * sm90_blocks(dev), squares);
  return counts ? moe_cuda_sum_squares(dev, dw, squares) : MOE_OK;
}

} // namespace sm90

moe_status sm90_expert_weight_grad(moe_device *dev, moe_tensor left, moe_tensor right,
                                   moe_tensor offsets, int accumulate, moe_tensor dw,
                                   moe_tensor squares) {
  return (dw.dtype == MOE_F32
              ? sm90::sum_rows<float>
              : sm90::sum_rows<__nv_bfloat16>)(dev, left, right, offsets, accumulate, dw, squares);
}
