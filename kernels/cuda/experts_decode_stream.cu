/* The experts of a few tokens on Hopper: up and down as streams of weights (stream.cuh).
 *
 * A warp's item is 16 rows of weights: 8 columns of an expert's hidden layer with their rows of W1
 * and of W3, or 16 rows of W2 in one segment of F. Every block lists the pairs of each expert
 * first, in groups that share a pass over the weights. The choices are known before `up` begins, so
 * `down` lists them and asks for its first weights while `up` still runs. */
#include "kernels/cuda/experts_decode.cuh"
#include "kernels/cuda/stream.cuh"
#include "kernels/cuda/swiglu.cuh"

namespace {

constexpr int most_pairs = 256, most_experts = 256;

/* Groups of pairs that want the same expert. */
struct pair_groups {
  int count;
  short expert[most_pairs], first[most_pairs], size[most_pairs]; /* of each group */
  short list[most_pairs];                                        /* pairs, less p.begin */
  short start[most_experts];                                     /* of an expert's pairs in list */
};

/* Call f(i, rank) in the lane that sees pair i for each that wants e, in order; returns how many.
 * All lanes must call. */
template <typename F> __device__ __forceinline__ int each_pair(const decode_args &p, int e, F f) {
  int found = 0, pairs = (int)(p.end - p.begin), lane = (int)threadIdx.x % 32;
  for (int base = 0; base < pairs; base += 32) {
    bool mine = base + lane < pairs && decode_choice(p, p.begin + base + lane) == e;
    unsigned all = __ballot_sync(full_warp, mine);
    if (mine) f(base + lane, found + __popc(all & ((1u << lane) - 1)));
    found += __popc(all);
  }
  return found;
}

/* The sum over the lanes before this one. */
__device__ __forceinline__ int lanes_before(int x) {
  int lane = (int)threadIdx.x % 32, sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    int before = __shfl_up_sync(full_warp, sum, step);
    if (lane >= step) sum += before;
  }
  return sum - x;
}

/* Groups of at most MOST pairs. All threads of the block must call. */
template <int MOST>
__device__ __forceinline__ void group_pairs(const decode_args &p, pair_groups &s) {
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  for (int e = warp; e < p.count; e += stream_warps) {
    int n = each_pair(p, e, [](int, int) {});
    if (lane == 0) s.start[e] = (short)n;
  }
  __syncthreads();
  if (warp == 0) {
    int pairs = 0, groups = 0;
    for (int base = 0; base < p.count; base += 32) {
      int e = base + lane, n = e < p.count ? s.start[e] : 0, mine = (n + MOST - 1) / MOST;
      int first = pairs + lanes_before(n), group = groups + lanes_before(mine);
      if (e < p.count) s.start[e] = (short)first;
      for (int i = 0; i < mine; i++) {
        s.expert[group + i] = (short)e;
        s.first[group + i] = (short)(first + i * MOST);
        s.size[group + i] = (short)min(MOST, n - i * MOST);
      }
      pairs = __shfl_sync(full_warp, first + n, 31);
      groups = __shfl_sync(full_warp, group + mine, 31);
    }
    if (lane == 0) s.count = groups;
  }
  __syncthreads();
  for (int e = warp; e < p.count; e += stream_warps)
    each_pair(p, e, [&](int i, int rank) { s.list[s.start[e] + rank] = (short)i; });
  __syncthreads();
}

/* This lane's row of each tile: what its pair reads of `x`. */
template <typename T, int TILES>
__device__ __forceinline__ void group_rows(const T *(&row)[TILES], const decode_args &p,
                                           const pair_groups &s, int group, const void *x,
                                           int64_t width, int per_row) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    int slot = j * 8 + (int)threadIdx.x % 32 / 4;
    row[j] = nullptr;
    if (slot < s.size[group])
      row[j] =
          static_cast<const T *>(x) + (p.begin + s.list[s.first[group] + slot]) / per_row * width;
  }
}

/* Call put(pair less p.begin, low, high) for what this lane has of a group's results. */
template <int TILES, typename F>
__device__ __forceinline__ void each_result(const stream_sums<TILES> &sums, const pair_groups &s,
                                            int group, F put) {
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int slot = j * 8 + (int)threadIdx.x % 4 * 2 + i;
      if (slot < s.size[group])
        put(s.list[s.first[group] + slot], sums.total(j, 0, i), sums.total(j, 1, i));
    }
}

