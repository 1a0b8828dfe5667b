/* A checkpoint's step folder as a source of weights.
 *
 * The manifest says which slices hold a tensor; shards are opened when first needed and stay open,
 * a bounded number of them. A slice's hash is checked once, before its first element is used. */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/shard.h"
#include "checkpoint/verify.h"
#include "checkpoint/weights.h"

enum {
  OPEN_SHARDS = 64, /* shard i is kept in place i modulo this */
  STEP = MOE_SHARD_CHUNK / (int)sizeof(float)
};

typedef struct {
  moe_weights base;
  moe_manifest manifest;
  moe_hdf5 file[OPEN_SHARDS];
  int held[OPEN_SHARDS]; /* the shard's number + 1 */
  bool *verified;        /* of each slice */
  void *raw;             /* MOE_SHARD_CHUNK bytes */
  XXH3_state_t *hash;
} source;

static const moe_slice *first_slice(const moe_manifest *m, const char *name) {
  int64_t i = moe_manifest_find(m, MOE_ROLE_MASTER, name);
  if (i < 0) i = moe_manifest_find(m, MOE_ROLE_PARAM, name);
  return i < 0 ? NULL : &m->slice[i];
}

static moe_status open_shard(source *s, int number, const moe_hdf5 **out) {
  int place = number % OPEN_SHARDS;
  *out = &s->file[place];
  if (s->held[place] == number + 1) return MOE_OK;
  if (s->held[place]) moe_hdf5_release(&s->file[place]);
  s->held[place] = 0;
  MOE_TRY(moe_shard_open(s->base.name, &s->manifest, number, &s->file[place]));
  s->held[place] = number + 1;
  return MOE_OK;
}

/* Elements [begin, end) of the tensor, all in slice `slice`. */
static moe_status read_slice(source *s, const moe_slice *slice, int64_t begin, int64_t end,
                             float *out) {
  const moe_hdf5 *file;
  moe_dataset d;
  MOE_TRY(open_shard(s, slice->file, &file));
  bool *verified = &s->verified[slice - s->manifest.slice];
  if (!*verified) MOE_TRY(moe_shard_verify_slice(file, slice, s->raw, s->hash));
  *verified = true;
  MOE_TRY(moe_dataset_open(file, slice, &d));
  moe_status status = MOE_OK;
  for (int64_t at = begin; at < end && status == MOE_OK; at += STEP) {
    int64_t n = end - at < STEP ? end - at : STEP;
    status = moe_dataset_read(&d, at - slice->begin, n, s->raw);
    if (status == MOE_OK) moe_convert(s->raw, slice->dtype, out + (at - begin), MOE_F32, n);
  }
  moe_dataset_close(&d);
  return status;
}

/* The slices of a tensor continue each other. */
static moe_status checkpoint_read(moe_weights *w, const moe_param *p, int64_t begin, int64_t count,
                                  float *out) {
  source *s = (source *)w;
  const moe_slice *slice = first_slice(&s->manifest, p->name);
  if (!slice) return moe_fail(MOE_INVALID, "%s: %s is not one of its tensors", w->name, p->name);
  while (slice->begin + slice->count <= begin) slice++;
  for (int64_t at = begin, end = begin + count; at < end; slice++) {
    int64_t stop = slice->begin + slice->count < end ? slice->begin + slice->count : end;
    MOE_TRY(read_slice(s, slice, at, stop, out + (at - begin)));
    at = stop;
  }
  return MOE_OK;
}

static moe_dtype checkpoint_dtype(const moe_weights *w, const moe_param *p) {
  const moe_slice *slice = first_slice(&((const source *)w)->manifest, p->name);
  return slice ? slice->dtype : MOE_F32;
}

static void checkpoint_close(moe_weights *w) {
  source *s = (source *)w;
  for (int i = 0; i < OPEN_SHARDS; i++)
    if (s->held[i]) moe_hdf5_release(&s->file[i]);
  moe_manifest_clear(&s->manifest);
  free(s->verified);
  free(s->raw);
  XXH3_freeState(s->hash);
  free(s);
}

/* Sizes and settings of the model, from the configuration in the manifest. */
static moe_status describe(source *s) {
  moe_weights *w = &s->base;
  moe_run_state *state = &s->manifest.state;
  if (!state->config || !state->config[0])
    return moe_fail(MOE_DAMAGED, "%s: its manifest has no configuration, so its model is not known",
                    w->name);
  moe_config *c = malloc(sizeof *c);
  if (!c) return moe_fail(MOE_NO_MEMORY, "%s: no memory for its configuration", w->name);
  moe_config_defaults(c);
  moe_status status = moe_config_parse(c, state->config, (int64_t)strlen(state->config), w->name);
  if (status == MOE_OK) status = moe_config_resolve(c, 0);
  if (status == MOE_OK) {
    w->dims = moe_dims_of(c);
    w->norm_eps = c->model.norm_eps;
    w->rope_base = c->model.rope_base;
    w->rope_alpha = c->model.rope_alpha;
    w->context = c->model.context;
    w->compute = moe_config_compute_dtype(c);
    w->init_std = c->model.init_std;
    w->aux_coef = c->train.aux_coef;
  }
  free(c);
  return status == MOE_USAGE ? MOE_DAMAGED : status; /* nobody wrote this text by hand */
}

/* Masters are optional tensor by tensor, and must then have the model's shape; params were checked
 * with the model. */
static moe_status check_tensors(const source *s) {
  const moe_weights *w = &s->base;
  for (int i = 0; i < w->params.count; i++) {
    const moe_param *p = &w->params.list[i];
    const moe_slice *slice = first_slice(&s->manifest, p->name);
    if (slice->dims != p->dims || slice->shape[0] != p->shape[0] || slice->shape[1] != p->shape[1])
      return moe_fail(MOE_DAMAGED, "%s: %s %s has another shape than its model's", w->name,
                      moe_role_name(slice->role), p->name);
    if (slice->dtype != MOE_F32 && slice->dtype != MOE_BF16 && slice->dtype != MOE_F16)
      return moe_fail(MOE_DAMAGED, "%s: %s is %s, which is no type of weights", w->name, p->name,
                      moe_dtype_name(slice->dtype));
  }
  return MOE_OK;
}

/* The state's bias and text become the source's. */
static moe_status adopt_state(source *s) {
  moe_weights *w = &s->base;
  moe_run_state *state = &s->manifest.state;
  if (state->router_bias_count != 0 && state->router_bias_count != w->dims.layers * w->dims.experts)
    return moe_fail(MOE_DAMAGED, "%s: its router bias is not of its model's size", w->name);
  w->router_bias_count = state->router_bias_count;
  w->router_bias = state->router_bias;
  w->config = state->config;
  state->router_bias = NULL;
  state->config = NULL;
  return MOE_OK;
}

static moe_status open_source(source *s) {
  MOE_TRY(moe_manifest_read(s->base.name, &s->manifest));
  MOE_TRY(describe(s));
  MOE_TRY(moe_checkpoint_check_model(&s->manifest, s->base.name));
  MOE_TRY(moe_weights_list(&s->base));
  MOE_TRY(check_tensors(s));
  MOE_TRY(adopt_state(s));
  s->verified = calloc((size_t)s->manifest.slices + 1, sizeof *s->verified);
  s->raw = malloc(MOE_SHARD_CHUNK);
  s->hash = XXH3_createState();
  if (s->verified && s->raw && s->hash) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY, "%s: no memory to read it", s->base.name);
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
