/* Hopper: da = dy w2 and SwiGLU's derivative in one kernel; g, u become dg, du in place.
 *
 * The one product of the experts that is bound by memory: per routed row it moves 10 F bytes, 8
 * where the forward's a is not wanted again, and multiplies 2 D F times. So a second producer
 * brings g and u, 64 rows and columns at a time, while the tile's products still run; dg, du and a
 * leave from the same slots of shared memory. What passes once would drive w2 out of the cache, so
 * that is told to keep it; then few tiles down before the next to the right are best: whole rows of
 * g and u pass at about the same time. The gates' gradients are sums over all columns: each
 * tile leaves its part in scratch memory and a second, small kernel adds the parts in order.
 * Where the forward pass left slopes in place of g and u two multiplications an element are all
 * there is to do, and the gates' gradients are not made here.
 * Source: Shazeer 2020, arXiv:2002.05202. */
#include "kernels/cuda/sm90_gemm.cuh"
#include "kernels/cuda/swiglu.cuh"

namespace sm90 {

/* Where a is not wanted again its room lets tiles be wider, which read dy less often. */
template <moe_gu_kind KIND> struct down_backward {
  static constexpr bool REMAKE = KIND == MOE_GU_VALUES, SLOPES = KIND == MOE_GU_SLOPES;
  static constexpr int N = REMAKE ? 128 : 192, STAGES = 4, A_MN = 0, B_MN = 1;
  static constexpr bool ROWS_ARE_K = false, FEEDS = true;
  static constexpr int DOWN = 8;                      /* tiles before the next to the right */
  static constexpr int WIDE = 64, ACROSS = N / WIDE;  /* a piece's columns, pieces across a tile */
  static constexpr int PIECES = SM90_M / 64 * ACROSS; /* of a tile */
  static constexpr int RING = 4;                      /* slots, which the pieces take by turns */
  static constexpr int PART = 16 * WIDE * 2;          /* bytes of a warp's part of a tensor */
  static constexpr int PARTS = REMAKE ? 3 : 2;        /* g, u and where wanted a */
  static constexpr int BLOCK = 4 * PART, SLOT = PARTS * BLOCK; /* of a tensor's, of all */

  struct args : sm90_sizes {
    CUtensorMap dy, w2, gu_in, gu_out, a_out;
    const float *gates;
    float *dgates; /* [n_tiles, C] */
    __nv_bfloat16 *gu, *a;
    int ffn;
  };

  /* The warps of the group that has the tile turn 16 rows each of a piece into dg, du and a, and
   * send them off. */
  struct work {
    char slot[RING][SLOT];
    uint64_t full[2 * PIECES]; /* g and u are there. A group has its own: it might take the other's
                                  piece, which comes before in the same slot, for its own */
    uint64_t empty[RING];      /* what became of them has been read */
    __device__ __forceinline__ void begin() {
      for (int i = 0; i < 2 * PIECES; i++) barrier_init(shared_address(&full[i]), 1);
      for (int i = 0; i < RING; i++) barrier_init(shared_address(&empty[i]), 4);
    }
    __device__ __forceinline__ uint32_t full_of(const sm90_tile &t, int piece) {
      return shared_address(&full[t.number % 2 * PIECES + piece]);
    }
  };

  /* Of all the block's pieces; the remainder by RING is its slot. */
  static __device__ __forceinline__ uint32_t place_of(const sm90_tile &t, int piece) {
    return (uint32_t)(t.number * PIECES + piece);
  }

  static __device__ __forceinline__ void load(const args &p, const sm90_tile &t, int k,
                                              uint32_t bar, uint32_t a, uint32_t b) {
    tma_load(a, &p.dy, bar, k, t.row, 0, 0);
    tma_load_kept(b, &p.w2, bar, 0, k, t.column / 64, t.expert);
  }

  static __device__ __forceinline__ void feed(const args &p, work &w, const sm90_tile &t) {
    for (int i = 0; i < PIECES; i++) {
      uint32_t place = place_of(t, i), slot = place % RING, full = w.full_of(t, i);
      barrier_wait(shared_address(&w.empty[slot]), (place / RING + 1) & 1);
      barrier_expect(full, 2 * BLOCK);
      tma_load(shared_address(w.slot[slot]), &p.gu_in, full, t.column + i % ACROSS * WIDE,
               t.row + i / ACROSS * 64, 0, 0);
    }
  }

  struct epilogue {
    const args &p;
    work &w;
    float fetched; /* gates */

    __device__ __forceinline__ epilogue(const args &p_, work &w_, int)
        : p(p_), w(w_), fetched(0.0f) {}

    __device__ __forceinline__ void prepare(const sm90_tile &t) {
      if constexpr (!SLOPES) fetched = gates_fetch(p.gates, t);
    }

    /* 16 x 16 elements of da, g and u: g, u become dg, du, and a is found. sum: of da silu(g) u in
     * rows lane / 4 and 8 below. */
    static __device__ __forceinline__ void derive(const float *da, uint32_t (&g)[4],
                                                  uint32_t (&u)[4], uint32_t (&a)[4],
                                                  const float (&gate)[2], float (&sum)[2]) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float g0 = low(g[i]), g1 = high(g[i]), u0 = low(u[i]), u1 = high(u[i]);
        float a0 = swiglu_backward<__nv_bfloat16>(gate[i % 2], da[2 * i], &g0, &u0, &sum[i % 2]);
        float a1 =
            swiglu_backward<__nv_bfloat16>(gate[i % 2], da[2 * i + 1], &g1, &u1, &sum[i % 2]);
        g[i] = pack<__nv_bfloat16>(g0, g1), u[i] = pack<__nv_bfloat16>(u0, u1),
        a[i] = pack<__nv_bfloat16>(a0, a1);
      }
    }

