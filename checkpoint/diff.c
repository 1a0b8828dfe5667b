/* Comparing checkpoints and weights.
 *
 * The tensors of a checkpoint are sorted by role and name, so two checkpoints are compared by one
 * walk along both lists; each tensor is read once, in equal pieces of both, whatever slices and
 * files they lie in. The processors share the tensors; what they found is told in order. */
#include "checkpoint/diff.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/crew.h"
#include "checkpoint/stored_config.h"
#include "checkpoint/tensors.h"
#include "core/base/log.h"
#include "data/progress.h"

enum {
  PART = 1 << 17, /* elements compared at a time */
  SHOWN = 6       /* tensors listed per role unless all are asked for */
};

/* ---- one tensor */

typedef struct {
  bool same_bits;
  int64_t not_finite;       /* elements of which one side is no number, and the bits differ */
  double largest, relative; /* |a - b|, and that as a share of the larger of |a|, |b| */
  double aa, bb, ab, dd;    /* sums of a a, b b, a b, (a - b)(a - b) */
} difference;

static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static void add_values(difference *d, const float *a, const float *b, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    double x = (double)a[i], y = (double)b[i], gap = fabs(x - y);
    if (!isfinite(gap)) {
      d->not_finite += bits_of(a[i]) != bits_of(b[i]);
      continue;
    }
    d->aa += x * x;
    d->bb += y * y;
    d->ab += x * y;
    d->dd += gap * gap;
    if (gap > d->largest) d->largest = gap;
    if (gap > 0.0) d->relative = fmax(d->relative, gap / fmax(fabs(x), fabs(y)));
  }
}

static bool is_equal(const difference *d, double tolerance) {
  if (d->same_bits || tolerance <= 0.0) return d->same_bits;
  return d->not_finite == 0 && sqrt(d->dd) <= tolerance * sqrt(d->aa);
}

static void print_difference(FILE *out, const char *name, const char *types, const difference *d) {
  if (!out) return;
  double length = sqrt(d->aa) * sqrt(d->bb);
  fprintf(out, "    %s%s  largest %.3g, relative %.3g, norm %.3g of %.3g, cosine %.9f", name, types,
          d->largest, d->relative, sqrt(d->dd), sqrt(d->aa), length > 0.0 ? d->ab / length : 0.0);
  if (d->not_finite > 0) fprintf(out, ", %" PRId64 " not finite", d->not_finite);
  fputc('\n', out);
}

/* ---- many */

/* A thread's: PART elements of both sides, as they are kept (of 8 bytes at most) and as f32. */
typedef struct {
  char *raw[2];
  float *values[2];
} room;

/* Tensors that both sides have. */
typedef struct {
  int64_t at[2]; /* first slices in the manifests; parameter's number */
  difference found;
} pair;

typedef struct {
  const moe_diff_options *options;
  room room[MOE_CREW_MOST];
  pair *pair;
  int64_t pairs;
  moe_progress progress;
  int64_t total;                          /* bytes of the first */
  int64_t equal, unequal, missing, shown; /* of the role */
  bool differ;
  /* checkpoints */
  moe_tensors *from[2];
  const moe_manifest *manifest[2];
  /* or weights */
  moe_weights *weights[2];
} comparison;

static moe_status take_room(room *r) {
  bool all = true;
  for (int i = 0; i < 2; i++) {
    if (!r->raw[i]) r->raw[i] = malloc(PART * 8);
    if (!r->values[i]) r->values[i] = malloc(PART * sizeof *r->values[i]);
    all = all && r->raw[i] && r->values[i];
  }
  return all ? MOE_OK : moe_fail(MOE_NO_MEMORY, "no memory to compare");
}

/* Before each part. */
static moe_status go_on(const comparison *c) {
  if (c->options->stop && *c->options->stop)
    return moe_fail(MOE_STOPPED, "stopped on request: nothing was changed");
  return MOE_OK;
}

static moe_status add_pair(comparison *c, int64_t a, int64_t b) {
  if ((c->pairs & (c->pairs - 1)) == 0) { /* full at every power of two */
    pair *list = realloc(c->pair, (size_t)(c->pairs > 0 ? 2 * c->pairs : 1) * sizeof *list);
    if (!list) return moe_fail(MOE_NO_MEMORY, "no memory for the list of tensors");
    c->pair = list;
  }
  c->pair[c->pairs++] = (pair){.at = {a, b}};
  return MOE_OK;
}

