/* Attention over a cache for few rows (one token's query heads are 12 or so), where time is the way
 * to memory: all warps have the same 16 rows, each walks its own 16 keys of every tile, and they
 * meet in shared memory at the end.
 *
 * On Hopper and while caches are short, the blocks that share a sequence are a cluster. Each sends
 * its sums to the block that finishes the row. Cached keys of the first tile are asked for before
 * the kernel before has ended, by the length that it is thought to leave. */
#ifndef MOE_KERNELS_CUDA_ATTENTION_CACHED_FEW_CUH
#define MOE_KERNELS_CUDA_ATTENTION_CACHED_FEW_CUH

#include "kernels/cuda/attention_cached_tiles.cuh"
#include "kernels/cuda/attention_cached_turn.cuh"
#include "kernels/cuda/cluster.cuh"

constexpr int few_rows = 64; /* four blocks of 16, each reading all keys, are still the cheapest */

template <int D> struct few_shape {
  static constexpr int warps = D <= 64 ? 8 : 2, threads = 32 * warps, rows = 16;
  static constexpr int keys = 16 * warps, tile = keys * tile_row<D>; /* elements */
  static constexpr int tiles = 2 * 2 * tile * 2;                     /* bytes: K and V, twice */
  static constexpr int row = D + 8;                     /* floats of a warp's sums: other banks */
  static constexpr int sums = warps * rows * (row + 2); /* with peaks and sums of weights */
  static_assert(4 * sums <= tiles, "the warps' sums lie where the tiles were");
  static constexpr int shared = tiles + 4 * rows * (D + 2); /* and what the cluster sends */
};

/* A block's place in its cluster. Row r is finished by block r % splits, which has a slot for every
 * block that sends a part of it. */
template <int D> struct cluster_sink {
  float *slots; /* sums [16, D], then pairs of peak and sum of weights [16] */
  uint64_t *barrier;
  int row0, rows, z, splits; /* rows: in all */

  __device__ __forceinline__ float2 *pairs() const {
    return reinterpret_cast<float2 *>(slots + few_shape<D>::rows * D);
  }
  /* Elements c to c + 3 of a row; its first elements bring peak and sum. */
  __device__ __forceinline__ void put(int i, int c, float4 v, float peak, float sum) const {
    int slot = z + (i & -splits), to = i & (splits - 1);
    if (row0 + i >= rows) return;
    uint32_t there = cluster_address(barrier, to);
    cluster_send(cluster_address(slots + slot * D + c, to), there, v);
    if (c == 0) cluster_send(cluster_address(pairs() + slot, to), there, make_float2(peak, sum));
  }
  /* Rows that this block finishes. */
  __device__ __forceinline__ int mine() const {
    int left = min(rows - row0, 16) - z;
    return left > 0 ? (left + splits - 1) / splits : 0;
  }
};

/* Where a block alone puts its rows: elements c to c + 3 of row0 + i. */
template <typename T> struct memory_sink {
  cached_sink<T> to;
  int row0;
  __device__ __forceinline__ void put(int i, int c, float4 v, float peak, float sum) const {
    if (c == 0) to.stats(row0 + i, peak, sum);
    to.put(row0 + i, c, v.x, v.y, sum);
    to.put(row0 + i, c + 2, v.z, v.w, sum);
  }
};

/* Add what the first `used` blocks of the cluster sent for this block's rows, in order. */
template <int D, typename T>
__device__ __forceinline__ void finish_sent_rows(const cached_sink<T> &out,
                                                 const cluster_sink<D> &in, int used, float scale) {
  int mine = in.mine();
  if (mine == 0) return;
  cluster_await(in.barrier, mine * used * (D + 2) * 4);
  scale *= log2_e;
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < mine * (D / 2); i += (int)blockDim.x) {
    int first = i / (D / 2) * in.splits, c = i % (D / 2) * 2;
    const float2 *stats = in.pairs() + first;
    const float *part = in.slots + first * D + c;
    float top = -INFINITY, sum = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll 4
    for (int z = 0; z < used; z++) top = fmaxf(top, stats[z].x);
#pragma unroll 4
    for (int z = 0; z < used; z++) {
      float weight = exp2_fast((stats[z].x - top) * scale);
      float2 pair = *reinterpret_cast<const float2 *>(part + z * D);
      sum += weight * stats[z].y, x += weight * pair.x, y += weight * pair.y;
    }
    out.put(in.row0 + first + in.z, c, x, y, sum);
  }
}

