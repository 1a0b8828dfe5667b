/* Whole rows of bf16 in a block, 16 at a time: a warp has 64 columns of them, a thread four pieces
 * of 8 neighbours, which are fragments of products as they lie (router_mma.cuh). */
#ifndef MOE_KERNELS_CUDA_ROW_PIECES_CUH
#define MOE_KERNELS_CUDA_ROW_PIECES_CUH

#include "kernels/cuda/mma.cuh"

constexpr int piece_columns = 64, piece_tile = 16;                /* of a warp; rows */
constexpr int piece_warps = 12, piece_threads = 32 * piece_warps; /* at most */

struct piece_at {
  int token, column; /* of the tile; of the row */
};
/* Piece i: rows lane / 4 and 8 more, in each half of the warp's columns. */
__device__ __forceinline__ piece_at piece_place(int i) {
  int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
  return {lane / 4 + i % 2 * 8, warp * piece_columns + i / 2 * 32 + lane % 4 * 8};
}

/* A block's rows of a matrix, [first, end) with 16 to a tile: where piece i of a tile lies. */
struct piece_rows {
  int64_t first, end;
  int width;

  __device__ __forceinline__ bool here(int tile, int i) const {
    return first + tile * piece_tile + piece_place(i).token < end;
  }
  __device__ __forceinline__ int64_t place(int tile, int i) const {
    return (first + tile * piece_tile + piece_place(i).token) * width + piece_place(i).column;
  }
  /* To shared memory; zeros where there is no such row. */
  __device__ __forceinline__ void copy(uint4 *to, const __nv_bfloat16 *from, int tile,
                                       int i) const {
    copy_start<16>(to, from + (here(tile, i) ? place(tile, i) : 0), here(tile, i));
  }
};

__device__ __forceinline__ void piece_unpack(const uint4 &from, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t word = reinterpret_cast<const uint32_t *>(&from)[i];
    v[2 * i] = low(word), v[2 * i + 1] = high(word);
  }
}
__device__ __forceinline__ uint4 piece_pack(const float (&v)[8]) {
  return {pack<__nv_bfloat16>(v[0], v[1]), pack<__nv_bfloat16>(v[2], v[3]),
          pack<__nv_bfloat16>(v[4], v[5]), pack<__nv_bfloat16>(v[6], v[7])};
}

/* Eight of a row's gains, in shared memory. */
__device__ __forceinline__ void piece_gain(const float *gains, int column, float (&gain)[8]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float4 v = *reinterpret_cast<const float4 *>(gains + column + 4 * i);
    gain[4 * i] = v.x, gain[4 * i + 1] = v.y, gain[4 * i + 2] = v.z, gain[4 * i + 3] = v.w;
  }
}

/* What norm.cu makes of a piece, to the bit. */
__device__ __forceinline__ uint4 piece_normed(const float *gains, int column, const uint4 &from,
                                              float rstd) {
  float gain[8], v[8];
  piece_gain(gains, column, gain);
  piece_unpack(from, v);
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = gain[j] * (v[j] * rstd);
  return piece_pack(v);
}

/* What each warp has left of a row, summed: part[warp][row]. Lanes of a row share the work. */
__device__ __forceinline__ float piece_sum(const float (*part)[piece_tile], int row) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < piece_warps / 4; i++) {
    int warp = i * 4 + (int)threadIdx.x % 4;
    if (warp < (int)blockDim.x / 32) sum += part[warp][row];
  }
  return quad_reduce(sum, op_sum{});
}

/* Whether rows of this width, at these addresses, can be taken in pieces. */
static inline bool piece_fits(int64_t width, const void *const *all, int count) {
  uintptr_t bits = 0;
  for (int i = 0; i < count; i++) bits |= reinterpret_cast<uintptr_t>(all[i]);
  return width > 0 && width % piece_columns == 0 && width <= piece_warps * piece_columns &&
         bits % 16 == 0;
}

#endif
