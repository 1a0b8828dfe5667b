/* Attention backward on Hopper: bf16, head size 64, by wgmma and the copy engine.
 *
 * A block keeps 128 keys and values and lets the queries of all heads that read them pass by, 128
 * at a time, so dK and dV stay in registers until the end. Of one such tile, with rows of keys:
 *
 *     S^T = K Q^T          P^T = exp2(scale log2(e) S^T - log2(e) lse)
 *     dP^T = V dO^T       dS^T = P^T (dP^T - delta)
 *     dV += P^T dO         dK += dS^T Q         dQ += dS K
 *
 *     producer    brings Q, lse, dO, delta of the tiles to come; a ring of two stages
 *     group 0     keys 0 to 63: P and dS stay in registers, where dV and dK want them; dS goes to
 *                 shared memory too; the groups meet; dQ of queries 0 to 63 from all keys' dS
 *     group 1     keys 64 to 127, and dQ of queries 64 to 127, the same way
 *
 * While one group works on its exponentials the other multiplies, and the next tile's S^T is begun
 * before this one's dQ is added. A query's gradient comes from many blocks: it is added up in
 * memory in float32, in whatever order they come, and rounded at the end. So this is not for
 * run.deterministic. Its order in memory is that of the accumulators, 16 bytes of each thread side
 * by side. Source: Shah et al. 2024, arXiv:2407.08608 (FlashAttention-3).
 */
#include "kernels/cuda/attention_sm90.cuh"

