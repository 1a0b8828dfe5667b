/* Attention forward on Hopper: bf16, head size 64, by wgmma and the copy engine.
 *
 * Each of a block's three groups takes 64 queries of a head. Keys and values come in tiles of 128,
 * from the queries' own down to the first:
 *
 *     S = Q K^T        P = exp2(scale log2(e) S - peak)        O += P V        sum += P 1
 *
 *     producer    brings Q of the queries to come, and K and V through a ring of stages
 *     a group     begins the next tile's S, then this one's P V, and goes on to the exponentials
 *                 of the next when that S is there; meanwhile the others' products are made
 *
 * The tiles of all the queries that a block gets are one stream, so nothing drains in between. Two
 * blocks, a cluster, share the tiles: each brings one half to both. Where several heads read the
 * same keys, a cluster's six groups are heads. Each row is made by one group in a fixed order: the
 * same bits again.
 *
 * The exponentials cost as much time as the products, so what surrounds them is spared. The peak
 * need not be the highest score: in float32 and bf16 any number will do, exactly, that is not a
 * hundred powers of two from it. It is that of the first tile; should the sum of a later one tell
 * that it is much too low, that tile's S is made again and the peak raised.
 * Source: Shah et al. 2024, arXiv:2407.08608 (FlashAttention-3). */
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_sm90.cuh"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/launch.cuh"

