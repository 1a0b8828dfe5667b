/* A GGUF file as a source of weights, and weights as a GGUF file would keep them.
 *
 * The opener gives back our layout: experts one by one, rotary rows in our order. Its two halves
 * stand apart on purpose: the source below reads what is in a file, moe_weights_as_stored computes
 * what should be there, and a proof compares them. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/gguf_export.h"

#define KEY(name) "llama." name

enum {
  PART = 1 << 14,         /* elements at a time */
  MOST_EXPERTS = 1 << 18, /* of all layers; the largest models have some 16 thousand */
  MOST_LAYERS = 4096,     /* as in config_table.h */
  MOST_EXTENT = 1 << 24
};

/* ---- the layout */

const char *moe_gguf_param_name(const moe_param *p, char name[MOE_GGUF_TENSOR_NAME]) {
  const char *layer = strstr(p->row->gguf, "{L}");
  if (layer)
    snprintf(name, MOE_GGUF_TENSOR_NAME, "%.*s%" PRId64 "%s", (int)(layer - p->row->gguf),
             p->row->gguf, p->layer, layer + 3);
  else
    snprintf(name, MOE_GGUF_TENSOR_NAME, "%s", p->row->gguf);
  return name;
}

moe_ggml_type moe_gguf_param_type(const moe_param *p, moe_ggml_type type) {
  if (p->row->pool == MOE_POOL_GAIN || p->row->pool == MOE_POOL_ROUTER) return MOE_GGML_F32;
  bool whole_blocks = p->shape[p->dims - 1] % moe_ggml_block(type) == 0;
  return whole_blocks ? type : MOE_GGML_F16;
}

static bool ends_in(const char *text, const char *end) {
  size_t n = strlen(text), m = strlen(end);
  return n >= m && strcmp(text + n - m, end) == 0;
}

int64_t moe_gguf_rotary_heads(const moe_param *p, const moe_dims *dims) {
  if (ends_in(p->row->name, ".q_proj.weight")) return dims->heads;
  if (ends_in(p->row->name, ".k_proj.weight")) return dims->kv_heads;
  return 0;
}

/* ---- a file */

typedef struct {
  moe_weights base;
  moe_gguf *file;
} source;

static const moe_gguf_tensor *tensor_of(const source *s, const moe_param *p) {
  char name[MOE_GGUF_TENSOR_NAME];
  return moe_gguf_tensor_find(s->file, moe_gguf_param_name(p, name));
}

/* Elements [begin, begin + count) of a tensor of the file, which need not be whole blocks. */
static moe_status read_elements(const source *s, const moe_gguf_tensor *t, int64_t begin,
                                int64_t count, float *out) {
  float values[256], raw[PART];
  int64_t block = moe_ggml_block(t->type);
  while (count > 0) {
    int64_t skip = begin % block, n;
    if (skip > 0 || count < block) { /* a part of a block */
      n = block - skip < count ? block - skip : count;
      MOE_TRY(moe_gguf_read(s->file, t, begin - skip, block, raw));
      moe_ggml_decode(t->type, raw, block, values);
      memcpy(out, values + skip, (size_t)n * sizeof *out);
    } else {
      n = count < PART ? count / block * block : PART;
      MOE_TRY(moe_gguf_read(s->file, t, begin, n, raw));
      moe_ggml_decode(t->type, raw, n, out);
    }
    begin += n;
    count -= n;
    out += n;
  }
  return MOE_OK;
}

/* Where our row i of a head of d is in the file: rotary pair (j, j + d/2) lies at (2j, 2j + 1). */
static int64_t row_in_file(int64_t row, int64_t d) {
  int64_t i = row % d, half = d / 2;
  return row - i + 2 * (i % half) + i / half;
}

static moe_status gguf_read(moe_weights *w, const moe_param *p, int64_t begin, int64_t count,
                            float *out) {
  source *s = (source *)w;
  const moe_gguf_tensor *t = tensor_of(s, p);
  if (!t) return moe_fail(MOE_INVALID, "%s: %s is not one of its tensors", w->name, p->name);
  if (moe_gguf_rotary_heads(p, &w->dims) == 0)
    return read_elements(s, t, (p->expert > 0 ? p->expert * p->count : 0) + begin, count, out);
  for (int64_t n; count > 0; begin += n, count -= n, out += n) {
    int64_t row = begin / p->shape[1], column = begin % p->shape[1];
    n = p->shape[1] - column < count ? p->shape[1] - column : count;
    int64_t at = row_in_file(row, w->dims.head_dim) * p->shape[1] + column;
    MOE_TRY(read_elements(s, t, at, n, out));
  }
  return MOE_OK;
}

