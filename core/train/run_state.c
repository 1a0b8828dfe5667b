/* Pieces of an engine: element ranges of its tensors, by role. */
#include "core/train/run_state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/stored_config.h"
#include "core/base/log.h"
#include "parallel/grad_sync.h"

typedef struct {
  moe_piece *list;
  int count;
} piece_list;

int64_t moe_run_state_parameter_bytes(const moe_config *config, moe_pool_kind pool) {
  moe_dtype weight = moe_pool_dtype(pool, moe_config_compute_dtype(config));
  moe_dtype moment = pool == MOE_POOL_EXPERT ? moe_config_moment_dtype(config) : MOE_F32;
  int64_t master = weight == MOE_F32 ? 0 : moe_dtype_size(MOE_F32); /* in files it is whole */
  return moe_dtype_size(weight) + master + 2 * moe_dtype_size(moment);
}

int64_t moe_run_state_bytes(const moe_config *config) {
  moe_dims d = moe_dims_of(config);
  int64_t experts = d.layers * d.experts * 3 * d.hidden * d.ffn;
  return experts * moe_run_state_parameter_bytes(config, MOE_POOL_EXPERT) +
         (moe_dims_parameters(&d) - experts) *
             moe_run_state_parameter_bytes(config, MOE_POOL_DENSE); /* most of the rest */
}

/* The part of parameter p within elements `range` of its pool, as a piece of `values`, which holds
 * the pool's elements from values_begin on. NULL if there is none. */
static moe_piece *add_piece(piece_list *out, const moe_param *p, moe_role role, moe_range range,
                            moe_tensor values, int64_t values_begin) {
  int64_t begin = p->offset > range.begin ? p->offset : range.begin;
  int64_t end = p->offset + p->count < range.end ? p->offset + p->count : range.end;
  if (begin >= end) return NULL;
  moe_piece *piece = &out->list[out->count++];
  memset(piece, 0, sizeof *piece);
  snprintf(piece->name, sizeof piece->name, "%s", p->name);
  piece->role = role;
  piece->dtype = values.dtype;
  piece->dims = p->dims;
  piece->shape[0] = p->shape[0];
  piece->shape[1] = p->shape[1];
  piece->begin = begin - p->offset;
  piece->count = end - begin;
  piece->data = (char *)values.data + (begin - values_begin) * moe_dtype_size(values.dtype);
  return piece;
}

/* Weights of one parameter, cut to `range` of its pool. */
static void add_weights(moe_engine *e, piece_list *out, const moe_param *p, moe_range range) {
  add_piece(out, p, MOE_ROLE_PARAM, range, moe_model_weights(e->model, p->row->pool), 0);
}

/* Masters of one parameter, as the optimizer keeps them. */
static void add_masters(moe_engine *e, piece_list *out, const moe_param *p, moe_range range) {
  const moe_optimizer_pool *o = moe_optimizer_pool_state(e->optimizer, p->row->pool);
  moe_piece *piece = add_piece(out, p, MOE_ROLE_MASTER, range, o->master, o->owned.begin);
  if (!piece || piece->dtype != MOE_LOW16) return;
  piece->dtype = MOE_F32;
  piece->low = piece->data;
  int64_t at = p->offset + piece->begin;
  piece->data = moe_tensor_rows(moe_model_weights(e->model, p->row->pool), at, 1).data;
}

/* A parameter's state that the optimizer has, cut to `range`: masters, and with `moments` those. */
static void add_state(moe_engine *e, piece_list *out, const moe_param *p, moe_range range,
                      bool moments) {
  const moe_optimizer_pool *o = moe_optimizer_pool_state(e->optimizer, p->row->pool);
  moe_range owned = moe_range_intersect(range, o->owned);
  int64_t at = o->owned.begin;
  if (moe_tensor_present(o->master)) add_masters(e, out, p, owned);
  if (!moments) return;
  add_piece(out, p, MOE_ROLE_ADAM_M, owned, o->m, at);
  add_piece(out, p, MOE_ROLE_ADAM_V, owned, o->v, at);
}

static moe_status list_create(moe_engine *e, piece_list *out) {
  size_t room = (size_t)moe_model_params(e->model)->count * (MOE_ROLES + 1); /* weights: in two */
  out->count = 0;
  out->list = calloc(room, sizeof *out->list);
  if (out->list) return MOE_OK;
  return moe_fail(MOE_NO_MEMORY, "out of memory: list of %zu pieces", room);
}

/* What this rank saves: its chunk of each pool, so that replicas divide the work. With sharded
 * state it has updated that itself: it need not wait for the weights that come from others. */
static moe_status pieces_to_save(moe_engine *e, piece_list *out) {
  MOE_TRY(list_create(e, out));
  const moe_params *params = moe_model_params(e->model);
  for (int i = 0; i < params->count; i++) {
    moe_pool_kind pool = params->list[i].row->pool;
    moe_comm *group = moe_model_pool_group(e->model, pool);
    moe_range chunk = moe_pool_chunk(moe_model_weights(e->model, pool).shape[0],
                                     moe_comm_size(group), moe_comm_rank(group));
    add_weights(e, out, &params->list[i], chunk);
    if (e->optimizer) add_state(e, out, &params->list[i], chunk, true);
  }
  return MOE_OK;
}

