/* The skeleton of Hopper's expert products: one persistent kernel, filled in by each product.
 *
 * A block holds one producer and two groups of consumers, 128 threads each. The producer brings
 * k-blocks of 64 through a ring of stages by the copy engine; the groups take whole output tiles
 * (128 x N) by turns, so that one multiplies while the other finishes its tile ("ping-pong": at
 * K = 768 the tensor cores would otherwise idle a fifth of the time). Which tiles there are is
 * read from the experts' row offsets on the device: the host waits for nothing.
 *
 * A product is a struct `Op`:
 *   N, STAGES                tile columns and ring length
 *   A_MN, B_MN               0: K runs fastest in the operand, 1: the other index does
 *   ROWS_ARE_K               weight gradients: an expert's rows are what is summed over
 *   work                     shared memory of the epilogues; begin() by one thread before all else
 *   args                     tensor maps and sizes, with the members of sm90_sizes
 *   load(args, tile, k, bar, a, b)       copy one k-block's operands (k: its first column or row)
 *   FEEDS, feed(args, work, tile)        whether and how a second producer brings what the tile's
 *                                        epilogue reads
 *   epilogue(args, work, place)          made once per consumer warp, number `place` of 8;
 *                                        prepare(tile) before the products of a tile,
 *                                        finish(tile, acc) after
 *
 * Segments may have any number of rows: what a tile holds beyond its expert's rows is computed and
 * not stored. Source: the warp-specialised kernels of CUTLASS 3 (Thakkar et al.) and DeepGEMM. */
#ifndef MOE_KERNELS_CUDA_SM90_GEMM_CUH
#define MOE_KERNELS_CUDA_SM90_GEMM_CUH

#include "kernels/cuda/sm90_ptx.cuh"

enum {
  SM90_M = 128,            /* rows of a tile */
  SM90_K = 64,             /* of a k-block: 128 bytes, the width of the swizzle */
  SM90_MOST_EXPERTS = 128, /* whose segments shared memory can hold */
  SM90_HALF = 64 * 128,    /* bytes between the two 64-row halves of A, or 64-column parts of B */
};

/* ---- host: tensor maps (experts_sm90.cu) ----------------------------------------------------- */

/* One view of device memory for the copy engine: up to four dimensions, the fastest first; stride
 * in elements (of dimensions 1 to 3; 0 where the size is 1); a box is moved at once and lies in
 * shared memory with its rows' 16-byte words permuted over `swizzle` bytes (64 or 128). */
struct sm90_view {
  void *data;
  moe_dtype dtype;
  int64_t size[4], stride[3];
  int box[4], swizzle;
};
moe_status sm90_map(moe_device *dev, CUtensorMap *out, const sm90_view &view);

__device__ __forceinline__ int lane_of_warp() {
  return (int)threadIdx.x % 32;
}
__device__ __forceinline__ int warp_of_group() {
  return (int)threadIdx.x / 32 % 4;
}

/* ---- which tiles there are ------------------------------------------------------------------- */

/* Of rows: offsets i32 [experts + 1] on the device, not beyond `rows`. m_tiles is used where rows
 * are K; k_blocks and down where they are not. */
struct sm90_sizes {
  const int32_t *offsets;
  int experts, rows, m_tiles, n_tiles, k_blocks;
  int down = 0; /* tiles down before the next to the right; 0: as tiles_down says */
};

struct sm90_tile {
  int expert, row, column; /* of its first element; row counts from the start of the buffer, or of
                              the expert's matrix where rows are K */
  int rows;                /* of the segment from `row` on; all of them where rows are K */
  int k, k_blocks;         /* the first row of the segment where rows are K, else 0 */
  int number;              /* how many tiles its block made before */
};

struct sm90_segments {
  int begin[SM90_MOST_EXPERTS + 1]; /* first row of each expert */
  int tiles[SM90_MOST_EXPERTS + 1]; /* row tiles before each expert */
  int high;                         /* tiles down before the next to the right */
};

