/* What a checkpoint holds, for people: one pass over the tensors, gathered by kind and by layer. */
#include "checkpoint/inspect.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/stored_config.h"
#include "checkpoint/tensors.h"
#include "core/base/log.h"
#include "core/model/params.h"
#include "data/progress.h"

enum { PART = 1 << 20 }; /* elements read at a time */

/* The values of one tensor, or of several together. */
typedef struct {
  double squares, largest;
  int64_t count, not_finite;
} summary;

static void add_values(summary *s, const float *x, int64_t n) {
  s->count += n;
  for (int64_t i = 0; i < n; i++) {
    double size = fabs((double)x[i]);
    if (!isfinite(size)) {
      s->not_finite++;
      continue;
    }
    s->squares += size * size;
    if (size > s->largest) s->largest = size;
  }
}

static double rms(const summary *s) {
  return s->count > 0 ? sqrt(s->squares / (double)s->count) : 0.0;
}

/* Numbers of which only the range and the spread are wanted. */
typedef struct {
  double least, most, sum, squares;
  int64_t n;
} spread;

static void add_number(spread *s, double x) {
  if (s->n == 0 || x < s->least) s->least = x;
  if (s->n == 0 || x > s->most) s->most = x;
  s->sum += x;
  s->squares += x * x;
  s->n++;
}

/* Deviation as a share of the mean. */
static double variation(const spread *s) {
  double mean = s->n > 0 ? s->sum / (double)s->n : 0.0;
  double variance = s->n > 0 ? s->squares / (double)s->n - mean * mean : 0.0;
  return mean != 0.0 && variance > 0.0 ? sqrt(variance) / fabs(mean) : 0.0;
}

enum { KINDS = 32 }; /* more than the parameter table has rows */

typedef struct {
  const moe_inspect_options *options;
  FILE *out;
  moe_tensors *from;
  const moe_manifest *manifest;
  bool has_model;
  moe_params params;
  /* by role and row of the parameter table; and per layer the norms of experts' tensors */
  summary kind[MOE_ROLES][KINDS];
  spread range[MOE_ROLES][KINDS]; /* of the tensors' rms */
  spread *experts;                /* [L][KINDS], of the weights in use */
  char *raw;
  float *values;
  moe_progress progress;
  int64_t done, total;
} inspection;

/* ---- without reading data */

static void print_state(const inspection *c, const char *folder) {
  const moe_manifest *m = c->manifest;
  const moe_run_state *s = &m->state;
  char tokens[MOE_TEXT];
  fprintf(c->out, "checkpoint   %s\n", folder);
  fprintf(c->out, "step         %" PRId64 "; %s tokens, %" PRId64 " samples seen\n", s->step,
          moe_text_count(tokens, (double)s->tokens), s->samples);
  fprintf(c->out, "data         seed %" PRIu64 ", fingerprint %016" PRIx64 "\n", s->seed,
          s->data_fingerprint);
  if (s->loss_scale > 0.0 && s->loss_scale != 1.0)
    fprintf(c->out, "loss scale   %g\n", s->loss_scale);
  if (s->router_bias_count > 0) {
    spread b = {0};
    for (int64_t i = 0; i < s->router_bias_count; i++) add_number(&b, (double)s->router_bias[i]);
    fprintf(c->out, "router bias  %" PRId64 " values from %.4g to %.4g\n", b.n, b.least, b.most);
  }
  fprintf(c->out, "written by   %d ranks, %d files\n", m->ranks, m->files);
}

static void print_roles(const inspection *c) {
  const moe_manifest *m = c->manifest;
  char text[MOE_TEXT], count[MOE_TEXT];
  int64_t all = 0;
  fprintf(c->out, "\nrole      tensors    elements        bytes  type\n");
  for (int role = 0; role < MOE_ROLES; role++) {
    int64_t tensors = 0, elements = 0, bytes = 0;
    bool types[8] = {false};
    for (int64_t i = 0; i < m->slices; i++) {
      const moe_slice *s = &m->slice[i];
      if ((int)s->role != role) continue;
      tensors += s->begin == 0;
      elements += s->count;
      bytes += moe_slice_bytes(s);
      types[s->dtype] = true;
    }
    if (tensors == 0) continue;
    all += bytes;
    fprintf(c->out, "%-8s %8" PRId64 "  %10s  %11s ", moe_role_name((moe_role)role), tensors,
            moe_text_count(count, (double)elements), moe_text_bytes(text, (double)bytes));
    for (int type = 0; type < 8; type++)
      if (types[type]) fprintf(c->out, " %s", moe_dtype_name((moe_dtype)type));
    fputc('\n', c->out);
  }
  fprintf(c->out, "%-8s %8s  %10s  %11s\n", "in all", "", "", moe_text_bytes(text, (double)all));
}

