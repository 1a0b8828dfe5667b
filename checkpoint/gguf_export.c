/* Exporting to GGUF: describe everything, stream the tensors, read the file back and prove it.
 *
 * The file's tensors are those of the parameter table, row by row and layer by layer; the experts
 * of a layer are one tensor, written one after the other. */
#include "checkpoint/gguf_export.h"

#include <errno.h>
#include <inttypes.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint/export.h"
#include "checkpoint/files.h"
#include "checkpoint/run_tokenizer.h"
#include "core/base/log.h"

#define KEY(name) "llama." name

typedef struct {
  const moe_gguf_options *options;
  moe_weights *original; /* with the export's alpha */
  moe_ggml_type type;
  int64_t context;
  int64_t not_whole; /* matrices whose rows are not whole blocks of `type` */
  moe_gguf_writer *writer;
  char temporary[MOE_PATH + 32];
  moe_export_tensor *tensor; /* [tensors] so far, in the order of the file */
  int64_t tensors;
} export;

/* ---- keys */

/* llama.cpp's numbers for what most of a file is: LLAMA_FTYPE. */
static uint32_t file_type(moe_ggml_type type) {
  switch (type) {
  case MOE_GGML_F16:
    return 1;
  case MOE_GGML_Q8_0:
    return 7;
  case MOE_GGML_BF16:
    return 32;
  default:
    return 0;
  }
}

/* The run's folder, RUN/checkpoints/step-N, names the model. */
static void put_name(export *e) {
  char path[MOE_PATH] = "", *folder = NULL;
  if (e->options->name) {
    moe_gguf_put_string(e->writer, "general.name", e->options->name);
    return;
  }
  folder = realpath(e->options->common.checkpoint, NULL);
  snprintf(path, sizeof path, "%s", folder ? folder : "");
  free(folder);
  for (int up = 0; up < 2; up++) {
    char *slash = strrchr(path, '/');
    if (slash) *slash = 0;
  }
  moe_gguf_put_string(e->writer, "general.name", path[0] ? basename(path) : "moe-train");
}

static void put_model(export *e) {
  const moe_dims *d = &e->original->dims;
  moe_gguf_writer *w = e->writer;
  const struct {
    const char *key;
    int64_t value;
  } sizes[] = {
      {KEY("vocab_size"), d->vocab},
      {KEY("context_length"), e->context},
      {KEY("embedding_length"), d->hidden},
      {KEY("block_count"), d->layers},
      {KEY("feed_forward_length"), d->ffn},
      {KEY("attention.head_count"), d->heads},
      {KEY("attention.head_count_kv"), d->kv_heads},
      {KEY("attention.key_length"), d->head_dim},
      {KEY("attention.value_length"), d->head_dim},
      {KEY("rope.dimension_count"), d->head_dim},
      {KEY("expert_count"), d->experts},
      {KEY("expert_used_count"), d->top_k},
  };
  moe_gguf_put_string(w, "general.architecture", "llama");
  moe_gguf_put_string(w, "general.type", "model");
  put_name(e);
  moe_gguf_put_u32(w, "general.alignment", MOE_GGUF_ALIGNMENT);
  moe_gguf_put_u32(w, "general.quantization_version", 2);
  moe_gguf_put_u32(w, "general.file_type", file_type(e->type));
  for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
    moe_gguf_put_u32(w, sizes[i].key, (uint32_t)sizes[i].value);
  moe_gguf_put_f32(w, KEY("rope.freq_base"), (float)moe_weights_theta(e->original));
  moe_gguf_put_f32(w, KEY("attention.layer_norm_rms_epsilon"), (float)e->original->norm_eps);
}

static moe_status put_tokenizer(export *e) {
  char name[MOE_PATH];
  moe_tokenizer *t = NULL;
  MOE_TRY(moe_run_tokenizer(e->options->common.checkpoint, e->original->config,
                            e->options->common.tokenizer, name));
  if (name[0] && e->options->vocab != MOE_GGUF_VOCAB_NONE) MOE_TRY(moe_tokenizer_open(name, &t));
  if (!t) moe_info("the file gets no tokenizer: it takes and gives token ids");
  moe_status status = moe_gguf_put_vocab(e->writer, t, e->original->dims.vocab, e->options->vocab);
  moe_tokenizer_close(t);
  return status;
}

/* ---- tensors */