/* Reading an operand from memory twice costs the joules of 5 % of a product. Where few tiles lie
 * side by side they are made at once, in step, and their rows read once: columns first. Else rows
 * stay in L2, of which they may have 12 MiB, while the columns' operand passes once; or the wave
 * is about square. A product may know better. */
__device__ __forceinline__ int tiles_down(const sm90_sizes &n) {
  enum { FEW = 16, SQUARE = 16, KEPT = 12 << 20, BLOCK = SM90_M * SM90_K * 2 };
  if (n.down > 0) return n.down;
  return n.n_tiles <= FEW ? 1 : max(SQUARE, KEPT / BLOCK / max(n.k_blocks, 1));
}

/* By one warp. Offsets that do not rise give empty segments. */
__device__ __forceinline__ void segments_fill(sm90_segments *s, const sm90_sizes &n) {
  int lane = lane_of_warp(), before = 0;
  for (int first = 0; first <= n.experts; first += 32) {
    int j = first + lane, begin = 0, tiles = 0;
    if (j <= n.experts) begin = min(max(n.offsets[j], 0), n.rows);
    if (j < n.experts) {
      int rows = min(max(n.offsets[j + 1], 0), n.rows) - begin;
      tiles = rows > 0 ? (rows + SM90_M - 1) / SM90_M : 0;
    }
    int sum = tiles;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      int below = __shfl_up_sync(full_warp, sum, step);
      if (lane >= step) sum += below;
    }
    if (j <= n.experts) {
      s->begin[j] = begin;
      s->tiles[j] = before + sum - tiles;
    }
    before += __shfl_sync(full_warp, sum, 31);
  }
  if (lane == 0) s->high = tiles_down(n);
}

/* Tile number `index`; false after the last. *expert: where the search begins, 0 at first; the
 * index may only rise. N: the columns of a tile. */
template <bool rows_are_k, int N>
__device__ __forceinline__ bool tile_find(const sm90_segments &s, const sm90_sizes &n, int index,
                                          int *expert, sm90_tile *t) {
  if constexpr (rows_are_k) {
    int each = n.m_tiles * n.n_tiles, j = index / each, r = index % each;
    if (j >= n.experts) return false;
    bool down = n.m_tiles <= n.n_tiles; /* the narrow side first: its operand stays in L2 */
    int rows = max(s.begin[j + 1] - s.begin[j], 0);
    *t = {j,
          (down ? r % n.m_tiles : r / n.n_tiles) * SM90_M,
          (down ? r / n.m_tiles : r % n.n_tiles) * N,
          rows,
          s.begin[j],
          (rows + SM90_K - 1) / SM90_K};
    return true;
  } else {
    int j = *expert;
    while (j < n.experts && index >= s.tiles[j + 1] * n.n_tiles) j++;
    *expert = j;
    if (j == n.experts) return false;
    int r = index - s.tiles[j] * n.n_tiles, tiles = s.tiles[j + 1] - s.tiles[j];
    int group = r / (s.high * n.n_tiles) * s.high, high = min(s.high, tiles - group);
    r -= group * n.n_tiles;
    int down = (group + r % high) * SM90_M;
    *t = {j, s.begin[j] + down, r / high * N, s.begin[j + 1] - s.begin[j] - down, 0, n.k_blocks};
    return true;
  }
}

/* ---- slabs ------------------------------------------------------------------------------------
 * 16 rows of results on their way through shared memory. GROUP bytes of each row lie together (the
 * copy engine's swizzle spans them), 16 rows after one another, then the next GROUP bytes of the
 * rows. */

