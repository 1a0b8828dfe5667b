/* Attention over a cache on tensor cores (bf16, f16): attention_forward.cu's loop over another
 * layout (attention_cached.cuh).
 *
 * With many rows (a chunk of a prompt) each warp has 16 rows of its own and all walk the same keys.
 * With few (one token's query heads are 12 rows or so) all warps have the same 16 rows, each walks
 * its own 16 keys of every tile, and they meet in shared memory at the end. */
#include "kernels/cuda/attention_cached.cuh"
#include "kernels/cuda/attention_cached_turn.cuh"

namespace {

constexpr int few_rows = 64; /* four blocks of 16, each reading all keys, are still the cheapest */

template <int D, bool FEW> struct cached_shape {
  static constexpr int warps = D <= 64 ? 8 : FEW ? 2 : 4;
  static constexpr int threads = 32 * warps, rows = FEW ? 16 : 16 * warps;
  static constexpr int keys = D > 64 ? 32 : FEW ? 128 : 64, own = FEW ? keys / warps : keys;
  static constexpr int tile = keys * tile_row<D>; /* elements */
  static constexpr int shared = 2 * 2 * tile * 2; /* K and V, twice, 2 bytes */
  static_assert(!FEW || own == 16, "a step of a product");
  static constexpr int sums = 16 * (D + 2); /* floats: of 16 rows, with peaks and sums of weights */
  static_assert(!FEW || 4 * (warps + 1) * sums <= shared,
                "the warps' and the block's fit the tiles");
};

/* All blocks of the cluster meet, and see what each other stored before. */
__device__ __forceinline__ void cluster_meet() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
/* The two floats that block z of the cluster has where this block has *p. */
__device__ __forceinline__ float2 cluster_load(const float *p, int z) {
  float2 v = {};
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .u32 at;\nmapa.shared::cluster.u32 at, %2, %3;\n"
               "ld.shared::cluster.v2.f32 {%0, %1}, [at];\n}"
               : "=f"(v.x), "=f"(v.y)
               : "r"(shared_address(p)), "r"(z)
               : "memory");
#endif
  return v;
}

/* Ask for the cached keys and values of split z. The kernel before may be about to change the
 * length: then these are the wrong lines, at no more than their cost. */
template <typename T>
__device__ __forceinline__ void prefetch_split(const cached_args &p, int group, int z) {
#ifdef __CUDA_ARCH__
  int length =
      min(max(__ldcg(p.lengths + group / p.kv_heads), 0), (int)min(p.room, (int64_t)INT_MAX));
  cached_group<T> g(p, group, length);
  int begin = z * g.span(p), end = min(begin + g.span(p), length);
  for (int j = begin + (int)threadIdx.x; j < end; j += (int)blockDim.x)
    for (int c = 0; c < p.d; c += 64) {
      prefetch_line(g.key(j) + c);
      prefetch_line(g.value(j) + c);
    }
#endif
}

/* Start copying keys and values [n0, n0 + N) to two tiles; zeros from `end` on and past d. */
template <int N, int D, int THREADS, typename T>
__device__ __forceinline__ void start_keys(T *tile, const cached_group<T> &g, int n0, int end,
                                           int d) {
  constexpr int words = D / 8;
#pragma unroll
  for (int at = 0; at < N * words; at += THREADS) {
    int word = at + (int)threadIdx.x, r = word / words, c = word % words * 8;
    if (N * words % THREADS != 0 && word >= N * words) break;
    bool inside = n0 + r < end && c < d;
    int to = r * tile_row<D> + c;
    copy_start<16>(tile + to, inside ? g.key(n0 + r) + c : g.new_keys, inside);
    copy_start<16>(tile + N * tile_row<D> + to, inside ? g.value(n0 + r) + c : g.new_values,
                   inside);
  }
}

/* Rows [row0, row0 + 16) as fragments; zeros past the last. */
template <int D, typename T>
__device__ __forceinline__ void load_queries(uint32_t (&a)[D / 16][4], const cached_args &p,
                                             const cached_group<T> &g, int row0) {
  int c = lane_of() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = row0 + lane_of() / 4 + 8 * half;
    const T *q = row < p.rows ? g.query(p, row) : nullptr;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
      for (int part = 0; part < 2; part++) {
        int j = k * 16 + c + part * 8;
        a[k][half + 2 * part] =
            q != nullptr && j < p.d ? *reinterpret_cast<const uint32_t *>(q + j) : 0u;
      }
  }
}