static void report(comparison *c, const difference *d, const char *name, const char *types) {
  bool equal = is_equal(d, c->options->tolerance);
  *(equal ? &c->equal : &c->unequal) += 1;
  if (!equal && (c->options->all || c->shown++ < SHOWN))
    print_difference(c->options->out, name, types, d);
}

static void release(comparison *c) {
  for (int w = 0; w < MOE_CREW_MOST; w++)
    for (int i = 0; i < 2; i++) {
      free(c->room[w].raw[i]);
      free(c->room[w].values[i]);
    }
  free(c->pair);
}

/* ---- checkpoints */

static bool is_float(moe_dtype t) {
  return t == MOE_F32 || t == MOE_BF16 || t == MOE_F16;
}

static moe_status read_tensors(void *context, int worker, int64_t k) {
  comparison *c = context;
  room *r = &c->room[worker];
  pair *p = &c->pair[k];
  const moe_slice *s[2];
  for (int i = 0; i < 2; i++) s[i] = &c->manifest[i]->slice[p->at[i]];
  int64_t total = moe_slice_total(s[0]), size = moe_dtype_size(s[0]->dtype);
  bool same_type = s[0]->dtype == s[1]->dtype;
  bool bits_alone = (!c->options->out && c->options->tolerance <= 0.0) || !is_float(s[0]->dtype) ||
                    !is_float(s[1]->dtype);
  MOE_TRY(take_room(r));
  p->found.same_bits = same_type;
  for (int64_t at = 0; at < total; at += PART) {
    int64_t n = total - at < PART ? total - at : PART;
    MOE_TRY(go_on(c));
    for (int i = 0; i < 2; i++) MOE_TRY(moe_tensors_read(c->from[i], p->at[i], at, n, r->raw[i]));
    moe_progress_add(&c->progress, n * size, c->total);
    if (same_type && memcmp(r->raw[0], r->raw[1], (size_t)(n * size)) != 0)
      p->found.same_bits = false;
    if (bits_alone) continue;
    for (int i = 0; i < 2; i++) moe_convert(r->raw[i], s[i]->dtype, r->values[i], MOE_F32, n);
    add_values(&p->found, r->values[0], r->values[1], n);
  }
  return MOE_OK;
}

static bool same_shape(const moe_slice *a, const moe_slice *b) {
  return a->dims == b->dims && a->shape[0] == b->shape[0] && a->shape[1] == b->shape[1];
}

/* Of one name. *k: the next pair that was read. */
static void report_tensor(comparison *c, const moe_slice *a, const moe_slice *b, int64_t *k) {
  char types[64] = "";
  if (!same_shape(a, b)) {
    if (c->options->out && (c->options->all || c->shown++ < SHOWN))
      fprintf(c->options->out,
              "    %s  has another shape: [%" PRId64 ", %" PRId64 "] and [%" PRId64 ", %" PRId64
              "]\n",
              a->name, a->shape[0], a->shape[1], b->shape[0], b->shape[1]);
    c->unequal++;
    return;
  }
  if (a->dtype != b->dtype)
    snprintf(types, sizeof types, " (%s, %s)", moe_dtype_name(a->dtype), moe_dtype_name(b->dtype));
  report(c, &c->pair[(*k)++].found, a->name, types);
}

static void report_missing(comparison *c, const moe_slice *s, int side) {
  c->missing++;
  if (c->options->out && (c->options->all || c->shown++ < SHOWN))
    fprintf(c->options->out, "    %s  is only in %s\n", s->name,
            side == 0 ? "the first" : "the second");
}

/* Where a role's tensors begin and end in a manifest. */
static void role_range(const moe_manifest *m, moe_role role, int64_t *begin, int64_t *end) {
  for (*begin = 0; *begin < m->slices && m->slice[*begin].role < role;) ++*begin;
  for (*end = *begin; *end < m->slices && m->slice[*end].role == role;) ++*end;
}

static void print_role(const comparison *c, moe_role role) {
  FILE *out = c->options->out;
  int64_t listed = c->options->all ? 0 : c->shown - SHOWN;
  if (!out || c->equal + c->unequal + c->missing == 0) return;
  if (listed > 0) fprintf(out, "    ... and %" PRId64 " more: --all lists them\n", listed);
  fprintf(out, "  %-7s %" PRId64 " tensors equal, %" PRId64 " differ, %" PRId64 " only in one\n",
          moe_role_name(role), c->equal, c->unequal, c->missing);
}