/* The warps' rows, added in warp order. memory: floats [warps, 16, row], then peaks and sums
 * [warps, 16]. */
template <int D, typename S>
__device__ __forceinline__ void finish_shared_rows(const S &sink, const two_rows &r,
                                                   const float (&o)[D / 8][4], float scale,
                                                   float *memory) {
  constexpr int warps = few_shape<D>::warps, width = few_shape<D>::row;
  float *peaks = memory + warps * 16 * width, *sums = peaks + warps * 16;
  __syncthreads(); /* the tiles have been read */
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = warp_of() * 16 + lane_of() / 4 + 8 * half;
    float sum = quad_sum(r.sum[half]);
    if (lane_of() % 4 == 0) peaks[row] = r.peak[half], sums[row] = sum;
#pragma unroll
    for (int c = 0; c < D / 8; c++)
      *reinterpret_cast<float2 *>(memory + row * width + c * 8 + lane_of() % 4 * 2) =
          make_float2(o[c][2 * half], o[c][2 * half + 1]);
  }
  __syncthreads();
  scale *= log2_e;
#pragma unroll 1
  for (int i = (int)threadIdx.x; i < 16 * D / 4; i += 32 * warps) {
    int row = i / (D / 4), c = i % (D / 4) * 4;
    float top = -INFINITY, sum = 0.0f;
    float4 total = {};
#pragma unroll
    for (int w = 0; w < warps; w++) top = fmaxf(top, peaks[w * 16 + row]);
#pragma unroll
    for (int w = 0; w < warps; w++) {
      float peak = peaks[w * 16 + row];
      float weight = peak == -INFINITY ? 0.0f : exp2_fast((peak - top) * scale);
      float4 v = *reinterpret_cast<const float4 *>(memory + (w * 16 + row) * width + c);
      sum += weight * sums[w * 16 + row];
      total.x += weight * v.x, total.y += weight * v.y;
      total.z += weight * v.z, total.w += weight * v.w;
    }
    sink.put(row, c, total, top, sum);
  }
}

/* The keys of a block, [begin, end), when its sequence has g.length tokens. */
struct few_keys {
  int begin, end;
  template <typename T>
  __device__ __forceinline__ few_keys(const cached_args &p, const cached_group<T> &g, int m0) {
    int span = g.span(p), last = g.position(p, min(m0 + 16, p.rows) - 1);
    begin = (int)blockIdx.y * span;
    end = min(min(begin + span, g.keys), last + 1);
  }
};

/* Ask for the cached keys and values [begin, end) of the second tile and those after it. */
template <typename T>
__device__ __forceinline__ void prefetch_keys(const cached_args &p, const cached_group<T> &g,
                                              int begin, int end) {
#pragma unroll 1
  for (int j = begin + (int)threadIdx.x; j < end; j += (int)blockDim.x)
#pragma unroll 1
    for (int c = 0; c < p.d; c += 64) {
      prefetch_line(g.key(j) + c);
      prefetch_line(g.value(j) + c);
    }
}

/* What the warps have seen, to where the block's rows go. */
template <typename T, int D>
__device__ __forceinline__ void finish_few_rows(const cached_args &p, const cached_group<T> &g,
                                                const two_rows &r, const float (&o)[D / 8][4],
                                                int m0, float *memory, uint64_t *barrier) {
  int z = (int)blockIdx.y, used = g.splits_used(p);
  if (p.together) {
    cluster_sink<D> to = {memory + few_shape<D>::tiles / 4, barrier, m0, p.rows, z, p.splits};
    cluster_wait();
    if (z < used) finish_shared_rows<D>(to, r, o, p.scale, memory);
    finish_sent_rows<D, T>({p, g, -1}, to, used, p.scale);
  } else if (z < used) {
    memory_sink<T> to = {{p, g, used > 1 ? z : -1}, m0};
    finish_shared_rows<D>(to, r, o, p.scale, memory);
  }
}