static moe_dtype gguf_dtype(const moe_weights *w, const moe_param *p) {
  const moe_gguf_tensor *t = tensor_of((const source *)w, p);
  return t && t->type == MOE_GGML_F16    ? MOE_F16
         : t && t->type == MOE_GGML_BF16 ? MOE_BF16
                                         : MOE_F32;
}

static void gguf_close(moe_weights *w) {
  moe_gguf_close(((source *)w)->file);
  free(w);
}

/* ---- opening */

static moe_status size_of(const source *s, const char *key, int64_t most, int64_t *out) {
  MOE_TRY(moe_gguf_int(s->file, key, out));
  if (*out >= 1 && *out <= most) return MOE_OK;
  return moe_fail(MOE_DAMAGED, "%s: %s is %" PRId64 ", not from 1 to %" PRId64, s->base.name, key,
                  *out, most);
}

static moe_status size_or(const source *s, const char *key, int64_t otherwise, int64_t *out) {
  moe_gguf_entry unused;
  *out = otherwise;
  return moe_gguf_find(s->file, key, &unused) ? size_of(s, key, MOST_EXTENT, out) : MOE_OK;
}

static moe_status refuse(const source *s, const char *what) {
  return moe_fail(MOE_USAGE, "%s: %s: models like ours alone can be read", s->base.name, what);
}

static moe_status check_architecture(const source *s) {
  char *name = NULL;
  moe_gguf_entry unused;
  MOE_TRY(moe_gguf_text(s->file, "general.architecture", &name));
  bool ours = strcmp(name, "llama") == 0;
  free(name);
  if (!ours) return refuse(s, "its general.architecture is not llama");
  if (!moe_gguf_find(s->file, KEY("expert_count"), &unused)) return refuse(s, "it has no experts");
  if (moe_gguf_find(s->file, KEY("rope.scaling.type"), &unused) ||
      moe_gguf_tensor_find(s->file, "rope_freqs.weight"))
    return refuse(s, "its rotary positions are scaled");
  if (moe_gguf_tensor_find(s->file, "blk.0.attn_q.bias") ||
      moe_gguf_tensor_find(s->file, "blk.0.ffn_gate_shexp.weight"))
    return refuse(s, "it has biases or shared experts");
  return moe_gguf_tensor_find(s->file, "output.weight")
             ? MOE_OK
             : refuse(s, "its head is the embedding (no output.weight)");
}

static moe_status read_dims(source *s) {
  moe_dims *d = &s->base.dims;
  int64_t value_dim, rotary_dim;
  const moe_gguf_tensor *embedding = moe_gguf_tensor_find(s->file, "token_embd.weight");
  if (!embedding) return moe_fail(MOE_DAMAGED, "%s: token_embd.weight is missing", s->base.name);
  MOE_TRY(size_of(s, KEY("block_count"), MOST_LAYERS, &d->layers));
  MOE_TRY(size_of(s, KEY("embedding_length"), MOST_EXTENT, &d->hidden));
  MOE_TRY(size_of(s, KEY("feed_forward_length"), MOST_EXTENT, &d->ffn));
  MOE_TRY(size_of(s, KEY("attention.head_count"), MOST_EXTENT, &d->heads));
  MOE_TRY(size_or(s, KEY("attention.head_count_kv"), d->heads, &d->kv_heads));
  MOE_TRY(size_or(s, KEY("attention.key_length"), d->hidden / d->heads, &d->head_dim));
  MOE_TRY(size_or(s, KEY("attention.value_length"), d->head_dim, &value_dim));
  MOE_TRY(size_or(s, KEY("rope.dimension_count"), d->head_dim, &rotary_dim));
  MOE_TRY(size_of(s, KEY("expert_count"), MOST_EXPERTS / d->layers, &d->experts));
  MOE_TRY(size_of(s, KEY("expert_used_count"), d->experts, &d->top_k));
  d->vocab = embedding->ne[1];
  if (value_dim != d->head_dim || rotary_dim != d->head_dim || d->head_dim < 1)
    return refuse(s, "keys, values and rotary positions are not of one size");
  if (d->head_dim % 2 != 0 || d->heads % d->kv_heads != 0)
    return moe_fail(MOE_DAMAGED,
                    "%s: heads of %" PRId64 ", %" PRId64 " over %" PRId64
                    " key/value heads: impossible",
                    s->base.name, d->head_dim, d->heads, d->kv_heads);
  return MOE_OK;
}

