/* What all sources of weights share, and the source that rounds another one's values. */
#include "checkpoint/weights.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

moe_status moe_weights_new(const moe_weights_kind *kind, size_t size, const char *name,
                           moe_weights **out) {
  *out = NULL;
  if (strlen(name) >= MOE_PATH) return moe_fail(MOE_USAGE, "%.60s...: the path is too long", name);
  moe_weights *w = calloc(1, size);
  if (!w) return moe_fail(MOE_NO_MEMORY, "%s: no memory to open it", name);
  w->kind = kind;
  snprintf(w->name, sizeof w->name, "%s", name);
  w->rope_alpha = 1.0;
  *out = w;
  return MOE_OK;
}

moe_status moe_weights_list(moe_weights *w) {
  return moe_params_create(&w->dims, (moe_range){0, w->dims.experts}, &w->params);
}

void moe_weights_close(moe_weights *w) {
  if (!w) return;
  moe_params_destroy(&w->params);
  free(w->router_bias);
  free(w->config);
  w->kind->close(w);
}

/* Whole blocks where they are to go, the ends of a range from a block of their own. */
static moe_status read_rounded(moe_weights *w, const moe_param *p, int64_t begin, int64_t count,
                               float *out) {
  float block[MOE_WEIGHTS_BLOCK];
  for (int64_t n; count > 0; begin += n, count -= n, out += n) {
    int64_t skip = begin % MOE_WEIGHTS_BLOCK, left = p->count - (begin - skip);
    int64_t size = left < MOE_WEIGHTS_BLOCK ? left : MOE_WEIGHTS_BLOCK;
    if (skip == 0 && count >= size) {
      n = begin + count == p->count ? count : count / MOE_WEIGHTS_BLOCK * MOE_WEIGHTS_BLOCK;
      MOE_TRY(moe_weights_read(w->exact, p, begin, n, out));
      w->kind->round(w, p, n, out);
    } else {
      n = size - skip < count ? size - skip : count;
      MOE_TRY(moe_weights_read(w->exact, p, begin - skip, size, block));
      w->kind->round(w, p, size, block);
      memcpy(out, block + skip, (size_t)n * sizeof *out);
    }
  }
  return MOE_OK;
}

moe_status moe_weights_read(moe_weights *w, const moe_param *p, int64_t begin, int64_t count,
                            float *out) {
  if (begin < 0 || count < 0 || begin > p->count - count)
    return moe_fail(MOE_INVALID, "%s: %s: its range is outside the tensor", w->name, p->name);
  if (count == 0) return MOE_OK;
  return w->exact ? read_rounded(w, p, begin, count, out) : w->kind->read(w, p, begin, count, out);
}

moe_dtype moe_weights_dtype(const moe_weights *w, const moe_param *p) {
  return w->kind->dtype(w, p);
}

double moe_weights_theta(const moe_weights *w) {
  double d = (double)w->dims.head_dim;
  return w->rope_alpha == 1.0 ? w->rope_base : w->rope_base * pow(w->rope_alpha, d / (d - 2.0));
}

/* ---- rounding ----------------------------------------------------------------------------------
 */

enum { PART = 4096 }; /* elements rounded at a time */

typedef struct {
  moe_weights base;
  moe_dtype dtype;
} rounded;

static moe_dtype rounded_dtype(const moe_weights *w, const moe_param *p) {
  return moe_pool_dtype(p->row->pool, ((const rounded *)w)->dtype);
}

static void rounded_round(const moe_weights *w, const moe_param *p, int64_t count, float *values) {
  uint16_t bits[PART];
  moe_dtype dtype = rounded_dtype(w, p);
  for (int64_t at = 0; at < count && dtype != MOE_F32; at += PART) {
    int64_t n = count - at < PART ? count - at : PART;
    moe_convert(values + at, MOE_F32, bits, dtype, n);
    moe_convert(bits, dtype, values + at, MOE_F32, n);
  }
}

static void rounded_close(moe_weights *w) {
  free(w);
}

moe_status moe_weights_round(moe_weights *w, moe_dtype dtype, moe_weights **out) {
  static const moe_weights_kind kind = {
      .round = rounded_round, .dtype = rounded_dtype, .close = rounded_close};
  MOE_TRY(moe_weights_new(&kind, sizeof(rounded), w->name, out));
  moe_weights *r = *out;
  r->dims = w->dims;
  r->norm_eps = w->norm_eps;
  r->rope_base = w->rope_base;
  r->rope_alpha = w->rope_alpha;
  r->context = w->context;
  r->compute = dtype;
  r->exact = w;
  ((rounded *)r)->dtype = dtype;
  moe_status status = moe_weights_list(r);
  if (status == MOE_OK && w->router_bias) {
    size_t bytes = (size_t)w->router_bias_count * sizeof(float);
    r->router_bias = malloc(bytes);
    r->router_bias_count = w->router_bias_count;
    if (r->router_bias)
      memcpy(r->router_bias, w->router_bias, bytes);
    else
      status = moe_fail(MOE_NO_MEMORY, "%s: no memory for its router bias", w->name);
  }
  if (status == MOE_OK) return MOE_OK;
  moe_weights_close(r);
  *out = NULL;
  return status;
}
