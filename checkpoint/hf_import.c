/* Importing from Hugging Face's layout: a checkpoint at a step of one's choice, weights alone.
 *
 * The pieces of the checkpoint are fetched from the folder as they are written, so no model is ever
 * in memory. Values survive bit for bit: where the run computes in another type than the file has,
 * the file's values become its masters. */
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint/commit.h"
#include "checkpoint/files.h"
#include "checkpoint/hf.h"
#include "checkpoint/hf_config.h"
#include "core/base/log.h"
#include "data/progress.h"
#include "data/tokenizer.h"

enum { PART = 1 << 14, TOKENIZER_LIMIT = 1 << 30 };

typedef struct {
  const moe_import_options *options;
  moe_weights *source;
  moe_config *config; /* of the new run */
  moe_piece *pieces;
  int count;
  moe_progress progress;
  int64_t total; /* bytes */
} import;

/* ---- weights as pieces -------------------------------------------------------------------------
 */

static moe_status fetch(void *context, const moe_piece *piece, int64_t at, int64_t n, void *out) {
  import *m = context;
  float values[PART];
  const moe_param *p = moe_params_find(&m->source->params, piece->name);
  int64_t size = moe_dtype_size(piece->dtype);
  for (int64_t done = 0; done < n; done += PART) {
    int64_t part = n - done < PART ? n - done : PART;
    if (m->options->stop && *m->options->stop)
      return moe_fail(MOE_STOPPED, "stopped on request: nothing was kept");
    char *to = (char *)out + done * size;
    MOE_TRY(moe_weights_read(m->source, p, piece->begin + at + done, part, values));
    moe_convert(values, MOE_F32, to, piece->dtype, part);
    if (!moe_all_finite(to, piece->dtype, part))
      return moe_fail(MOE_USAGE,
                      "%s: %s has a value that is not finite in %s: it cannot be trained",
                      m->source->name, p->name, moe_dtype_name(piece->dtype));
    moe_progress_add(&m->progress, part * size, m->total);
  }
  return MOE_OK;
}

static void add_piece(import *m, const moe_param *p, moe_role role, moe_dtype dtype) {
  moe_piece *piece = &m->pieces[m->count++];
  *piece = (moe_piece){.role = role, .dtype = dtype, .dims = p->dims, .count = p->count};
  snprintf(piece->name, sizeof piece->name, "%s", p->name);
  memcpy(piece->shape, p->shape, sizeof piece->shape);
  piece->fetch = fetch;
  piece->context = m;
  piece->any_thread = true;
  m->total += p->count * moe_dtype_size(dtype);
}

static moe_status list_pieces(import *m) {
  const moe_params *params = &m->source->params;
  m->pieces = calloc((size_t)params->count * 2, sizeof *m->pieces);
  if (!m->pieces) return moe_fail(MOE_NO_MEMORY, "no memory to import %d tensors", params->count);
  for (int i = 0; i < params->count; i++) {
    const moe_param *p = &params->list[i];
    moe_dtype dtype = moe_pool_dtype(p->row->pool, moe_config_compute_dtype(m->config));
    add_piece(m, p, MOE_ROLE_PARAM, dtype);
    if (dtype != MOE_F32 && dtype != moe_weights_dtype(m->source, p))
      add_piece(m, p, MOE_ROLE_MASTER, MOE_F32);
  }
  return MOE_OK;
}

/* ---- the run around them -----------------------------------------------------------------------
 */

/* The folder's SentencePiece model, if it has one, comes along and is named in the configuration.
 */
static moe_status bring_tokenizer(import *m) {
  char from[MOE_PATH + 32], to[MOE_PATH + 32], real[PATH_MAX], *bytes;
  int64_t size;
  moe_tokenizer *t;
  snprintf(from, sizeof from, "%s/tokenizer.model", m->options->folder);
  snprintf(to, sizeof to, "%s/tokenizer.model", m->options->run_dir);
  if (!realpath(from, real)) {
    moe_info("%s has no tokenizer.model: name the run's tokenizer in data.tokenizer",
             m->options->folder);
    return MOE_OK;
  }
  MOE_TRY(moe_files_read(real, TOKENIZER_LIMIT, &bytes, &size));
  moe_status status = moe_tokenizer_parse(bytes, size, from, &t);
  if (status == MOE_OK) moe_tokenizer_close(t);
  if (status == MOE_OK && access(to, F_OK) != 0) status = moe_files_write_new(to, bytes, size);
  free(bytes);
  if (status == MOE_OK && strlen(to) < sizeof m->config->data.tokenizer)
    snprintf(m->config->data.tokenizer, sizeof m->config->data.tokenizer, "%.*s",
             MOE_CONFIG_TEXT - 1, to);
  return status;
}

