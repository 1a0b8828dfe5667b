/* The tensor core attention kernels' tiles: [rows, D] of f16 or bf16 in shared memory, and the two
 * products of a warp's 16 rows with them (see mma.cuh for fragments).
 *
 *     nt:  S [16, N] = A [16, D] B [N, D]^T      scores, dP
 *     nn:  O [16, D] += P [16, N] B [N, D]       outputs, gradients
 *
 * A lies in registers, or in a tile where registers are short. P is a result of nt, rounded: it
 * goes from one product to the next without leaving its registers. Rows are 16 bytes longer than D,
 * so that the 8 rows of a matrix lie in different banks. */
#ifndef MOE_KERNELS_CUDA_ATTENTION_MMA_CUH
#define MOE_KERNELS_CUDA_ATTENTION_MMA_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/mma.cuh"

template <int D> constexpr int tile_row = D + 8;

__device__ __forceinline__ int lane_of() {
  return (int)threadIdx.x % 32;
}
__device__ __forceinline__ int warp_of() {
  return (int)threadIdx.x / 32;
}

/* Start copying rows [first, first + ROWS) to a tile; zeros past the sequence and past d. */
template <int ROWS, int D, int THREADS, typename T>
__device__ __forceinline__ void start_tile(T *tile, attention_rows<const T> from, int first,
                                           int seq, int d) {
  constexpr int words = D / 8;
#pragma unroll
  for (int at = 0; at < ROWS * words; at += THREADS) {
    int word = at + (int)threadIdx.x, r = word / words, c = word % words * 8;
    if (ROWS * words % THREADS != 0 && word >= ROWS * words) break;
    bool inside = first + r < seq && c < d;
    copy_start<16>(tile + r * tile_row<D> + c,
                   inside ? from.data + (first + r) * from.stride + c : from.data, inside);
  }
}

/* Rows [row, row + 16) of the sequence as fragments, straight from global memory. */
template <int D, typename T>
__device__ __forceinline__ void load_rows(uint32_t (&a)[D / 16][4], attention_rows<const T> from,
                                          int row, int seq, int d) {
  int r = row + lane_of() / 4, c = lane_of() % 4 * 2;
#pragma unroll
  for (int k = 0; k < D / 16; k++)
#pragma unroll
    for (int part = 0; part < 4; part++) {
      int i = r + part % 2 * 8, j = k * 16 + c + part / 2 * 8;
      a[k][part] = i < seq && j < d
                       ? *reinterpret_cast<const uint32_t *>(from.data + i * from.stride + j)
                       : 0u;
    }
}

/* 16 rows to multiply by: KEPT in registers, or read from their tile each time. */
template <typename T, int D, bool KEPT> struct left_rows;
template <typename T, int D> struct left_rows<T, D, true> {
  uint32_t a[D / 16][4];
  __device__ __forceinline__ void get(uint32_t (&out)[4], int k) const {
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = a[k][i];
  }
};
template <typename T, int D> struct left_rows<T, D, false> {
  const T *rows;
  __device__ __forceinline__ void get(uint32_t (&out)[4], int k) const {
    load_matrices(out, rows + lane_of() % 16 * tile_row<D> + k * 16 + lane_of() / 16 * 8);
  }
};

template <int N, typename T, int D, bool KEPT>
__device__ __forceinline__ void product_nt(float (&s)[N / 8][4], const left_rows<T, D, KEPT> &left,
                                           const T *b) {
#pragma unroll
  for (int j = 0; j < N / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[j][e] = 0.0f;
  b += (lane_of() / 16 * 8 + lane_of() % 8) * tile_row<D> + lane_of() / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t a[4];
    left.get(a, k);
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
      uint32_t r[4];
      load_matrices(r, b + j * 16 * tile_row<D> + k * 16);
      mma<T>(s[2 * j], a, r[0], r[1]);
      mma<T>(s[2 * j + 1], a, r[2], r[3]);
    }
  }
}

