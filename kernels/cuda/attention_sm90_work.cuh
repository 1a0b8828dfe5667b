/* Attention backward on Hopper: a block's work and shared memory, and its producer.
 *
 * A block has 128 keys of one K/V head, and of the query heads that read them those of its part:
 * head after head, all blocks of queries that see some of the keys. attention_sm90.cu has the rest.
 */
#ifndef MOE_KERNELS_CUDA_ATTENTION_SM90_WORK_CUH
#define MOE_KERNELS_CUDA_ATTENTION_SM90_WORK_CUH

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
  char ds[2][2 * TILE];      /* [64 queries each, keys], by turns */
  char dq[8][16 * HEAD * 4]; /* of each warp, on its way to memory */
  float lse2[STAGES][QUERIES], delta[STAGES][QUERIES];
  uint64_t keys_full, q_full[STAGES], dout_full[STAGES], q_empty[STAGES], dout_empty[STAGES];
  uint64_t ds_full[2], ds_empty[2];
};

/* A block's keys, and the heads and blocks of queries that pass by. */
template <bool DOCUMENTS> struct backward_work {
  int64_t batch;
  int kv_head, part, head, heads; /* `heads` query heads from `head` on */
  int n0, begin, end;             /* first key; blocks of queries */
  int all_end;                    /* queries from n0 + KEYS on, and before this, see all the keys */
  int some_end;                   /* queries before this see some */

  __device__ __forceinline__ explicit backward_work(const attention_args &p) {
    part = (int)(blockIdx.x % p.parts);
    kv_head = (int)(blockIdx.x / p.parts % p.kv_heads);
    batch = blockIdx.x / p.parts / p.kv_heads;
    heads = p.rep / p.parts;
    head = kv_head * p.rep + part * heads;
    n0 = (int)blockIdx.y * KEYS; /* the longest first */
    begin = n0 / QUERIES;
    all_end = some_end = p.seq;
    if constexpr (DOCUMENTS) {
      int last = min(n0 + KEYS, p.seq) - 1;
      some_end = end_of_queries<THREADS>(p, batch, last, last);
      all_end = end_of_queries<THREADS>(p, batch, n0, n0);
    }
    end = (some_end + QUERIES - 1) / QUERIES;
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

} // namespace sm90_attention

#endif