template <typename T, int TILES>
__global__ void __launch_bounds__(stream_threads, 2) stream_up_kernel(decode_args p) {
  extern __shared__ uint4 memory[];
  __shared__ uint64_t barriers[stream_warps];
  __shared__ pair_groups s;
  if constexpr (mma_built<T>()) {
    stream_place place(memory, barriers);
    launch_wait();
    launch_release();
    group_pairs<8 * TILES>(p, s);

    int lane = (int)threadIdx.x % 32, tiles = (int)div_up(p.ffn, 8), items = s.count * tiles;
    auto ask = [&](int item, int k0) {
      int e = s.expert[item / tiles], f = item % tiles * 8 + lane % 8;
      const T *row =
          static_cast<const T *>(p.w13) + ((2LL * e + lane / 8) * p.ffn + f) * p.width + k0;
      place.ask(lane < skinny_rows && f < p.ffn ? row : nullptr, min(stream_segment, p.width - k0));
    };
    int item = stream_first();
    if (item < items) ask(item, 0);
    for (; item < items; item += stream_all()) {
      int group = item / tiles, f = item % tiles * 8 + lane / 4;
      const T *rows[TILES];
      group_rows<T, TILES>(rows, p, s, group, p.x, p.width, p.k);
      stream_sums<TILES> sums;
      sums.clear();
      for (int k0 = 0; k0 < p.width; k0 += stream_segment) {
        sums.multiply(place, rows, (s.size[group] + 7) / 8, k0, min(stream_segment, p.width - k0));
        if (k0 + stream_segment < p.width)
          ask(item, k0 + stream_segment);
        else if (item + stream_all() < items)
          ask(item + stream_all(), 0);
      }
      each_result(sums, s, group, [&](int at, float g, float u) {
        int64_t pair = p.begin + at;
        if (f < p.ffn)
          static_cast<T *>(p.hidden)[pair * p.ffn + f] =
              from_float<T>(swiglu<T>(p.gates[pair], g, u));
      });
    }
  }
}

template <typename T, int TILES>
__global__ void __launch_bounds__(stream_threads, 2) stream_down_kernel(decode_args p) {
  extern __shared__ uint4 memory[];
  __shared__ uint64_t barriers[stream_warps];
  __shared__ pair_groups s;
  if constexpr (mma_built<T>()) {
    /* The kernel before is `up`, which writes neither choices nor weights. */
    stream_place place(memory, barriers);
    group_pairs<8 * TILES>(p, s);
    int lane = (int)threadIdx.x % 32, tiles = (int)div_up(p.width, skinny_rows);
    int items = s.count * tiles * p.slices;
    auto ask = [&](int item) {
      int k0 = item % p.slices * stream_segment, tile = item / p.slices;
      int e = s.expert[tile / tiles], row = tile % tiles * skinny_rows + lane;
      const T *from = static_cast<const T *>(p.w2) + ((int64_t)e * p.width + row) * p.ffn + k0;
      place.ask(lane < skinny_rows && row < p.width ? from : nullptr,
                min(stream_segment, p.ffn - k0));
    };
    int item = stream_first();
    if (item < items) ask(item);
    launch_wait();
    launch_release();
    int64_t pairs = p.end - p.begin;
    for (; item < items; item += stream_all()) {
      int z = item % p.slices, k0 = z * stream_segment, tile = item / p.slices;
      int group = tile / tiles, row = tile % tiles * skinny_rows + lane / 4;
      const T *rows[TILES];
      group_rows<T, TILES>(rows, p, s, group, p.hidden, p.ffn, 1);
      stream_sums<TILES> sums;
      sums.clear();
      sums.multiply(place, rows, (s.size[group] + 7) / 8, k0, min(stream_segment, p.ffn - k0));
      if (item + stream_all() < items) ask(item + stream_all());
      each_result(sums, s, group, [&](int at, float x, float y) {
        float *to = p.partial + (z * pairs + at) * p.width + row;
        if (row < p.width) to[0] = x;
        if (row + 8 < p.width) to[8] = y;
      });
    }
  }
}

template <typename T, int TILES> moe_status start(moe_device *dev, const decode_args &p) {
  dim3 grid((unsigned)cuda_of(dev)->sms);
  MOE_TRY(stream_start(dev, stream_up_kernel<T, TILES>, grid, p));
  return stream_start(dev, stream_down_kernel<T, TILES>, grid, p);
}

} /* namespace */

int cuda_experts_stream_slices(const moe_device *dev, const decode_args &p) {
  int64_t slices = div_up(p.ffn, stream_segment), pairs = p.end - p.begin;
  bool fits = stream_fits(dev) && pairs <= most_pairs && p.count <= most_experts &&
              4 * slices * pairs * p.width <= cuda_of(dev)->partial_bytes;
  return fits ? (int)slices : 0;
}

moe_status cuda_experts_stream(moe_device *dev, moe_dtype dtype, const decode_args &p) {
  bool few = (p.end - p.begin) / p.k <= 8;
  if (dtype == MOE_F16) return few ? start<__half, 1>(dev, p) : start<__half, 4>(dev, p);
  return few ? start<__nv_bfloat16, 1>(dev, p) : start<__nv_bfloat16, 4>(dev, p);
}