template <int D, int N, typename T>
__device__ __forceinline__ void product_nn(float (&o)[D / 8][4], const uint32_t (&p)[N / 16][4],
                                           const T *b) {
  b += lane_of() % 16 * tile_row<D> + lane_of() / 16 * 8;
#pragma unroll
  for (int k = 0; k < N / 16; k++)
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
      uint32_t r[4];
      load_transposed(r, b + k * 16 * tile_row<D> + c * 16);
      mma<T>(o[2 * c], p[k], r[0], r[1]);
      mma<T>(o[2 * c + 1], p[k], r[2], r[3]);
    }
}

/* What a lane's two rows, g and g + 8 of its warp's 16, have seen so far. */
struct two_rows {
  float peak[2], sum[2]; /* of scores; sum is this lane's share */
};

/* Over the 4 lanes that share a row. */
__device__ __forceinline__ float quad_max(float x) {
  return quad_reduce(x, [](float a, float b) { return fmaxf(a, b); });
}
__device__ __forceinline__ float quad_sum(float x) {
  return quad_reduce(x, op_sum{});
}

/* Scores become probabilities relative to the raised peak; o and sum follow it. */
template <int N, int C>
__device__ __forceinline__ void soften(float (&s)[N][4], two_rows &r, float (&o)[C][4],
                                       float scale2) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float top = r.peak[half];
#pragma unroll
    for (int j = 0; j < N; j++) top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
    top = quad_max(top);
    float base = top == -INFINITY ? 0.0f : top * scale2; /* nothing seen yet */
    float shrink = exp2_fast(r.peak[half] * scale2 - base);
    r.peak[half] = top;
    r.sum[half] *= shrink;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; e++) {
        s[j][e] = exp2_fast(fmaf(s[j][e], scale2, -base));
        r.sum[half] += s[j][e];
      }
#pragma unroll
    for (int c = 0; c < C; c++) {
      o[c][2 * half] *= shrink;
      o[c][2 * half + 1] *= shrink;
    }
  }
}

/* A result as the next product's left side. */
template <typename T, int N>
__device__ __forceinline__ void round_rows(uint32_t (&p)[N / 2][4], const float (&s)[N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; k++) {
    p[k][0] = pack<T>(s[2 * k][0], s[2 * k][1]);
    p[k][1] = pack<T>(s[2 * k][2], s[2 * k][3]);
    p[k][2] = pack<T>(s[2 * k + 1][0], s[2 * k + 1][1]);
    p[k][3] = pack<T>(s[2 * k + 1][2], s[2 * k + 1][3]);
  }
}

/* Call hide(j, e) for each element o[j][e] of a result [16 queries from row0, 8 N keys from n0]
 * whose query does not see its key. */
template <int N, typename F>
__device__ __forceinline__ void each_hidden(const attention_args &p, int64_t batch, int row0,
                                            int n0, F hide) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = min(row0 + lane_of() / 4 + 8 * half, p.seq - 1), first = first_key(p, batch, row);
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; e++) {
        int key = n0 + j * 8 + lane_of() % 4 * 2 + e % 2;
        if (key < first || key > row) hide(j, e);
      }
  }
}

/* Call put(row, c, x, y) for this lane's pairs of neighbouring elements of a result [16, D] whose
 * first row is `row`; rows past the sequence and columns past d are left out. */
template <int N, typename F>
__device__ __forceinline__ void each_pair(const float (&o)[N][4], int row, int seq, int d, F put) {
  int c = lane_of() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int i = row + lane_of() / 4 + 8 * half;
    if (i >= seq) continue;
#pragma unroll
    for (int j = 0; j < N; j++)
      if (j * 8 < d) put(i, j * 8 + c, o[j][2 * half], o[j][2 * half + 1]);
  }
}

/* Two neighbouring elements (an even offset, so 4-byte aligned). */
template <typename T> __device__ __forceinline__ void store_pair(T *to, float x, float y) {
  *reinterpret_cast<uint32_t *>(to) = pack<T>(x, y);
}

/* Call f(T{}, cuda_int<D>) for a half type and the smallest built head size that holds d. */
template <typename F> static inline moe_status attention_half(moe_dtype dtype, int d, F f) {
  moe_status status = MOE_INVALID; /* d is at most 128: attention.cu saw to it */
  attention_head_size(d, [&](auto size) {
    status = dtype == MOE_F16 ? f(__half{}, size) : f(__nv_bfloat16{}, size);
  });
  return status;
}

#endif
