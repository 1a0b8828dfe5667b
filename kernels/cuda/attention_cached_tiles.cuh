/* What both blocks of attention over a cache on tensor cores share (attention_cached_mma.cu): tiles
 * of keys and values on their way, rows of queries, what a tile adds, and where results go. */
#ifndef MOE_KERNELS_CUDA_ATTENTION_CACHED_TILES_CUH
#define MOE_KERNELS_CUDA_ATTENTION_CACHED_TILES_CUH

#include "kernels/cuda/attention_cached.cuh"
#include "kernels/cuda/attention_mma.cuh"

/* Start copying rows [from, until) of the keys and values [n0, n0 + N) to two tiles; zeros from
 * `end` on and past d. */
template <int N, int D, int THREADS, typename T>
__device__ __forceinline__ void start_keys(T *tile, const cached_group<T> &g, int n0, int from,
                                           int until, int end, int d) {
  constexpr int words = D / 8;
#pragma unroll 1 /* little code, read once: instructions have a long way from memory, too */
  for (int at = 0; at < N * words; at += THREADS) {
    int word = at + (int)threadIdx.x, r = word / words, c = word % words * 8;
    if (N * words % THREADS != 0 && word >= N * words) break;
    if (n0 + r < from || n0 + r >= until) continue;
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

/* Rows from row0 on see N keys from k0 on, at `tile`, their values `values` elements further. */
template <int N, int D, typename T>
__device__ __forceinline__ void
see_keys(float (&o)[D / 8][4], two_rows &r, const left_rows<T, D, true> &q, const T *tile,
         int values, const cached_args &p, const cached_group<T> &g, int row0, int k0, int end) {
  float s[N / 8][4];
  product_nt<N>(s, q, tile);
  if (k0 + N > end || k0 + N - 1 > g.position(p, row0)) hide(s, p, g, row0, k0, end);
  soften(s, r, o, p.scale * log2_e);
  uint32_t probs[N / 16][4];
  round_rows<T>(probs, s);
  product_nn<D, N>(o, probs, tile + values);
}

/* Nothing seen yet. */
template <int C> __device__ __forceinline__ void clear_rows(float (&o)[C][4], two_rows &r) {
#pragma unroll
  for (int half = 0; half < 2; half++) r.peak[half] = -INFINITY, r.sum[half] = 0.0f;
#pragma unroll
  for (int c = 0; c < C; c++)
#pragma unroll
    for (int i = 0; i < 4; i++) o[c][i] = 0.0f;
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

#endif
