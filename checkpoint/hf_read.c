/* A Hugging Face folder as a source of weights.
 *
 * Opening finds each parameter's place once: a tensor of its own, or, where a layer's experts were
 * saved as one tensor, a part of that. What is left over in the files would be a part of the model
 * that we do not compute, so it is refused. */
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/files.h"
#include "checkpoint/hf.h"
#include "checkpoint/hf_config.h"
#include "checkpoint/json.h"
#include "checkpoint/safetensors.h"

enum {
  INDEX_LIMIT = 64 << 20, /* bytes of model.safetensors.index.json */
  MOST_FILES = 512,       /* each stays open */
  FILE_NAME = 256,
  PART = 1 << 15 /* elements converted at a time */
};

typedef struct {
  const moe_safetensors *file;
  const moe_safetensor *tensor;
  int64_t begin; /* of the parameter in the tensor */
} place;

typedef struct {
  moe_weights base;
  moe_hf_config config;
  int files;
  moe_safetensors *file; /* [files] */
  place *places;         /* [params.count] */
} source;

/* ---- reading -----------------------------------------------------------------------------------
 */

/* A parameter of the source's own list is there without a search. */
static const place *place_of(const source *s, const moe_param *p) {
  const moe_params *params = &s->base.params;
  const moe_param *own = p;
  if (p < params->list || p >= params->list + params->count) own = moe_params_find(params, p->name);
  return own ? &s->places[own - s->base.params.list] : NULL;
}

static moe_status hf_read(moe_weights *w, const moe_param *p, int64_t begin, int64_t count,
                          float *out) {
  uint16_t raw[PART];
  const place *at = place_of((source *)w, p);
  if (!at) return moe_fail(MOE_INVALID, "%s: %s is not one of its tensors", w->name, p->name);
  if (at->tensor->dtype == MOE_F32)
    return moe_safetensors_read(at->file, at->tensor, at->begin + begin, count, out);
  for (int64_t done = 0; done < count; done += PART) {
    int64_t n = count - done < PART ? count - done : PART;
    MOE_TRY(moe_safetensors_read(at->file, at->tensor, at->begin + begin + done, n, raw));
    moe_convert(raw, at->tensor->dtype, out + done, MOE_F32, n);
  }
  return MOE_OK;
}

static moe_dtype hf_dtype(const moe_weights *w, const moe_param *p) {
  const place *at = place_of((const source *)w, p);
  return at ? at->tensor->dtype : MOE_F32;
}

static void hf_close(moe_weights *w) {
  source *s = (source *)w;
  for (int i = 0; i < s->files; i++) moe_safetensors_close(&s->file[i]);
  free(s->file);
  free(s->places);
  free(s);
}

/* ---- the files ---------------------------------------------------------------------------------
 */

/* Links are followed: a cache of downloads is made of them, and what they lead to is only read. */
static moe_status open_file(source *s, const char *name) {
  char path[MOE_PATH + FILE_NAME], real[PATH_MAX];
  snprintf(path, sizeof path, "%s/%s", s->base.name, name);
  if (!realpath(path, real))
    return moe_fail(MOE_DAMAGED, "%s: is missing, though the folder needs it", path);
  MOE_TRY(moe_safetensors_open(real, &s->file[s->files]));
  s->files++;
  return MOE_OK;
}

