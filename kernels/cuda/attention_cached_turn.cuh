/* Rotation of a single new token inside attention over a cache (attention_cached_mma.cu): its
 * queries in registers, where a lane has both elements of a rotated pair, and its key in shared
 * memory, on the way to the cache. The numbers are rope.cu's. */
#ifndef MOE_KERNELS_CUDA_ATTENTION_CACHED_TURN_CUH
#define MOE_KERNELS_CUDA_ATTENTION_CACHED_TURN_CUH

#include "kernels/cuda/attention_cached.cuh"
#include "kernels/cuda/attention_mma.cuh"

/* Cosines and sines of elements i and i + 1 at a position; NaN where the table does not reach. */
struct two_angles {
  float2 cosine = {}, sine = {};
  __device__ __forceinline__ void load(const cached_args &p, int position, int i) {
    bool known = position >= 0 && position < p.turns;
    const float *at = p.table + (int64_t)(known ? position : 0) * p.d + i;
    cosine = *reinterpret_cast<const float2 *>(at);
    sine = *reinterpret_cast<const float2 *>(at + p.d / 2);
    if (!known) cosine = sine = make_float2(NAN, NAN);
  }
  /* Turn a pair of neighbours a and its partner b, half a head further. */
  template <typename T> __device__ __forceinline__ void turn(uint32_t &a, uint32_t &b) const {
    T *first = reinterpret_cast<T *>(&a), *second = reinterpret_cast<T *>(&b);
    float x[2], y[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float cos = i == 0 ? cosine.x : cosine.y, sin = i == 0 ? sine.x : sine.y;
      x[i] = to_float(first[i]) * cos - to_float(second[i]) * sin;
      y[i] = to_float(second[i]) * cos + to_float(first[i]) * sin;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) first[i] = from_float<T>(x[i]), second[i] = from_float<T>(y[i]);
  }
};

/* What a thread turns by: its elements of the rows of queries, and its two of the new key. */
template <int D> struct turned_angles {
  static constexpr int groups = D < 32 ? 1 : D / 32;
  two_angles query[groups][2], key;

  __device__ __forceinline__ void load(const cached_args &p, int position) {
#pragma unroll
    for (int k = 0; k < D / 32; k++)
#pragma unroll
      for (int part = 0; part < 2; part++)
        query[k][part].load(p, position, k * 16 + lane_of() % 4 * 2 + part * 8);
    if (threadIdx.x < D / 4) key.load(p, position, (int)threadIdx.x * 2);
  }
  /* A lane has both elements of a rotated pair. */
  template <typename T>
  __device__ __forceinline__ void turn_queries(uint32_t (&a)[D / 16][4]) const {
#pragma unroll
    for (int k = 0; k < D / 32; k++)
#pragma unroll
      for (int part = 0; part < 2; part++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          query[k][part].template turn<T>(a[k][half + 2 * part], a[k + D / 32][half + 2 * part]);
  }
  /* The new key, in its row of a tile of KEYS; then it and its value go to the cache, if `store`.
   * All threads must call. */
  template <int KEYS, typename T>
  __device__ __forceinline__ void turn_new_key(T *row, const cached_group<T> &g, bool store) const {
    int i = (int)threadIdx.x * 2;
    if (i < D / 2) {
      uint32_t *a = reinterpret_cast<uint32_t *>(row + i), *b = a + D / 4;
      key.template turn<T>(*a, *b);
      if (store) {
        T *to = g.cached_keys + g.length * g.width, *value = g.cached_values + g.length * g.width;
        const uint32_t *from = a + KEYS * tile_row<D> / 2;
        *reinterpret_cast<uint32_t *>(to + i) = *a;
        *reinterpret_cast<uint32_t *>(to + i + D / 2) = *b;
        *reinterpret_cast<uint32_t *>(value + i) = from[0];
        *reinterpret_cast<uint32_t *>(value + i + D / 2) = from[D / 4];
      }
    }
    __syncthreads();
  }
};

#endif
