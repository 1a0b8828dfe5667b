/* gemv.cu: moe_gemm's NT form where a has few rows (generation). */
#ifndef MOE_KERNELS_CUDA_GEMV_H
#define MOE_KERNELS_CUDA_GEMV_H

#include "kernels/cuda/cuda.h"

/* Whether the kernel takes these operands: at most 32 rows, half precision, whole words. */
bool cuda_gemv_fits(const moe_device *dev, moe_gemm_form form, moe_tensor a, moe_tensor b);
moe_status cuda_gemv(moe_device *dev, moe_tensor a, moe_tensor b, float beta, moe_tensor c);

#endif