template <typename T, int D>
__device__ __forceinline__ void few_block(const cached_args &p, uint4 *shared) {
  using shape = few_shape<D>;
  __shared__ uint64_t barrier;
  T *memory = reinterpret_cast<T *>(shared);
  bool turns = p.table != nullptr;
  int group = (int)blockIdx.x / p.blocks, m0 = (int)blockIdx.x % p.blocks * shape::rows;
  int sequence = group / p.kv_heads;
  auto start = [&](const cached_group<T> &g, int n0, int from, int end, int until, int buffer) {
    start_keys<shape::keys, D, shape::threads>(memory + 2 * buffer * shape::tile, g, n0, from,
                                               until, end, p.d);
  };

  /* Ahead of the wait: by the length and the position found there, though they may yet change. */
  if (p.together) cluster_open(&barrier);
  int guess = load_l2(p.lengths + sequence), angle = turns ? load_l2(p.positions + sequence) : 0;
  cached_group<T> g(p, group, guess);
  few_keys mine(p, g, m0);
  int known = min(max(min(mine.end, guess), mine.begin), mine.begin + shape::keys);
  start(g, mine.begin, mine.begin, mine.end, known, 0);
  if (p.together) prefetch_keys(p, g, mine.begin + shape::keys, min(mine.end, guess));
  turned_angles<D> angles;
  if (turns) angles.load(p, angle);
  launch_wait();
  launch_release();

  left_rows<T, D, true> q;
  load_queries<D>(q.a, p, g, m0);
  int length = load_l2(p.lengths + sequence),
      position = turns ? load_l2(p.positions + sequence) : 0;
  if (length != guess) { /* the same for all threads */
    copy_wait();
    __syncthreads();
    g = cached_group<T>(p, group, length);
    mine = few_keys(p, g, m0);
    known = mine.begin;
  }
  if (position != angle) angles.load(p, position);
  int begin = mine.begin, end = mine.end;
  if (begin < end) start(g, begin, known, end, begin + shape::keys, 0);
  copy_group();
  if (begin + shape::keys < end)
    start(g, begin + shape::keys, begin, end, begin + 2 * shape::keys, 1);
  copy_group();
  if (blockIdx.y == 0 && !turns) cached_append<T, 8>(p, g, m0, shape::rows);
  if (turns) angles.template turn_queries<T>(q.a);

  two_rows r;
  float o[D / 8][4];
  clear_rows(o, r);
#pragma unroll 1
  for (int n0 = begin, buffer = 0; n0 < end; n0 += shape::keys, buffer ^= 1) {
    T *tile = memory + 2 * buffer * shape::tile;
    copy_wait_but<1>();
    __syncthreads(); /* this buffer has arrived */
    if (turns && g.length >= n0 && g.length < min(n0 + shape::keys, end))
      angles.template turn_new_key<shape::keys>(tile + (g.length - n0) * tile_row<D>, g, m0 == 0);
    int own = 16 * warp_of(), k0 = n0 + own; /* this warp's keys */
    if (k0 < end)
      see_keys<16, D>(o, r, q, tile + own * tile_row<D>, shape::tile, p, g, m0, k0, end);
    if (n0 + 2 * shape::keys < end) {
      __syncthreads(); /* all are done with this buffer */
      start(g, n0 + 2 * shape::keys, begin, end, n0 + 3 * shape::keys, buffer);
    }
    copy_group();
  }

  finish_few_rows<T, D>(p, g, r, o, m0, reinterpret_cast<float *>(shared), &barrier);
}

#endif