/* Where a 16-byte word of a row lies. */
template <int GROUP> __device__ __forceinline__ uint32_t slab_at(uint32_t slab, int row, int word) {
  constexpr int words = GROUP / 16;
  int turn = GROUP == 128 ? row & 7 : row >> 1 & 3;
  return slab +
         (uint32_t)(word / words * 16 * GROUP + row * GROUP + (((word % words) ^ turn) << 4));
}
/* The address that this lane gives to store_blocks and load_matrices for the 16 x 16 elements that
 * begin at column 16 c. */
template <int GROUP> __device__ __forceinline__ uint32_t slab_blocks(uint32_t slab, int c) {
  int lane = lane_of_warp();
  return slab_at<GROUP>(slab, lane % 16, 2 * c + lane / 16);
}

/* Before a warp writes to one of BUFFERS slabs that it uses by turns: the copy engine has read it.
 * Each use of a slab must end in slab_sent. */
template <int BUFFERS> __device__ __forceinline__ void slab_free() {
  if (lane_of_warp() == 0) tma_wait_read<BUFFERS - 1>();
  __syncwarp();
}
/* After a warp wrote a slab, before its lane 0 hands it to the copy engine. */
__device__ __forceinline__ void slab_written() {
  async_fence();
  __syncwarp();
}
__device__ __forceinline__ void slab_sent() {
  if (lane_of_warp() == 0) tma_commit();
}
/* The last rows of a segment, fewer than 16, by ordinary stores, so that the next expert's rows
 * stay as they are: COLUMNS of each, of which `columns` exist. ld: elements per row. */
template <int GROUP, int COLUMNS>
__device__ void slab_rows(uint32_t slab, int rows, int columns, __nv_bfloat16 *to, int64_t ld) {
#pragma unroll 1
  for (int i = lane_of_warp(); i < rows * (COLUMNS / 8); i += 32) {
    int row = i / (COLUMNS / 8), word = i % (COLUMNS / 8);
    if (word * 8 < columns)
      *reinterpret_cast<uint4 *>(to + row * ld + word * 8) =
          load_shared(slab_at<GROUP>(slab, row, word));
  }
  __syncwarp();
}

/* The gates of a warp's 32 rows of a tile, one in each lane, fetched before they are wanted; then
 * that of row 64 h + 16 warp + lane / 4 + 8 i of the tile. Rows beyond the segment get 0. */
__device__ __forceinline__ float gates_fetch(const float *gates, const sm90_tile &t) {
  int lane = lane_of_warp(), row = lane / 16 * 64 + warp_of_group() * 16 + lane % 16;
  return row < t.rows ? gates[t.row + row] : 0.0f;
}
__device__ __forceinline__ float gates_pick(float fetched, int h, int i) {
  return __shfl_sync(full_warp, fetched, h * 16 + lane_of_warp() / 4 + 8 * i);
}

/* ---- the kernel ------------------------------------------------------------------------------ */

template <class Op> struct sm90_shared {
  static constexpr int STAGES = Op::STAGES, A_BYTES = SM90_M * 128, B_BYTES = Op::N * 128;
  alignas(1024) char a[STAGES][A_BYTES];
  alignas(1024) char b[STAGES][B_BYTES];
  alignas(1024) typename Op::work work;
  uint64_t full[STAGES], empty[STAGES]; /* a stage has its bytes; the consumers are done with it */
  uint64_t turn[2];                     /* a group may begin to multiply */
  sm90_segments segments;
};

/* The work of epilogues that want BYTES for each consumer warp and no more. */
template <int BYTES> struct sm90_slabs {
  char slab[8][BYTES];
  __device__ __forceinline__ void begin() {}
};

/* A place in the ring of stages, and the parity of its phase. */
template <int STAGES> struct sm90_ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void skip(int blocks) {
    stage += blocks;
    parity ^= (uint32_t)(stage / STAGES) & 1;
    stage %= STAGES;
  }
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

