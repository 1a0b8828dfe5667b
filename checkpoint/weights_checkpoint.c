/* A checkpoint's step folder as a source of weights.
 *
 * Whoever asks for weights asks for a tensor's elements in order, so a reader stays where the last
 * request ended: each byte is read once, and hashed as it passes (checkpoint/tensors.h). There are
 * as many readers as tensors may be in reading at a time; a request takes the one that stands
 * nearest before its beginning. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/stored_config.h"
#include "checkpoint/tensors.h"
#include "checkpoint/weights.h"

_Static_assert((int)MOE_WEIGHTS_TENSORS <= (int)MOE_TENSOR_READERS,
               "each may be in the middle of a tensor");

enum { PART = 1 << 15 }; /* elements read at a time */

/* A reader, somewhere in a tensor. */
typedef struct {
  int64_t first, at; /* the tensor's first slice (-1: none), elements of it that were read */
  bool busy;         /* some thread reads */
  int64_t turn;      /* when it was last taken */
  moe_tensor_reader reader;
  float *raw; /* PART elements, from its first tensor on */
} stand;

typedef struct {
  moe_weights base;
  moe_tensors *tensors;
  const moe_manifest *manifest;
  pthread_mutex_t lock; /* of who is busy */
  int64_t turns;
  stand stand[MOE_WEIGHTS_TENSORS];
} source;

/* The first slice of a parameter's tensor, or -1. */
static int64_t find(const source *s, const char *name) {
  int64_t i = moe_manifest_find(s->manifest, MOE_ROLE_MASTER, name);
  return i >= 0 ? i : moe_manifest_find(s->manifest, MOE_ROLE_PARAM, name);
}

/* Which of two readers rather begins to read at element `begin` of tensor `first`. */
static bool is_better(const stand *a, const stand *b, int64_t first, int64_t begin) {
  bool fits_a = a->first == first && a->at <= begin, fits_b = b->first == first && b->at <= begin;
  if (fits_a != fits_b) return fits_a;
  if (fits_a) return a->at > b->at;
  return a->turn < b->turn; /* what was left alone for longest */
}

static stand *take(source *s, int64_t first, int64_t begin) {
  stand *best = NULL;
  pthread_mutex_lock(&s->lock);
  for (stand *t = s->stand; t < s->stand + MOE_WEIGHTS_TENSORS; t++)
    if (!t->busy && (!best || is_better(t, best, first, begin))) best = t;
  if (best) {
    best->busy = true;
    best->turn = ++s->turns;
  }
  pthread_mutex_unlock(&s->lock);
  return best;
}

static void give_back(source *s, stand *t) {
  pthread_mutex_lock(&s->lock);
  t->busy = false;
  pthread_mutex_unlock(&s->lock);
}

static void stop_reading(stand *t) {
  if (t->first >= 0) moe_tensor_reader_close(&t->reader);
  t->first = -1;
}

static moe_status start_reading(source *s, stand *t, int64_t first) {
  stop_reading(t);
  if (!t->raw) t->raw = malloc(PART * sizeof *t->raw);
  if (!t->raw) return moe_fail(MOE_NO_MEMORY, "%s: no memory to read it", s->base.name);
  MOE_TRY(moe_tensor_reader_open(s->tensors, first, &t->reader));
  t->first = first;
  t->at = 0;
  return MOE_OK;
}

/* From where the reader is up to element `end`, of which those from `begin` on are wanted. */
static moe_status read_on(const source *s, stand *t, int64_t begin, int64_t end, float *out) {
  moe_dtype dtype = s->manifest->slice[t->first].dtype;
  while (t->at < end) {
    int64_t stop = t->at < begin ? begin : end, n = stop - t->at < PART ? stop - t->at : PART;
    bool wanted = t->at >= begin, as_it_is = wanted && dtype == MOE_F32;
    float *to = wanted ? out + (t->at - begin) : NULL;
    MOE_TRY(moe_tensor_reader_next(&t->reader, n, as_it_is ? to : t->raw));
    if (wanted && !as_it_is) moe_convert(t->raw, dtype, to, MOE_F32, n);
    t->at += n;
  }
  return MOE_OK;
}

static moe_status checkpoint_read(moe_weights *w, const moe_param *p, int64_t begin, int64_t count,
                                  float *out) {
  source *s = (source *)w;
  int64_t first = find(s, p->name);
  if (first < 0) return moe_fail(MOE_INVALID, "%s: %s is not one of its tensors", w->name, p->name);
  stand *t = take(s, first, begin);
  if (!t) return moe_fail(MOE_INVALID, "%s: too many threads read it", w->name);
  moe_status status = MOE_OK;
  if (t->first != first || t->at > begin) status = start_reading(s, t, first);
  if (status == MOE_OK) status = read_on(s, t, begin, begin + count, out);
  if (status != MOE_OK || begin + count == p->count) stop_reading(t);
  give_back(s, t);
  return status;
}

static moe_dtype checkpoint_dtype(const moe_weights *w, const moe_param *p) {
  int64_t first = find((const source *)w, p->name);
  return first >= 0 ? ((const source *)w)->manifest->slice[first].dtype : MOE_F32;
}

static void checkpoint_close(moe_weights *w) {
  source *s = (source *)w;
  for (int i = 0; i < MOE_WEIGHTS_TENSORS; i++) {
    stop_reading(&s->stand[i]);
    free(s->stand[i].raw);
  }
  moe_tensors_close(s->tensors);
  pthread_mutex_destroy(&s->lock);
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
  pthread_mutex_init(&s->lock, NULL);
  for (int i = 0; i < MOE_WEIGHTS_TENSORS; i++) s->stand[i].first = -1;
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
