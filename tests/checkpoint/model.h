/* A small model whose every size differs and whose number of experts is no power of two, and
 * checkpoints of it. Include after fixture.h. */
#ifndef MOE_TESTS_CHECKPOINT_MODEL_H
#define MOE_TESTS_CHECKPOINT_MODEL_H

#include "checkpoint/weights.h"
#include "core/base/rng.h"

/* V 101, D 24, L 3, H 6, d 10, E 5, K 3, F 14, context 40; groups 1 or 2. */
static inline moe_config *model_config(int groups, int precision) {
  static const char *const sizes[] = {
      "model.vocab_size=101", "model.hidden_size=24", "model.num_layers=3", "model.num_heads=6",
      "model.head_dim=10",    "model.num_experts=5",  "model.top_k=3",      "model.ffn_size=14",
      "model.context=40",     "model.rope_base=500",  "model.norm_eps=3e-5"};
  moe_config *c = malloc(sizeof *c);
  moe_config_defaults(c);
  for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
    cr_assert(moe_config_set(c, sizes[i]) == MOE_OK, "%s", moe_error_message());
  c->model.num_kv_heads = groups;
  c->precision.dtype = precision;
  cr_assert(moe_config_resolve(c, 1) == MOE_OK, "%s", moe_error_message());
  return c;
}

/* What tensor p holds, before rounding: gains round 1, matrices wide enough that no two experts or
 * tokens look alike. */
static inline float *model_values(const moe_param *p, uint64_t seed) {
  float *v = malloc((size_t)p->count * sizeof *v);
  bool gain = p->row->pool == MOE_POOL_GAIN;
  moe_rng_normal_fill(seed, moe_rng_stream(p->row->name, p->layer, p->expert), 0, p->count,
                      gain ? 0.1f : 0.25f, v);
  for (int64_t i = 0; gain && i < p->count; i++) v[i] += 1.0f;
  return v;
}

static inline void *rounded_copy(const float *values, int64_t n, moe_dtype dtype) {
  void *copy = malloc((size_t)(n * moe_dtype_size(dtype)));
  moe_convert(values, MOE_F32, copy, dtype, n);
  return copy;
}

/* Tensors [0, n) of the model as pieces: params in the pool's type, masters where that is narrower,
 * moments of every tensor. */
static inline moe_piece *model_pieces(const moe_config *c, uint64_t seed, int *count) {
  moe_dims dims = moe_dims_of(c);
  moe_params params;
  EXPECT_OK(moe_params_create(&dims, (moe_range){0, dims.experts}, &params));
  moe_piece *pieces = calloc((size_t)params.count * MOE_ROLES, sizeof *pieces);
  *count = 0;
  for (int i = 0; i < params.count; i++) {
    const moe_param *p = &params.list[i];
    moe_dtype dtype = moe_pool_dtype(p->row->pool, moe_config_compute_dtype(c));
    float *values = model_values(p, seed);
    for (int role = 0; role < MOE_ROLES; role++) {
      if (role == MOE_ROLE_MASTER && dtype == MOE_F32) continue;
      moe_dtype type = role == MOE_ROLE_PARAM ? dtype : MOE_F32;
      moe_piece *piece = &pieces[(*count)++];
      *piece = (moe_piece){.role = (moe_role)role, .dtype = type, .dims = p->dims};
      snprintf(piece->name, sizeof piece->name, "%s", p->name);
      memcpy(piece->shape, p->shape, sizeof piece->shape);
      piece->count = p->count;
      piece->data = rounded_copy(values, p->count, type);
    }
    free(values);
  }
  moe_params_destroy(&params);
  return pieces;
}

/* Save the model as step `step` of `run`. */
static inline void save_model(const moe_config *c, uint64_t seed, int64_t step) {
  int n;
  moe_piece *pieces = model_pieces(c, seed, &n);
  moe_run_state state = {.step = step, .tokens = 1000 * step, .samples = 10 * step, .seed = seed};
  state.config = moe_config_text(c);
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, pieces, n, 100, NULL, NULL));
  free(state.config);
  for (int i = 0; i < n; i++) free(pieces[i].data);
  free(pieces);
}

/* Every tensor of the source holds the values of a model saved with seed 5, rounded to `dtype` in
 * its pool. */
static inline void expect_values(moe_weights *w, moe_dtype dtype) {
  for (int i = 0; i < w->params.count; i++) {
    const moe_param *p = &w->params.list[i];
    moe_dtype kept = moe_pool_dtype(p->row->pool, dtype);
    float *expected = model_values(p, 5), *got = malloc((size_t)p->count * sizeof *got);
    void *bits = rounded_copy(expected, p->count, kept);
    moe_convert(bits, kept, expected, MOE_F32, p->count);
    EXPECT_OK(moe_weights_read(w, p, 0, p->count, got));
    cr_assert_arr_eq(got, expected, (size_t)p->count * sizeof *got, "%s", p->name);
    free(bits);
    free(expected);
    free(got);
  }
}

#endif
