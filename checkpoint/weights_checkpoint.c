/* A checkpoint's step folder as a source of weights. Whoever asks for weights asks for a tensor's
 * elements in order, which is how checkpoint/tensors.h reads and hashes each byte once. */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/stored_config.h"
#include "checkpoint/tensors.h"
#include "checkpoint/weights.h"

_Static_assert((int)MOE_WEIGHTS_TENSORS <= (int)MOE_TENSORS_READ, "what weights.h promises");

enum { PART = 1 << 15 }; /* elements converted at a time */

typedef struct {
  moe_weights base;
  moe_tensors *tensors;
  const moe_manifest *manifest;
} source;

/* The first slice of a parameter's tensor, or -1. */
static int64_t find(const source *s, const char *name) {
  int64_t i = moe_manifest_find(s->manifest, MOE_ROLE_MASTER, name);
  return i >= 0 ? i : moe_manifest_find(s->manifest, MOE_ROLE_PARAM, name);
}

static moe_status checkpoint_read(moe_weights *w, const moe_param *p, int64_t begin, int64_t count,
                                  float *out) {
  const source *s = (const source *)w;
  uint16_t raw[PART];
  int64_t first = find(s, p->name);
  if (first < 0) return moe_fail(MOE_INVALID, "%s: %s is not one of its tensors", w->name, p->name);
  moe_dtype dtype = s->manifest->slice[first].dtype;
  if (dtype == MOE_F32) return moe_tensors_read(s->tensors, first, begin, count, out);
  for (int64_t at = 0, n; at < count; at += n) {
    n = count - at < PART ? count - at : PART;
    MOE_TRY(moe_tensors_read(s->tensors, first, begin + at, n, raw));
    moe_convert(raw, dtype, out + at, MOE_F32, n);
  }
  return MOE_OK;
}

static moe_dtype checkpoint_dtype(const moe_weights *w, const moe_param *p) {
  int64_t first = find((const source *)w, p->name);
  return first >= 0 ? ((const source *)w)->manifest->slice[first].dtype : MOE_F32;
}

static void checkpoint_close(moe_weights *w) {
  moe_tensors_close(((source *)w)->tensors);
  free(w);
}

/* Sizes and settings of the model, from the configuration in the manifest. */
static moe_status describe(source *s) {
  moe_weights *w = &s->base;
  moe_config *c;
  MOE_TRY(moe_stored_config(s->manifest->state.config, w->name, &c));
  w->dims = moe_dims_of(c);
  w->norm_eps = c->model.norm_eps;
  w->rope_base = c->model.rope_base;
  w->rope_alpha = c->model.rope_alpha;
  w->context = c->model.context;
  w->compute = moe_config_compute_dtype(c);
  w->init_std = c->model.init_std;
  w->aux_coef = c->train.aux_coef;
  free(c);
  return MOE_OK;
}

/* Masters are optional tensor by tensor, and must then have the model's shape; params were checked
 * with the model. */
static moe_status check_tensors(const source *s) {
  const moe_weights *w = &s->base;
  for (int i = 0; i < w->params.count; i++) {
    const moe_param *p = &w->params.list[i];
    const moe_slice *slice = &s->manifest->slice[find(s, p->name)];
    if (slice->dims != p->dims || slice->shape[0] != p->shape[0] || slice->shape[1] != p->shape[1])
      return moe_fail(MOE_DAMAGED, "%s: %s %s has another shape than its model's", w->name,
                      moe_role_name(slice->role), p->name);
    if (slice->dtype != MOE_F32 && slice->dtype != MOE_BF16 && slice->dtype != MOE_F16)
      return moe_fail(MOE_DAMAGED, "%s: %s is %s, which is no type of weights", w->name, p->name,
                      moe_dtype_name(slice->dtype));
  }
  return MOE_OK;
}

static moe_status copy_state(source *s) {
  moe_weights *w = &s->base;
  const moe_run_state *state = &s->manifest->state;
  size_t bias = (size_t)state->router_bias_count * sizeof *state->router_bias;
  if (state->router_bias_count != 0 && state->router_bias_count != w->dims.layers * w->dims.experts)
    return moe_fail(MOE_DAMAGED, "%s: its router bias is not of its model's size", w->name);
  w->router_bias_count = state->router_bias_count;
  w->router_bias = bias > 0 ? malloc(bias) : NULL;
  w->config = strdup(state->config);
  if (!w->config || (bias > 0 && !w->router_bias))
    return moe_fail(MOE_NO_MEMORY, "%s: no memory for its state", w->name);
  if (bias > 0) memcpy(w->router_bias, state->router_bias, bias);
  return MOE_OK;
}

static moe_status open_source(source *s) {
  MOE_TRY(moe_tensors_open(s->base.name, &s->tensors));
  s->manifest = moe_tensors_manifest(s->tensors);
  MOE_TRY(describe(s));
  MOE_TRY(moe_weights_list(&s->base));
  MOE_TRY(check_tensors(s));
  return copy_state(s);
}

moe_status moe_weights_open_checkpoint(const char *step_folder, moe_weights **out) {
  static const moe_weights_kind kind = {
      .read = checkpoint_read, .dtype = checkpoint_dtype, .close = checkpoint_close};
  MOE_TRY(moe_weights_new(&kind, sizeof(source), step_folder, out));
  moe_status status = open_source((source *)*out);
  if (status == MOE_OK) return MOE_OK;
  moe_weights_close(*out);
  *out = NULL;
  return status;
}