/* Call `each` for the parameters in the order of the file. */
static moe_status walk(export *e, moe_status (*each)(export *e, const moe_param *p)) {
  const moe_dims *d = &e->original->dims;
  const moe_params *params = &e->original->params;
  for (const moe_param_row *row = moe_param_table(); row->name; row++) {
    bool per_layer = strstr(row->name, "{L}") != NULL,
         per_expert = strstr(row->name, "{E}") != NULL;
    for (int64_t l = per_layer ? 0 : -1; l < (per_layer ? d->layers : 0); l++)
      for (int64_t x = per_expert ? 0 : -1; x < (per_expert ? d->experts : 0); x++)
        MOE_TRY(each(e, moe_params_at(params, row->name, l, x)));
  }
  return MOE_OK;
}

/* Describe it, and say where it goes; experts follow the first of their layer. */
static moe_status put_tensor(export *e, const moe_param *p) {
  char name[MOE_GGUF_TENSOR_NAME];
  moe_ggml_type type = moe_gguf_param_type(p, e->type);
  moe_export_tensor *t = &e->tensor[e->tensors++];
  bool rotary = moe_gguf_rotary_heads(p, &e->original->dims) > 0;
  *t = (moe_export_tensor){.param = p, .file = e->writer};
  t->rows = rotary ? e->original->dims.head_dim : moe_export_rows(p); /* rows change in a head */
  t->row_bytes = moe_ggml_bytes(type, p->shape[p->dims - 1]);
  if (p->expert > 0) {
    t->offset = t[-1].offset + moe_ggml_bytes(type, p->count);
    return MOE_OK;
  }
  const int64_t ne[3] = {p->shape[p->dims - 1], p->shape[0], e->original->dims.experts};
  t->offset = moe_gguf_put_tensor(e->writer, moe_gguf_param_name(p, name), type,
                                  p->expert == 0 ? 3 : p->dims, ne);
  bool matrix = p->row->pool != MOE_POOL_GAIN && p->row->pool != MOE_POOL_ROUTER;
  if (matrix && type != e->type) e->not_whole++;
  return MOE_OK;
}

static moe_status put_tensors(export *e) {
  e->tensor = calloc((size_t)e->original->params.count, sizeof *e->tensor);
  if (!e->tensor) return moe_fail(MOE_NO_MEMORY, "no memory for the list of tensors");
  return walk(e, put_tensor);
}

/* Where our row j of a head of `rows` is in the file: pair (j, j + d/2) lies at (2j, 2j + 1). */
static int64_t exchanged(int64_t j, int64_t rows) {
  return j < rows / 2 ? 2 * j : 2 * (j - rows / 2) + 1;
}

/* Of what was encoded. (Q8_0's scales are too small to overflow unless a value did.) */
static moe_status check_finite(const export *e, const moe_param *p, moe_ggml_type type, int64_t n,
                               const float *values, const void *raw) {
  moe_dtype dtype = type == MOE_GGML_BF16 ? MOE_BF16 : type == MOE_GGML_F16 ? MOE_F16 : MOE_F32;
  if (moe_all_finite(type == MOE_GGML_Q8_0 ? values : raw, dtype, n)) return MOE_OK;
  return moe_export_not_finite(e->original, p, moe_ggml_name(type));
}

static moe_status encode(const void *context, const moe_param *p, const float *values, int64_t rows,
                         void *out) {
  const export *e = context;
  moe_ggml_type type = moe_gguf_param_type(p, e->type);
  int64_t columns = p->shape[p->dims - 1], bytes = moe_ggml_bytes(type, columns);
  if (moe_gguf_rotary_heads(p, &e->original->dims) == 0)
    moe_ggml_encode(type, values, rows * columns, out);
  else
    for (int64_t j = 0; j < rows; j++)
      moe_ggml_encode(type, values + j * columns, columns,
                      (char *)out + exchanged(j, rows) * bytes);
  return check_finite(e, p, type, rows * columns, values, out);
}

static moe_status put(void *file, int64_t at, int64_t bytes, const void *data) {
  return moe_gguf_writer_write(file, at, bytes, data);
}

static moe_status finish_file(void *context) {
  return moe_gguf_writer_finish(((export *)context)->writer);
}

/* ---- the file */

