/* Hopper: plain products of the experts' rows with their matrices.
 *
 *   y  = a w2^T             w2 [e, D, F] is read as it lies: K = F runs fastest
 *   dx = dg w1 + du w3      K = 2 F runs over the rows of w13 [e, 2 F, D]: wgmma reads B transposed
 *
 * so neither needs a transposed copy of the weights. */
#include "kernels/cuda/sm90_gemm.cuh"

namespace sm90 {

template <int b_mn> struct product {
  static constexpr int N = 192, STAGES = 4, A_MN = 0, B_MN = b_mn;
  static constexpr int WIDE = 64, ACROSS = N / WIDE, BUFFER = 16 * WIDE * 2;
  static constexpr bool ROWS_ARE_K = false, FEEDS = false;
  using work = sm90_slabs<2 * BUFFER>;

  struct args : sm90_sizes {
    CUtensorMap left, weights, out_map;
    __nv_bfloat16 *out;
    int columns;
  };

  static __device__ __forceinline__ void load(const args &p, const sm90_tile &t, int k,
                                              uint32_t bar, uint32_t a, uint32_t b) {
    tma_load(a, &p.left, bar, k, t.row, 0, 0);
    if constexpr (B_MN)
      tma_load(b, &p.weights, bar, 0, k, t.column / 64, t.expert);
    else
      tma_load(b, &p.weights, bar, k, t.column, t.expert, 0);
  }

  struct epilogue {
    const args &p;
    uint32_t slabs;

    __device__ __forceinline__ epilogue(const args &p_, work &w, int place)
        : p(p_), slabs(shared_address(w.slab[place])) {}

    __device__ __forceinline__ void prepare(const sm90_tile &) {}

    __device__ __forceinline__ void finish(const sm90_tile &t, float (&acc)[2][N / 2]) {
#pragma unroll
      for (int s = 0; s < 2 * ACROSS; s++) {
        int h = s / ACROSS, top = h * 64 + warp_of_group() * 16, rows = t.rows - top;
        int column = t.column + s % ACROSS * WIDE;
        int64_t row = t.row + top;
        uint32_t slab = slabs + s % 2 * BUFFER;
        slab_free<2>();
#pragma unroll
        for (int c = 0; c < WIDE / 16; c++) {
          const float *v = acc[h] + s % ACROSS * (WIDE / 2) + 8 * c;
          uint32_t b[4];
#pragma unroll
          for (int i = 0; i < 4; i++) b[i] = pack<__nv_bfloat16>(v[2 * i], v[2 * i + 1]);
          store_blocks(slab_blocks<128>(slab, c), b);
        }
        slab_written();
        if (rows < 16)
          slab_rows<128, WIDE>(slab, rows, p.columns - column, p.out + row * p.columns + column,
                               p.columns);
        else if (lane_of_warp() == 0)
          tma_store(&p.out_map, slab, column, (int)row, 0, 0);
        slab_sent();
      }
    }
  };
};

/* out [C, n] = left [C, k] times each row's expert's matrix, described by `weights`. */
template <int b_mn>
static moe_status multiply_rows(moe_device *dev, moe_tensor left, moe_tensor offsets,
                                const sm90_view &weights, moe_tensor out) {
  using op = product<b_mn>;
  int64_t rows = left.shape[0], k = left.shape[1], n = out.shape[1];
  typename op::args p = {};
  static_cast<sm90_sizes &>(p) = {
      cuda_data<int32_t>(offsets), (int)offsets.shape[0] - 1, (int)rows, 0,
      (int)div_up(n, op::N),       (int)div_up(k, SM90_K)};
  p.out = cuda_data<__nv_bfloat16>(out);
  p.columns = (int)n;
  MOE_TRY(sm90_map(dev, &p.left,
                   {left.data, MOE_BF16, {k, rows, 1, 1}, {k}, {SM90_K, SM90_M, 1, 1}, 128}));
  MOE_TRY(sm90_map(dev, &p.weights, weights));
  MOE_TRY(sm90_map(dev, &p.out_map,
                   {out.data, MOE_BF16, {n, rows, 1, 1}, {n}, {op::WIDE, 16, 1, 1}, 128}));
  return sm90_launch<op>(dev, p);
}

} // namespace sm90

moe_status sm90_expert_down(moe_device *dev, moe_tensor a, moe_tensor offsets, moe_tensor w2,
                            moe_tensor y) {
  int64_t e = w2.shape[0], d = w2.shape[1], f = w2.shape[2];
  int box = sm90::product<0>::N;
  return sm90::multiply_rows<0>(
      dev, a, offsets, {w2.data, MOE_BF16, {f, d, e, 1}, {f, d * f}, {SM90_K, box, 1, 1}, 128}, y);
}

moe_status sm90_expert_up_backward(moe_device *dev, moe_tensor dgu, moe_tensor offsets,
                                   moe_tensor w13, moe_tensor dx) {
  int64_t e = w13.shape[0], f2 = dgu.shape[1], d = dx.shape[1];
  int parts = sm90::product<1>::N / 64;
  return sm90::multiply_rows<1>(
      dev, dgu, offsets,
      {w13.data, MOE_BF16, {64, f2, d / 64, e}, {d, 64, f2 * d}, {64, SM90_K, parts, 1}, 128}, dx);
}
