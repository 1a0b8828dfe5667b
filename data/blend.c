/* The blend's repeating pattern. */
#include "data/blend.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* ---- the text of the configuration ---- */

static moe_status add_source(moe_blend_spec *spec, const char *prefix, double weight,
                             const char *where) {
  if (spec->files == MOE_BLEND_FILES)
    return moe_fail(MOE_USAGE, "blend of more than %d files: %s: merge some", MOE_BLEND_FILES,
                    where);
  char *copy = strdup(prefix);
  if (!copy) return moe_fail(MOE_NO_MEMORY, "out of memory: %s", where);
  spec->prefix[spec->files] = copy;
  spec->weight[spec->files++] = weight;
  return MOE_OK;
}

/* One part "WEIGHT:PREFIX"; a lone PREFIX has weight 1. A colon inside a path is no weight. */
static moe_status parse_source(moe_blend_spec *spec, const char *part, bool alone,
                               const char *where) {
  char *end;
  double weight = strtod(part, &end);
  bool weighted = end != part && *end == ':';
  if (!weighted && !alone)
    return moe_fail(MOE_USAGE, "no weight before \"%s\": %s: write WEIGHT:PREFIX,WEIGHT:PREFIX",
                    part, where);
  if (weighted && !(weight > 0 && isfinite(weight)))
    return moe_fail(MOE_USAGE, "weight must be above 0: %s, \"%s\": leave the file out instead",
                    where, part);
  const char *prefix = weighted ? end + 1 : part;
  if (!*prefix)
    return moe_fail(MOE_USAGE, "empty file name: %s: write WEIGHT:PREFIX,WEIGHT:PREFIX", where);
  return add_source(spec, prefix, weighted ? weight : 1, where);
}

static char *trimmed(char *text) {
  text += strspn(text, " \t");
  for (size_t n = strlen(text); n > 0 && strchr(" \t", text[n - 1]); n--) text[n - 1] = 0;
  return text;
}

moe_status moe_blend_spec_parse(const char *text, const char *where, moe_blend_spec *out) {
  memset(out, 0, sizeof *out);
  char *copy = strdup(text);
  if (!copy) return moe_fail(MOE_NO_MEMORY, "out of memory: %s", where);
  bool alone = strchr(copy, ',') == NULL;
  moe_status status = MOE_OK;
  char *rest = copy;
  for (char *part; status == MOE_OK && (part = strsep(&rest, ","));)
    status = parse_source(out, trimmed(part), alone, where);
  free(copy);
  return status;
}

void moe_blend_spec_clear(moe_blend_spec *spec) {
  for (int i = 0; i < spec->files; i++) free(spec->prefix[i]);
  spec->files = 0;
}

/* ---- the pattern ---- */

/* The shortest period in which every share is a whole number of samples, else the longest. */
static int64_t choose_period(const double *share, int files) {
  for (int64_t period = files; period < MOE_BLEND_PERIOD; period++) {
    int i = 0;
    while (i < files) {
      double samples = share[i] * (double)period;
      if (samples < 0.5 || fabs(samples - nearbyint(samples)) > 1e-9 * (double)period) break;
      i++;
    }
    if (i == files) return period;
  }
  return MOE_BLEND_PERIOD;
}

/* count[i] = share[i] * period by largest remainders, but at least 1. */
static void share_out(const double *share, int files, int64_t period, int64_t *count) {
  int64_t given = 0;
  for (int i = 0; i < files; i++) {
    count[i] = (int64_t)floor(share[i] * (double)period + 1e-6);
    if (count[i] < 1) count[i] = 1;
    given += count[i];
  }
  while (given != period) { /* each round moves one sample to or from where it errs least */
    int64_t step = given < period ? 1 : -1;
    int best = -1;
    double best_gain = 0;
    for (int i = 0; i < files; i++) {
      double gain = (double)step * (share[i] * (double)period - (double)count[i]);
      if (count[i] + step < 1 || (best >= 0 && gain <= best_gain)) continue;
      best = i;
      best_gain = gain;
    }
    count[best] += step;
    given += step;
  }
}

/* Spread: each place goes to the file furthest behind its share, ties to the lower index. */
static void spread(moe_blend *b, int64_t *used) {
  for (int64_t j = 0; j < b->period; j++) {
    int best = 0;
    int64_t best_behind = INT64_MIN;
    for (int i = 0; i < b->files; i++) {
      int64_t behind = b->count[i] * (j + 1) - used[i] * b->period;
      if (used[i] == b->count[i] || behind <= best_behind) continue;
      best = i;
      best_behind = behind;
    }
    b->file[j] = (int32_t)best;
    b->place[j] = (int32_t)used[best]++;
  }
}

moe_status moe_blend_create(const double *weight, int files, moe_blend **out) {
  *out = NULL;
  if (files < 1 || files > MOE_BLEND_FILES)
    return moe_fail(MOE_INVALID, "blend of %d files", files);
  double share[MOE_BLEND_FILES], sum = 0;
  for (int i = 0; i < files; i++) {
    if (!(weight[i] > 0) || !isfinite(weight[i]))
      return moe_fail(MOE_INVALID, "weight %d is %g", i, weight[i]);
    sum += weight[i];
  }
  for (int i = 0; i < files; i++) share[i] = weight[i] / sum;

  moe_blend *b = calloc(1, sizeof *b);
  int64_t used[MOE_BLEND_FILES] = {0};
  if (!b) return moe_fail(MOE_NO_MEMORY, "out of memory: blend");
  b->files = files;
  b->period = choose_period(share, files);
  b->count = calloc((size_t)files, sizeof *b->count);
  b->file = calloc((size_t)b->period, sizeof *b->file);
  b->place = calloc((size_t)b->period, sizeof *b->place);
  if (!b->count || !b->file || !b->place) {
    moe_blend_destroy(b);
    return moe_fail(MOE_NO_MEMORY, "out of memory: blend");
  }
  share_out(share, files, b->period, b->count);
  spread(b, used);
  *out = b;
  return MOE_OK;
}

void moe_blend_destroy(moe_blend *b) {
  if (!b) return;
  free(b->count);
  free(b->file);
  free(b->place);
  free(b);
}

void moe_blend_place(const moe_blend *b, int64_t g, int *file, int64_t *index) {
  int64_t j = g % b->period;
  *file = b->file[j];
  *index = g / b->period * b->count[*file] + b->place[j];
}

int64_t moe_blend_sample(const moe_blend *b, int file, int64_t index) {
  int64_t place = index % b->count[file], j = 0;
  while (b->file[j] != file || b->place[j] != place) j++;
  return index / b->count[file] * b->period + j;
}
