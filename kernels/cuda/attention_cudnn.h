/* Attention through cuDNN, where it is built in and the shape suits it. Private to kernels/cuda. */
#ifndef MOE_KERNELS_CUDA_ATTENTION_CUDNN_H
#define MOE_KERNELS_CUDA_ATTENTION_CUDNN_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* bf16 or fp16, no document mask, head size a multiple of 8 up to 128, sm_80 or newer, and cuDNN
 * has a plan: then the plans for this shape are built (once) and kept. */
bool cuda_cudnn_fits(moe_device *dev, moe_attention_shape shape, moe_dtype dtype);
/* Scratch bytes of forward and backward for a shape that fits. */
int64_t cuda_cudnn_scratch(moe_device *dev, moe_attention_shape shape, moe_dtype dtype);
moe_status cuda_cudnn_attention(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                                moe_tensor out, moe_tensor lse);
moe_status cuda_cudnn_attention_backward(moe_device *dev, moe_attention_shape shape,
                                         moe_tensor dout, moe_tensor qkv, moe_tensor out,
                                         moe_tensor lse, moe_tensor dqkv);
/* Give back what this device's plans hold. */
void cuda_cudnn_close(moe_device *dev);

#ifdef __cplusplus
}
#endif
#endif