namespace sm90_attention {

enum {
  QUERIES = 64, /* of a group */
  GROUPS = 3,
  CLUSTER = 2,
  UNITS = GROUPS * CLUSTER,
  FORWARD_STAGES = 4,
  FORWARD_THREADS = 128 * (GROUPS + 1),
  PART = ROWS / CLUSTER, /* rows of a tile that one block brings */
  Q_BYTES = QUERIES * HEAD * 2,
  SLAB = 16 * HEAD * 2, /* bytes of a warp's 16 rows */
  EARLY = 16,           /* of a thread's 64 exponentials, made before it waits for P V */
};
static_assert(PART == QUERIES, "the copy engine moves boxes of one size");

/* The work is numbered in units of one group: of each K/V head in each sequence (a plane), the
 * query heads that read it, for one block of queries after the other. A cluster takes UNITS
 * neighbours at a time, an item. */
struct forward_args : attention_args {
  CUtensorMap map;
  int units, planes, items; /* of a plane; in all; in all */
};

struct forward_memory {
  char k[FORWARD_STAGES][TILE], v[FORWARD_STAGES][TILE], q[2][GROUPS][Q_BYTES];
  char slab[4 * GROUPS][SLAB];
  uint64_t k_full[FORWARD_STAGES], v_full[FORWARD_STAGES], empty[FORWARD_STAGES];
  uint64_t q_full[2], q_empty[2];
};

struct forward_unit {
  int batch, head, m0; /* m0: the first query */
};

/* A cluster's stream of tiles. Items are numbered with the longest first, and dealt out to and
 * fro. */
template <bool DOCUMENTS> struct forward_stream {
  int turn = 0;            /* items so far */
  int plane = 0, unit = 0; /* of this item, and its first */
  int tile = 0, last = 0;  /* of keys; the item's last, that is lowest */

  __device__ __forceinline__ forward_unit unit_of(const forward_args &p, int group) const {
    int number = min(unit + (int)blockIdx.y * GROUPS + group, p.units - 1);
    return {plane / p.kv_heads, plane % p.kv_heads * p.rep + number % p.rep,
            number / p.rep * QUERIES};
  }

  /* To the next tile; false: there is none, and this stays. */
  __device__ __forceinline__ bool next(const forward_args &p) {
    if (tile > last) {
      tile--;
      return true;
    }
    int clusters = (int)gridDim.x, cluster = (int)blockIdx.x;
    int number = turn * clusters + (turn % 2 == 0 ? cluster : clusters - 1 - cluster);
    if (number >= p.items) return false;
    turn++;
    plane = number % p.planes;
    unit = (p.items / p.planes - 1 - number / p.planes) * UNITS;
    tile = min(unit + UNITS, p.units) - 1;
    tile = tile / p.rep * QUERIES / ROWS;
    if constexpr (DOCUMENTS) last = first_key(p, plane / p.kv_heads, unit / p.rep * QUERIES) / ROWS;
    return true;
  }
  /* Where this item's Q lies, and the parity of its phase there. */
  __device__ __forceinline__ int buffer() const {
    return (turn - 1) & 1;
  }
  __device__ __forceinline__ uint32_t parity() const {
    return (uint32_t)(turn - 1) / 2 & 1;
  }
};

template <bool DOCUMENTS>
__device__ __forceinline__ void produce(const forward_args &p, forward_memory &s) {
  sm90_ring<FORWARD_STAGES> ring;
  forward_stream<DOCUMENTS> at;
  for (int turn = 0; at.next(p); ring.next()) {
    int batch = at.plane / p.kv_heads, k_head = p.heads + at.plane % p.kv_heads;
    if (at.turn != turn) {
      turn = at.turn;
      uint32_t q_full = shared_address(&s.q_full[at.buffer()]);
      barrier_wait(shared_address(&s.q_empty[at.buffer()]), at.parity() ^ 1);
      barrier_expect(q_full, GROUPS * Q_BYTES);
      for (int g = 0; g < GROUPS; g++) {
        forward_unit u = at.unit_of(p, g);
        tma_load(shared_address(s.q[at.buffer()][g]), &p.map, q_full, 0, u.m0, u.head, u.batch);
      }
    }
    int part = (int)blockIdx.y * PART, row = at.tile * ROWS + part, all = (1 << CLUSTER) - 1;
    uint32_t k = shared_address(s.k[ring.stage]), k_full = shared_address(&s.k_full[ring.stage]);
    uint32_t v = shared_address(s.v[ring.stage]), v_full = shared_address(&s.v_full[ring.stage]);
    uint32_t to = (uint32_t)(part * HEAD * 2);
    barrier_wait(shared_address(&s.empty[ring.stage]), ring.parity ^ 1);
    barrier_expect(k_full, TILE);
    tma_load_all(k + to, &p.map, k_full, 0, row, k_head, batch, all);
    barrier_expect(v_full, TILE);
    tma_load_all(v + to, &p.map, v_full, 0, row, k_head + p.kv_heads, batch, all);
  }
}

/* The compiler may not compute ahead what depends on x. */
template <typename T> __device__ __forceinline__ T opaque(T x) {
  asm volatile("" : "+r"(x));
  return x;
}

/* One group's 64 queries. */
template <bool DOCUMENTS> struct forward_group {
  const forward_args &p;
  forward_memory &s;
  int group;
  forward_stream<DOCUMENTS> ahead; /* the next tile */
  sm90_ring<FORWARD_STAGES> ring;  /* its stage */
  forward_unit own = {};           /* this tile's queries */
  int tile = 0, buffer = 0;        /* this tile; where Q lies */
  int all_first = 0;               /* the first key that all of the queries see */
  float o[32];
  uint32_t prob[32] = {};
  float peak[2], sum[2]; /* of rows lane / 4 and 8 below */

  __device__ __forceinline__ forward_group(const forward_args &p_, forward_memory &s_, int group_)
      : p(p_), s(s_), group(group_) {}

  /* The first of the warp's 16 queries. */
  __device__ __forceinline__ int row0() const {
    return own.m0 + warp_of_group() * 16;
  }
  /* Tiles begin with the one that has the queries' own keys. */
  __device__ __forceinline__ bool fresh() const {
    return tile == own.m0 / ROWS;
  }
  /* Whether some of the queries do not see some of the keys. */
  __device__ __forceinline__ bool masked() const {
    return fresh() || (DOCUMENTS && tile * ROWS < all_first);
  }

  __device__ __forceinline__ void free(int stage) const {
    if (lane_of_warp() < CLUSTER) cluster_arrive(&s.empty[stage], lane_of_warp());
  }

  /* S of this tile again, by this warp alone. */
  __device__ __forceinline__ void scores_again(float (&v)[64]) const {
    int lane = opaque(lane_of_warp()), row = lane % 16, word = lane / 16;
    uint32_t q = shared_address(s.q[buffer][group]) + (uint32_t)(warp_of_group() * SLAB), a[4][4];
    uint32_t k = shared_address(s.k[ring.stage]);
#pragma unroll
    for (int c = 0; c < 4; c++) load_matrices(a[c], slab_at<128>(q, row, 2 * c + word));
#pragma unroll
    for (int n = 0; n < 8; n++) { /* of 16 keys */
      float low[4] = {}, high[4] = {};
#pragma unroll
      for (int c = 0; c < 4; c++) {
        uint32_t b[4];
        load_matrices(b, slab_at<128>(k + (uint32_t)(n * SLAB), row, 2 * c + word));
        mma<__nv_bfloat16>(low, a[c], b[0], b[2]);
        mma<__nv_bfloat16>(high, a[c], b[1], b[3]);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) v[8 * n + e] = low[e], v[8 * n + 4 + e] = high[e];
    }
  }

  /* Keys that a query does not see score -infinity. */
  __device__ __forceinline__ void hide(float (&v)[64]) const {
    int lane = opaque(lane_of_warp());
    int key = tile * ROWS + lane % 4 * 2, row = row0() + lane / 4;
#pragma unroll
    for (int i = 0; i < 64; i++)
      if (i / 4 * 8 + i % 2 - i / 2 % 2 * 8 > row - key) v[i] = -INFINITY;
    if constexpr (DOCUMENTS) {
      int first[2] = {first_key(p, own.batch, min(row, p.seq - 1)) - key,
                      first_key(p, own.batch, min(row + 8, p.seq - 1)) - key};
#pragma unroll
      for (int i = 0; i < 64; i++)
        if (i / 4 * 8 + i % 2 < first[i / 2 % 2]) v[i] = -INFINITY;
    }
  }

  /* The peaks rise to the highest scores, and what was summed follows. */
  template <bool FOLLOW> __device__ __forceinline__ void raise(const float (&v)[64]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < 64; i++)
        if (i / 2 % 2 == r) top = fmaxf(top, v[i]);
      top = fmaxf(peak[r], quad_max(top) * (p.scale * log2_e));
      float shrink = exp2_fast(peak[r] - top);
      peak[r] = top;
      if constexpr (!FOLLOW) continue;
      sum[r] *= shrink;
#pragma unroll
      for (int i = 0; i < 32; i++)
        if (i / 2 % 2 == r) o[i] *= shrink;
    }
  }

  /* v = P for keys FROM and so on of each thread's 64 values; t += their sums. */
  template <int FROM, int COUNT>
  __device__ __forceinline__ void soften(float (&v)[64], float (&t)[2]) const {
    float scale2 = p.scale * log2_e;
#pragma unroll
    for (int i = FROM; i < FROM + COUNT; i++) {
      v[i] = exp2_fast(fmaf(v[i], scale2, -peak[i / 2 % 2]));
      t[i / 2 % 2] += v[i];
    }
  }
  __device__ __forceinline__ void round(const float (&v)[64]) {
#pragma unroll
    for (int i = 0; i < 32; i++) prob[i] = pack<__nv_bfloat16>(v[2 * i], v[2 * i + 1]);
  }

  /* out and lse; Q is wanted no more. */
  __device__ __forceinline__ void finish() const {
    int row = row0();
    float inverse[2];
    float *lse = p.lse + ((int64_t)own.batch * p.heads + own.head) * p.seq;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float total = quad_sum(sum[r]);
      int i = row + lane_of_warp() / 4 + 8 * r;
      inverse[r] = 1.0f / total;
      if (lane_of_warp() % 4 == 0 && i < p.seq) lse[i] = (peak[r] + log2f(total)) * (1.0f / log2_e);
    }
    uint32_t slab = shared_address(s.slab[group * 4 + warp_of_group()]);
