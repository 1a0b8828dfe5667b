/* The CUDA backend's slots, one file per op family, and what NCCL needs to know of the device.
 * Contracts are in kernels/ops.h. Plain C, so that C layers may include it. */
#ifndef MOE_KERNELS_CUDA_CUDA_H
#define MOE_KERNELS_CUDA_CUDA_H

#include "kernels/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The stream (a cudaStream_t) on which everything of `dev` is queued, and its GPU's number. */
void *moe_cuda_stream(const moe_device *dev);
int moe_cuda_ordinal(const moe_device *dev);
bool moe_cuda_has_lanes(const moe_device *dev); /* not with MOE_LANES=off */

moe_status moe_cuda_zero(moe_device *dev, moe_tensor x);
moe_status moe_cuda_fill(moe_device *dev, moe_tensor x, float value);
moe_status moe_cuda_draw_normal(moe_device *dev, uint64_t seed, uint64_t stream, int64_t begin,
                                float std, moe_tensor out);
moe_status moe_cuda_copy(moe_device *dev, moe_tensor dst, moe_tensor src);
moe_status moe_cuda_add(moe_device *dev, moe_tensor y, moe_tensor x);
moe_status moe_cuda_sum_rows(moe_device *dev, moe_tensor x, int64_t own, moe_tensor out,
                             moe_tensor squares);
moe_status moe_cuda_scale(moe_device *dev, moe_tensor x, float s);
moe_status moe_cuda_sum_squares(moe_device *dev, moe_tensor x, moe_tensor out);
moe_status moe_cuda_embed(moe_device *dev, moe_tensor tokens, moe_tensor weight, moe_tensor out);
moe_status moe_cuda_embed_backward(moe_device *dev, moe_tensor tokens, moe_tensor dout,
                                   moe_tensor dweight);
moe_status moe_cuda_rms_norm(moe_device *dev, moe_tensor x, moe_tensor residual, moe_tensor gain,
                             double eps, moe_tensor sum, moe_tensor out, moe_tensor rstd);
moe_status moe_cuda_norm_gemm(moe_device *dev, moe_norm norm, moe_tensor b, moe_tensor c,
                              bool *done);
moe_status moe_cuda_norm_router(moe_device *dev, moe_norm norm, moe_tensor weight, moe_tensor bias,
                                moe_tensor probs, moe_tensor lse, moe_tensor experts,
                                moe_tensor gates, moe_tensor stats, bool *done);
moe_status moe_cuda_rms_norm_backward(moe_device *dev, moe_tensor dout, moe_tensor x,
                                      moe_tensor gain, moe_tensor rstd, moe_tensor dx,
                                      moe_tensor dgain);
moe_status moe_cuda_gemm(moe_device *dev, moe_gemm_form form, moe_tensor a, moe_tensor b,
                         float beta, moe_tensor c);
moe_status moe_cuda_rope(moe_device *dev, moe_tensor qkv, moe_tensor positions, moe_tensor table,
                         int64_t heads, int64_t kv_heads, int direction);
moe_status moe_cuda_attention(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                              moe_tensor doc_start, moe_tensor out, moe_tensor lse);
moe_status moe_cuda_attention_backward(moe_device *dev, moe_attention_shape shape, moe_tensor dout,
                                       moe_tensor qkv, moe_tensor doc_start, moe_tensor out,
                                       moe_tensor lse, moe_tensor dqkv);
int64_t moe_cuda_attention_scratch(moe_device *dev, moe_attention_shape shape, moe_dtype dtype);
moe_status moe_cuda_attention_cached(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                                     moe_tensor positions, moe_tensor table, moe_tensor keys,
                                     moe_tensor values, moe_tensor lengths, moe_tensor out);
int64_t moe_cuda_attention_cached_scratch(moe_device *dev, moe_attention_shape shape, int64_t room,
                                          moe_dtype dtype);
moe_status moe_cuda_router(moe_device *dev, moe_tensor x, moe_tensor weight, moe_tensor bias,
                           moe_tensor probs, moe_tensor lse, moe_tensor experts, moe_tensor gates,
                           moe_tensor stats);
moe_status moe_cuda_router_drop(moe_device *dev, moe_tensor probs, int64_t capacity,
                                moe_tensor experts, moe_tensor gates, moe_tensor dropped);
moe_status moe_cuda_router_backward(moe_device *dev, moe_tensor dgates, moe_tensor x,
                                    moe_tensor weight, moe_tensor probs, moe_tensor lse,
                                    moe_tensor experts, moe_tensor gates, moe_tensor load,
                                    float aux_scale, float z_scale, moe_tensor dlogits,
                                    moe_tensor dx, moe_tensor dweight);
