/* Exporting to Hugging Face's layout: plan the files, stream the tensors, read all of it back and
 * prove it, and only then give the folder its name. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/export.h"
#include "checkpoint/files.h"
#include "checkpoint/hf_config.h"
#include "checkpoint/hf_tokenizer.h"
#include "checkpoint/run_tokenizer.h"
#include "checkpoint/safetensors.h"
#include "core/base/log.h"

enum { FILE_NAME = 48 };
#define SHARD_BYTES 5000000000LL

typedef struct {
  const moe_export_options *options;
  moe_weights *original; /* with the export's alpha */
  moe_dtype dtype;       /* of matrices; norms and routers are f32 (params.h) */
  moe_hf_config config;
  char tokenizer[MOE_PATH]; /* as moe_tokenizer_open takes it; "" for none */
  char temporary[MOE_PATH];
  const moe_param **order; /* [params.count]: as they are written */
  int *file;               /* [params.count]: of order[i] */
  int files;
  moe_safetensors_writer *writer; /* [files] */
  moe_export_tensor *tensor;      /* [params.count]: order[i] on its way */
  int64_t total;                  /* bytes of data */
  moe_proof_report proof;
} export;

/* ---- plan --------------------------------------------------------------------------------------
 */

static moe_dtype dtype_of(const export *e, const moe_param *p) {
  return moe_pool_dtype(p->row->pool, e->dtype);
}

static int64_t bytes_of(const export *e, const moe_param *p) {
  return p->count * moe_dtype_size(dtype_of(e, p));
}

/* Layer by layer in the order of the table, each expert's matrices together: a loader that fills
 * one layer at a time then reads straight on. */
static int by_layer(const void *pa, const void *pb) {
  const moe_param *a = *(const moe_param *const *)pa, *b = *(const moe_param *const *)pb;
  const moe_param_row *table = moe_param_table();
  int64_t a_layer = a->layer >= 0 ? a->layer : a->row == table ? -1 : INT64_MAX;
  int64_t b_layer = b->layer >= 0 ? b->layer : b->row == table ? -1 : INT64_MAX;
  if (a_layer != b_layer) return a_layer < b_layer ? -1 : 1;
  if (a->expert != b->expert) return a->expert < b->expert ? -1 : 1;
  return (a->row > b->row) - (a->row < b->row);
}

static moe_status plan(export *e) {
  const moe_params *params = &e->original->params;
  int64_t limit = e->options->shard_bytes > 0 ? e->options->shard_bytes : SHARD_BYTES, used = 0;
  e->order = calloc((size_t)params->count, sizeof *e->order);
  e->file = calloc((size_t)params->count, sizeof *e->file);
  e->tensor = calloc((size_t)params->count, sizeof *e->tensor);
  if (!e->order || !e->file || !e->tensor)
    return moe_fail(MOE_NO_MEMORY, "no memory to export %d tensors", params->count);
  for (int i = 0; i < params->count; i++) e->order[i] = &params->list[i];
  qsort(e->order, (size_t)params->count, sizeof(void *), by_layer);
  e->files = 1;
  for (int i = 0; i < params->count; i++) {
    int64_t bytes = bytes_of(e, e->order[i]);
    if (used > 0 && used + bytes > limit) {
      e->files++;
      used = 0;
    }
    used += bytes;
    e->total += bytes;
    e->file[i] = e->files - 1;
  }
  if (e->files <= 512) return MOE_OK;
  return moe_fail(MOE_USAGE, "a shard size of %" PRId64 " makes %d files: use a larger one", limit,
                  e->files);
}

static const char *file_name(const export *e, int file, char name[FILE_NAME]) {
  if (e->files == 1)
    snprintf(name, FILE_NAME, "model.safetensors");
  else
    snprintf(name, FILE_NAME, "model-%05d-of-%05d.safetensors", file + 1, e->files);
  return name;
}

/* ---- weights -----------------------------------------------------------------------------------
 */