/* visit(tile) for each of this block's tiles. */
template <class Op, class Visit>
__device__ __forceinline__ void tiles_each(const typename Op::args &p, const sm90_segments &s,
                                           Visit visit) {
  int index = (int)blockIdx.x, expert = 0;
  sm90_tile t;
  for (int number = 0; tile_find<Op::ROWS_ARE_K, Op::N>(s, p, index, &expert, &t); number++) {
    t.number = number;
    visit(t);
    index += (int)gridDim.x;
  }
}

template <class Op>
__device__ __forceinline__ void produce(const typename Op::args &p, sm90_shared<Op> &s) {
  sm90_ring<Op::STAGES> ring;
  tiles_each<Op>(p, s.segments, [&](const sm90_tile &t) {
    for (int k = 0; k < t.k_blocks; k++, ring.next()) {
      barrier_wait(shared_address(&s.empty[ring.stage]), ring.parity ^ 1);
      barrier_expect(shared_address(&s.full[ring.stage]), s.A_BYTES + s.B_BYTES);
      Op::load(p, t, t.k + k * SM90_K, shared_address(&s.full[ring.stage]),
               shared_address(s.a[ring.stage]), shared_address(s.b[ring.stage]));
    }
  });
}

/* Rows of K from `rows` on belong to another expert: nothing of them may reach the sums. */
template <class Op>
__device__ __forceinline__ void clear_rows(sm90_shared<Op> &s, int stage, int rows, int group) {
  for (int i = (int)threadIdx.x % 128; i < (SM90_K - rows) * 8; i += 128) {
    uint32_t at = (uint32_t)(rows * 128 + i * 16);
    for (int part = 0; part < SM90_M / 64; part++)
      store_shared(shared_address(s.a[stage]) + part * SM90_HALF + at, uint4{});
    for (int part = 0; part < Op::N / 64; part++)
      store_shared(shared_address(s.b[stage]) + part * SM90_HALF + at, uint4{});
  }
  async_fence();
  warpgroup_meet(1 + group);
}

/* acc[h]: rows 64 h .. 64 h + 63 of the tile. */
template <class Op>
__device__ __forceinline__ void multiply(sm90_shared<Op> &s, const sm90_tile &t, int group,
                                         sm90_ring<Op::STAGES> *ring, float (&acc)[2][Op::N / 2]) {
  constexpr uint32_t a_step = Op::A_MN ? 16 * 128 : 32, b_step = Op::B_MN ? 16 * 128 : 32;
  bool releases = lane_of_warp() == 0;
  int last = 0;
  wgmma_keep(acc[0]);
  wgmma_keep(acc[1]);
  for (int k = 0; k < t.k_blocks; k++, ring->next()) {
    barrier_wait(shared_address(&s.full[ring->stage]), ring->parity);
    if constexpr (Op::ROWS_ARE_K) {
      int rows = t.rows - k * SM90_K;
      if (rows < SM90_K) clear_rows<Op>(s, ring->stage, rows, group);
    }
    uint64_t a = operand(shared_address(s.a[ring->stage]), SM90_HALF);
    uint64_t b = operand(shared_address(s.b[ring->stage]), SM90_HALF);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < SM90_K / 16; i++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        wgmma<Op::A_MN, Op::B_MN>(acc[h], a + ((i * a_step + h * SM90_HALF) >> 4),
                                  b + (i * b_step >> 4));
    wgmma_commit();
    wgmma_wait<1>(); /* the k-block before this one is done */
    if (k > 0 && releases) barrier_arrive(shared_address(&s.empty[last]));
    last = ring->stage;
  }
  if (releases) barrier_arrive(shared_address(&s.turn[1 - group]));
  wgmma_wait<0>();
  wgmma_keep(acc[0]);
  wgmma_keep(acc[1]);
  if (t.k_blocks > 0 && releases) barrier_arrive(shared_address(&s.empty[last]));
}

