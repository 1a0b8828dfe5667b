/* Hopper: [g | u] = x w13^T and a = gate silu(g) u in one kernel.
 *
 * A tile is 128 rows by 96 columns of g and the same 96 of u: the two weight matrices' rows lie
 * under one another in shared memory, so one wgmma makes both and each thread finds a g and its u
 * in its own registers. a is made of g and u as they are stored, rounded, so that the backward pass
 * makes the same a from them. Source: Shazeer 2020, arXiv:2002.05202. */
#include "kernels/cuda/sm90_gemm.cuh"
#include "kernels/cuda/swiglu.cuh"

namespace sm90 {

struct up {
  static constexpr int N = 192, WIDE = N / 2, STAGES = 4, A_MN = 0, B_MN = 0;
  static constexpr int BUFFER = 16 * WIDE * 2;
  static constexpr bool ROWS_ARE_K = false, FEEDS = false;
  using work = sm90_slabs<2 * BUFFER>;

  struct args : sm90_sizes {
    CUtensorMap x, w13, gu_map, a_map;
    const float *gates;
    __nv_bfloat16 *gu, *a;
    int ffn;
  };

  static __device__ __forceinline__ void load(const args &p, const sm90_tile &t, int k,
                                              uint32_t bar, uint32_t a, uint32_t b) {
    tma_load(a, &p.x, bar, k, t.row, 0, 0);
    tma_load(b, &p.w13, bar, k, t.column / N * WIDE, 0, t.expert);
  }

  struct epilogue {
    const args &p;
    uint32_t slabs;
    float fetched; /* gates */

    __device__ __forceinline__ epilogue(const args &p_, work &w, int place)
        : p(p_), slabs(shared_address(w.slab[place])), fetched(0.0f) {}

    __device__ __forceinline__ void prepare(const sm90_tile &t) {
      fetched = gates_fetch(p.gates, t);
    }

    /* Round 16 x 96 of g or u on the way to the slab, in the accumulators too. */
    static __device__ __forceinline__ void put(uint32_t slab, float *v) {
#pragma unroll
      for (int c = 0; c < WIDE / 16; c++, v += 8) {
        uint32_t b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          b[i] = pack<__nv_bfloat16>(v[2 * i], v[2 * i + 1]);
          v[2 * i] = low(b[i]), v[2 * i + 1] = high(b[i]);
        }
        store_blocks(slab_blocks<64>(slab, c), b);
      }
    }
    static __device__ __forceinline__ void put_a(uint32_t slab, const float *g, const float *u,
                                                 const float (&gate)[2]) {
#pragma unroll
      for (int c = 0; c < WIDE / 16; c++) {
        uint32_t b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int at = 8 * c + 2 * i;
          b[i] = pack<__nv_bfloat16>(swiglu<__nv_bfloat16>(gate[i % 2], g[at], u[at]),
                                     swiglu<__nv_bfloat16>(gate[i % 2], g[at + 1], u[at + 1]));
        }
        store_blocks(slab_blocks<64>(slab, c), b);
      }
    }

    __device__ __forceinline__ void finish(const sm90_tile &t, float (&acc)[2][N / 2]) {
      int column = t.column / N * WIDE;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int top = h * 64 + warp_of_group() * 16, rows = t.rows - top;
        int64_t row = t.row + top;
        float gate[2] = {gates_pick(fetched, h, 0), gates_pick(fetched, h, 1)};
#pragma unroll
        for (int half = 0; half < 2; half++) { /* g, then u */
          uint32_t slab = slabs + (h * 3 + half) % 2 * BUFFER;
          slab_free<2>();
          put(slab, acc[h] + half * (WIDE / 2));
          slab_written();
          if (rows < 16)
            slab_rows<64, WIDE>(slab, rows, p.ffn - column,
                                p.gu + row * 2 * p.ffn + half * p.ffn + column, 2 * p.ffn);
          else if (lane_of_warp() == 0)
            tma_store(&p.gu_map, slab, 0, (int)row, column / 32, half);
          slab_sent();
        }
        uint32_t slab = slabs + (h * 3 + 2) % 2 * BUFFER;
        slab_free<2>();
        put_a(slab, acc[h], acc[h] + WIDE / 2, gate);
        slab_written();
        if (rows < 16)
          slab_rows<64, WIDE>(slab, rows, p.ffn - column, p.a + row * p.ffn + column, p.ffn);
        else if (lane_of_warp() == 0)
          tma_store(&p.a_map, slab, 0, (int)row, column / 32, 0);
        slab_sent();
      }
    }
  };
};

} // namespace sm90

moe_status sm90_expert_up(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                          moe_tensor gates, moe_tensor gu, moe_tensor a) {
  int64_t rows = x.shape[0], d = x.shape[1], e = w13.shape[0], f = a.shape[1];
  sm90::up::args p = {};
  static_cast<sm90_sizes &>(p) = {
      cuda_data<int32_t>(offsets), (int)e, (int)rows, 0, (int)div_up(f, sm90::up::WIDE),
      (int)div_up(d, SM90_K)};
  p.gates = cuda_data<float>(gates);
  p.gu = cuda_data<__nv_bfloat16>(gu);
  p.a = cuda_data<__nv_bfloat16>(a);
  p.ffn = (int)f;
  MOE_TRY(
      sm90_map(dev, &p.x, {x.data, MOE_BF16, {d, rows, 1, 1}, {d}, {SM90_K, SM90_M, 1, 1}, 128}));
  MOE_TRY(sm90_map(dev, &p.w13,
                   {w13.data,
                    MOE_BF16,
                    {d, f, 2, e},
                    {d, f * d, 2 * f * d},
                    {SM90_K, sm90::up::WIDE, 2, 1},
                    128}));
  MOE_TRY(sm90_map(dev, &p.gu_map,
                   {gu.data,
                    MOE_BF16,
                    {32, rows, f / 32, 2},
                    {2 * f, 32, f},
                    {32, 16, sm90::up::WIDE / 32, 1},
                    64}));
  MOE_TRY(sm90_map(
      dev, &p.a_map,
      {a.data, MOE_BF16, {32, rows, f / 32, 1}, {f, 32}, {32, 16, sm90::up::WIDE / 32, 1}, 64}));
  return sm90_launch<sm90::up>(dev, p);
}
