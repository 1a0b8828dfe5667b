/* A checkpoint's step folder as a source of weights.
 *
 * Whoever asks for weights asks for a tensor's elements in order, so one reader stays where the
 * last request ended: each byte is read once, and hashed as it passes (checkpoint/tensors.h). */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/stored_config.h"
#include "checkpoint/tensors.h"
#include "checkpoint/weights.h"

enum { PART = 1 << 18 }; /* elements read at a time */

typedef struct {
  moe_weights base;
  moe_tensors *tensors;
  const moe_manifest *manifest;
  void *raw; /* PART elements */
  /* the tensor whose first slice is `first` (-1: none) was read up to element `at` */
  int64_t first, at;
  moe_tensor_reader reader;
} source;

/* The first slice of a parameter's tensor, or -1. */
static int64_t find(const source *s, const char *name) {
  int64_t i = moe_manifest_find(s->manifest, MOE_ROLE_MASTER, name);
  return i >= 0 ? i : moe_manifest_find(s->manifest, MOE_ROLE_PARAM, name);
}

static void stop_reading(source *s) {
  if (s->first >= 0) moe_tensor_reader_close(&s->reader);
  s->first = -1;
}

static moe_status start_reading(source *s, int64_t first) {
  stop_reading(s);
  MOE_TRY(moe_tensor_reader_open(s->tensors, first, &s->reader));
  s->first = first;
  s->at = 0;
  return MOE_OK;
}

/* From where the reader is up to element `end`, of which those from `begin` on are wanted. */
static moe_status read_on(source *s, int64_t begin, int64_t end, float *out) {
  moe_dtype dtype = s->manifest->slice[s->first].dtype;
  while (s->at < end) {
    int64_t stop = s->at < begin ? begin : end, n = stop - s->at < PART ? stop - s->at : PART;
    MOE_TRY(moe_tensor_reader_next(&s->reader, n, s->raw));
    if (s->at >= begin) moe_convert(s->raw, dtype, out + (s->at - begin), MOE_F32, n);
    s->at += n;
  }
  return MOE_OK;
}

static moe_status checkpoint_read(moe_weights *w, const moe_param *p, int64_t begin, int64_t count,
                                  float *out) {
  source *s = (source *)w;
  int64_t first = find(s, p->name);
  if (first < 0) return moe_fail(MOE_INVALID, "%s: %s is not one of its tensors", w->name, p->name);
  if (s->first != first || s->at > begin) MOE_TRY(start_reading(s, first));
  moe_status status = read_on(s, begin, begin + count, out);
  if (status != MOE_OK) stop_reading(s);
  return status;
}

static moe_dtype checkpoint_dtype(const moe_weights *w, const moe_param *p) {
  int64_t first = find((const source *)w, p->name);
  return first >= 0 ? ((const source *)w)->manifest->slice[first].dtype : MOE_F32;
}

static void checkpoint_close(moe_weights *w) {
  source *s = (source *)w;
  stop_reading(s);
  moe_tensors_close(s->tensors);
  free(s->raw);
  free(s);
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
  s->first = -1;
  MOE_TRY(moe_tensors_open(s->base.name, &s->tensors));
  s->manifest = moe_tensors_manifest(s->tensors);
  MOE_TRY(describe(s));
  MOE_TRY(moe_weights_list(&s->base));
  MOE_TRY(check_tensors(s));
  MOE_TRY(copy_state(s));
  s->raw = malloc(PART * sizeof(float));
  return s->raw ? MOE_OK : moe_fail(MOE_NO_MEMORY, "%s: no memory to read it", s->base.name);
}

moe_status moe_weights_open_checkpoint(const char *step_folder, moe_weights **out) {
  static const moe_weights_kind kind = {checkpoint_read, checkpoint_dtype, checkpoint_close};
  MOE_TRY(moe_weights_new(&kind, sizeof(source), step_folder, out));
  moe_status status = open_source((source *)*out);
  if (status == MOE_OK) return MOE_OK;
  moe_weights_close(*out);
  *out = NULL;
  return status;
}
