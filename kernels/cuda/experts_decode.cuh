/* What the kernels of the experts of a few tokens share.
 *
 *   experts_decode.cu          the slot, its plain kernels, and those on tensor cores
 *   experts_decode_stream.cu   Hopper: weights by the copy engine
 *
 * A pair is a token and one of its choices, number token * K + k. */
#ifndef MOE_KERNELS_CUDA_EXPERTS_DECODE_CUH
#define MOE_KERNELS_CUDA_EXPERTS_DECODE_CUH

#include "kernels/cuda/launch.cuh"

struct decode_args {
  const void *x, *w13, *w2;
  const int32_t *experts; /* [T, K] */
  const float *gates;     /* [T, K] */
  void *hidden, *out;
  float *partial;           /* [slices, pairs of this pass, D] */
  int64_t begin, end;       /* pairs of this pass */
  int k, count, width, ffn; /* K, e, D, F */
  int slices, chunks;       /* of F: chunks in all, in `slices` equal parts */
  bool by_pair;             /* blockIdx.y numbers pairs, else experts */
};

/* A pair's expert. Kernels read it ahead of launch_wait, where only the L2 cache is to be trusted.
 */
__device__ __forceinline__ int decode_choice(const decode_args &p, int64_t pair) {
#ifdef __CUDA_ARCH__
  return __ldcg(p.experts + pair);
#else
  return p.experts[pair];
#endif
}

/* experts_decode_stream.cu: slices of F there; 0: not for it, where tensor cores could. */
int cuda_experts_stream_slices(const moe_device *dev, const decode_args &p);
moe_status cuda_experts_stream(moe_device *dev, moe_dtype dtype, const decode_args &p);

#endif