static moe_status make_config(import *m) {
  const moe_weights *w = m->source;
  moe_hf_config h = {.dims = w->dims, .norm_eps = w->norm_eps, .theta = w->rope_base};
  h.context = w->context;
  h.init_std = w->init_std;
  h.aux_coef = w->aux_coef;
  h.dtype = m->options->dtype == MOE_EXPORT_RUN_DTYPE
                ? moe_weights_dtype(w, moe_params_find(&w->params, "model.embed_tokens.weight"))
                : (moe_dtype)m->options->dtype;
  m->config = malloc(sizeof *m->config);
  if (!m->config) return moe_fail(MOE_NO_MEMORY, "no memory for a configuration");
  moe_config_defaults(m->config);
  snprintf(m->config->run.dir, sizeof m->config->run.dir, "%.*s", MOE_CONFIG_TEXT - 1,
           m->options->run_dir);
  MOE_TRY(moe_hf_config_apply(&h, w->name, m->config));
  m->config->train.global_batch = 0; /* not this one rank's, but what the run's ranks make it */
  return MOE_OK;
}

static void print_config(FILE *out, const void *context) {
  moe_config_print(context, out);
}

/* To start from; a run that has its own keeps it. */
static moe_status write_config(const import *m) {
  char path[MOE_PATH + 32];
  snprintf(path, sizeof path, "%s/config.ini", m->options->run_dir);
  return access(path, F_OK) == 0 ? MOE_OK : moe_files_print_new(path, print_config, m->config);
}

static moe_status save(import *m, moe_comm *world, moe_device *dev) {
  moe_run_state state = {.step = m->options->step, .seed = (uint64_t)m->config->train.seed};
  state.loss_scale =
      m->config->precision.dtype == MOE_PRECISION_FP16 ? m->config->precision.loss_scale : 1.0;
  state.config = moe_config_text(m->config);
  if (!state.config) return moe_fail(MOE_NO_MEMORY, "no memory for a configuration");
  moe_progress_start(&m->progress, "importing");
  int64_t bytes = 0;
  double seconds = 0.0;
  moe_status status = moe_checkpoint_save(world, dev, m->options->run_dir, &state, m->pieces,
                                          m->count, 2, &bytes, &seconds);
  moe_progress_end(&m->progress);
  free(state.config);
  char size[MOE_TEXT], time[MOE_TEXT];
  if (status == MOE_OK)
    moe_info("imported: %s, %s in %s (%.2f GB/s, written and verified)",
             moe_dtype_name(moe_config_compute_dtype(m->config)),
             moe_text_bytes(size, (double)bytes), moe_text_seconds(time, seconds),
             1e-9 * (double)bytes / (seconds + 1e-9));
  return status;
}

static moe_status prove(const import *m, const char *step_folder) {
  moe_weights *written;
  moe_proof_report report;
  MOE_TRY(moe_weights_open_checkpoint(step_folder, &written));
  const moe_proof_options proof = {
      .original = m->source, .expected = m->source, .written = written, .stop = m->options->stop};
  moe_status status = moe_proof(&proof, &report);
  if (status == MOE_OK) moe_proof_print(&report);
  moe_weights_close(written);
  return status;
}

static moe_status write_run(import *m, moe_comm *world, moe_device *dev) {
  char folder[MOE_PATH], place[MOE_PATH];
  MOE_TRY(bring_tokenizer(m));
  MOE_TRY(save(m, world, dev));
  MOE_TRY(moe_commit_folder(m->options->run_dir, folder));
  moe_status status = prove(m, moe_commit_place(folder, m->options->step, place));
  if (status == MOE_OK) status = write_config(m);
  if (status != MOE_OK) { /* what is no proven copy must not be resumed from */
    char latest[MOE_PATH + 16];
    snprintf(latest, sizeof latest, "%s/latest", folder);
    unlink(latest);
    moe_files_remove_folder(place);
    return status;
  }
  moe_info("%s: the optimizer starts afresh: moe-train %s/config.ini --set data.train=... "
           "--resume %s",
           place, m->options->run_dir, place);
  return MOE_OK;
}

static moe_status lock_and_write(import *m, moe_comm *world) {
  moe_device_options options = {.kind = MOE_DEVICE_CPU};
  moe_device *dev = NULL;
  moe_run_lock *lock = NULL;
  moe_status status;
  MOE_TRY_OR(status, done, moe_device_open(&options, &dev));
  MOE_TRY_OR(status, done, moe_run_lock_take(world, m->options->run_dir, &lock));
  status = write_run(m, world, dev);
done:
  moe_run_lock_release(lock);
  moe_device_close(dev);
  return status;
}

moe_status moe_import_hf(moe_comm *world, const moe_import_options *options) {
import m = {.options = options };
  if (moe_comm_size(world) != 1)
    return moe_fail(MOE_USAGE, "import runs on one rank, not on %d: start it without mpirun",
                    moe_comm_size(world));
  moe_status status;
  MOE_TRY_OR(status, done, moe_commit_check_new(options->run_dir));
  MOE_TRY_OR(status, done, moe_weights_open_hf(options->folder, &m.source));
  MOE_TRY_OR(status, done, make_config(&m));
  MOE_TRY_OR(status, done, list_pieces(&m));
  status = lock_and_write(&m, world);
done:
  moe_weights_close(m.source);
  free(m.config);
  free(m.pieces);
  return status;
}