    /* The same of slopes. */
    static __device__ __forceinline__ void apply(const float *da, uint32_t (&g)[4],
                                                 uint32_t (&u)[4]) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float d0 = da[2 * i], d1 = da[2 * i + 1];
        g[i] = pack<__nv_bfloat16>(d0 * low(g[i]), d1 * high(g[i]));
        u[i] = pack<__nv_bfloat16>(d0 * low(u[i]), d1 * high(u[i]));
      }
    }

    /* The warp's part of a piece: `at` its g, da 16 x 64. */
    static __device__ __forceinline__ void turn(uint32_t at, const float *da,
                                                const float (&gate)[2], float (&sum)[2]) {
      uint32_t g[2][4], u[2][4];
      load_matrices(g[0], slab_blocks<128>(at, 0));
      load_matrices(u[0], slab_blocks<128>(at + BLOCK, 0));
#pragma unroll
      for (int c = 0; c < WIDE / 16; c++) {
        uint32_t a[4];
        if (c + 1 < WIDE / 16) { /* before this one's stores, which the compiler keeps in order */
          load_matrices(g[(c + 1) % 2], slab_blocks<128>(at, c + 1));
          load_matrices(u[(c + 1) % 2], slab_blocks<128>(at + BLOCK, c + 1));
        }
        if constexpr (SLOPES)
          apply(da + 8 * c, g[c % 2], u[c % 2]);
        else
          derive(da + 8 * c, g[c % 2], u[c % 2], a, gate, sum);
        store_blocks(slab_blocks<128>(at, c), g[c % 2]);
        store_blocks(slab_blocks<128>(at + BLOCK, c), u[c % 2]);
        if constexpr (REMAKE) store_blocks(slab_blocks<128>(at + 2 * BLOCK, c), a);
      }
    }

    __device__ __forceinline__ void send(const sm90_tile &t, int piece, uint32_t at) {
      int top = piece / ACROSS * 64 + warp_of_group() * 16, rows = t.rows - top,
          column = t.column + piece % ACROSS * WIDE;
      int64_t row = t.row + top;
      slab_written();
      if (rows < 16) {
#pragma unroll 1
        for (int part = 0; part < PARTS; part++)
          slab_rows<128, WIDE>(at + part * BLOCK, rows, p.ffn - column,
                               (part < 2 ? p.gu + (row * 2 + part) * p.ffn : p.a + row * p.ffn) +
                                   column,
                               part < 2 ? 2 * p.ffn : p.ffn);
      } else if (lane_of_warp() == 0) {
        tma_store(&p.gu_out, at, column, (int)row, 0, 0);
        tma_store(&p.gu_out, at + BLOCK, column, (int)row, 1, 0);
        if constexpr (REMAKE) tma_store(&p.a_out, at + 2 * BLOCK, column, (int)row, 0, 0);
      }
      slab_sent();
    }

    /* When all but the newest LATER pieces that were sent have been read: this one's slot is free
     * again. */
    template <int LATER> __device__ __forceinline__ void release(const sm90_tile &t, int piece) {
      if (lane_of_warp() != 0) return;
      tma_wait_read<LATER>();
      barrier_arrive(shared_address(&w.empty[place_of(t, piece) % RING]));
    }

    /* The tile's part of the gates' gradients. */
    __device__ __forceinline__ void leave_sums(const sm90_tile &t, int h, float (&sum)[2]) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int row = h * 64 + warp_of_group() * 16 + lane_of_warp() / 4 + i * 8;
        sum[i] = quad_reduce(sum[i], op_sum{});
        if (lane_of_warp() % 4 == 0 && row < t.rows)
          p.dgates[(int64_t)(t.column / N) * p.rows + t.row + row] = sum[i];
      }
    }

    __device__ __forceinline__ void finish(const sm90_tile &t, float (&acc)[2][N / 2]) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float gate[2] = {}, sum[2] = {};
        if constexpr (!SLOPES)
          gate[0] = gates_pick(fetched, h, 0), gate[1] = gates_pick(fetched, h, 1);