static void print_model(const inspection *c) {
  const moe_dims *d = &c->params.dims;
  char all[MOE_TEXT], active[MOE_TEXT];
  if (!c->has_model) return;
  fprintf(c->out,
          "model        %s parameters, %s of them in a token's matrix products\n"
          "             vocabulary %" PRId64 ", hidden %" PRId64 ", layers %" PRId64
          ", heads %" PRId64 " x %" PRId64 " (%" PRId64 " key/value)\n"
          "             %" PRId64 " experts of %" PRId64 ", %" PRId64 " per token\n",
          moe_text_count(all, (double)moe_dims_parameters(d)),
          moe_text_count(active, (double)moe_dims_active_matmul(d)), d->vocab, d->hidden, d->layers,
          d->heads, d->head_dim, d->kv_heads, d->experts, d->ffn, d->top_k);
}

/* ---- with the data */

static moe_status read_tensor(inspection *c, int64_t first, summary *out) {
  const moe_slice *s = &c->manifest->slice[first];
  int64_t total = moe_slice_total(s);
  bool is_float = s->dtype == MOE_F32 || s->dtype == MOE_BF16 || s->dtype == MOE_F16;
  for (int64_t at = 0; at < total; at += PART) {
    int64_t n = total - at < PART ? total - at : PART;
    if (*c->options->stop) return moe_fail(MOE_STOPPED, "stopped on request");
    MOE_TRY(moe_tensors_read(c->from, first, at, n, c->raw));
    if (!is_float) continue;
    moe_convert(c->raw, s->dtype, c->values, MOE_F32, n);
    add_values(out, c->values, n);
  }
  c->done += total * moe_dtype_size(s->dtype);
  moe_progress_show(&c->progress, c->done, c->total, "");
  return MOE_OK;
}

static void gather(inspection *c, const moe_slice *s, const summary *one) {
  const moe_param *p = c->has_model ? moe_params_find(&c->params, s->name) : NULL;
  int64_t kind = p ? p->row - moe_param_table() : -1;
  if (c->options->tensors)
    fprintf(c->out, "%-7s %-64s %-5s [%" PRId64 ", %" PRId64 "]  rms %.5g  largest %.5g%s\n",
            moe_role_name(s->role), s->name, moe_dtype_name(s->dtype), s->shape[0], s->shape[1],
            rms(one), one->largest, one->not_finite ? "  NOT FINITE" : "");
  if (kind < 0 || kind >= KINDS) return;
  summary *all = &c->kind[s->role][kind];
  all->squares += one->squares;
  all->count += one->count;
  all->not_finite += one->not_finite;
  if (one->largest > all->largest) all->largest = one->largest;
  add_number(&c->range[s->role][kind], rms(one));
  if (p->expert >= 0 && s->role == MOE_ROLE_PARAM)
    add_number(&c->experts[p->layer * KINDS + kind], sqrt(one->squares));
}

static moe_status read_all(inspection *c) {
  const moe_manifest *m = c->manifest;
  moe_status status = MOE_OK;
  for (int64_t i = 0; i < m->slices; i++) c->total += moe_slice_bytes(&m->slice[i]);
  moe_progress_start(&c->progress, "reading");
  for (int64_t i = 0; i < m->slices && status == MOE_OK; i = moe_tensors_end(c->from, i)) {
    summary one = {0};
    status = read_tensor(c, i, &one);
    if (status == MOE_OK) gather(c, &m->slice[i], &one);
  }
  moe_progress_end(&c->progress);
  return status;
}

/* The last part of a parameter's name that tells it apart: "self_attn.q_proj". */
static const char *short_name(const char *pattern, char text[64]) {
  static const char *const leads[] = {"model.layers.{L}.", "block_sparse_moe.", "model.", NULL};
  for (int i = 0; leads[i]; i++)
    if (strncmp(pattern, leads[i], strlen(leads[i])) == 0) pattern += strlen(leads[i]);
  snprintf(text, 64, "%s", pattern);
  char *end = strstr(text, ".weight");
  if (end) *end = 0;
  return text;
}

