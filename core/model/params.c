/* THE parameter table and the layout of the pools it implies.
 *
 * Rows of one `bundle` are neighbours in memory, so that they can be used as one matrix: q, k, v of
 * a layer, w1 and w3 of an expert. Bundles start at multiples of BUNDLE_ALIGN elements; the gaps
 * stay zero. */
#include "core/model/params.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "kernels/ops.h"

enum { BUNDLE_ALIGN = 64 };

#define LAYER "model.layers.{L}."
#define EXPERT LAYER "block_sparse_moe.experts.{E}."

/* In the order of the model. Shape letters: V vocabulary, D hidden, Q = H d, K = G d, E experts,
 * F expert FFN size. */
static const moe_param_row table[] = {
    {"model.embed_tokens.weight", "token_embd.weight", "VD", MOE_POOL_DENSE, MOE_INIT_NORMAL, 0},
    {LAYER "input_layernorm.weight", "blk.{L}.attn_norm.weight", "D", MOE_POOL_GAIN, MOE_INIT_ONES,
     0},
    {LAYER "self_attn.q_proj.weight", "blk.{L}.attn_q.weight", "QD", MOE_POOL_DENSE,
     MOE_INIT_NORMAL, 'q'},
    {LAYER "self_attn.k_proj.weight", "blk.{L}.attn_k.weight", "KD", MOE_POOL_DENSE,
     MOE_INIT_NORMAL, 'q'},
    {LAYER "self_attn.v_proj.weight", "blk.{L}.attn_v.weight", "KD", MOE_POOL_DENSE,
     MOE_INIT_NORMAL, 'q'},
    {LAYER "self_attn.o_proj.weight", "blk.{L}.attn_output.weight", "DQ", MOE_POOL_DENSE,
     MOE_INIT_NORMAL_OUT, 0},
    {LAYER "post_attention_layernorm.weight", "blk.{L}.ffn_norm.weight", "D", MOE_POOL_GAIN,
     MOE_INIT_ONES, 0},
    {LAYER "block_sparse_moe.gate.weight", "blk.{L}.ffn_gate_inp.weight", "ED", MOE_POOL_ROUTER,
     MOE_INIT_NORMAL, 0},
    {EXPERT "w1.weight", "blk.{L}.ffn_gate_exps.weight", "FD", MOE_POOL_EXPERT, MOE_INIT_NORMAL,
     'u'},
    {EXPERT "w3.weight", "blk.{L}.ffn_up_exps.weight", "FD", MOE_POOL_EXPERT, MOE_INIT_NORMAL, 'u'},
    {EXPERT "w2.weight", "blk.{L}.ffn_down_exps.weight", "DF", MOE_POOL_EXPERT, MOE_INIT_NORMAL_OUT,
     'd'},
    {"model.norm.weight", "output_norm.weight", "D", MOE_POOL_GAIN, MOE_INIT_ONES, 0},
    {"lm_head.weight", "output.weight", "VD", MOE_POOL_DENSE, MOE_INIT_NORMAL, 0},
    {NULL, NULL, NULL, MOE_POOL_DENSE, MOE_INIT_NORMAL, 0},
};

const moe_param_row *moe_param_table(void) {
  return table;
}

static bool per_layer(const moe_param_row *row) {
  return strstr(row->name, "{L}") != NULL;
}

static bool per_expert(const moe_param_row *row) {
  return strstr(row->name, "{E}") != NULL;
}

bool moe_pool_decays(moe_pool_kind pool) {
  return pool != MOE_POOL_GAIN;
}

moe_dtype moe_pool_dtype(moe_pool_kind pool, moe_dtype compute) {
  return pool == MOE_POOL_GAIN || pool == MOE_POOL_ROUTER ? MOE_F32 : compute;
}

const char *moe_pool_name(moe_pool_kind pool) {
  static const char *const names[MOE_POOLS] = {"dense", "router", "gain", "expert"};
  return names[pool];
}

moe_dims moe_dims_of(const moe_config *c) {
  moe_dims d = {.vocab = c->model.vocab_size,
                .hidden = c->model.hidden_size,
                .layers = c->model.num_layers,
                .heads = c->model.num_heads,
                .kv_heads = c->model.num_kv_heads,
                .head_dim = c->model.head_dim,
                .experts = c->model.num_experts,
                .top_k = c->model.top_k,
                .ffn = c->model.ffn_size};
  return d;
}

static int64_t dim_of(const moe_dims *d, char letter) {
  switch (letter) {
  case 'V':
    return d->vocab;
  case 'D':
    return d->hidden;
  case 'Q':
    return d->heads * d->head_dim;
  case 'K':
    return d->kv_heads * d->head_dim;
  case 'E':
    return d->experts;
  case 'F':
    return d->ffn;
  default:
    return 0;
  }
}

/* Copy `pattern` with {L} and {E} replaced. */
static void fill_name(char *out, size_t size, const char *pattern, int64_t layer, int64_t expert) {
  size_t n = 0;
  while (*pattern && n + 1 < size) {
    int64_t number = pattern[0] != '{' ? -1 : pattern[1] == 'L' ? layer : expert;
    if (number < 0) {
      out[n++] = *pattern++;
      continue;
    }
    int wrote = snprintf(out + n, size - n, "%lld", (long long)number);
    n += (size_t)wrote < size - n ? (size_t)wrote : size - n - 1;
    pattern += 3;
  }
  out[n] = '\0';
}

