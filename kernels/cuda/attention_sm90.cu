/* Attention backward on Hopper: bf16, head size 64, by wgmma and the copy engine.
 *
 * A block keeps 128 keys and values and lets the queries of all heads that read them pass by, 128
 * at a time, so dK and dV stay in registers until the end. Of one such tile, with rows of keys:
 *
 *     S^T = K Q^T          P^T = exp2(scale log2(e) S^T - log2(e) lse)
 *     dP^T = V dO^T       dS^T = P^T (dP^T - delta)
 *     dV += P^T dO         dK += dS^T Q         dQ += dS K
 *
 * A producer brings Q, lse, dO, delta of the tiles to come, through a ring of two stages. Two
 * groups of threads have half the keys each; one multiplies while the other makes exponentials and
 * dS, and since both want the tensor cores, they fall into such turns by themselves:
 *
 *     group 0   exp dS | dV  dK  dQ-  S+  dP+ | exp dS ............. | dV  dK  dQ-  S+ ...
 *     group 1   dK  dQ-  S+  dP+ | exp dS ........... | dV  dK  dQ-  S+  dP+ | exp dS ...
 *
 * + is of the next tile; - of the one before: dQ wants all keys' dS, and the other group's of that
 * tile lie in shared memory long since, so that no one waits. P and dS stay in registers too, where
 * dV and dK want them. Group 0 makes dQ of queries 0 to 63, group 1 of the others.
 *
 * A query's gradient comes from many blocks: it is added up in memory in float32, in whatever order
 * they come, and rounded at the end. So this is not for run.deterministic. The copy engine adds:
 * threads would wait for memory. Its order there is that of the accumulators, 16 queries in 4 KiB,
 * 16 bytes of each thread side by side. Source: Shah et al. 2024, arXiv:2407.08608
 * (FlashAttention-3).
 */
#include "kernels/cuda/attention_sm90_work.cuh"