static void print_kinds(const inspection *c) {
  const moe_param_row *table = moe_param_table();
  char text[64];
  for (int role = 0; role < MOE_ROLES; role++) {
    bool any = false;
    for (int k = 0; k < KINDS && table[k].name; k++) {
      const summary *s = &c->kind[role][k];
      const spread *r = &c->range[role][k];
      if (s->count == 0) continue;
      if (!any)
        fprintf(c->out, "\n%-26s tensors         rms   from          to     largest\n",
                moe_role_name((moe_role)role));
      any = true;
      fprintf(c->out, "  %-24s %7" PRId64 "  %10.4g  %10.4g  %10.4g  %10.4g",
              short_name(table[k].name, text), r->n, rms(s), r->least, r->most, s->largest);
      if (s->not_finite > 0) fprintf(c->out, "  %" PRId64 " NOT FINITE", s->not_finite);
      fputc('\n', c->out);
    }
  }
}

/* A layer whose experts have norms far apart has some that hardly learn. */
static void print_experts(const inspection *c) {
  const moe_param_row *table = moe_param_table();
  char text[64];
  fprintf(c->out, "\nexperts' norms, by layer: least, most, deviation / mean\n");
  for (int64_t layer = 0; layer < c->params.dims.layers; layer++) {
    fprintf(c->out, "  layer %-4" PRId64, layer);
    for (int k = 0; k < KINDS && table[k].name; k++) {
      const spread *s = &c->experts[layer * KINDS + k];
      if (s->n == 0) continue;
      const char *name = strrchr(short_name(table[k].name, text), '.');
      fprintf(c->out, "   %s %.4g %.4g %.2f%%", name ? name + 1 : text, s->least, s->most,
              100.0 * variation(s));
    }
    fputc('\n', c->out);
  }
}

/* ---- all of it */

static moe_status describe_model(inspection *c, const char *folder) {
  const char *text = c->manifest->state.config;
  if (!text || !text[0]) return MOE_OK;
  moe_config *config;
  MOE_TRY(moe_stored_config(text, folder, &config));
  moe_dims dims = moe_dims_of(config);
  free(config);
  MOE_TRY(moe_params_create(&dims, (moe_range){0, dims.experts}, &c->params));
  c->has_model = true;
  return MOE_OK;
}

static moe_status print_values(inspection *c) {
  c->raw = malloc(PART * 8);
  c->values = malloc(PART * sizeof *c->values);
  int64_t layers = c->has_model ? c->params.dims.layers : 0;
  c->experts = calloc((size_t)(layers * KINDS) + 1, sizeof *c->experts);
  if (!c->raw || !c->values || !c->experts)
    return moe_fail(MOE_NO_MEMORY, "no memory to read tensors");
  if (c->options->tensors) fputc('\n', c->out);
  MOE_TRY(read_all(c));
  print_kinds(c);
  if (c->has_model) print_experts(c);
  return MOE_OK;
}

static moe_status inspect(inspection *c, const char *folder) {
  c->manifest = moe_tensors_manifest(c->from);
  MOE_TRY(describe_model(c, folder));
  print_state(c, folder);
  print_model(c);
  print_roles(c);
  if (c->options->values || c->options->tensors) MOE_TRY(print_values(c));
  const char *text = c->manifest->state.config;
  if (c->options->config) fprintf(c->out, "\n%s", text ? text : "");
  return MOE_OK;
}

moe_status moe_inspect_checkpoint(const char *step_folder, const moe_inspect_options *options,
                                  FILE *out) {
  inspection *c = calloc(1, sizeof *c);
  if (!c) return moe_fail(MOE_NO_MEMORY, "no memory to inspect %s", step_folder);
  c->options = options;
  c->out = out;
  moe_status status = moe_tensors_open(step_folder, &c->from);
  if (status == MOE_OK) status = inspect(c, step_folder);
  moe_tensors_close(c->from);
  if (c->has_model) moe_params_destroy(&c->params);
  free(c->raw);
  free(c->values);
  free(c->experts);
  free(c);
  return status;
}
