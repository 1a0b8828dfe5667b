/* Hopper: da = dy w2 and SwiGLU's derivative in one kernel; g, u become dg, du in place.
 *
 * The one product of the experts that is bound by memory: per routed row it moves 10 F bytes and
 * multiplies 2 D F times. So each consumer warp brings its own g and u (16 rows by 64 columns at a
 * time) through two slots of shared memory, the first two before its products begin, and dg, du and
 * a leave from the same slots. The gates' gradients are sums over all columns: each tile leaves its
 * part in scratch memory and a second, small kernel adds the parts in order.
 * Source: Shazeer 2020, arXiv:2002.05202. */
#include "kernels/cuda/sm90_gemm.cuh"
#include "kernels/cuda/swiglu.cuh"

namespace sm90 {

struct down_backward {
  static constexpr int N = 192, STAGES = 3, A_MN = 0, B_MN = 1;
  static constexpr int WIDE = 64,
                       PART = 16 * WIDE * 2; /* a slab's columns; bytes of one tensor's */
  static constexpr int SLOT = 3 * PART, SLAB = 2 * SLOT;      /* g, u, a */
  static constexpr int ACROSS = N / WIDE, STEPS = 2 * ACROSS; /* slabs of a warp's part of a tile */
  static constexpr bool ROWS_ARE_K = false;

  struct args : sm90_sizes {
    CUtensorMap dy, w2, gu_map, a_map;
    const float *gates;
    float *dgates; /* [n_tiles, C] */
    __nv_bfloat16 *gu, *a;
    int ffn;
  };

  static __device__ __forceinline__ void load(const args &p, const sm90_tile &t, int k,
                                              uint32_t bar, uint32_t a, uint32_t b) {
    tma_load(a, &p.dy, bar, k, t.row, 0, 0);
    tma_load(b, &p.w2, bar, 0, k, t.column / 64, t.expert);
  }

  struct epilogue {
    const args &p;
    uint32_t slabs, slots;
    float fetched; /* gates */

    /* Lane 0: bring step s's g and u, when what left its slot has been read. */
    __device__ __forceinline__ void fetch(const sm90_tile &t, int s) {
      barrier_expect(slots + s % 2 * 8, 2 * PART);
      tma_load(slabs + s % 2 * SLOT, &p.gu_map, slots + s % 2 * 8, t.column + s % ACROSS * WIDE,
               t.row + s / ACROSS * 64 + warp_of_group() * 16, 0, 0);
    }

    __device__ __forceinline__ void prepare(const sm90_tile &t) {
      if (lane_of_warp() == 0) {
        tma_wait_read<0>();
        fetch(t, 0);
        fetch(t, 1);
      }
      __syncwarp();
      fetched = gates_fetch(p.gates, t);
    }

    /* 16 x 16 elements at `at`: v holds da. sum: of da silu(g) u in rows lane / 4 and 8 below. */
    static __device__ __forceinline__ void derive(uint32_t at, const float *v,
                                                  const float (&gate)[2], float (&sum)[2]) {
      uint32_t g[4], u[4], a[4];
      load_blocks(g, at);
      load_blocks(u, at + PART);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float g0 = low(g[i]), g1 = high(g[i]), u0 = low(u[i]), u1 = high(u[i]);
        float a0 = swiglu_backward<__nv_bfloat16>(gate[i % 2], v[2 * i], &g0, &u0, &sum[i % 2]);
        float a1 = swiglu_backward<__nv_bfloat16>(gate[i % 2], v[2 * i + 1], &g1, &u1, &sum[i % 2]);
        g[i] = pack(g0, g1), u[i] = pack(u0, u1), a[i] = pack(a0, a1);
      }
      store_blocks(at, g);
      store_blocks(at + PART, u);
      store_blocks(at + 2 * PART, a);
    }

    __device__ __forceinline__ void send(const sm90_tile &t, int s) {
      uint32_t slab = slabs + s % 2 * SLOT;
      int top = s / ACROSS * 64 + warp_of_group() * 16, rows = t.rows - top,
          column = t.column + s % ACROSS * WIDE;
      int64_t row = t.row + top;
      slab_written();
      if (rows < 16) {
#pragma unroll 1
        for (int part = 0; part < 3; part++)
          slab_rows<128, WIDE>(slab + part * PART, rows, p.ffn - column,
                               (part < 2 ? p.gu + (row * 2 + part) * p.ffn : p.a + row * p.ffn) +
                                   column,
                               part < 2 ? 2 * p.ffn : p.ffn);
      } else if (lane_of_warp() == 0) {
        tma_store(&p.gu_map, slab, column, (int)row, 0, 0);
        tma_store(&p.a_map, slab + 2 * PART, column, (int)row, 0, 0);
      }
      slab_sent();
    }