/* Both lists of a role from their beginnings to their ends. First to find what is to be read
 * (told: false), then to tell what was found. */
static moe_status walk(comparison *c, moe_role role, bool told) {
  const moe_manifest *const *m = c->manifest;
  int64_t i, j, i_end, j_end, k = 0;
  role_range(m[0], role, &i, &i_end);
  role_range(m[1], role, &j, &j_end);
  while (i < i_end || j < j_end) {
    const moe_slice *a = &m[0]->slice[i], *b = &m[1]->slice[j];
    int order = i == i_end ? 1 : j == j_end ? -1 : strcmp(a->name, b->name);
    if (told && order < 0) report_missing(c, a, 0);
    if (told && order > 0) report_missing(c, b, 1);
    if (told && order == 0) report_tensor(c, a, b, &k);
    if (!told && order == 0 && same_shape(a, b)) MOE_TRY(add_pair(c, i, j));
    if (order <= 0) i = moe_tensors_end(c->from[0], i);
    if (order >= 0) j = moe_tensors_end(c->from[1], j);
  }
  return MOE_OK;
}

static moe_status compare_role(comparison *c, moe_role role) {
  c->pairs = c->equal = c->unequal = c->missing = c->shown = 0;
  MOE_TRY(walk(c, role, false));
  MOE_TRY(moe_crew_work(moe_crew_cores(), c->pairs, read_tensors, c));
  MOE_TRY(walk(c, role, true));
  c->differ = c->differ || c->unequal > 0 || c->missing > 0;
  print_role(c, role);
  return MOE_OK;
}

/* ---- states and settings */

static void compare_state(comparison *c) {
  const moe_run_state *a = &c->manifest[0]->state, *b = &c->manifest[1]->state;
  const struct {
    const char *name;
    uint64_t a, b;
  } fields[] = {
      {"step", (uint64_t)a->step, (uint64_t)b->step},
      {"tokens", (uint64_t)a->tokens, (uint64_t)b->tokens},
      {"samples", (uint64_t)a->samples, (uint64_t)b->samples},
      {"seed", a->seed, b->seed},
      {"data fingerprint", a->data_fingerprint, b->data_fingerprint},
  };
  for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
    if (fields[i].a == fields[i].b) continue;
    c->differ = true;
    if (c->options->out)
      fprintf(c->options->out, "  %s: %" PRIu64 ", %" PRIu64 "\n", fields[i].name, fields[i].a,
              fields[i].b);
  }
  size_t bias = (size_t)a->router_bias_count * sizeof *a->router_bias;
  if (a->router_bias_count == b->router_bias_count &&
      (bias == 0 || memcmp(a->router_bias, b->router_bias, bias) == 0))
    return;
  c->differ = true;
  if (c->options->out) fprintf(c->options->out, "  the router's selection bias differs\n");
}

/* Both texts come from one table: line i of one is line i of the other. */
static void print_settings(FILE *out, char *a, char *b) {
  char section[64] = "", *x_rest, *y_rest;
  char *x = strtok_r(a, "\n", &x_rest), *y = strtok_r(b, "\n", &y_rest);
  for (; x && y; x = strtok_r(NULL, "\n", &x_rest), y = strtok_r(NULL, "\n", &y_rest)) {
    if (*x == '[') snprintf(section, sizeof section, "%.*s", (int)strcspn(x + 1, "]"), x + 1);
    if (strcmp(x, y) == 0) continue;
    const char *value = strchr(y, '=');
    fprintf(out, "  %s.%s, %s\n", section, x, value ? value + (value[1] == ' ' ? 2 : 1) : "");
  }
}