/* The part of a pool whose weights are loaded with their masters, being halves of them. */
static moe_range weights_of_masters(const moe_engine *e, moe_pool_kind pool) {
  if (!e->optimizer) return (moe_range){0, 0};
  const moe_optimizer_pool *o = moe_optimizer_pool_state(e->optimizer, pool);
  return o->master.dtype == MOE_LOW16 ? o->owned : (moe_range){0, 0};
}

/* What this rank needs: all its weights, and the optimizer state it keeps, moments if asked. */
static moe_status pieces_to_load(moe_engine *e, bool moments, piece_list *out) {
  MOE_TRY(list_create(e, out));
  const moe_params *params = moe_model_params(e->model);
  for (int i = 0; i < params->count; i++) {
    const moe_param *p = &params->list[i];
    int64_t n = moe_model_weights(e->model, p->row->pool).shape[0];
    moe_range with_master = weights_of_masters(e, p->row->pool);
    add_weights(e, out, p, (moe_range){0, with_master.begin});
    add_weights(e, out, p, (moe_range){with_master.end, n});
    if (e->optimizer) add_state(e, out, p, (moe_range){0, n}, moments);
  }
  return MOE_OK;
}

moe_status moe_run_save(moe_engine *e, moe_saver *saver, const moe_run_position *at) {
  float *bias = moe_model_router_bias(e->model);
  moe_run_state state = {.step = at->step,
                         .tokens = at->tokens,
                         .samples = at->samples,
                         .seed = (uint64_t)e->config.train.seed,
                         .data_fingerprint = at->data_fingerprint,
                         .loss_scale = e->loss_scale,
                         .loss_scale_good_steps = e->good_steps,
                         .router_bias_count =
                             bias ? e->config.model.num_layers * e->config.model.num_experts : 0,
                         .router_bias = bias,
                         .config = moe_config_text(&e->config)};
  piece_list pieces = {NULL, 0};
  moe_status status = state.config ? pieces_to_save(e, &pieces)
                                   : moe_fail(MOE_NO_MEMORY, "out of memory: configuration text");
  status = moe_agree(e->world, status);
  if (status == MOE_OK) status = moe_saver_begin(saver, &state, pieces.list, pieces.count);
  free(pieces.list);
  free(state.config);
  return status;
}

/* One line that lists the keys in which the checkpoint and this run contradict each other. */
static moe_status check_config(const moe_engine *e, const char *path, const moe_run_state *state) {
  moe_config *saved;
  MOE_TRY(moe_stored_config(state->config, path, &saved));
  if (state->samples == 0) { /* imported weights: no data was seen, so only the model is decided */
    saved->data = e->config.data;
    saved->train = e->config.train;
  }
  char *text = NULL;
  size_t size = 0;
  FILE *out = open_memstream(&text, &size);
  int differ = out ? moe_config_diff_for_resume(saved, &e->config, out) : 0;
  free(saved);
  if (!out) return moe_fail(MOE_NO_MEMORY, "out of memory: comparing configurations");
  fclose(out);
  for (char *c = text; *c; c++) {
    if (*c == '\n') *c = c[1] ? ';' : '\0';
  }
  moe_status status = MOE_OK;
  if (differ > 0) {
    status = moe_fail(MOE_USAGE,
                      "cannot resume: %s was made with another configuration: %s: restore these "
                      "settings, or start a new run in another run.dir",
                      path, text);
  }
  free(text);
  return status;
}

static moe_status restore_bias(moe_engine *e, const moe_run_state *state) {
  float *bias = moe_model_router_bias(e->model);
  int64_t n = e->config.model.num_layers * e->config.model.num_experts;
  if (!bias || state->router_bias_count != n) return MOE_OK;
  memcpy(bias, state->router_bias, (size_t)n * sizeof *bias);
  return moe_model_router_bias_changed(e->model);
}

moe_status moe_run_restore(moe_engine *e, const char *path, const moe_run_state *state) {
  MOE_TRY(moe_agree(e->world, check_config(e, path, state)));
  bool moments = e->optimizer != NULL;
  if (moments) {
    bool there = false;
    MOE_TRY(moe_agree(e->world, moe_checkpoint_has_role(path, MOE_ROLE_ADAM_M, &there)));
    if (!there) moe_info("%s has no optimizer state: the moments start at zero", path);
    moments = there;
  }
  piece_list pieces = {NULL, 0};
  moe_status status = moe_agree(e->world, pieces_to_load(e, moments, &pieces));
  if (status == MOE_OK) { /* moe_checkpoint_find has verified every hash */
    status = moe_checkpoint_load(e->world, e->dev, path, pieces.list, pieces.count, false);
  }
  free(pieces.list);
  MOE_TRY(status);
  if (state->loss_scale > 0.0 && e->config.precision.dtype == MOE_PRECISION_FP16) {
    e->loss_scale = state->loss_scale;
    e->good_steps = state->loss_scale_good_steps;
  }
  return restore_bias(e, state);
}
