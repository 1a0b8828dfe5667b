/* What the kernels of attention over a cache share.
 *
 *   attention_cached.cu       the slot, float32 arithmetic for any type, the sum of splits
 *   attention_cached_mma.cu   bf16 and f16 on tensor cores
 *   attention_cached_turn.cuh rotation there
 *
 * The query heads of a K/V head are stacked, row = token * rep + head: they read the same keys. A
 * sequence's keys are cut into splits, so that one query fills the chip; where the cut falls
 * depends on the sequence's length, which only the device knows. Each split leaves, for each row,
 * the sum of its values weighted by exp(score - peak), the peak and the sum of weights; one more
 * kernel adds them; on Hopper, while caches are short, the splits' blocks are a cluster and send
 * them to each other instead. A sequence that fits one split is written at once. New keys
 * and values are read where they are, in qkv, and stored to the cache by one block on the way, so
 * nothing waits for the cache; a single new token of each sequence may be rotated on the way.
 * Source: "Flash-Decoding for long-context inference", Dao et al.
 * 2023. */
#ifndef MOE_KERNELS_CUDA_ATTENTION_CACHED_CUH
#define MOE_KERNELS_CUDA_ATTENTION_CACHED_CUH

#include "kernels/cuda/launch.cuh"

struct cached_args {
  const void *qkv;
  void *keys, *values, *out;
  const int32_t *lengths;
  const float *table; /* [turns, d]: queries and keys are rotated here; NULL: they come rotated */
  const int32_t *positions;
  int turns;
  float *partial;   /* [splits, rows of all] times d; then peaks, then sums */
  int64_t rows_all; /* B G n rep */
  int64_t room;     /* positions of a sequence */
  int batch, n, kv_heads, rep, d;
  int rows;           /* of one sequence and K/V head: n rep */
  int blocks, splits; /* blocks of rows; at most so many splits */
  bool together;      /* the splits of a sequence are a cluster, which adds them itself */
  float scale;
};

/* Keys: a split is whole steps (a power of two), no less. */
constexpr int cached_step = 64, cached_least = 128;
constexpr int cached_most_splits = 512;
/* Up to so many positions, and in so many splits, blocks of a cluster share a sequence. */
constexpr int cached_near = 8192, cached_cluster = 16, cached_near_step = 16,
              cached_near_least = 64;

/* One sequence and K/V head, as a kernel sees it. */
template <typename T> struct cached_group {
  int64_t first_row;                  /* of rows_all */
  int length, keys;                   /* tokens cached before; positions in use from now on */
  int64_t stride, width;              /* elements from token to token in qkv, in the cache */
  const T *q, *new_keys, *new_values; /* of the first new token */
  T *cached_keys, *cached_values;     /* position 0 */
  T *out;
  int64_t out_stride;

  __device__ __forceinline__ cached_group(const cached_args &p, int group)
      : cached_group(p, group, p.lengths[group / p.kv_heads]) {}
  __device__ __forceinline__ cached_group(const cached_args &p, int group, int cached_before) {
    int b = group / p.kv_heads, g = group % p.kv_heads, heads = p.kv_heads * p.rep;
    first_row = (int64_t)group * p.rows;
    length = cached_before;
    keys = (int)max((int64_t)0, min((int64_t)length + p.n, p.room));
    stride = (int64_t)(heads + 2 * p.kv_heads) * p.d;
    width = (int64_t)p.kv_heads * p.d;
    const T *qkv = static_cast<const T *>(p.qkv) + (int64_t)b * p.n * stride;
    q = qkv + (int64_t)g * p.rep * p.d;
    new_keys = qkv + (int64_t)(heads + g) * p.d;
    new_values = new_keys + width;
    int64_t cached = (int64_t)b * p.room * width + (int64_t)g * p.d;
    cached_keys = static_cast<T *>(p.keys) + cached;
    cached_values = static_cast<T *>(p.values) + cached;
    out_stride = (int64_t)heads * p.d;
    out = static_cast<T *>(p.out) + (int64_t)b * p.n * out_stride + (int64_t)g * p.rep * p.d;
  }
  /* Position of a row's token; rows whose position is not in [0, room) are not computed. */
  __device__ __forceinline__ int position(const cached_args &p, int row) const {
    return length + row / p.rep;
  }
  __device__ __forceinline__ bool computed(const cached_args &p, int row) const {
    int at = row < p.rows ? position(p, row) : -1;
    return at >= 0 && at < p.room;
  }
  __device__ __forceinline__ const T *query(const cached_args &p, int row) const {
    return q + row / p.rep * stride + row % p.rep * p.d;
  }
  __device__ __forceinline__ T *output(const cached_args &p, int row) const {
    return out + row / p.rep * out_stride + row % p.rep * p.d;
  }
  /* Keys or values of a position below `keys`. */
  __device__ __forceinline__ const T *key(int j) const {
    return j < length ? cached_keys + j * width : new_keys + (j - length) * stride;
  }
  __device__ __forceinline__ const T *value(int j) const {
    return j < length ? cached_values + j * width : new_values + (j - length) * stride;
  }
  /* Keys in one split, and how many splits have any. In 32 bits: all wait for these divisions. */
  __device__ __forceinline__ int span(const cached_args &p) const {
    unsigned step = p.together ? cached_near_step : cached_step;
    unsigned least = p.together ? cached_near_least : cached_least;
    unsigned even = ((unsigned)keys + (unsigned)p.splits - 1) / (unsigned)p.splits;
    return (int)max((even + step - 1) & ~(step - 1), least);
  }
  __device__ __forceinline__ int splits_used(const cached_args &p) const {
    unsigned each = (unsigned)span(p);
    return (int)(((unsigned)keys + each - 1) / each);
  }
};

/* Store the new keys and values of those tokens whose first row is among [row, row + rows): all
 * threads of the block share the work, N elements at a time. */
template <typename T, int N>
__device__ __forceinline__ void cached_append(const cached_args &p, const cached_group<T> &g,
                                              int row, int rows) {
  int begin = (int)div_up(row, p.rep), end = (int)div_up(min(row + rows, p.rows), p.rep);
  int each = p.d / N;
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < (end - begin) * each; i += (int)blockDim.x) {
    int token = begin + i / each, c = i % each * N, at = g.length + token;
    if (at < 0 || at >= p.room) continue;
    cuda_pack<T, N> k, v;
    k.load(g.new_keys + token * g.stride + c);
    v.load(g.new_values + token * g.stride + c);
    k.store(g.cached_keys + at * g.width + c);
    v.store(g.cached_values + at * g.width + c);
  }
}

/* A row's part in split z: d sums, its peak and its sum of weights. */
__device__ __forceinline__ float *cached_part(const cached_args &p, int64_t row, int z) {
  return p.partial + (z * p.rows_all + row) * p.d;
}
__device__ __forceinline__ float *cached_peak(const cached_args &p, int64_t row, int z) {
  return p.partial + p.splits * p.rows_all * p.d + z * p.rows_all + row;
}
__device__ __forceinline__ float *cached_sum(const cached_args &p, int64_t row, int z) {
  return cached_peak(p, row, z) + p.splits * p.rows_all;
}

/* attention_cached_mma.cu: rows of a block for so many rows of a group; the kernel. d is a multiple
 * of 8 and at most 128. */
int cuda_attention_cached_mma_rows(int rows, int d);
/* Whether that kernel rotates single new tokens itself. */
bool cuda_attention_cached_mma_turns(int rows, int d);
moe_status cuda_attention_cached_mma(moe_device *dev, moe_dtype dtype, const cached_args &p);

#endif