static moe_status encode(const void *context, const moe_param *p, const float *values, int64_t rows,
                         void *out) {
  const export *e = context;
  moe_dtype dtype = dtype_of(e, p);
  int64_t n = rows * p->shape[p->dims - 1];
  moe_convert(values, MOE_F32, out, dtype, n);
  if (moe_all_finite(out, dtype, n)) return MOE_OK;
  return moe_export_not_finite(e->original, p, moe_dtype_name(dtype));
}

static moe_status put(void *file, int64_t at, int64_t bytes, const void *data) {
  return moe_safetensors_write(file, at, bytes, data);
}

static moe_status finish_files(void *context) {
  export *e = context;
  for (int i = 0; i < e->files; i++) MOE_TRY(moe_safetensors_finish(&e->writer[i]));
  return MOE_OK;
}

/* Make a file for tensors [first, end) of the order, and say where each goes. */
static moe_status make_file(export *e, int first, int end) {
  char path[MOE_PATH + FILE_NAME], name[FILE_NAME];
  int64_t offset = 0;
  moe_safetensors_writer *w = &e->writer[e->file[first]];
  snprintf(path, sizeof path, "%s/%s", e->temporary, file_name(e, e->file[first], name));
  moe_safetensors_entry *entries = calloc((size_t)(end - first), sizeof *entries);
  if (!entries) return moe_fail(MOE_NO_MEMORY, "%s: no memory for its header", path);
  for (int i = first; i < end; i++) {
    const moe_param *p = e->order[i];
    moe_safetensors_entry *t = &entries[i - first];
    snprintf(t->name, sizeof t->name, "%s", p->name);
    t->dtype = dtype_of(e, p);
    t->dims = p->dims;
    memcpy(t->shape, p->shape, sizeof t->shape);
    int64_t row_bytes = p->shape[p->dims - 1] * moe_dtype_size(t->dtype);
    e->tensor[i] = (moe_export_tensor){p, moe_export_rows(p), row_bytes, w, offset};
    offset += bytes_of(e, p);
  }
  moe_status status = moe_safetensors_create(path, entries, end - first, w);
  free(entries);
  return status;
}

static moe_status make_files(export *e) {
  int count = e->original->params.count;
  e->writer = calloc((size_t)e->files, sizeof *e->writer);
  if (!e->writer) return moe_fail(MOE_NO_MEMORY, "no memory for %d files", e->files);
  for (int i = 0; i < e->files; i++) e->writer[i].fd = -1;
  for (int first = 0, end; first < count; first = end) {
    for (end = first; end < count && e->file[end] == e->file[first];) end++;
    MOE_TRY(make_file(e, first, end));
  }
  return MOE_OK;
}

static moe_status write_weights(export *e) {
  char bytes[MOE_TEXT], time[MOE_TEXT];
  int64_t written;
  double seconds;
  MOE_TRY(make_files(e));
  const moe_export_work work = {.from = e->original,
                                .tensor = e->tensor,
                                .tensors = e->original->params.count,
                                .encode = encode,
                                .write = put,
                                .finish = finish_files,
                                .context = e,
                                .stop = e->options->stop};
  MOE_TRY(moe_export_write(&work, &written, &seconds));
  moe_info("written: %s, %s in %d file%s, %s (%.2f GB/s)", moe_dtype_name(e->dtype),
           moe_text_bytes(bytes, (double)written), e->files, e->files == 1 ? "" : "s",
           moe_text_seconds(time, seconds), 1e-9 * (double)written / (seconds + 1e-9));
  return MOE_OK;
}

/* ---- the files around them ---------------------------------------------------------------------
 */

static void print_index(FILE *out, const void *context) {
  const export *e = context;
  char name[FILE_NAME];
  fprintf(out, "{\n  \"metadata\": {\"total_size\": %" PRId64 "},\n  \"weight_map\": {", e->total);
  for (int i = 0; i < e->original->params.count; i++)
    fprintf(out, "%s\n    \"%s\": \"%s\"", i ? "," : "", e->order[i]->name,
            file_name(e, e->file[i], name));
  fputs("\n  }\n}\n", out);
}