/* Hide what a row does not see of a result [16 rows from row0, 8 N keys from n0]. */
template <int N, typename T>
__device__ __forceinline__ void hide(float (&s)[N][4], const cached_args &p,
                                     const cached_group<T> &g, int row0, int n0, int end) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int last = min(g.position(p, row0 + lane_of() / 4 + 8 * half), end - 1);
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; e++)
        if (n0 + j * 8 + lane_of() % 4 * 2 + e % 2 > last) s[j][e] = -INFINITY;
  }
}

/* Where a block's results go: to out when there is one split, else to its part. */
template <typename T> struct cached_sink {
  const cached_args &p;
  const cached_group<T> &g;
  int z; /* -1: out */
  __device__ __forceinline__ void stats(int row, float peak, float sum) const {
    if (z < 0 || row >= p.rows) return;
    *cached_peak(p, g.first_row + row, z) = peak * p.scale;
    *cached_sum(p, g.first_row + row, z) = sum;
  }
  /* Two neighbouring elements of a row whose weights sum to `sum`. */
  __device__ __forceinline__ void put(int row, int c, float x, float y, float sum) const {
    if (c >= p.d || !g.computed(p, row)) return;
    if (z < 0) {
      float inverse = 1.0f / sum;
      store_pair(g.output(p, row) + c, x * inverse, y * inverse);
    } else {
      *reinterpret_cast<float2 *>(cached_part(p, g.first_row + row, z) + c) = make_float2(x, y);
    }
  }
};

/* The same for the block's own shared memory: sums [16, D], then pairs of peak and sum of
 * weights. */
template <int D> struct shared_sink {
  float *memory;
  int row0;
  __device__ __forceinline__ float *peak_and_sum(int row) const {
    return memory + 16 * D + 2 * row;
  }
  __device__ __forceinline__ void stats(int row, float peak, float sum) const {
    *reinterpret_cast<float2 *>(peak_and_sum(row - row0)) = make_float2(peak, sum);
  }
  __device__ __forceinline__ void put(int row, int c, float x, float y, float) const {
    *reinterpret_cast<float2 *>(memory + (row - row0) * D + c) = make_float2(x, y);
  }
};

/* Add what the first `used` blocks of the cluster have in their memory, in order: each finishes
 * some of the elements. */
template <int D, typename T>
__device__ __forceinline__ void finish_cluster(const cached_sink<T> &out,
                                               const shared_sink<D> &mine, int used, int splits,
                                               float scale) {
  cluster_meet();
  int step = splits * (int)blockDim.x;
  for (int i = (int)(blockIdx.y * blockDim.x + threadIdx.x); i < 16 * D / 2; i += step) {
    int row = i / (D / 2), c = i % (D / 2) * 2;
    float2 stats[cached_cluster], pair[cached_cluster];
#pragma unroll
    for (int z = 0; z < cached_cluster; z++) {
      stats[z] = make_float2(-INFINITY, 0.0f), pair[z] = float2{};
      if (z >= used) continue;
      stats[z] = cluster_load(mine.peak_and_sum(row), z);
      pair[z] = cluster_load(mine.memory + row * D + c, z);
    }
    float top = -INFINITY, sum = 0.0f, first = 0.0f, second = 0.0f;
#pragma unroll
    for (int z = 0; z < cached_cluster; z++) top = fmaxf(top, stats[z].x);
#pragma unroll
    for (int z = 0; z < cached_cluster; z++) {
      float weight = stats[z].x == -INFINITY ? 0.0f : expf((stats[z].x - top) * scale);
      sum += weight * stats[z].y, first += weight * pair[z].x, second += weight * pair[z].y;
    }
    out.put(mine.row0 + row, c, first, second, sum);
  }
  cluster_meet(); /* nobody's memory goes while it is read */
}

/* Each warp has 16 rows. */
template <typename T, int C>
__device__ __forceinline__ void finish_own_rows(const cached_sink<T> &sink, const two_rows &r,
                                                const float (&o)[C][4], int row0) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = row0 + lane_of() / 4 + 8 * half;
    float sum = quad_sum(r.sum[half]);
    if (lane_of() % 4 == 0) sink.stats(row, r.peak[half], sum);
#pragma unroll
    for (int c = 0; c < C; c++)
      sink.put(row, c * 8 + lane_of() % 4 * 2, o[c][2 * half], o[c][2 * half + 1], sum);
  }
}

