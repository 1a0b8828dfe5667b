/* The CUDA device's state, for host code in C++ or CUDA. Private to kernels/cuda. */
#ifndef MOE_KERNELS_CUDA_STATE_H
#define MOE_KERNELS_CUDA_STATE_H

#include <cublasLt.h>
#include <cuda_runtime.h>

#include "kernels/cuda/cuda.h"

struct cuda_plans;   /* gemm.cu: cuBLASLt plans by shape */
struct cuda_offsets; /* experts.cu: expert offsets read back to the host */
struct cuda_expert_ops;
struct cuda_cudnn; /* attention_cudnn.cpp */

struct cuda_state {
  int ordinal;                  /* this GPU's number */
  int sms;                      /* multiprocessors */
  int lent;                     /* of them to MOE_LANE_REDUCE: lanes.h */
  int arch;                     /* 90 for compute capability 9.0 */
  int max_shared;               /* bytes of shared memory one block may ask for */
  cudaStream_t stream;          /* of the current lane: where everything is queued */
  cudaStream_t lane[MOE_LANES]; /* lanes.cu */
  cudaEvent_t passed[MOE_LANES];
  cublasLtHandle_t blas;
  void *workspace; /* cuBLASLt's */
  size_t workspace_bytes;
  char *partial; /* partial sums between the two stages of a reduction, inside one op */
  int64_t partial_bytes;
  unsigned *ended; /* 0 between operations of the main lane: common.cuh, block_is_last */
  double *beside;  /* the same for moe_sum_rows, which runs beside others: [1 + 8 sms] */
  bool own_gemm;   /* MOE_GEMM=own: the tiled kernel instead of cuBLASLt, for tests */
  cuda_plans *plans;
  cuda_offsets *offsets;
  const cuda_expert_ops *experts;
  cuda_cudnn *cudnn; /* attention_cudnn.cpp: NULL until a shape asks for it */
};

static inline cuda_state *cuda_of(const moe_device *dev) {
  return static_cast<cuda_state *>(dev->state);
}

#endif