/* Sizes for people, how it was made, and how far it may be trusted. */
static void print_card(FILE *out, const void *context) {
  const export *e = context;
  const moe_dims *d = &e->original->dims;
  const moe_proof_report *r = &e->proof;
  char all[MOE_TEXT], active[MOE_TEXT];
  fprintf(out,
          "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- mixtral\n"
          "- moe\n---\n\n# A mixture-of-experts language model trained with moe-train\n\n"
          "%s parameters, %s of them in the matrix products of one token: %" PRId64
          " layers of %" PRId64 " experts, %" PRId64 " for each token; hidden size %" PRId64
          ", %" PRId64 " query heads, %" PRId64 " key/value head%s of %" PRId64
          "; vocabulary %" PRId64 "; context %" PRId64 " tokens.\n\n",
          moe_text_count(all, (double)moe_dims_parameters(d)),
          moe_text_count(active, (double)moe_dims_active_matmul(d)), d->layers, d->experts,
          d->top_k, d->hidden, d->heads, d->kv_heads, d->kv_heads == 1 ? "" : "s", d->head_dim,
          d->vocab, e->config.context);
  fprintf(out,
          "The architecture is Mixtral's: transformers (`MixtralForCausalLM`) and vLLM load this "
          "folder as it is.\n\n```python\nfrom transformers import AutoModelForCausalLM, "
          "AutoTokenizer\nmodel = AutoModelForCausalLM.from_pretrained(\".\")\n%s```\n\n",
          e->tokenizer[0] ? "tokenizer = AutoTokenizer.from_pretrained(\".\")\n" : "");
  fprintf(out,
          "Matrices are %s, norms and routers fp32. Rotary base %.9g: %g with the NTK factor %g "
          "folded in, base * alpha^(d/(d-2)).\n%s\n",
          moe_dtype_name(e->dtype), e->config.theta, e->original->rope_base,
          e->original->rope_alpha,
          e->tokenizer[0] ? "The tokenizer adds neither <bos> nor <eos>; in training, documents "
                            "ended with <eos>.\n"
                          : "There is no tokenizer here: the model takes and gives token ids.\n");
  fprintf(out,
          "Checked when it was made by moe-convert %s: all %" PRId64 " tensors, %" PRId64
          " of them of experts, read back as written (XXH3-128 of their hashes %s); largest "
          "difference of logits on %" PRId64 " tokens: %.2g of the largest logit against the same "
          "rounded weights, %.2g against the unrounded ones.\n",
          MOE_VERSION, r->tensors, r->expert_tensors, r->hash, r->tokens, r->difference,
          r->rounding);
}

static moe_status print_file(const export *e, const char *name,
                             void (*print)(FILE *out, const void *context)) {
  char path[MOE_PATH + FILE_NAME];
  snprintf(path, sizeof path, "%s/%s", e->temporary, name);
  return moe_files_print_new(path, print, e);
}

/* The run's tokenizer, which must fit the vocabulary, and its ids for config.json. */
static moe_status open_tokenizer(export *e, moe_tokenizer **out) {
  const moe_export_options *o = e->options;
  *out = NULL;
  MOE_TRY(moe_run_tokenizer(o->checkpoint, e->original->config, o->tokenizer, e->tokenizer));
  for (int i = 0; i < 4; i++) e->config.special[i] = -1;
  if (!e->tokenizer[0]) {
    moe_info("the export gets no tokenizer: it takes and gives token ids");
    return MOE_OK;
  }
  MOE_TRY(moe_tokenizer_open(e->tokenizer, out));
  int64_t pieces = moe_tokenizer_vocab_size(*out);
  for (int i = 0; i < 4; i++) e->config.special[i] = moe_tokenizer_special(*out, i);
  if (pieces <= e->original->dims.vocab) return MOE_OK;
  moe_tokenizer_close(*out);
  *out = NULL;
  return moe_fail(MOE_USAGE,
                  "%s: has %" PRId64 " pieces, but the model a vocabulary of %" PRId64
                  ": is it the run's tokenizer?",
                  e->tokenizer, pieces, e->original->dims.vocab);
}