#pragma unroll
    for (int c = 0; c < HEAD / 16; c++) {
      uint32_t b[4];
#pragma unroll
      for (int e = 0; e < 4; e++)
        b[e] = pack<__nv_bfloat16>(o[8 * c + 2 * e] * inverse[e % 2],
                                   o[8 * c + 2 * e + 1] * inverse[e % 2]);
      store_blocks(slab_blocks<128>(slab, c), b);
    }
    __syncwarp();
    auto to = out_rows(p, static_cast<__nv_bfloat16 *>(p.out), own.batch, own.head);
    slab_rows<128, HEAD>(slab, min(p.seq - row, 16), HEAD, to.data + row * to.stride, to.stride);
    if (lane_of_warp() == 0) barrier_arrive(shared_address(&s.q_empty[buffer]));
  }

  /* To the item of `ahead`. */
  __device__ __forceinline__ void open() {
    own = ahead.unit_of(p, group);
    buffer = ahead.buffer();
    if constexpr (DOCUMENTS) all_first = first_key(p, own.batch, min(own.m0 + QUERIES, p.seq) - 1);
#pragma unroll
    for (int r = 0; r < 2; r++) peak[r] = -INFINITY, sum[r] = 0.0f;
  }

  /* Wait for what the next S is made of, passing over tiles after this group's queries. */
  __device__ __forceinline__ void arrived(int turn_before) {
    barrier_wait(shared_address(&s.k_full[ring.stage]), ring.parity);
    if (ahead.turn == turn_before) return;
    barrier_wait(shared_address(&s.q_full[ahead.buffer()]), ahead.parity());
    int m0 = ahead.unit_of(p, group).m0;
    while (ahead.tile > m0 / ROWS) {
      barrier_wait(shared_address(&s.v_full[ring.stage]), ring.parity);
      free(ring.stage);
      ahead.next(p);
      ring.next();
      barrier_wait(shared_address(&s.k_full[ring.stage]), ring.parity);
    }
  }

  /* prob = P of this tile, whose S is in v, while the last one's P V is on its way to o. */
  __device__ __forceinline__ void probabilities(float (&v)[64], bool any, int last_stage) {
    constexpr float most = 0x1p60f; /* of a tile's sum: beyond, the peak is too low */
    float t[2] = {};
    if (masked()) hide(v);
    if (fresh()) raise<false>(v);
    soften<0, EARLY>(v, t);
    /* t is not -0: but so the wait for P V does not come before it is known */
    uint32_t never = __float_as_uint(t[0] + t[1]) == 0x80000000u ? 1 : 0;
    barrier_wait(shared_address(&s.v_full[ring.stage]), ring.parity + never);
    wgmma_wait<0>();
    wgmma_keep(o);
    if (any) free(last_stage);
    soften<EARLY, 64 - EARLY>(v, t);
    round(v);
    if (__any_sync(full_warp, !(t[0] + t[1] < most))) {
      scores_again(v);
      if (masked()) hide(v);
      raise<true>(v);
      t[0] = t[1] = 0.0f;
      soften<0, 64>(v, t);
      round(v);
    }
    sum[0] += t[0], sum[1] += t[1];
  }

  __device__ __forceinline__ void all_tiles() {
    float v[64];
    /* Before the first tile P V, and after the last S, is made for nothing. */
    for (bool any = false;; any = true) {
      int stage = ring.stage, turn = ahead.turn, add = any && !fresh();
      bool more = ahead.next(p);
      if (more) {
        if (any) ring.next();
        arrived(turn);
      }
      score_rows(v, shared_address(s.q[ahead.buffer()][group]), shared_address(s.k[ring.stage]));
      add_rows(o, prob, shared_address(s.v[stage]), add);
      wgmma_wait<1>();
      wgmma_keep(v);
      if (!more || ahead.turn != turn) {
        wgmma_wait<0>();
        wgmma_keep(v);
        wgmma_keep(o);
        if (any) finish();
        if (!more) break;
        open();
      }
      tile = ahead.tile;
      probabilities(v, any, stage);
    }
  }
};

