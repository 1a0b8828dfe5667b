/* Views into the pools: bundles that lie together are one matrix. */
#include "core/model/views.h"

#include <string.h>

moe_tensor moe_param_view(const moe_params *params, const moe_tensor *pools, const char *pattern,
                          int64_t layer, int64_t rows) {
  int64_t expert = strstr(pattern, "{E}") ? params->experts.begin : -1;
  const moe_param *p = moe_params_at(params, pattern, layer, expert);
  moe_tensor pool = pools[p->row->pool];
  if (!moe_tensor_present(pool)) return moe_tensor_none();
  char *at = (char *)pool.data + p->offset * moe_dtype_size(pool.dtype);
  if (p->dims == 1) return moe_tensor_1d(at, pool.dtype, rows);
  return moe_tensor_2d(at, pool.dtype, rows, p->shape[1]);
}

#define LAYER "model.layers.{L}."
#define EXPERT LAYER "block_sparse_moe.experts.{E}."

static moe_tensor per_expert(moe_tensor t, int64_t experts) {
  if (!moe_tensor_present(t)) return t;
  return moe_tensor_3d(t.data, t.dtype, experts, t.shape[0] / experts, t.shape[1]);
}

moe_layer_weights moe_layer_views(const moe_params *p, const moe_tensor *pools, int64_t l) {
  const moe_dims *d = &p->dims;
  int64_t owned = moe_range_size(p->experts);
  int64_t query = d->heads * d->head_dim, key = d->kv_heads * d->head_dim;
#define VIEW(pattern, rows) moe_param_view(p, pools, pattern, l, rows)
  moe_layer_weights w = {.norm1 = VIEW(LAYER "input_layernorm.weight", d->hidden),
                         .qkv = VIEW(LAYER "self_attn.q_proj.weight", query + 2 * key),
                         .o = VIEW(LAYER "self_attn.o_proj.weight", d->hidden),
                         .norm2 = VIEW(LAYER "post_attention_layernorm.weight", d->hidden),
                         .router = VIEW(LAYER "block_sparse_moe.gate.weight", d->experts),
                         .w13 = VIEW(EXPERT "w1.weight", owned * 2 * d->ffn),
                         .w2 = VIEW(EXPERT "w2.weight", owned * d->hidden)};
#undef VIEW
  w.w13 = per_expert(w.w13, owned);
  w.w2 = per_expert(w.w2, owned);
  return w;
}