static int by_text(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The different file names of a weight map, sorted; they point into it. */
static moe_status list_files(const cJSON *map, const char *where, const char ***names, int *n) {
  const cJSON *item;
  int entries = cJSON_GetArraySize(map);
  *names = calloc((size_t)entries + 1, sizeof **names);
  if (!*names) return moe_fail(MOE_NO_MEMORY, "%s: no memory to read it", where);
  int found = 0;
  cJSON_ArrayForEach(item, map) {
    const char *name = cJSON_IsString(item) ? item->valuestring : "";
    if (!name[0] || name[0] == '.' || strchr(name, '/') || strlen(name) >= FILE_NAME)
      return moe_fail(MOE_DAMAGED, "%s: %.100s is not in a file of this folder", where,
                      item->string);
    (*names)[found++] = name;
  }
  qsort(*names, (size_t)found, sizeof **names, by_text);
  *n = 0;
  for (int i = 0; i < found; i++)
    if (*n == 0 || strcmp((*names)[*n - 1], (*names)[i]) != 0) (*names)[(*n)++] = (*names)[i];
  if (*n >= 1 && *n <= MOST_FILES) return MOE_OK;
  return moe_fail(MOE_DAMAGED, "%s: names %d files: from 1 to %d are possible", where, *n,
                  MOST_FILES);
}

/* The index is only a list of files: what each holds, its own header says. But both must agree, or
 * a file belongs to another model. */
static moe_status check_index(const source *s, const cJSON *map, const char *const *names,
                              const char *where) {
  const cJSON *item;
  int64_t tensors = 0;
  cJSON_ArrayForEach(item, map) {
    const char **name =
        bsearch(&item->valuestring, names, (size_t)s->files, sizeof *names, by_text);
    if (!name || !moe_safetensors_find(&s->file[name - names], item->string))
      return moe_fail(MOE_DAMAGED, "%s: %.100s is not in %s, where the index has it", where,
                      item->string, item->valuestring);
  }
  for (int i = 0; i < s->files; i++) tensors += s->file[i].count;
  if (tensors == cJSON_GetArraySize(map)) return MOE_OK;
  return moe_fail(MOE_DAMAGED, "%s: lists %d tensors, but its files hold %" PRId64, where,
                  cJSON_GetArraySize(map), tensors);
}

static moe_status open_indexed(source *s, const char *where) {
  cJSON *root;
  const char **names = NULL;
  int n = 0;
  MOE_TRY(moe_json_read(where, INDEX_LIMIT, &root));
  const cJSON *map = moe_json_member(root, "weight_map");
  moe_status status = cJSON_IsObject(map)
                          ? list_files(map, where, &names, &n)
                          : moe_fail(MOE_DAMAGED, "%s: has no \"weight_map\"", where);
  if (status == MOE_OK && !(s->file = calloc((size_t)n, sizeof *s->file)))
    status = moe_fail(MOE_NO_MEMORY, "%s: no memory to open its files", where);
  for (int i = 0; i < n && status == MOE_OK; i++) status = open_file(s, names[i]);
  if (status == MOE_OK) status = check_index(s, map, names, where);
  free(names);
  cJSON_Delete(root);
  return status;
}

static moe_status open_files(source *s) {
  char path[MOE_PATH + FILE_NAME], real[PATH_MAX];
  snprintf(path, sizeof path, "%s/model.safetensors.index.json", s->base.name);
  if (realpath(path, real)) return open_indexed(s, real);
  if (!(s->file = calloc(1, sizeof *s->file)))
    return moe_fail(MOE_NO_MEMORY, "%s: no memory to open it", path);
  return open_file(s, "model.safetensors");
}

/* ---- where each parameter lies -----------------------------------------------------------------
 */

static bool look_up(const source *s, const char *name, place *out) {
  for (int i = 0; i < s->files; i++) {
    out->file = &s->file[i];
    out->tensor = moe_safetensors_find(out->file, name);
    if (out->tensor) return true;
  }
  return false;
}

/* The name as transformers 5 has it in memory: "mlp" for "block_sparse_moe". */
static void rename_block(char name[MOE_PARAM_NAME], const char *old) {
  static const char from[] = "block_sparse_moe";
  const char *at = strstr(old, from);
  snprintf(name, MOE_PARAM_NAME, "%.*s%s%s", (int)(at ? at - old : (ptrdiff_t)strlen(old)), old,
           at ? "mlp" : "", at ? at + sizeof from - 1 : "");
}

/* An expert inside its layer's fused tensors: gate_up_proj [E, 2 F, D] holds w1 above w3,
 * down_proj [E, D, F] the w2. */
static bool find_fused(const source *s, const moe_param *p, place *out) {
  const moe_dims *d = &s->base.dims;
  char kind = strrchr(p->row->name, '.')[-1]; /* "...{E}.w1.weight" */
  char name[MOE_PARAM_NAME];
  int64_t size = d->ffn * d->hidden, rows = kind == '2' ? d->hidden : 2 * d->ffn;
  static const char *const blocks[] = {"mlp", "block_sparse_moe"};
  for (int i = 0; i < 2; i++) {
    snprintf(name, sizeof name, "model.layers.%" PRId64 ".%s.experts.%s", p->layer, blocks[i],
             kind == '2' ? "down_proj" : "gate_up_proj");
    if (!look_up(s, name, out)) continue;
    const moe_safetensor *t = out->tensor;
    out->begin = p->expert * rows * t->shape[2] + (kind == '3' ? size : 0);
    return t->dims == 3 && t->shape[0] == d->experts && t->shape[1] == rows &&
           t->shape[2] == (kind == '2' ? d->ffn : d->hidden);
  }
  return false;
}

static moe_status find_place(const source *s, const moe_param *p, place *out) {
  char other[MOE_PARAM_NAME];
  rename_block(other, p->name);
  *out = (place){0};
  if (look_up(s, p->name, out) || look_up(s, other, out)) {
    const moe_safetensor *t = out->tensor;
    if (t->dims != p->dims || t->shape[0] != p->shape[0] ||
        (p->dims == 2 && t->shape[1] != p->shape[1]))
      return moe_fail(MOE_DAMAGED, "%s: %s has another shape than config.json says", s->base.name,
                      p->name);
  } else if (p->expert < 0 || !find_fused(s, p, out)) {
    return moe_fail(MOE_DAMAGED, "%s: %s is missing, or not of the shape config.json says",
                    s->base.name, p->name);
  }
  if (out->tensor->readable) return MOE_OK;
  return moe_fail(MOE_USAGE, "%s: %s is not in fp32, bf16 or fp16: give unquantised weights",
                  s->base.name, p->name);
}

/* Every element of every file must be one of the model's, but for what old exports also kept. */
static moe_status check_leftovers(const source *s) {
  int64_t elements = 0;
  for (int i = 0; i < s->files; i++)
    for (int64_t k = 0; k < s->file[i].count; k++) {
      const moe_safetensor *t = &s->file[i].list[k];
      bool constant = strstr(t->name, ".rotary_emb.inv_freq") != NULL;
      if (!constant && __builtin_add_overflow(elements, t->count, &elements))
        return moe_fail(MOE_DAMAGED, "%s: its tensors have an impossible size", s->base.name);
    }
  int64_t expected = moe_dims_parameters(&s->base.dims);
  if (elements == expected) return MOE_OK;
  return moe_fail(MOE_USAGE,
                  "%s: its tensors hold %" PRId64 " elements, the model of its config.json %" PRId64
                  ": it has parts (biases, adapters, ...) that this program does not compute",
                  s->base.name, elements, expected);
}

static moe_status find_places(source *s) {
  int64_t n = s->base.params.count;
  s->places = calloc((size_t)n, sizeof *s->places);
  if (!s->places) return moe_fail(MOE_NO_MEMORY, "%s: no memory to read it", s->base.name);
  for (int64_t i = 0; i < n; i++) MOE_TRY(find_place(s, &s->base.params.list[i], &s->places[i]));
  return check_leftovers(s);
}

/* ---- opening -----------------------------------------------------------------------------------
 */

static moe_status read_config(source *s) {
  moe_weights *w = &s->base;
  char path[MOE_PATH + FILE_NAME], real[PATH_MAX];
  snprintf(path, sizeof path, "%s/config.json", w->name);
  if (!realpath(path, real))
    return moe_fail(MOE_USAGE,
                    "%s: there is no such file: name a folder with config.json and "
                    "model.safetensors",
                    path);
  MOE_TRY(moe_hf_config_read(real, &s->config));
  moe_config *c = malloc(sizeof *c);
  if (!c) return moe_fail(MOE_NO_MEMORY, "%s: no memory for a configuration", path);
  moe_config_defaults(c);
  moe_status status = moe_hf_config_apply(&s->config, path, c);
  free(c);
  w->dims = s->config.dims;
  w->norm_eps = s->config.norm_eps;
  w->rope_base = s->config.theta;
  w->context = s->config.context;
  w->compute = s->config.dtype;
  w->init_std = s->config.init_std;
  w->aux_coef = s->config.aux_coef;
  return status;
}

static moe_status open_source(source *s) {
  MOE_TRY(read_config(s));
  MOE_TRY(open_files(s));
  MOE_TRY(moe_weights_list(&s->base));
  return find_places(s);
}

moe_status moe_weights_open_hf(const char *folder, moe_weights **out) {
  static const moe_weights_kind kind = {.read = hf_read, .dtype = hf_dtype, .close = hf_close};
  MOE_TRY(moe_weights_new(&kind, sizeof(source), folder, out));
  moe_status status = open_source((source *)*out);
  if (status == MOE_OK) return MOE_OK;
  moe_weights_close(*out);
  *out = NULL;
  return status;
}