static moe_status write_files(export *e, const moe_tokenizer *t) {
  bool bytes = strcmp(e->tokenizer, "bytes") == 0;
  if (e->files > 1) MOE_TRY(print_file(e, "model.safetensors.index.json", print_index));
  MOE_TRY(moe_hf_config_write(&e->config, e->temporary));
  if (!t) return MOE_OK;
  return moe_hf_tokenizer_write(t, bytes ? NULL : e->tokenizer, e->config.context, e->temporary);
}

/* ---- all of it ---------------------------------------------------------------------------------
 */

/* Is anything rounded on its way out? */
static bool rounds(const export *e) {
  const moe_params *params = &e->original->params;
  for (int i = 0; i < params->count; i++)
    if (dtype_of(e, &params->list[i]) != MOE_F32 &&
        moe_weights_dtype(e->original, &params->list[i]) != dtype_of(e, &params->list[i]))
      return true;
  return false;
}

static moe_status prove(export *e) {
  moe_weights *expected = NULL, *written = NULL;
  moe_status status = MOE_OK;
  if (rounds(e)) status = moe_weights_round(e->original, e->dtype, &expected);
  if (status == MOE_OK) status = moe_weights_open_hf(e->temporary, &written);
  const moe_proof_options proof = {.original = e->original,
                                   .expected = expected ? expected : e->original,
                                   .written = written,
                                   .stop = e->options->stop};
  if (status == MOE_OK) status = moe_proof(&proof, &e->proof);
  if (status == MOE_OK) moe_proof_print(&e->proof);
  moe_weights_close(written);
  moe_weights_close(expected);
  return status;
}

static moe_status settle(export *e) {
  moe_weights *w = e->original;
  MOE_TRY(moe_export_settle(e->options, w, &e->config.context));
  e->dtype = moe_export_dtype(e->options, w);
  e->config.dims = w->dims;
  e->config.norm_eps = w->norm_eps;
  e->config.theta = moe_weights_theta(w);
  e->config.init_std = w->init_std;
  e->config.aux_coef = w->aux_coef;
  e->config.dtype = e->dtype;
  return plan(e);
}

static moe_status make(export *e) {
  moe_tokenizer *t = NULL;
  MOE_TRY(settle(e));
  MOE_TRY(open_tokenizer(e, &t));
  moe_status status = moe_export_folder_begin(e->options, e->temporary);
  if (status == MOE_OK) status = write_weights(e);
  if (status == MOE_OK) status = write_files(e, t);
  if (status == MOE_OK) status = prove(e);
  if (status == MOE_OK) status = print_file(e, "README.md", print_card);
  if (status == MOE_OK) status = moe_export_folder_commit(e->options, e->temporary);
  if (status != MOE_OK && e->temporary[0] && !moe_files_remove_folder(e->temporary))
    moe_warn("%s: cannot remove what a failed export left: %s", e->temporary, strerror(errno));
  moe_tokenizer_close(t);
  return status;
}

moe_status moe_export_hf(const moe_export_options *options) {
  export e = {.options = options};
  MOE_TRY(moe_weights_open_checkpoint(options->checkpoint, &e.original));
  moe_status status = make(&e);
  if (status == MOE_OK) moe_info("%s: done", options->out);
  moe_weights_close(e.original);
  for (int i = 0; i < e.files && e.writer; i++) moe_safetensors_abandon(&e.writer[i]);
  free(e.writer);
  free(e.tensor);
  free(e.order);
  free(e.file);
  return status;
}