static moe_status compare_settings(comparison *c) {
  const moe_run_state *s[2] = {&c->manifest[0]->state, &c->manifest[1]->state};
  moe_config *config[2] = {NULL, NULL};
  char *text[2] = {NULL, NULL}, *unused = NULL;
  size_t size = 0;
  moe_status status = MOE_OK;
  if (!s[0]->config || !s[1]->config || !s[0]->config[0] || !s[1]->config[0]) return MOE_OK;
  for (int i = 0; i < 2 && status == MOE_OK; i++) {
    status = moe_stored_config(s[i]->config, i == 0 ? "the first" : "the second", &config[i]);
    if (status == MOE_OK && !(text[i] = moe_config_text(config[i])))
      status = moe_fail(MOE_NO_MEMORY, "no memory for a configuration");
  }
  FILE *nowhere = status == MOE_OK ? open_memstream(&unused, &size) : NULL;
  if (nowhere) {
    c->differ = c->differ || moe_config_diff_for_resume(config[0], config[1], nowhere) > 0;
    fclose(nowhere);
    if (c->options->out) print_settings(c->options->out, text[0], text[1]);
  }
  free(unused);
  for (int i = 0; i < 2; i++) {
    free(config[i]);
    free(text[i]);
  }
  return status;
}

static moe_status compare_all(comparison *c) {
  for (int i = 0; i < 2; i++) c->manifest[i] = moe_tensors_manifest(c->from[i]);
  for (int64_t i = 0; i < c->manifest[0]->slices; i++)
    c->total += moe_slice_bytes(&c->manifest[0]->slice[i]);
  compare_state(c);
  MOE_TRY(compare_settings(c));
  moe_status status = MOE_OK;
  moe_progress_start(&c->progress, "comparing");
  for (int role = 0; role < MOE_ROLES && status == MOE_OK; role++)
    status = compare_role(c, (moe_role)role);
  moe_progress_end(&c->progress);
  return status;
}

moe_status moe_diff_checkpoints(const char *a, const char *b, const moe_diff_options *options,
                                bool *differ) {
  comparison c = {.options = options};
  moe_status status = moe_tensors_open(a, &c.from[0]);
  if (status == MOE_OK) status = moe_tensors_open(b, &c.from[1]);
  if (status == MOE_OK) status = compare_all(&c);
  for (int i = 0; i < 2; i++) moe_tensors_close(c.from[i]);
  release(&c);
  *differ = c.differ;
  return status;
}

/* ---- weights */

static moe_status read_params(void *context, int worker, int64_t k) {
  comparison *c = context;
  room *r = &c->room[worker];
  const moe_param *p = &c->weights[0]->params.list[k];
  difference *d = &c->pair[k].found;
  MOE_TRY(take_room(r));
  d->same_bits = true;
  for (int64_t at = 0; at < p->count; at += PART) {
    int64_t n = p->count - at < PART ? p->count - at : PART, bytes = n * (int64_t)sizeof(float);
    MOE_TRY(go_on(c));
    for (int i = 0; i < 2; i++)
      MOE_TRY(moe_weights_read(c->weights[i], &c->weights[i]->params.list[k], at, n, r->values[i]));
    moe_progress_add(&c->progress, bytes, c->total);
    if (memcmp(r->values[0], r->values[1], (size_t)bytes) != 0) d->same_bits = false;
    add_values(d, r->values[0], r->values[1], n);
  }
  return MOE_OK;
}

static moe_status compare_params(comparison *c) {
  const moe_params *params = &c->weights[0]->params;
  for (int i = 0; i < params->count; i++) MOE_TRY(add_pair(c, i, i));
  MOE_TRY(moe_crew_work(moe_crew_cores(), params->count, read_params, c));
  for (int i = 0; i < params->count; i++) report(c, &c->pair[i].found, params->list[i].name, "");
  c->differ = c->unequal > 0;
  print_role(c, MOE_ROLE_PARAM);
  return MOE_OK;
}

moe_status moe_diff_weights(moe_weights *a, moe_weights *b, const moe_diff_options *options,
                            bool *differ) {
  comparison c = {.options = options,
                  .weights = {a, b},
                  .total = moe_dims_parameters(&a->dims) * (int64_t)sizeof(float)};
  if (memcmp(&a->dims, &b->dims, sizeof a->dims) != 0)
    return moe_fail(MOE_USAGE, "%s, %s: models of different sizes: moe-convert inspect shows them",
                    a->name, b->name);
  if (options->out &&
      fabs(moe_weights_theta(a) - moe_weights_theta(b)) > 1e-6 * moe_weights_theta(a))
    fprintf(options->out, "  rotary base: %.9g, %.9g\n", moe_weights_theta(a),
            moe_weights_theta(b));
  moe_progress_start(&c.progress, "comparing");
  moe_status status = compare_params(&c);
  moe_progress_end(&c.progress);
  release(&c);
  *differ = c.differ;
  return status;
}