namespace sm90_attention {

/* One group's keys. */
template <bool DOCUMENTS> struct backward_group {
  using work = backward_work<DOCUMENTS>;
  const backward_args &p;
  backward_memory &s;
  const work &w;
  int group, thread;
  int key_end[2];      /* with documents: no query from here on sees this thread's keys */
  uint32_t values[16]; /* V stays in registers: that spares shared memory, which is short */
  float dk[32] = {}, dv[32] = {};

  __device__ __forceinline__ backward_group(const backward_args &p_, backward_memory &s_,
                                            const work &w_, int group_)
      : p(p_), s(s_), w(w_), group(group_), thread((int)threadIdx.x % 128) {
    if constexpr (DOCUMENTS)
      for (int i = 0; i < 2; i++) key_end[i] = end_of_key(first_row() + 8 * i);
  }

  /* The first of this thread's keys; the other is 8 further. */
  __device__ __forceinline__ int first_row() const {
    return w.n0 + group * 64 + warp_of_group() * 16 + lane_of_warp() / 4;
  }
  __device__ __forceinline__ int end_of_key(int key) const {
    int seeing = key, end = w.some_end;
    while (end - seeing > 1) {
      int query = (seeing + end) / 2;
      (first_key(p, w.batch, query) <= key ? seeing : end) = query;
    }
    return end;
  }

  /* Keys that a query does not see have probability 0. */
  __device__ __forceinline__ void hide(float (&prob)[64], int m0) const {
    int key = first_row(), query = m0 + thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; i++)
      if (key + i / 2 % 2 * 8 > query + i / 4 * 8 + i % 2) prob[i] = 0.0f;
    if constexpr (DOCUMENTS) {
#pragma unroll
      for (int i = 0; i < 64; i++)
        if (query + i / 4 * 8 + i % 2 >= key_end[i / 2 % 2]) prob[i] = 0.0f;
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

  __device__ __forceinline__ void signal(uint64_t *barrier) const {
    if (lane_of_warp() == 0) barrier_arrive(shared_address(barrier));
  }

  __device__ __forceinline__ void begin_scores(float (&v)[64], int number) const {
    int stage = number % STAGES;
    barrier_wait(shared_address(&s.q_full[stage]), (uint32_t)(number / STAGES & 1));
    score_rows(v, shared_address(s.k) + (uint32_t)(group * SM90_HALF), shared_address(s.q[stage]));
  }
  __device__ __forceinline__ void begin_slopes(float (&dp)[64], int number) const {
    int stage = number % STAGES;
    barrier_wait(shared_address(&s.dout_full[stage]), (uint32_t)(number / STAGES & 1));
    score_rows(dp, values, shared_address(s.dout[stage]));
  }

  /* When the scores are there, and then their gradients: v becomes P. */
  __device__ __forceinline__ void end_scores(float (&v)[64], float (&dp)[64], int number,
                                             int m0) const {
    wgmma_wait<1>();
    wgmma_keep(v);
    probabilities(v, s.lse2[number % STAGES], m0);
    wgmma_wait<0>();
    wgmma_keep(v);
    wgmma_keep(dp);
  }

  /* P and dS, rounded. */
  __device__ __forceinline__ void differentiate(uint32_t (&prob)[32], uint32_t (&ds)[32],
                                                const float (&v)[64], const float (&dp)[64],
                                                const float *delta) const {
#pragma unroll
    for (int j = 0; j < 16; j++) {
      float2 of = *reinterpret_cast<const float2 *>(delta + j * 8 + thread % 4 * 2);
#pragma unroll
      for (int i = 2 * j; i < 2 * j + 2; i++) {
        prob[i] = pack<__nv_bfloat16>(v[2 * i], v[2 * i + 1]);
        ds[i] = pack<__nv_bfloat16>(v[2 * i] * (dp[2 * i] - of.x),
                                    v[2 * i + 1] * (dp[2 * i + 1] - of.y));
      }
    }
  }

  /* This group's dS, for both. Keys lie 128 bytes apart, 64 queries side by side. (By slab_blocks
   * the compiler orders the loop around it so that the kernel takes 8 % longer at S 4096.) */
  __device__ __forceinline__ void share(const uint32_t (&ds)[32], int number) const {
    int lane = lane_of_warp(), key = group * 64 + warp_of_group() * 16 + lane % 16;
    uint32_t to = shared_address(s.ds[number % 2]);
    barrier_wait(shared_address(&s.ds_empty[number % 2]), (uint32_t)(number / 2 & 1) ^ 1);
#pragma unroll
    for (int c = 0; c < 8; c++) {
      uint32_t v[4] = {ds[4 * c], ds[4 * c + 1], ds[4 * c + 2], ds[4 * c + 3]};
      int word = (2 * (c % 4) + lane / 16) ^ (key & 7);
      store_blocks(to + (uint32_t)(c / 4 * TILE + key * 128 + word * 16), v);
    }
  }
  /* What was shared is there: said once dV is under way, since it takes a while. */
  __device__ __forceinline__ void announce(int number) const {
    async_fence();
    __syncwarp();
    signal(&s.ds_full[number % 2]);
  }

  /* dq [64 queries, HEAD] = dS K */
  __device__ __forceinline__ void begin_queries(float (&dq)[32], int number) const {
    barrier_wait(shared_address(&s.ds_full[number % 2]), (uint32_t)(number / 2 & 1));
    uint64_t a = operand(shared_address(s.ds[number % 2]) + (uint32_t)(group * TILE), 0);
    uint64_t b = operand(shared_address(s.k), 0);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++)
      wgmma<1, 1>(dq, a + (i * STEP_ROWS >> 4), b + (i * STEP_ROWS >> 4), i > 0);
    wgmma_commit();
  }
  /* When it is there: each warp's 16 queries. */
  __device__ __forceinline__ void end_queries(float (&dq)[32], backward_place at,
                                              int number) const {
    wgmma_keep(dq);
    signal(&s.ds_empty[number % 2]);
    int lane = lane_of_warp(), warp = group * 4 + warp_of_group();
    uint32_t from = shared_address(s.dq[warp]);
    slab_free<1>();
#pragma unroll
    for (int j = 0; j < 8; j++) store_shared(from + (uint32_t)(j * 512 + lane * 16), dq + 4 * j);
    slab_written();
    if (lane == 0)
      bulk_add(p.dq + (term_at(p, w.batch, at.head, at.m * QUERIES) + warp * 16) * HEAD, from,
               sizeof s.dq[warp]);
    slab_sent();
  }

  /* From P and dP of a tile to those of the next. After the last tile, next is that tile: they are
   * made again, for nothing. */
  template <bool FIRST>
  __device__ __forceinline__ void tile(float (&v)[64], float (&dp)[64], backward_place before,
                                       backward_place after, int number, int next) {
    int stage = number % STAGES;
    uint32_t prob[32], ds[32];
    differentiate(prob, ds, v, dp, s.delta[stage]);
    share(ds, number);
    wgmma_keep(dv);
    add_rows(dv, prob, shared_address(s.dout[stage]));
    announce(number);
    wgmma_keep(dk);
    add_rows(dk, ds, shared_address(s.q[stage]));
    float dq[32];
    if (!FIRST) begin_queries(dq, number - 1);
    wgmma_wait<FIRST ? 1 : 2>();
    wgmma_keep(dv);
    signal(&s.dout_empty[stage]);
    begin_scores(v, next); /* where P was, rounded or not */
    wgmma_wait<FIRST ? 1 : 2>();
    wgmma_keep(dk);
    signal(&s.q_empty[stage]);
    if (!FIRST) {
      wgmma_wait<1>();
      end_queries(dq, before, number - 1);
    }
    begin_slopes(dp, next); /* where dS and dQ were */
    end_scores(v, dp, next, after.m * QUERIES);
  }

  __device__ __forceinline__ void all_tiles() {
    float v[64], dp[64], dq[32];
    int last = w.tiles() - 1;
    backward_place before(w), at(w), after(w);
    after.next(w);
    take_rows(values, shared_address(s.v) + (uint32_t)(group * SM90_HALF));
    begin_scores(v, 0);
    begin_slopes(dp, 0);
    end_scores(v, dp, 0, at.m * QUERIES);
    tile<true>(v, dp, before, after, 0, min(1, last));
    for (int number = 1; number <= last; number++) {
      before = at, at = after;
      after.next(w);
      tile<false>(v, dp, before, after, number, min(number + 1, last));
    }
    begin_queries(dq, last);
    wgmma_wait<0>();
    end_queries(dq, at, last);
    wgmma_keep(dk);
    wgmma_keep(dv);
    if (lane_of_warp() == 0) tma_wait<0>();
  }

  __device__ __forceinline__ void put(int which, const float (&acc)[32], float scale) const {
    auto sink = key_sink<__nv_bfloat16>(p, w.batch, w.kv_head, w.part, which);
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      int row = first_row() + i / 2 % 2 * 8, c = i / 4 * 8 + lane_of_warp() % 4 * 2;
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
    for (int i = 0; i < 2; i++) {
      barrier_init(shared_address(&s.ds_full[i]), 8);
      barrier_init(shared_address(&s.ds_empty[i]), 8);
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
  const float *from = p.dq + (head * p.padded + row) * HEAD + lane * 4;
  uint32_t slab = shared_address(memory + threadIdx.x / 32 * STEP_ROWS);
#pragma unroll
  for (int c = 0; c < HEAD / 16; c++) {
    float4 low = __ldcs(reinterpret_cast<const float4 *>(from + 2 * c * 128));
    float4 high = __ldcs(reinterpret_cast<const float4 *>(from + (2 * c + 1) * 128));
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