/* All warps have the same 16 rows: added in warp order. memory: floats [warps, 16, 8 C], then peaks
 * and sums [warps, 16]. */
template <int WARPS, typename S, int C>
__device__ __forceinline__ void finish_shared_rows(const S &sink, const two_rows &r,
                                                   const float (&o)[C][4], int row0, float scale,
                                                   float *memory) {
  constexpr int D = 8 * C;
  float *peaks = memory + WARPS * 16 * D, *sums = peaks + WARPS * 16;
  __syncthreads(); /* the tiles have been read */
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = warp_of() * 16 + lane_of() / 4 + 8 * half;
    float sum = quad_sum(r.sum[half]);
    if (lane_of() % 4 == 0) peaks[row] = r.peak[half], sums[row] = sum;
#pragma unroll
    for (int c = 0; c < C; c++)
      *reinterpret_cast<float2 *>(memory + row * D + c * 8 + lane_of() % 4 * 2) =
          make_float2(o[c][2 * half], o[c][2 * half + 1]);
  }
  __syncthreads();
  for (int i = (int)threadIdx.x; i < 16 * D / 2; i += 32 * WARPS) {
    int row = i / (D / 2), c = i % (D / 2) * 2;
    float top = -INFINITY, sum = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, peaks[w * 16 + row]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float peak = peaks[w * 16 + row];
      float weight = peak == -INFINITY ? 0.0f : expf((peak - top) * scale);
      float2 v = *reinterpret_cast<const float2 *>(memory + (w * 16 + row) * D + c);
      sum += weight * sums[w * 16 + row];
      x += weight * v.x;
      y += weight * v.y;
    }
    if (c == 0) sink.stats(row0 + row, top, sum);
    sink.put(row0 + row, c, x, y, sum);
  }
}

template <typename T, int D, bool FEW>
__device__ __forceinline__ void cached_block(const cached_args &p, uint4 *shared) {
  using shape = cached_shape<D, FEW>;
  T *memory = reinterpret_cast<T *>(shared);
  bool turns = FEW && p.table != nullptr;
  int position = turns ? p.positions[(int)blockIdx.x / p.blocks / p.kv_heads] : 0;
  cached_group<T> g(p, (int)blockIdx.x / p.blocks);
  int z = (int)blockIdx.y, m0 = (int)blockIdx.x % p.blocks * shape::rows;
  if (z == 0 && !turns) cached_append<T, 8>(p, g, m0, shape::rows);
  int span = g.span(p), used = g.splits_used(p);
  shared_sink<D> mine = {reinterpret_cast<float *>(shared) + shape::warps * shape::sums, m0};
  if (z >= used) {
    if (FEW && p.together) finish_cluster<D, T>({p, g, -1}, mine, used, p.splits, p.scale);
    return;
  }
  cached_sink<T> sink = {p, g, used > 1 && !p.together ? z : -1};

  int row0 = m0 + (FEW ? 0 : 16 * warp_of());
  int block_last = g.position(p, min(m0 + shape::rows, p.rows) - 1);
  int warp_last = g.position(p, min(row0 + 15, p.rows - 1));
  int begin = z * span, end = min(min(begin + span, g.keys), block_last + 1);
  auto start = [&](int n0, int buffer) {
    start_keys<shape::keys, D, shape::threads>(memory + 2 * buffer * shape::tile, g, n0, end, p.d);
  };
  if (begin < end) start(begin, 0);
  copy_group();
  if (FEW && begin + shape::keys < end) start(begin + shape::keys, 1);
  if (FEW) copy_group();
  left_rows<T, D, true> q;
  load_queries<D>(q.a, p, g, row0);
  if constexpr (FEW)
    if (turns) turn_queries<D, T>(q.a, p, position);
  two_rows r;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    r.peak[half] = -INFINITY;
    r.sum[half] = 0.0f;
  }
  float o[D / 8][4] = {};
  for (int n0 = begin, buffer = 0; n0 < end; n0 += shape::keys, buffer ^= 1) {
    /* With few rows, time is the way to memory: two tiles are on it. With many, arithmetic: one. */
    if constexpr (FEW)
      copy_wait_but<1>();
    else
      copy_wait();
    __syncthreads(); /* this buffer has arrived, and all are done with the other */
    if (!FEW && n0 + shape::keys < end) start(n0 + shape::keys, buffer ^ 1);
    if constexpr (FEW)
      if (turns && g.length >= n0 && g.length < min(n0 + shape::keys, end))
        turn_new_key<D, shape::keys>(memory + 2 * buffer * shape::tile +
                                         (g.length - n0) * tile_row<D>,
                                     p, g, position, m0 == 0);
    int k0 = n0 + (FEW ? shape::own * warp_of() : 0); /* this warp's keys */
    if (k0 <= warp_last && k0 < end) {
      const T *tile = memory + 2 * buffer * shape::tile + (k0 - n0) * tile_row<D>;
      float s[shape::own / 8][4];
      product_nt<shape::own>(s, q, tile);
      if (k0 + shape::own > end || k0 + shape::own - 1 > g.position(p, row0))
        hide(s, p, g, row0, k0, end);
      soften(s, r, o, p.scale * log2_e);
      uint32_t probs[shape::own / 16][4];
      round_rows<T>(probs, s);
      product_nn<D, shape::own>(o, probs, tile + shape::tile);
    }
    if constexpr (FEW) {
      if (n0 + 2 * shape::keys < end) {
        __syncthreads(); /* all are done with this buffer */
        start(n0 + 2 * shape::keys, buffer);
      }
      copy_group();
    }
  }
  if constexpr (FEW) {
    float *sums = reinterpret_cast<float *>(shared);
    if (p.together) {
      finish_shared_rows<shape::warps>(mine, r, o, row0, p.scale, sums);
      finish_cluster<D>(sink, mine, used, p.splits, p.scale);
    } else {
      finish_shared_rows<shape::warps>(sink, r, o, row0, p.scale, sums);
    }
  } else {
    finish_own_rows(sink, r, o, row0);
  }
}