static void place(moe_params *p, const moe_param_row *row, int64_t layer, int64_t expert) {
  moe_param *q = &p->list[p->count++];
  memset(q, 0, sizeof *q);
  q->row = row;
  q->layer = layer;
  q->expert = expert;
  q->dims = (int)strlen(row->shape);
  q->count = 1;
  for (int i = 0; i < q->dims; i++) {
    q->shape[i] = dim_of(&p->dims, row->shape[i]);
    q->count *= q->shape[i];
  }
  if (q->dims == 1) q->shape[1] = 1;
  fill_name(q->name, sizeof q->name, row->name, layer, expert);
  q->offset = p->pool_count[row->pool];
  p->pool_count[row->pool] += q->count;
}

/* Rows [row, returned row) are one bundle. */
static const moe_param_row *bundle_end(const moe_param_row *row) {
  const moe_param_row *end = row + 1;
  while (row->bundle && end->name && end->bundle == row->bundle) end++;
  return end;
}

static void place_bundle(moe_params *p, const moe_param_row *row, const moe_param_row *end,
                         int64_t layer) {
  int64_t *used = &p->pool_count[row->pool];
  *used = (*used + BUNDLE_ALIGN - 1) / BUNDLE_ALIGN * BUNDLE_ALIGN;
  moe_range experts = per_expert(row) ? p->experts : (moe_range){-1, 0};
  for (int64_t e = experts.begin; e < experts.end; e++) {
    for (const moe_param_row *r = row; r < end; r++) place(p, r, layer, e);
  }
}

static void place_pool(moe_params *p, moe_pool_kind pool) {
  const moe_param_row *row = table;
  while (row->name) {
    const moe_param_row *section = row; /* consecutive rows that are all per layer, or all not */
    while (row->name && per_layer(row) == per_layer(section)) row++;
    int64_t layers = per_layer(section) ? p->dims.layers : 1;
    for (int64_t l = 0; l < layers; l++) {
      for (const moe_param_row *r = section; r < row; r = bundle_end(r)) {
        if (r->pool == pool) place_bundle(p, r, bundle_end(r), per_layer(r) ? l : -1);
      }
    }
  }
}

moe_status moe_params_create(const moe_dims *dims, moe_range experts, moe_params *out) {
  memset(out, 0, sizeof *out);
  out->dims = *dims;
  out->experts = experts;
  int64_t n = 0;
  for (const moe_param_row *row = table; row->name; row++) {
    n += (per_layer(row) ? dims->layers : 1) * (per_expert(row) ? moe_range_size(experts) : 1);
  }
  out->list = calloc((size_t)n, sizeof *out->list);
  if (!out->list)
    return moe_fail(MOE_NO_MEMORY, "out of memory: table of %lld tensors", (long long)n);
  for (int pool = 0; pool < MOE_POOLS; pool++) place_pool(out, (moe_pool_kind)pool);
  return MOE_OK;
}

void moe_params_destroy(moe_params *p) {
  free(p->list);
  memset(p, 0, sizeof *p);
}

const moe_param *moe_params_find(const moe_params *p, const char *name) {
  for (int i = 0; i < p->count; i++) {
    if (strcmp(p->list[i].name, name) == 0) return &p->list[i];
  }
  return NULL;
}

const moe_param *moe_params_at(const moe_params *p, const char *pattern, int64_t layer,
                               int64_t expert) {
  char name[MOE_PARAM_NAME];
  fill_name(name, sizeof name, pattern, layer, expert);
  return moe_params_find(p, name);
}

moe_status moe_param_init(moe_device *dev, const moe_param *p, const moe_dims *dims,
                          double init_std, uint64_t seed, int64_t begin, moe_tensor out) {
  if (p->row->init == MOE_INIT_ONES) return moe_fill(dev, out, 1.0f);
  double std = init_std;
  if (p->row->init == MOE_INIT_NORMAL_OUT) std /= sqrt(2.0 * (double)dims->layers);
  uint64_t stream = moe_rng_stream(p->row->name, p->layer, p->expert);
  return moe_draw_normal(dev, seed, stream, begin, (float)std, out);
}

int64_t moe_dims_parameters(const moe_dims *d) {
  int64_t n = 0;
  for (const moe_param_row *row = table; row->name; row++) {
    int64_t count = (per_layer(row) ? d->layers : 1) * (per_expert(row) ? d->experts : 1);
    for (const char *s = row->shape; *s; s++) count *= dim_of(d, *s);
    n += count;
  }
  return n;
}

int64_t moe_dims_active_matmul(const moe_dims *d) {
  int64_t attention = 2 * d->hidden * d->head_dim * (d->heads + d->kv_heads);
  int64_t experts = d->top_k * 3 * d->ffn * d->hidden;
  return d->layers * (attention + d->experts * d->hidden + experts) + d->vocab * d->hidden;
}

double moe_dims_flops_per_token(const moe_dims *d, int64_t seq) {
  double attention = 6.0 * (double)d->layers * (double)seq * (double)(d->heads * d->head_dim);
  return 6.0 * (double)moe_dims_active_matmul(d) + attention;
}
