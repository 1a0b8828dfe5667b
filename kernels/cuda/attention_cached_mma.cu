/* Attention over a cache on tensor cores (bf16, f16): attention_forward.cu's loop over another
 * layout (attention_cached.cuh). Few rows have a block of their own kind
 * (attention_cached_few.cuh); with many (a chunk of a prompt) each warp has 16 rows and all walk
 * the same keys. */
#include "kernels/cuda/attention_cached_few.cuh"

namespace {

template <int D> struct many_shape {
  static constexpr int warps = D <= 64 ? 8 : 4, threads = 32 * warps, rows = 16 * warps;
  static constexpr int keys = D <= 64 ? 64 : 32, tile = keys * tile_row<D>; /* elements */
  static constexpr int shared = 2 * 2 * tile * 2; /* K and V, twice, 2 bytes */
};

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

template <typename T, int D>
__device__ __forceinline__ void many_block(const cached_args &p, uint4 *shared) {
  using shape = many_shape<D>;
  T *memory = reinterpret_cast<T *>(shared);
  cached_group<T> g(p, (int)blockIdx.x / p.blocks);
  int z = (int)blockIdx.y, m0 = (int)blockIdx.x % p.blocks * shape::rows;
  if (z == 0) cached_append<T, 8>(p, g, m0, shape::rows);
  int span = g.span(p), used = g.splits_used(p);
  if (z >= used) return;

  int row0 = m0 + 16 * warp_of();
  int block_last = g.position(p, min(m0 + shape::rows, p.rows) - 1);
  int warp_last = g.position(p, min(row0 + 15, p.rows - 1));
  int begin = z * span, end = min(min(begin + span, g.keys), block_last + 1);
  auto start = [&](int n0, int buffer) {
    start_keys<shape::keys, D, shape::threads>(memory + 2 * buffer * shape::tile, g, n0, n0,
                                               n0 + shape::keys, end, p.d);
  };
  if (begin < end) start(begin, 0);
  left_rows<T, D, true> q;
  load_queries<D>(q.a, p, g, row0);
  two_rows r;
  float o[D / 8][4];
  clear_rows(o, r);
  for (int n0 = begin, buffer = 0; n0 < end; n0 += shape::keys, buffer ^= 1) {
    copy_wait();
    __syncthreads(); /* this buffer has arrived, and all are done with the other */
    if (n0 + shape::keys < end) start(n0 + shape::keys, buffer ^ 1);
    if (n0 <= warp_last)
      see_keys<shape::keys, D>(o, r, q, memory + 2 * buffer * shape::tile, shape::tile, p, g, row0,
                               n0, end);
  }
  finish_own_rows(cached_sink<T>{p, g, used > 1 ? z : -1}, r, o, row0);
}

template <typename T, int D>
__global__ void __launch_bounds__(few_shape<D>::threads, D <= 64 ? 2 : 1)
    few_kernel(cached_args p) {
  extern __shared__ uint4 memory[];
  if constexpr (mma_built<T>()) few_block<T, D>(p, memory);
}

template <typename T, int D>
__global__ void __launch_bounds__(many_shape<D>::threads, D <= 64 ? 2 : 3)
    many_kernel(cached_args p) {
  extern __shared__ uint4 memory[];
  launch_wait();
  launch_release();
  if constexpr (mma_built<T>()) many_block<T, D>(p, memory);
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
    auto kernel = few_kernel<T, D>;
    constexpr int shared = few_shape<D>::shared;
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim.x = together.val.clusterDim.z = 1;
    together.val.clusterDim.y = cached_cluster;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1, cached_cluster);
    config.blockDim = dim3(few_shape<D>::threads);
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
    using few = few_shape<D>;
    using many = many_shape<D>;
    cached_args p = args;
    if (p.together) p.splits = cluster_size<T, D>(p.splits);
    dim3 grid((unsigned)(p.batch * p.kv_heads * p.blocks), (unsigned)p.splits);
    if (p.rows <= few_rows)
      return cuda_launch_clusters(dev, true, p.together ? p.splits : 1, few_kernel<T, D>, grid,
                                  few::threads, few::shared, p);
    return cuda_start(dev, many_kernel<T, D>, grid, many::threads, many::shared, p);
  });
}
