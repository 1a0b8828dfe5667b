/* Hopper: [g | u] = x w13^T and a = gate silu(g) u in one kernel.
 *
 * A tile is 128 rows by 96 columns of g and the same 96 of u: the two weight matrices' rows lie
 * under one another in shared memory, so one wgmma makes both and each thread finds a g and its u
 * in its own registers. What is stored is g, u and a, a made of g and u as they are stored,
 * rounded, so that the backward pass makes the same a from them; or a and its derivatives, each
 * rounded once. Source: Shazeer 2020, arXiv:2002.05202. */
#include "kernels/cuda/sm90_gemm.cuh"
#include "kernels/cuda/swiglu.cuh"

namespace sm90 {

template <bool SLOPES> struct up {
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

    /* Round 16 x 96 values on the way to the slab, in the accumulators too. */
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
    static __device__ __forceinline__ float activation(float gate, float &g, float &u) {
      if constexpr (SLOPES) return swiglu_slopes<__nv_bfloat16>(gate, &g, &u);
      return swiglu<__nv_bfloat16>(gate, g, u);
    }
    /* a; where slopes are wanted g and u become them. */
    static __device__ __forceinline__ void put_a(uint32_t slab, float *g, float *u,
                                                 const float (&gate)[2]) {
#pragma unroll
      for (int c = 0; c < WIDE / 16; c++) {
        uint32_t b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int at = 8 * c + 2 * i;
          float a0 = activation(gate[i % 2], g[at], u[at]);
          float a1 = activation(gate[i % 2], g[at + 1], u[at + 1]);
          b[i] = pack<__nv_bfloat16>(a0, a1);
        }
        store_blocks(slab_blocks<64>(slab, c), b);
      }
    }

    /* The warp's 16 rows of half h: of g or its slope (part 0), of u or its (1), of a (2). */
    __device__ __forceinline__ void leave(const sm90_tile &t, int h, int part, uint32_t slab,
                                          float (&acc)[N / 2]) {
      int top = h * 64 + warp_of_group() * 16, rows = t.rows - top, column = t.column / N * WIDE;
      int64_t row = t.row + top;
      slab_free<2>();
      if (part < 2) {
        put(slab, acc + part * (WIDE / 2));
      } else {
        float gate[2] = {gates_pick(fetched, h, 0), gates_pick(fetched, h, 1)};
        put_a(slab, acc, acc + WIDE / 2, gate);
      }
      slab_written();
      if (rows < 16)
        slab_rows<64, WIDE>(slab, rows, p.ffn - column,
                            (part < 2 ? p.gu + (row * 2 + part) * p.ffn : p.a + row * p.ffn) +
                                column,
                            part < 2 ? 2 * p.ffn : p.ffn);
      else if (lane_of_warp() == 0)
        tma_store(part < 2 ? &p.gu_map : &p.a_map, slab, 0, (int)row, column / 32, part % 2);
      slab_sent();
    }

    __device__ __forceinline__ void finish(const sm90_tile &t, float (&acc)[2][N / 2]) {
#pragma unroll
      for (int i = 0; i < 6;
           i++) /* a before the slopes that take its operands' place, else after */
        leave(t, i / 3, SLOPES ? (i + 2) % 3 : i % 3, slabs + i % 2 * BUFFER, acc[i / 3]);
    }
  };
};

} // namespace sm90

template <bool SLOPES>
static moe_status launch(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                         moe_tensor gates, moe_tensor gu, moe_tensor a) {
  using op = sm90::up<SLOPES>;
  int64_t rows = x.shape[0], d = x.shape[1], e = w13.shape[0], f = a.shape[1];
  typename op::args p = {};
  static_cast<sm90_sizes &>(p) = {
      cuda_data<int32_t>(offsets), (int)e, (int)rows, 0, (int)div_up(f, op::WIDE),
      (int)div_up(d, SM90_K)};
  p.gates = cuda_data<float>(gates);
  p.gu = cuda_data<__nv_bfloat16>(gu);
  p.a = cuda_data<__nv_bfloat16>(a);
  p.ffn = (int)f;
  MOE_TRY(
      sm90_map(dev, &p.x, {x.data, MOE_BF16, {d, rows, 1, 1}, {d}, {SM90_K, SM90_M, 1, 1}, 128}));
  MOE_TRY(sm90_map(
      dev, &p.w13,
      {w13.data, MOE_BF16, {d, f, 2, e}, {d, f * d, 2 * f * d}, {SM90_K, op::WIDE, 2, 1}, 128}));
  MOE_TRY(sm90_map(
      dev, &p.gu_map,
      {gu.data, MOE_BF16, {32, rows, f / 32, 2}, {2 * f, 32, f}, {32, 16, op::WIDE / 32, 1}, 64}));
  MOE_TRY(
      sm90_map(dev, &p.a_map,
               {a.data, MOE_BF16, {32, rows, f / 32, 1}, {f, 32}, {32, 16, op::WIDE / 32, 1}, 64}));
  return sm90_launch<op>(dev, p);
}

moe_status sm90_expert_up(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                          moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a) {
  return (kind == MOE_GU_SLOPES ? launch<true> : launch<false>)(dev, x, offsets, w13, gates, gu, a);
}