template <typename T, int D, bool FEW>
__global__ void __launch_bounds__(cached_shape<D, FEW>::threads, D <= 64 ? 2
                                                                 : FEW   ? 1
                                                                         : 3)
    cached_kernel(cached_args p) {
  extern __shared__ uint4 memory[];
  if (FEW && p.together) prefetch_split<T>(p, (int)blockIdx.x / p.blocks, (int)blockIdx.y);
  launch_wait();
  launch_release();
  if constexpr (mma_built<T>()) cached_block<T, D, FEW>(p, memory);
}

} /* namespace */

int cuda_attention_cached_mma_rows(int rows, int d) {
  if (rows <= few_rows) return 16;
  return 16 * (d <= 64 ? 8 : 4);
}

bool cuda_attention_cached_mma_turns(int rows, int d) {
  return rows <= few_rows && (d == 64 || d == 128);
}

/* Blocks of a cluster: `wanted`, but more than any GPU of this kind has to take only where this one
 * has the room. */
template <typename T, int D> static int cluster_size(int wanted) {
  constexpr int portable = 8;
  static const int most = [] {
    auto kernel = cached_kernel<T, D, true>;
    constexpr int shared = cached_shape<D, true>::shared;
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim.x = together.val.clusterDim.z = 1;
    together.val.clusterDim.y = cached_cluster;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1, cached_cluster);
    config.blockDim = dim3(cached_shape<D, true>::threads);
    config.dynamicSmemBytes = shared;
    config.attrs = &together, config.numAttrs = 1;
    int fit = 0;
    bool fits = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) ==
                    cudaSuccess &&
                cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
                    cudaSuccess &&
                cudaOccupancyMaxActiveClusters(&fit, kernel, &config) == cudaSuccess && fit > 0;
    if (!fits) cudaGetLastError(); /* no error of ours */
    return fits ? cached_cluster : portable;
  }();
  return wanted < most ? wanted : most;
}

moe_status cuda_attention_cached_mma(moe_device *dev, moe_dtype dtype, const cached_args &args) {
  return attention_half(dtype, args.d, [&](auto x, auto size) {
    using T = decltype(x);
    constexpr int D = decltype(size)::value;
    using few = cached_shape<D, true>;
    using many = cached_shape<D, false>;
    cached_args p = args;
    if (p.together) p.splits = cluster_size<T, D>(p.splits);
    dim3 grid((unsigned)(p.batch * p.kv_heads * p.blocks), (unsigned)p.splits);
    if (p.rows <= few_rows)
      return cuda_launch_clusters(dev, true, p.together ? p.splits : 1, cached_kernel<T, D, true>,
                                  grid, few::threads, few::shared, p);
    return cuda_start(dev, cached_kernel<T, D, false>, grid, many::threads, many::shared, p);
  });
}