moe_status moe_cuda_router_norm_backward(moe_device *dev, moe_tensor dgates, moe_tensor x,
                                         moe_tensor weight, moe_tensor probs, moe_tensor lse,
                                         moe_tensor experts, moe_tensor gates, moe_tensor load,
                                         float aux_scale, float z_scale, moe_tensor dlogits,
                                         moe_tensor dweight, moe_norm_gradient norm, bool *done);
moe_status moe_cuda_permute_plan(moe_device *dev, moe_tensor experts, int64_t pad,
                                 moe_tensor offsets, moe_tensor pair, moe_tensor slot);
moe_status moe_cuda_permute_window(moe_device *dev, moe_tensor offsets, int64_t begin, int64_t rows,
                                   moe_tensor out);
moe_status moe_cuda_gather_rows(moe_device *dev, moe_tensor src, moe_tensor pair, int64_t group,
                                moe_tensor out);
moe_status moe_cuda_gather_gates(moe_device *dev, moe_tensor values, moe_tensor pair,
                                 moe_tensor out);
moe_status moe_cuda_combine_rows(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                                 int beta, moe_tensor out);
moe_status moe_cuda_combine_norm(moe_device *dev, moe_tensor src, moe_tensor slot, moe_norm norm,
                                 bool *done);
moe_status moe_cuda_combine_gates(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                                  int beta, moe_tensor out);
moe_status moe_cuda_localize_experts(moe_device *dev, moe_tensor experts, moe_tensor gates,
                                     int64_t begin, int64_t count);
moe_status moe_cuda_expert_up(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                              moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a);
moe_status moe_cuda_expert_down(moe_device *dev, moe_tensor a, moe_tensor offsets, moe_tensor w2,
                                moe_tensor y);
moe_status moe_cuda_expert_down_backward(moe_device *dev, moe_tensor dy, moe_tensor offsets,
                                         moe_tensor w2, moe_tensor gates, moe_gu_kind kind,
                                         moe_tensor gu, moe_tensor a, moe_tensor dgates);
moe_status moe_cuda_gates_backward(moe_device *dev, moe_tensor dy, moe_tensor y, moe_tensor slot,
                                   moe_tensor gates, moe_tensor dgates);
moe_status moe_cuda_gather_backward(moe_device *dev, moe_tensor dy, moe_tensor pair, moe_tensor y,
                                    moe_tensor slot, moe_tensor gates, moe_tensor out,
                                    moe_tensor dgates, bool *done);
moe_status moe_cuda_expert_up_backward(moe_device *dev, moe_tensor dgu, moe_tensor offsets,
                                       moe_tensor w13, moe_tensor dx);
moe_status moe_cuda_expert_weight_grad(moe_device *dev, moe_tensor left, moe_tensor right,
                                       moe_tensor offsets, int accumulate, moe_tensor dw,
                                       moe_tensor squares);
int64_t moe_cuda_expert_scratch(moe_device *dev, int64_t rows, int64_t hidden, int64_t ffn,
                                moe_dtype dtype);
moe_status moe_cuda_experts_decode(moe_device *dev, moe_tensor x, moe_tensor experts,
                                   moe_tensor gates, int64_t first, moe_tensor w13, moe_tensor w2,
                                   moe_tensor hidden, moe_tensor out);
moe_status moe_cuda_sum_choices(moe_device *dev, moe_tensor terms, moe_tensor out);
moe_status moe_cuda_cross_entropy(moe_device *dev, moe_tensor logits, moe_tensor targets,
                                  float scale, int with_grad, moe_tensor loss, moe_tensor row_loss);
moe_status moe_cuda_clip_scale(moe_device *dev, moe_tensor sum_squares, double max_norm,
                               double unscale, moe_tensor scale);
moe_status moe_cuda_adamw(moe_device *dev, moe_adamw_args args, moe_tensor now, moe_tensor grad,
                          moe_tensor scale, moe_tensor master, moe_tensor m, moe_tensor v,
                          moe_tensor weight);
moe_status moe_cuda_sample(moe_device *dev, moe_tensor logits, moe_sample_args args,
                           moe_tensor streams, moe_tensor positions, moe_tensor token);
moe_status moe_cuda_advance(moe_device *dev, moe_tensor counts, moe_tensor by);

#ifdef __cplusplus
}
#endif
#endif