#pragma unroll
        for (int q = 0; q < ACROSS; q++) {
          int piece = h * ACROSS + q;
          uint32_t at = shared_address(w.slot[place_of(t, piece) % RING]) + warp_of_group() * PART;
          barrier_wait(w.full_of(t, piece), (uint32_t)(t.number / 2) & 1);
          turn(at, acc[h] + q * (WIDE / 2), gate, sum);
          send(t, piece, at);
          if (piece > 0) release<1>(t, piece - 1);
        }
        if constexpr (!SLOPES) leave_sums(t, h, sum);
      }
      release<0>(t, PIECES - 1);
    }
  };
};

/* dgates[row] = the sum of its tiles' parts; rows past the last segment are left alone. */
static __global__ void add_gates(const float *parts, const int32_t *offsets, int experts, int rows,
                                 int tiles, float *dgates) {
  int row = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (row >= min(offsets[experts], rows)) return;
  float sum = 0.0f;
  for (int i = 0; i < tiles; i++) sum += parts[(int64_t)i * rows + row];
  dgates[row] = sum;
}

} // namespace sm90

int64_t sm90_down_backward_scratch(int64_t rows, int64_t ffn) {
  return div_up(ffn, sm90::down_backward<MOE_GU_VALUES>::N) * rows * (int64_t)sizeof(float);
}

template <moe_gu_kind KIND>
static moe_status launch(moe_device *dev, moe_tensor dy, moe_tensor offsets, moe_tensor w2,
                         moe_tensor gates, moe_tensor gu, moe_tensor a, moe_tensor dgates) {
  using op = sm90::down_backward<KIND>;
  int64_t rows = dy.shape[0], d = dy.shape[1], e = w2.shape[0], f = a.shape[1];
  int64_t bytes = sm90_down_backward_scratch(rows, f);
  typename op::args p = {};
  static_cast<sm90_sizes &>(p) = {
      cuda_data<int32_t>(offsets), (int)e, (int)rows, 0, (int)div_up(f, op::N),
      (int)div_up(d, SM90_K)};
  p.down = op::DOWN;
  p.gates = cuda_data<float>(gates);
  p.gu = cuda_data<__nv_bfloat16>(gu);
  p.a = cuda_data<__nv_bfloat16>(a);
  p.ffn = (int)f;
  p.dgates = op::SLOPES ? nullptr : static_cast<float *>(moe_device_scratch(dev, bytes));
  if (!op::SLOPES && p.dgates == nullptr)
    return moe_fail(MOE_INVALID,
                    "expert_down_backward: %lld bytes of scratch are needed for %lld rows: plan "
                    "them with moe_expert_scratch",
                    (long long)bytes, (long long)rows);
  MOE_TRY(
      sm90_map(dev, &p.dy, {dy.data, MOE_BF16, {d, rows, 1, 1}, {d}, {SM90_K, SM90_M, 1, 1}, 128}));
  MOE_TRY(sm90_map(
      dev, &p.w2,
      {w2.data, MOE_BF16, {64, d, f / 64, e}, {f, 64, d * f}, {64, SM90_K, op::N / 64, 1}, 128}));
  MOE_TRY(sm90_map(dev, &p.gu_in,
                   {gu.data, MOE_BF16, {f, rows, 2, 1}, {2 * f, f}, {op::WIDE, 64, 2, 1}, 128}));
  MOE_TRY(sm90_map(dev, &p.gu_out,
                   {gu.data, MOE_BF16, {f, rows, 2, 1}, {2 * f, f}, {op::WIDE, 16, 1, 1}, 128}));
  MOE_TRY(
      sm90_map(dev, &p.a_out, {a.data, MOE_BF16, {f, rows, 1, 1}, {f}, {op::WIDE, 16, 1, 1}, 128}));
  MOE_TRY(sm90_launch<op>(dev, p));
  if (op::SLOPES) return MOE_OK;
  sm90::add_gates<<<(unsigned)div_up(rows, 256), 256, 0, cuda_of(dev)->stream>>>(
      p.dgates, p.offsets, p.experts, p.rows, p.n_tiles, cuda_data<float>(dgates));
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}

moe_status sm90_expert_down_backward(moe_device *dev, moe_tensor dy, moe_tensor offsets,
                                     moe_tensor w2, moe_tensor gates, moe_gu_kind kind,
                                     moe_tensor gu, moe_tensor a, moe_tensor dgates) {
  auto make = kind == MOE_GU_SLOPES  ? launch<MOE_GU_SLOPES>
              : kind == MOE_GU_AND_A ? launch<MOE_GU_AND_A>
                                     : launch<MOE_GU_VALUES>;
  return make(dev, dy, offsets, w2, gates, gu, a, dgates);
}