static moe_status read_settings(source *s) {
  moe_weights *w = &s->base;
  moe_gguf_entry unused;
  w->rope_base = 10000.0; /* what llama.cpp takes */
  MOE_TRY(moe_gguf_number(s->file, KEY("attention.layer_norm_rms_epsilon"), &w->norm_eps));
  if (moe_gguf_find(s->file, KEY("rope.freq_base"), &unused))
    MOE_TRY(moe_gguf_number(s->file, KEY("rope.freq_base"), &w->rope_base));
  if (!(w->norm_eps > 0.0 && w->norm_eps < 1.0) || !(w->rope_base >= 1.0 && w->rope_base < 1e38))
    return moe_fail(MOE_DAMAGED, "%s: norm epsilon %g or rotary base %g is impossible", w->name,
                    w->norm_eps, w->rope_base);
  return size_or(s, KEY("context_length"), 0, &w->context);
}

/* The tensor that holds p has the extents p asks for. */
static moe_status check_tensor(const source *s, const moe_param *p) {
  char name[MOE_GGUF_TENSOR_NAME];
  const moe_gguf_tensor *t = moe_gguf_tensor_find(s->file, moe_gguf_param_name(p, name));
  if (!t) return moe_fail(MOE_DAMAGED, "%s: %s is missing", s->base.name, name);
  int64_t columns = p->shape[p->dims - 1], rows = p->dims == 2 ? p->shape[0] : 1;
  int64_t experts = p->expert >= 0 ? s->base.dims.experts : 1;
  if (t->ne[0] == columns && t->ne[1] == rows && t->ne[2] == experts && t->ne[3] == 1)
    return MOE_OK;
  return moe_fail(MOE_DAMAGED,
                  "%s: %s is [%" PRId64 ", %" PRId64 ", %" PRId64 "], not [%" PRId64 ", %" PRId64
                  ", %" PRId64 "] as its keys say",
                  s->base.name, name, t->ne[0], t->ne[1], t->ne[2], columns, rows, experts);
}

static moe_status open_source(source *s) {
  MOE_TRY(moe_gguf_open(s->base.name, &s->file));
  MOE_TRY(check_architecture(s));
  MOE_TRY(read_dims(s));
  MOE_TRY(read_settings(s));
  if (s->base.dims.layers > moe_gguf_tensors(s->file)) /* before a long list is made */
    return moe_fail(MOE_DAMAGED, "%s: has fewer tensors than layers", s->base.name);
  MOE_TRY(moe_weights_list(&s->base));
  for (int i = 0; i < s->base.params.count; i++)
    if (s->base.params.list[i].expert <= 0) MOE_TRY(check_tensor(s, &s->base.params.list[i]));
  return MOE_OK;
}

moe_status moe_weights_open_gguf(const char *path, moe_weights **out) {
  static const moe_weights_kind kind = {
      .read = gguf_read, .dtype = gguf_dtype, .close = gguf_close};
  MOE_TRY(moe_weights_new(&kind, sizeof(source), path, out));
  moe_status status = open_source((source *)*out);
  if (status == MOE_OK) return MOE_OK;
  moe_weights_close(*out);
  *out = NULL;
  return status;
}

/* ---- weights as they would be stored */

typedef struct {
  moe_weights base;
  moe_ggml_type type;
} stored;

/* Encoded and decoded. (Rows of Q8_0 are whole blocks of it, so ranges of ours are, too.) */
static void stored_round(const moe_weights *w, const moe_param *p, int64_t count, float *values) {
  float raw[PART];
  moe_ggml_type type = moe_gguf_param_type(p, ((const stored *)w)->type);
  for (int64_t at = 0; at < count && type != MOE_GGML_F32; at += PART) {
    int64_t n = count - at < PART ? count - at : PART;
    moe_ggml_encode(type, values + at, n, raw);
    moe_ggml_decode(type, raw, n, values + at);
  }
}

static moe_dtype stored_dtype(const moe_weights *w, const moe_param *p) {
  moe_ggml_type type = moe_gguf_param_type(p, ((const stored *)w)->type);
  return type == MOE_GGML_F16 ? MOE_F16 : type == MOE_GGML_BF16 ? MOE_BF16 : MOE_F32;
}

static void stored_close(moe_weights *w) {
  free(w);
}

moe_status moe_weights_as_stored(moe_weights *w, moe_ggml_type type, moe_weights **out) {
  static const moe_weights_kind kind = {
      .round = stored_round, .dtype = stored_dtype, .close = stored_close};
  MOE_TRY(moe_weights_new(&kind, sizeof(stored), w->name, out));
  stored *s = (stored *)*out;
  s->base.dims = w->dims;
  s->base.norm_eps = (double)(float)w->norm_eps; /* as the file's keys keep them */
  s->base.rope_base = (double)(float)moe_weights_theta(w);
  s->base.context = w->context;
  s->base.exact = w;
  s->type = type;
  moe_status status = moe_weights_list(&s->base);
  if (status == MOE_OK) return MOE_OK;
  moe_weights_close(*out);
  *out = NULL;
  return status;
}
