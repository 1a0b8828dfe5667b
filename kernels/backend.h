/* The backend table: one slot per operation, plus memory. Private to kernels/.
 *
 * A slot may assume what ops.c checked: shapes, types, present tensors. Documentation is in ops.h.
 */
#ifndef MOE_KERNELS_BACKEND_H
#define MOE_KERNELS_BACKEND_H

#include "kernels/lanes.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_backend {
  const char *name;
  bool is_host;
  void (*close)(moe_device *dev);
  int64_t (*free_bytes)(moe_device *dev);
  double (*peak_tflops)(moe_device *dev, moe_dtype dtype);
  void *(*alloc)(moe_device *dev, int64_t bytes);
  void (*free)(moe_device *dev, void *data);
  void *(*alloc_host)(moe_device *dev, int64_t bytes);
  void (*free_host)(moe_device *dev, void *data);
  moe_status (*upload)(moe_device *dev, void *to, const void *from, int64_t bytes);
  moe_status (*download)(moe_device *dev, void *to, const void *from, int64_t bytes);
  moe_status (*sync)(moe_device *dev);
  /* Lanes (lanes.h); NULL where work is done when its call returns. */
  void (*use_lane)(moe_device *dev, moe_lane lane);
  moe_status (*wait_lane)(moe_device *dev, moe_lane other);
  moe_status (*follow)(moe_device *dev, const moe_mark *mark);
  void (*lend)(moe_device *dev, int multiprocessors);
  /* Remember when the stream gets here (device.h); seconds between two marks, after a sync. */
  void (*mark)(moe_device *dev, moe_mark *out);
  moe_status (*wait)(moe_device *dev, const moe_mark *mark);
  double (*between)(moe_device *dev, const moe_mark *from, const moe_mark *to);
  void (*forget)(moe_device *dev, moe_mark *mark);
  /* Queue: slot[0] = cycles of the processors' clock so far, slot[1] = nanoseconds, both u64 in
   * device memory; between two slots they make a mean clock. NULL where there is no such count. */
  void (*count_cycles)(moe_device *dev, uint64_t *slot);

  /* Graphs (device.h); NULL where there are none. end takes the recording off the stream even when
   * it fails, and sets *out only when it succeeds. */
  moe_status (*graph_begin)(moe_device *dev);
  moe_status (*graph_end)(moe_device *dev, moe_graph **out);
  moe_status (*graph_launch)(moe_device *dev, moe_graph *graph);
  void (*graph_destroy)(moe_device *dev, moe_graph *graph);

  moe_status (*zero)(moe_device *dev, moe_tensor x);
  moe_status (*fill)(moe_device *dev, moe_tensor x, float value);
  moe_status (*draw_normal)(moe_device *dev, uint64_t seed, uint64_t stream, int64_t begin,
                            float std, moe_tensor out);
  moe_status (*copy)(moe_device *dev, moe_tensor dst, moe_tensor src);
  moe_status (*add)(moe_device *dev, moe_tensor y, moe_tensor x);
  moe_status (*sum_rows)(moe_device *dev, moe_tensor x, int64_t own, moe_tensor out,
                         moe_tensor squares);
  moe_status (*scale)(moe_device *dev, moe_tensor x, float s);
  moe_status (*sum_squares)(moe_device *dev, moe_tensor x, moe_tensor out);
  moe_status (*embed)(moe_device *dev, moe_tensor tokens, moe_tensor weight, moe_tensor out);
  moe_status (*embed_backward)(moe_device *dev, moe_tensor tokens, moe_tensor dout,
                               moe_tensor dweight);
  moe_status (*rms_norm)(moe_device *dev, moe_tensor x, moe_tensor residual, moe_tensor gain,
                         double eps, moe_tensor sum, moe_tensor out, moe_tensor rstd);
  /* These two, combine_norm, router_norm_backward and gather_backward may be NULL, or leave *done
   * false and queue nothing: then the two operations that they are made of are called. */
  moe_status (*norm_gemm)(moe_device *dev, moe_norm norm, moe_tensor b, moe_tensor c, bool *done);
  moe_status (*norm_router)(moe_device *dev, moe_norm norm, moe_tensor weight, moe_tensor bias,
                            moe_tensor probs, moe_tensor lse, moe_tensor experts, moe_tensor gates,
                            moe_tensor stats, bool *done);
  moe_status (*rms_norm_backward)(moe_device *dev, moe_tensor dout, moe_tensor x, moe_tensor gain,
                                  moe_tensor rstd, moe_tensor dx, moe_tensor dgain);
  moe_status (*gemm)(moe_device *dev, moe_gemm_form form, moe_tensor a, moe_tensor b, float beta,
                     moe_tensor c);
  moe_status (*rope)(moe_device *dev, moe_tensor qkv, moe_tensor positions, moe_tensor table,
                     int64_t heads, int64_t kv_heads, int direction);
  moe_status (*attention)(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                          moe_tensor doc_start, moe_tensor out, moe_tensor lse);
  moe_status (*attention_backward)(moe_device *dev, moe_attention_shape shape, moe_tensor dout,
                                   moe_tensor qkv, moe_tensor doc_start, moe_tensor out,
                                   moe_tensor lse, moe_tensor dqkv);
  int64_t (*attention_scratch)(moe_device *dev, moe_attention_shape shape, moe_dtype dtype);
  moe_status (*attention_cached)(moe_device *dev, moe_attention_shape shape, moe_tensor qkv,
                                 moe_tensor positions, moe_tensor table, moe_tensor keys,
                                 moe_tensor values, moe_tensor lengths, moe_tensor out);
  int64_t (*attention_cached_scratch)(moe_device *dev, moe_attention_shape shape, int64_t room,
                                      moe_dtype dtype);
  moe_status (*router)(moe_device *dev, moe_tensor x, moe_tensor weight, moe_tensor bias,
                       moe_tensor probs, moe_tensor lse, moe_tensor experts, moe_tensor gates,
                       moe_tensor stats);
  moe_status (*router_drop)(moe_device *dev, moe_tensor probs, int64_t capacity, moe_tensor experts,
                            moe_tensor gates, moe_tensor dropped);
  moe_status (*router_backward)(moe_device *dev, moe_tensor dgates, moe_tensor x, moe_tensor weight,
                                moe_tensor probs, moe_tensor lse, moe_tensor experts,
                                moe_tensor gates, moe_tensor load, float aux_scale, float z_scale,
                                moe_tensor dlogits, moe_tensor dx, moe_tensor dweight);
  moe_status (*router_norm_backward)(moe_device *dev, moe_tensor dgates, moe_tensor x,
                                     moe_tensor weight, moe_tensor probs, moe_tensor lse,
                                     moe_tensor experts, moe_tensor gates, moe_tensor load,
                                     float aux_scale, float z_scale, moe_tensor dlogits,
                                     moe_tensor dweight, moe_norm_gradient norm, bool *done);
  moe_status (*permute_plan)(moe_device *dev, moe_tensor experts, int64_t pad, moe_tensor offsets,
                             moe_tensor pair, moe_tensor slot);
  moe_status (*permute_window)(moe_device *dev, moe_tensor offsets, int64_t begin, int64_t rows,
                               moe_tensor out);
  moe_status (*gather_rows)(moe_device *dev, moe_tensor src, moe_tensor pair, int64_t group,
                            moe_tensor out);
  moe_status (*gather_gates)(moe_device *dev, moe_tensor values, moe_tensor pair, moe_tensor out);
  moe_status (*combine_rows)(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                             int beta, moe_tensor out);
  moe_status (*combine_norm)(moe_device *dev, moe_tensor src, moe_tensor slot, moe_norm norm,
                             bool *done);
  moe_status (*combine_gates)(moe_device *dev, moe_tensor src, moe_tensor slot, int64_t begin,
                              int beta, moe_tensor out);
  moe_status (*localize_experts)(moe_device *dev, moe_tensor experts, moe_tensor gates,
                                 int64_t begin, int64_t count);
  moe_status (*expert_up)(moe_device *dev, moe_tensor x, moe_tensor offsets, moe_tensor w13,
                          moe_tensor gates, moe_gu_kind kind, moe_tensor gu, moe_tensor a);
  moe_status (*expert_down)(moe_device *dev, moe_tensor a, moe_tensor offsets, moe_tensor w2,
                            moe_tensor y);
  moe_status (*expert_down_backward)(moe_device *dev, moe_tensor dy, moe_tensor offsets,
                                     moe_tensor w2, moe_tensor gates, moe_gu_kind kind,
                                     moe_tensor gu, moe_tensor a, moe_tensor dgates);
  moe_status (*gates_backward)(moe_device *dev, moe_tensor dy, moe_tensor y, moe_tensor slot,
                               moe_tensor gates, moe_tensor dgates);
  moe_status (*gather_backward)(moe_device *dev, moe_tensor dy, moe_tensor pair, moe_tensor y,
                                moe_tensor slot, moe_tensor gates, moe_tensor out,
                                moe_tensor dgates, bool *done);
  moe_status (*expert_up_backward)(moe_device *dev, moe_tensor dgu, moe_tensor offsets,
                                   moe_tensor w13, moe_tensor dx);
  moe_status (*expert_weight_grad)(moe_device *dev, moe_tensor left, moe_tensor right,
                                   moe_tensor offsets, int accumulate, moe_tensor dw,
                                   moe_tensor squares);
  int64_t (*expert_scratch)(moe_device *dev, int64_t rows, int64_t hidden, int64_t ffn,
                            moe_dtype dtype);
  moe_status (*experts_decode)(moe_device *dev, moe_tensor x, moe_tensor experts, moe_tensor gates,
                               int64_t first, moe_tensor w13, moe_tensor w2, moe_tensor hidden,
                               moe_tensor out);
  moe_status (*sum_choices)(moe_device *dev, moe_tensor terms, moe_tensor out);
  moe_status (*cross_entropy)(moe_device *dev, moe_tensor logits, moe_tensor targets, float scale,
                              int with_grad, moe_tensor loss, moe_tensor row_loss);
  moe_status (*clip_scale)(moe_device *dev, moe_tensor sum_squares, double max_norm, double unscale,
                           moe_tensor scale);
  moe_status (*adamw)(moe_device *dev, moe_adamw_args args, moe_tensor now, moe_tensor grad,
                      moe_tensor scale, moe_tensor master, moe_tensor m, moe_tensor v,
                      moe_tensor weight);
  moe_status (*sample)(moe_device *dev, moe_tensor logits, moe_sample_args args, moe_tensor streams,
                       moe_tensor positions, moe_tensor token);
  moe_status (*advance)(moe_device *dev, moe_tensor counts, moe_tensor by);
} moe_backend;

/* Whether experts_decode is asked for terms. (With K = 1 and f32 they are the sums.) */
static inline bool moe_decodes_apart(moe_tensor experts, moe_tensor out) {
  return out.dtype == MOE_F32 && out.shape[0] == moe_tensor_count(experts);
}

struct moe_device {
  const moe_backend *backend;
  moe_device_options options;
  char name[128];
  char bus_id[32]; /* a GPU's place on the PCI bus; empty for a host */
  void *scratch;
  int64_t scratch_bytes;
  moe_lane lane;     /* where operations go now */
  const char *label; /* what runs now, for messages */
  int64_t label_layer;
  bool recording;              /* a graph: see device.h */
  const char *recording_fault; /* NULL, or what cannot be in a graph and was asked for */
  struct moe_profile *profile; /* NULL unless operations are being timed */
  void *state;                 /* the backend's own: streams, handles */
};

/* Fill dev->backend, name and state. */
moe_status moe_cpu_open(moe_device *dev);
moe_status moe_cuda_open(moe_device *dev);
/* Visible GPUs; 0 on any failure. */
int moe_cuda_count(void);

#ifdef __cplusplus
}
#endif
#endif