template <class Op>
__device__ __forceinline__ void consume(const typename Op::args &p, sm90_shared<Op> &s, int group) {
  typename Op::epilogue out(p, s.work, group * 4 + warp_of_group());
  sm90_ring<Op::STAGES> ring;
  tiles_each<Op>(p, s.segments, [&](const sm90_tile &t) {
    if (t.number % 2 != group) {
      ring.skip(t.k_blocks);
      return;
    }
    out.prepare(t);
    float acc[2][Op::N / 2] = {};
    /* group 0 begins: for it the phase before the first counts as ended */
    barrier_wait(shared_address(&s.turn[group]), (uint32_t)(t.number / 2 + 1 - group) & 1);
    multiply<Op>(s, t, group, &ring, acc);
    out.finish(t, acc);
  });
  if (lane_of_warp() == 0) tma_wait<0>();
}

template <class Op>
__global__ void __launch_bounds__(384, 1) sm90_kernel(const __grid_constant__ typename Op::args p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  sm90_shared<Op> &s = *reinterpret_cast<sm90_shared<Op> *>(memory);
  int warp = (int)threadIdx.x / 32;
  if (warp == 0) segments_fill(&s.segments, p);
  if (threadIdx.x == 32) {
    if (shared_address(memory) % 1024 != 0) __trap(); /* the swizzle counts from there */
    for (int i = 0; i < Op::STAGES; i++) {
      barrier_init(shared_address(&s.full[i]), 1);
      barrier_init(shared_address(&s.empty[i]), 4);
    }
    for (int i = 0; i < 2; i++) barrier_init(shared_address(&s.turn[i]), 4);
    s.work.begin();
    barrier_init_fence();
  }
  __syncthreads();
  if (warp < 4) {
    registers_fewer<40>();
    if (threadIdx.x == 0) produce<Op>(p, s);
    if constexpr (Op::FEEDS)
      if (threadIdx.x == 32)
        tiles_each<Op>(p, s.segments, [&](const sm90_tile &t) { Op::feed(p, s.work, t); });
  } else {
    registers_more<232>();
    consume<Op>(p, s, warp / 4 - 1);
  }
#endif
}

/* Blocks take tiles by turns, so there are as many as multiprocessors whatever the work, but for
 * those that are lent: a block that had to wait for one would end last, alone with its tiles. */
static inline int sm90_blocks(const moe_device *dev) {
  return cuda_of(dev)->sms - cuda_of(dev)->lent;
}

template <class Op> static moe_status sm90_launch(moe_device *dev, const typename Op::args &args) {
  int bytes = (int)sizeof(sm90_shared<Op>);
  static_assert(sizeof(sm90_shared<Op>) <= 227 * 1024, "more shared memory than a block may have");
  CUDA_TRY(dev, cudaFuncSetAttribute(sm90_kernel<Op>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     bytes));
  sm90_kernel<Op><<<(unsigned)sm90_blocks(dev), 384, (size_t)bytes, cuda_of(dev)->stream>>>(args);
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}

/* ---- the products: experts_sm90_*.cu; contracts in kernels/ops.h ----------------------------- */

moe_status sm90_expert_up(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                          moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a);
moe_status sm90_expert_down(moe_device *dev, moe_tensor a, moe_tensor offsets, moe_tensor w2,
                            moe_tensor y);
moe_status sm90_expert_down_backward(moe_device *dev, moe_tensor dy, moe_tensor offsets,
                                     moe_tensor w2, moe_tensor gates, moe_gu_kind kind,
                                     moe_tensor gu, moe_tensor a, moe_tensor dgates);
int64_t sm90_down_backward_scratch(int64_t rows, int64_t ffn);
moe_status sm90_expert_up_backward(moe_device *dev, moe_tensor dgu, moe_tensor offsets,
                                   moe_tensor w13, moe_tensor dx);
moe_status sm90_expert_weight_grad(moe_device *dev, moe_tensor left, moe_tensor right,
                                   moe_tensor offsets, int accumulate, moe_tensor dw,
                                   moe_tensor squares);

#endif