template <bool DOCUMENTS>
__global__ void __launch_bounds__(FORWARD_THREADS, 1)
    forward_kernel(const __grid_constant__ forward_args p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  forward_memory &s = *reinterpret_cast<forward_memory *>(memory);
  if (threadIdx.x == 0) {
    if (shared_address(memory) % 1024 != 0) __trap(); /* the swizzle counts from there */
    for (int i = 0; i < FORWARD_STAGES; i++) {
      barrier_init(shared_address(&s.k_full[i]), 1);
      barrier_init(shared_address(&s.v_full[i]), 1);
      barrier_init(shared_address(&s.empty[i]), 4 * UNITS);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(shared_address(&s.q_full[i]), 1);
      barrier_init(shared_address(&s.q_empty[i]), 4 * GROUPS);
    }
    barrier_init_fence();
  }
  cluster_meet();
  int warp = __shfl_sync(full_warp, (int)threadIdx.x / 32, 0); /* known to be one for all */
  if (warp < 4) {
    registers_fewer<24>();
    if (threadIdx.x == 0) produce<DOCUMENTS>(p, s);
  } else {
    registers_more<160>();
    forward_group<DOCUMENTS>(p, s, warp / 4 - 1).all_tiles();
  }
  cluster_meet(); /* others may still arrive here */
#endif
}

} // namespace sm90_attention

using namespace sm90_attention;

bool cuda_attention_sm90_forward_fits(const moe_device *dev, moe_attention_shape s,
                                      moe_dtype dtype) {
  return cuda_of(dev)->arch == 90 && dtype == MOE_BF16 && s.head_dim == HEAD &&
         s.batch * s.heads * div_up(s.seq, QUERIES) <= INT32_MAX / 2;
}

moe_status cuda_attention_sm90_forward(moe_device *dev, const attention_args &p) {
  forward_args args = {};
  static_cast<attention_args &>(args) = p;
  MOE_TRY(map_heads(dev, &args.map, p, p.qkv, p.heads + 2 * p.kv_heads, QUERIES));
  args.units = p.rep * (int)div_up(p.seq, QUERIES);
  args.planes = (int)p.batch * p.kv_heads;
  args.items = args.planes * (int)div_up(args.units, UNITS);
  auto kernel = p.doc_start != nullptr ? forward_kernel<true> : forward_kernel<false>;
  int most = sm90_blocks(dev) / CLUSTER;
  dim3 grid((unsigned)(args.items < most ? args.items : most), CLUSTER);
  return cuda_launch_clusters(dev, false, CLUSTER, kernel, grid, FORWARD_THREADS,
                              (int)sizeof(forward_memory), args);
}