static moe_status write_file(export *e) {
  char bytes[MOE_TEXT], time[MOE_TEXT];
  int64_t written;
  double seconds;
  MOE_TRY(moe_gguf_writer_create(&e->writer));
  put_model(e);
  MOE_TRY(put_tokenizer(e));
  MOE_TRY(put_tensors(e));
  if (e->not_whole > 0)
    moe_info("%" PRId64 " matrices are kept as F16: their rows are not whole blocks of %s",
             e->not_whole, moe_ggml_name(e->type));
  MOE_TRY(moe_gguf_writer_open(e->writer, e->temporary));
  const moe_export_work work = {.from = e->original,
                                .tensor = e->tensor,
                                .tensors = e->tensors,
                                .encode = encode,
                                .write = put,
                                .finish = finish_file,
                                .context = e,
                                .stop = e->options->common.stop};
  MOE_TRY(moe_export_write(&work, &written, &seconds));
  moe_info("written: %s, %s in %s (%.2f GB/s)", moe_ggml_name(e->type),
           moe_text_bytes(bytes, (double)written), moe_text_seconds(time, seconds),
           1e-9 * (double)written / (seconds + 1e-9));
  return MOE_OK;
}

static moe_status prove(export *e) {
  moe_weights *expected = NULL, *written = NULL;
  moe_proof_report report;
  moe_status status = moe_weights_as_stored(e->original, e->type, &expected);
  if (status == MOE_OK) status = moe_weights_open_gguf(e->temporary, &written);
  const moe_proof_options proof = {.original = e->original,
                                   .expected = expected,
                                   .written = written,
                                   .rounding_tolerance =
                                       e->type == MOE_GGML_Q8_0 ? MOE_GGUF_Q8_0_TOLERANCE : 0.0,
                                   .stop = e->options->common.stop};
  if (status == MOE_OK) status = moe_proof(&proof, &report);
  if (status == MOE_OK) moe_proof_print(&report);
  moe_weights_close(written);
  moe_weights_close(expected);
  return status;
}

static moe_status put_in_place(const export *e) {
  const char *out = e->options->common.out;
  char folder[MOE_PATH];
  if (rename(e->temporary, out) != 0)
    return moe_fail(MOE_IO, "%s: cannot rename to it: %s", out, strerror(errno));
  snprintf(folder, sizeof folder, "%s", out);
  return moe_files_sync_folder(dirname(folder));
}

/* ---- before anything is written */

static moe_status check_output(export *e) {
  const char *out = e->options->common.out;
  struct stat st;
  if (snprintf(e->temporary, sizeof e->temporary, "%s.tmp-%ld", out, (long)getpid()) >= MOE_PATH)
    return moe_fail(MOE_USAGE, "%.60s...: the path is too long", out);
  if (lstat(out, &st) != 0) return MOE_OK;
  if (!S_ISREG(st.st_mode))
    return moe_fail(MOE_USAGE, "%s: is in the way: a file is to be made there", out);
  if (e->options->common.overwrite) return MOE_OK;
  return moe_fail(MOE_USAGE, "output exists: %s: choose another --output, or --overwrite", out);
}

/* The file's type for matrices: the one asked for, else the run's compute type. */
static moe_ggml_type matrix_type(const export *e) {
  if (e->options->type != MOE_GGUF_RUN_TYPE) return (moe_ggml_type)e->options->type;
  moe_dtype dtype = moe_export_dtype(&e->options->common, e->original);
  return dtype == MOE_BF16 ? MOE_GGML_BF16 : dtype == MOE_F16 ? MOE_GGML_F16 : MOE_GGML_F32;
}

moe_status moe_export_gguf(const moe_gguf_options *options) {
  export e = {.options = options};
  MOE_TRY(check_output(&e));
  MOE_TRY(moe_weights_open_checkpoint(options->common.checkpoint, &e.original));
  moe_status status = moe_export_settle(&options->common, e.original, &e.context);
  e.type = matrix_type(&e);
  if (status == MOE_OK) status = write_file(&e);
  if (status == MOE_OK) status = prove(&e);
  if (status == MOE_OK) status = put_in_place(&e);
  if (status == MOE_OK) moe_info("%s: done", options->common.out);
  bool made = e.writer != NULL; /* a file of that name before it was not ours */
  if (status != MOE_OK && made) unlink(e.temporary);
  moe_gguf_writer_destroy(e.writer);
  moe_weights_close(e.original);
  free(e.tensor);
  return status;
}