    __device__ __forceinline__ void finish(const sm90_tile &t, float (&acc)[2][N / 2]) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float gate[2] = {gates_pick(fetched, h, 0), gates_pick(fetched, h, 1)};
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int q = 0; q < ACROSS; q++) {
          int s = h * ACROSS + q;
          barrier_wait(slots + s % 2 * 8, (uint32_t)(STEPS / 2 % 2 * t.turn + s / 2) & 1);
#pragma unroll
          for (int c = 0; c < WIDE / 16; c++) {
            if (c == 2 && s > 0 && s + 1 < STEPS) { /* the slot of the step before is read by now */
              if (lane_of_warp() == 0) {
                tma_wait_read<0>();
                fetch(t, s + 1);
              }
              __syncwarp();
            }
            derive(slab_blocks<128>(slabs + s % 2 * SLOT, c), acc[h] + q * (WIDE / 2) + 8 * c, gate,
                   sum);
          }
          send(t, s);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int row = h * 64 + warp_of_group() * 16 + lane_of_warp() / 4 + i * 8;
          sum[i] += __shfl_xor_sync(full_warp, sum[i], 1);
          sum[i] += __shfl_xor_sync(full_warp, sum[i], 2);
          if (lane_of_warp() % 4 == 0 && row < t.rows)
            p.dgates[(int64_t)(t.column / N) * p.rows + t.row + row] = sum[i];
        }
      }
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
  return div_up(ffn, sm90::down_backward::N) * rows * (int64_t)sizeof(float);
}

moe_status sm90_expert_down_backward(moe_device *dev, moe_tensor dy, moe_tensor offsets,
                                     moe_tensor w2, moe_tensor gates, moe_tensor gu, moe_tensor a,
                                     moe_tensor dgates) {
  using op = sm90::down_backward;
  int64_t rows = dy.shape[0], d = dy.shape[1], e = w2.shape[0], f = a.shape[1];
  int64_t bytes = sm90_down_backward_scratch(rows, f);
  op::args p = {};
  static_cast<sm90_sizes &>(p) = {
      cuda_data<int32_t>(offsets), (int)e, (int)rows, 0, (int)div_up(f, op::N),
      (int)div_up(d, SM90_K)};
  p.gates = cuda_data<float>(gates);
  p.gu = cuda_data<__nv_bfloat16>(gu);
  p.a = cuda_data<__nv_bfloat16>(a);
  p.ffn = (int)f;
  p.dgates = static_cast<float *>(moe_device_scratch(dev, bytes));
  if (p.dgates == nullptr)
    return moe_fail(MOE_INVALID,
                    "expert_down_backward: %lld bytes of scratch are needed for %lld rows: plan "
                    "them with moe_expert_scratch",
                    (long long)bytes, (long long)rows);
  MOE_TRY(
      sm90_map(dev, &p.dy, {dy.data, MOE_BF16, {d, rows, 1, 1}, {d}, {SM90_K, SM90_M, 1, 1}, 128}));
  MOE_TRY(sm90_map(
      dev, &p.w2,
      {w2.data, MOE_BF16, {64, d, f / 64, e}, {f, 64, d * f}, {64, SM90_K, op::N / 64, 1}, 128}));
  MOE_TRY(sm90_map(dev, &p.gu_map,
                   {gu.data, MOE_BF16, {f, rows, 2, 1}, {2 * f, f}, {op::WIDE, 16, 2, 1}, 128}));
  MOE_TRY(
      sm90_map(dev, &p.a_map, {a.data, MOE_BF16, {f, rows, 1, 1}, {f}, {op::WIDE, 16, 1, 1}, 128}));
  MOE_TRY(sm90_launch<op>(dev, p));
  sm90::add_gates<<<(unsigned)div_up(rows, 256), 256, 0, cuda_of(dev)->stream>>>(
      p.dgates, p.offsets, p.experts, p.rows, p.n_tiles, cuda_data<float>(dgates));
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}
