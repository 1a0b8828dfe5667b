/* What the Hopper attention kernels share: heads of 64 bf16 elements, by wgmma and the copy engine.
 *
 * A head's rows lie between those of other heads, 128 bytes of each: one row of the swizzle. So 128
 * rows of a head, fetched at once, are 16 KiB of shared memory that wgmma reads either way round:
 * rows as the 64- or 128-wide side and the head as K, in steps of 16 columns, or rows as K, in
 * steps of 16 rows. */
#ifndef MOE_KERNELS_CUDA_ATTENTION_SM90_CUH
#define MOE_KERNELS_CUDA_ATTENTION_SM90_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/sm90_gemm.cuh"

namespace sm90_attention {

enum {
  HEAD = 64,
  ROWS = 128,             /* of a head, fetched at once */
  TILE = ROWS * HEAD * 2, /* their bytes */
  STEP_ROWS = 16 * 128,   /* bytes from 16 rows to the next: a product's K */
  STEP_COLUMNS = 32,      /* from 16 columns to the next */
};

/* A tensor [B, S, heads, HEAD] for the copy engine, in boxes of so many rows of one head.
 * Coordinates are (0, row, head, batch). */
static inline moe_status map_heads(moe_device *dev, CUtensorMap *out, const attention_args &p,
                                   const void *data, int64_t heads, int rows = ROWS) {
  int64_t width = heads * HEAD;
  return sm90_map(dev, out,
                  {const_cast<void *>(data),
                   MOE_BF16,
                   {HEAD, p.seq, heads, p.batch},
                   {width, HEAD, p.seq * width},
                   {HEAD, rows, 1, 1},
                   128});
}

/* acc [64, 128] = a [64, HEAD] b [128, HEAD]^T, rows of both side by side: S or dP of some rows. */
__device__ __forceinline__ void score_rows(float (&acc)[64], uint32_t a, uint32_t b) {
  uint64_t left = operand(a, 0), right = operand(b, 0);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < HEAD / 16; i++)
    wgmma<0, 0>(acc, left + (i * STEP_COLUMNS >> 4), right + (i * STEP_COLUMNS >> 4), i > 0);
  wgmma_commit();
}

/* The same with a in registers. */
__device__ __forceinline__ void score_rows(float (&acc)[64], const uint32_t (&a)[16], uint32_t b) {
  uint64_t right = operand(b, 0);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < HEAD / 16; i++)
    wgmma<0>(acc, a + 4 * i, right + (i * STEP_COLUMNS >> 4), i > 0);
  wgmma_commit();
}
/* This warp's 16 of 64 rows for it, from shared memory at `from`. */
__device__ __forceinline__ void take_rows(uint32_t (&a)[16], uint32_t from) {
  uint32_t own = from + (uint32_t)warp_of_group() * STEP_ROWS;
#pragma unroll
  for (int c = 0; c < HEAD / 16; c++) {
    uint32_t part[4];
    load_matrices(part, slab_blocks<128>(own, c));
#pragma unroll
    for (int i = 0; i < 4; i++) a[4 * c + i] = part[i];
  }
}

/* acc [64, HEAD] += left [64, 128] b [128, HEAD], left in registers as score_rows leaves it,
 * rounded; add 0: stored instead of added. */
__device__ __forceinline__ void add_rows(float (&acc)[32], const uint32_t (&left)[32], uint32_t b,
                                         int add = 1) {
  uint64_t right = operand(b, 0);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < ROWS / 16; i++)
    wgmma<1>(acc, left + 4 * i, right + (i * STEP_ROWS >> 4), i == 0 ? add : 1);
  wgmma_commit();
}

} // namespace sm90_attention

#endif