namespace sm90_attention {

enum {
  KEYS = ROWS,    /* of a block */
  QUERIES = ROWS, /* at a time */
  STAGES = 2,
  THREADS = 384,
};

struct backward_args : attention_args {
  CUtensorMap qkv_map, dout_map;
};

struct backward_memory {
  char k[TILE], v[TILE], q[STAGES][TILE], dout[STAGES][TILE];
  char ds[2][2 * TILE]; /* [64 queries each, keys], by turns */
  float lse2[STAGES][QUERIES], delta[STAGES][QUERIES];
  uint64_t keys_full, q_full[STAGES], dout_full[STAGES], q_empty[STAGES], dout_empty[STAGES];
};

/* A block's keys, and the heads and blocks of queries that pass by. */
template <bool DOCUMENTS> struct backward_work {
  int64_t batch;
  int kv_head, part, head, heads; /* `heads` query heads from `head` on */
  int n0, begin, end;             /* first key; blocks of queries */
  int all_end;                    /* queries from n0 + KEYS on, and before this, see all the keys */

  __device__ __forceinline__ explicit backward_work(const attention_args &p) {
    part = (int)(blockIdx.x % p.parts);
    kv_head = (int)(blockIdx.x / p.parts % p.kv_heads);
    batch = blockIdx.x / p.parts / p.kv_heads;
    heads = p.rep / p.parts;
    head = kv_head * p.rep + part * heads;
    n0 = (int)blockIdx.y * KEYS; /* the longest first */
    begin = n0 / QUERIES;
    end = (p.seq + QUERIES - 1) / QUERIES;
    all_end = p.seq;
    if constexpr (DOCUMENTS) {
      int last = min(n0 + KEYS, p.seq) - 1;
      end = (end_of_queries<THREADS>(p, batch, last, last) + QUERIES - 1) / QUERIES;
      all_end = end_of_queries<THREADS>(p, batch, n0, n0);
    }
  }
  /* Whether some of the queries from m0 on do not see all keys. */
  __device__ __forceinline__ bool masked(int m0) const {
    return m0 < n0 + KEYS || (DOCUMENTS && m0 + QUERIES > all_end);
  }
  __device__ __forceinline__ int tiles() const {
    return heads * (end - begin);
  }
};

/* A tile: a block of queries of one head. */
struct backward_place {
  int head, m;
  template <class Work>
  __device__ __forceinline__ explicit backward_place(const Work &w) : head(w.head), m(w.begin) {}
  template <class Work> __device__ __forceinline__ void next(const Work &w) {
    if (++m == w.end) m = w.begin, head++;
  }
};

__device__ __forceinline__ int64_t term_at(const attention_args &p, int64_t batch, int head,
                                           int query) {
  return (batch * p.heads + head) * p.padded + query;
}

template <class Work>
__device__ __forceinline__ void produce(const backward_args &p, backward_memory &s, const Work &w) {
  uint32_t keys = shared_address(&s.keys_full);
  int batch = (int)w.batch, k_head = p.heads + w.kv_head;
  barrier_expect(keys, 2 * TILE);
  tma_load(shared_address(s.k), &p.qkv_map, keys, 0, w.n0, k_head, batch);
  tma_load(shared_address(s.v), &p.qkv_map, keys, 0, w.n0, k_head + p.kv_heads, batch);
  backward_place at(w);
  for (int number = 0; number < w.tiles(); number++, at.next(w)) {
    int stage = number % STAGES, m0 = at.m * QUERIES;
    uint32_t free = (uint32_t)(number / STAGES & 1) ^ 1;
    int64_t terms = term_at(p, w.batch, at.head, m0);
    uint32_t full = shared_address(&s.q_full[stage]);
    barrier_wait(shared_address(&s.q_empty[stage]), free);
    barrier_expect(full, TILE + QUERIES * 4);
    tma_load(shared_address(s.q[stage]), &p.qkv_map, full, 0, m0, at.head, batch);
    bulk_load(shared_address(s.lse2[stage]), p.lse2 + terms, QUERIES * 4, full);
    full = shared_address(&s.dout_full[stage]);
    barrier_wait(shared_address(&s.dout_empty[stage]), free);
    barrier_expect(full, TILE + QUERIES * 4);
    tma_load(shared_address(s.dout[stage]), &p.dout_map, full, 0, m0, at.head, batch);
    bulk_load(shared_address(s.delta[stage]), p.delta + terms, QUERIES * 4, full);
  }
}

/* One group's keys. */
template <bool DOCUMENTS> struct backward_group {
  using work = backward_work<DOCUMENTS>;
  const backward_args &p;
  backward_memory &s;
  const work &w;
  int group, thread;
  float dk[32] = {}, dv[32] = {};

  __device__ __forceinline__ backward_group(const backward_args &p_, backward_memory &s_,
                                            const work &w_, int group_)
      : p(p_), s(s_), w(w_), group(group_), thread((int)threadIdx.x % 128) {}

  /* acc [64 keys, 128 queries] = keys queries^T: S^T of K and Q, dP^T of V and dO */
  __device__ __forceinline__ void scores(float (&acc)[64], const char *keys,
                                         const char *queries) const {
    score_rows(acc, shared_address(keys) + (uint32_t)(group * SM90_HALF), shared_address(queries));
  }

  /* Keys that a query does not see have probability 0. */
  __device__ __forceinline__ void hide(float (&prob)[64], int m0) const {
    int key = w.n0 + group * 64 + warp_of_group() * 16 + lane_of_warp() / 4;
    int query = m0 + thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; i++)
      if (key + i / 2 % 2 * 8 > query + i / 4 * 8 + i % 2) prob[i] = 0.0f;
    if constexpr (DOCUMENTS) {
#pragma unroll
      for (int i = 0; i < 64; i++) {
        int first = first_key(p, w.batch, min(query + i / 4 * 8 + i % 2, p.seq - 1));
        if (key + i / 2 % 2 * 8 < first) prob[i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void probabilities(float (&v)[64], const float *lse2, int m0) const {
    float scale2 = p.scale * log2_e;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      float2 of = *reinterpret_cast<const float2 *>(lse2 + j * 8 + thread % 4 * 2);
#pragma unroll
      for (int e = 0; e < 4; e++)
        v[4 * j + e] = exp2_fast(fmaf(v[4 * j + e], scale2, e % 2 ? -of.y : -of.x));
    }
    if (w.masked(m0)) hide(v, m0);
  }

  /* This group's dS, for both. Keys lie 128 bytes apart, 64 queries side by side. */
  __device__ __forceinline__ void share(uint32_t to, const uint32_t (&ds)[32]) const {
    int lane = lane_of_warp(), key = group * 64 + warp_of_group() * 16 + lane % 16;
#pragma unroll
    for (int c = 0; c < 8; c++) {
      uint32_t v[4] = {ds[4 * c], ds[4 * c + 1], ds[4 * c + 2], ds[4 * c + 3]};
      int word = (2 * (c % 4) + lane / 16) ^ (key & 7);
      store_blocks(to + (uint32_t)(c / 4 * TILE + key * 128 + word * 16), v);
    }
    async_fence();
  }

  /* dq [64 queries, HEAD] = dS K */
  __device__ __forceinline__ void query_grad(float (&dq)[32], uint32_t ds) const {
    uint64_t a = operand(ds + (uint32_t)(group * TILE), 0), b = operand(shared_address(s.k), 0);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++)
      wgmma<1, 1>(dq, a + (i * STEP_ROWS >> 4), b + (i * STEP_ROWS >> 4), i > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ void free(uint64_t *empty) const {
    if (lane_of_warp() == 0) barrier_arrive(shared_address(empty));
  }

  /* S^T of a tile is begun at the end of the tile before, or before the first. */
  __device__ __forceinline__ void begin(float (&v)[64], int number) const {
    int stage = number % STAGES;
    barrier_wait(shared_address(&s.q_full[stage]), (uint32_t)(number / STAGES & 1));
    scores(v, s.k, s.q[stage]);
  }

  /* After the last tile, next is that tile: its S^T is made again, for nothing. */
  __device__ __forceinline__ void tile(float (&v)[64], backward_place at, int number, int next) {
    int stage = number % STAGES, m0 = at.m * QUERIES;
    float dp[64];
    barrier_wait(shared_address(&s.dout_full[stage]), (uint32_t)(number / STAGES & 1));
    scores(dp, s.v, s.dout[stage]);
    probabilities(v, s.lse2[stage], m0);
    uint32_t prob[32], ds[32];
#pragma unroll
    for (int i = 0; i < 32; i++) prob[i] = pack<__nv_bfloat16>(v[2 * i], v[2 * i + 1]);
    wgmma_wait<0>();
    wgmma_keep(dp);
#pragma unroll
    for (int j = 0; j < 16; j++) {
      float2 of = *reinterpret_cast<const float2 *>(s.delta[stage] + j * 8 + thread % 4 * 2);
#pragma unroll
      for (int i = 2 * j; i < 2 * j + 2; i++)
        ds[i] = pack<__nv_bfloat16>(v[2 * i] * (dp[2 * i] - of.x),
                                    v[2 * i + 1] * (dp[2 * i + 1] - of.y));
    }
    wgmma_keep(dv);
    add_rows(dv, prob, shared_address(s.dout[stage]));
    uint32_t shared_ds = shared_address(s.ds[number % 2]);
    share(shared_ds, ds);
    warpgroup_meet<2>(1); /* both groups' dS is there */
    float dq[32];
    wgmma_keep(dk);
    query_grad(dq, shared_ds);
    add_rows(dk, ds, shared_address(s.q[stage]));
    wgmma_wait<2>();
    wgmma_keep(dv);
    free(&s.dout_empty[stage]);
    begin(v, next);
    wgmma_wait<2>();
    wgmma_keep(dq);
    float *to = p.dq + (term_at(p, w.batch, at.head, m0) + group * 64) * HEAD + thread * 4;
#pragma unroll
    for (int j = 0; j < 8; j++) add_global(to + j * 512, dq + 4 * j);
    wgmma_wait<0>();
    free(&s.q_empty[stage]);
    wgmma_keep(v);
    wgmma_keep(dk);
    wgmma_keep(dv);
  }

  __device__ __forceinline__ void all_tiles() {
    float v[64];
    int last = w.tiles() - 1;
    begin(v, 0);
    wgmma_wait<0>();
    wgmma_keep(v);
    backward_place at(w);
    for (int number = 0; number <= last; number++, at.next(w))
      tile(v, at, number, number < last ? number + 1 : last);
  }

  __device__ __forceinline__ void put(int which, const float (&acc)[32], float scale) const {
    auto sink = key_sink<__nv_bfloat16>(p, w.batch, w.kv_head, w.part, which);
    int key = w.n0 + group * 64 + thread / 32 * 16 + lane_of_warp() / 4;
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      int row = key + i / 2 % 2 * 8, c = i / 4 * 8 + lane_of_warp() % 4 * 2;
      if (row < p.seq) sink.put_pair(row, c, acc[i] * scale, acc[i + 1] * scale);
    }
  }
};

template <bool DOCUMENTS>
__global__ void __launch_bounds__(THREADS, 1)
    backward_kernel(const __grid_constant__ backward_args p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  backward_memory &s = *reinterpret_cast<backward_memory *>(memory);
  if (threadIdx.x == 0) {
    if (shared_address(memory) % 1024 != 0) __trap(); /* the swizzle counts from there */
    barrier_init(shared_address(&s.keys_full), 1);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(shared_address(&s.q_full[i]), 1);
      barrier_init(shared_address(&s.dout_full[i]), 1);
      barrier_init(shared_address(&s.q_empty[i]), 8);
      barrier_init(shared_address(&s.dout_empty[i]), 8);
    }
    barrier_init_fence();
  }
  backward_work<DOCUMENTS> work(p);
  __syncthreads();
  int warp = (int)threadIdx.x / 32;
  if (warp < 4) {
    registers_fewer<24>();
    if (threadIdx.x == 0) produce(p, s, work);
  } else {
    registers_more<240>();
    backward_group<DOCUMENTS> own(p, s, work, warp / 4 - 1);
    barrier_wait(shared_address(&s.keys_full), 0);
    own.all_tiles();
    own.put(0, own.dk, p.scale);
    own.put(1, own.dv, 1.0f);
  }
#endif
}

/* dQ of 16 queries of a head by one warp, out of the accumulators' order, scaled and rounded. */
__global__ void __launch_bounds__(128) query_kernel(attention_args p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ __align__(1024) char memory[4 * STEP_ROWS];
  int64_t number = (int64_t)blockIdx.x * 4 + threadIdx.x / 32, rows = p.padded / 16;
  int64_t head = number / rows;
  int row = (int)(number % rows) * 16, lane = lane_of_warp();
  if (head >= p.batch * p.heads || row >= p.seq) return;
  const float *from =
      p.dq + (head * p.padded + row / 64 * 64) * HEAD + (row % 64 / 16 * 32 + lane) * 4;
  uint32_t slab = shared_address(memory + threadIdx.x / 32 * STEP_ROWS);
#pragma unroll
  for (int c = 0; c < HEAD / 16; c++) {
    float4 low = __ldcs(reinterpret_cast<const float4 *>(from + 2 * c * 512));
    float4 high = __ldcs(reinterpret_cast<const float4 *>(from + (2 * c + 1) * 512));
    uint32_t b[4] = {pack<__nv_bfloat16>(low.x * p.scale, low.y * p.scale),
                     pack<__nv_bfloat16>(low.z * p.scale, low.w * p.scale),
                     pack<__nv_bfloat16>(high.x * p.scale, high.y * p.scale),
                     pack<__nv_bfloat16>(high.z * p.scale, high.w * p.scale)};
    store_blocks(slab_blocks<128>(slab, c), b);
  }
  __syncwarp();
  auto to =
      qkv_rows(p, static_cast<__nv_bfloat16 *>(p.dqkv), head / p.heads, (int)(head % p.heads));
  slab_rows<128, HEAD>(slab, p.seq - row < 16 ? p.seq - row : 16, HEAD, to.data + row * to.stride,
                       to.stride);
#endif
}

} // namespace sm90_attention

using namespace sm90_attention;

bool cuda_attention_sm90_fits(const moe_device *dev, moe_attention_shape s, moe_dtype dtype) {
  return cuda_of(dev)->arch == 90 && dtype == MOE_BF16 && s.head_dim == HEAD &&
         !dev->options.deterministic && div_up(s.seq, KEYS) <= 65535;
}

moe_status cuda_attention_sm90_backward(moe_device *dev, const attention_args &p) {
  cudaStream_t stream = cuda_of(dev)->stream;
  int bytes = (int)sizeof(backward_memory);
  backward_args args = {};
  static_cast<attention_args &>(args) = p;
  MOE_TRY(map_heads(dev, &args.qkv_map, p, p.qkv, p.heads + 2 * p.kv_heads));
  MOE_TRY(map_heads(dev, &args.dout_map, p, p.dout, p.heads));
  CUDA_TRY(dev,
           cudaMemsetAsync(p.dq, 0, (size_t)(p.batch * p.heads * p.padded * HEAD * 4), stream));
  auto kernel = p.doc_start != nullptr ? backward_kernel<true> : backward_kernel<false>;
  CUDA_TRY(dev, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  dim3 grid((unsigned)(p.batch * p.kv_heads * p.parts), (unsigned)div_up(p.seq, KEYS));
  kernel<<<grid, THREADS, (size_t)bytes, stream>>>(args);
  CUDA_LAUNCHED(dev);
  int64_t warps = p.batch * p.heads * (p.padded / 16);
  query_kernel<<<(unsigned)div_up(warps, 4), 128, 0, stream>>>(p);
  CUDA_LAUNCHED(dev);
  return MOE_OK;
}
