/* Text to token files: this process reads and writes, worker processes encode. */
#include "data/tokenize.h"

#include <inttypes.h>
#include <stdlib.h>

#include "core/base/log.h"
#include "data/encode_pool.h"
#include "data/progress.h"
#include "data/token_file.h"

enum { BATCH_BYTES = 1 << 20 };

typedef struct {
  const moe_tokenize_options *options;
  moe_tokenizer *tokenizer;
  moe_text_input *input;
  moe_encode_pool *pool;
  moe_token_writer *writer;
  moe_text_batch *batch; /* [workers] what each worker has */
  bool inside_document;  /* the writer has a part of one */
  int32_t bos, eos;      /* -1: not wanted */
  moe_progress progress;
} job;

/* ---- one batch ---- */

/* Read until the batch is full; *end when the input is over. */
static moe_status gather(job *j, moe_text_batch *b, bool *end) {
  moe_text_batch_reset(b);
  for (*end = false; b->bytes < BATCH_BYTES;) {
    moe_text_piece piece;
    MOE_TRY(moe_text_next(j->input, &piece, end));
    if (*end) break;
    if (b->pieces == 0) {
      b->file = piece.file;
      b->offset = piece.offset;
    }
    MOE_TRY(moe_text_batch_add(b, piece.text, piece.length, piece.ends_document));
  }
  b->position = moe_text_progress(j->input).bytes;
  return MOE_OK;
}

static moe_status write_piece(job *j, const int32_t *ids, int64_t count, bool ends_document) {
  if (!j->inside_document && j->bos >= 0) MOE_TRY(moe_token_writer_append(j->writer, &j->bos, 1));
  MOE_TRY(moe_token_writer_append(j->writer, ids, count));
  j->inside_document = !ends_document;
  if (!ends_document) return MOE_OK;
  if (j->eos >= 0) MOE_TRY(moe_token_writer_append(j->writer, &j->eos, 1));
  return moe_token_writer_end_document(j->writer);
}

static moe_status write_batch(job *j, const moe_text_batch *b) {
  const int32_t *ids = b->ids.ids;
  for (int64_t i = 0; i < b->pieces; i++) {
    MOE_TRY(write_piece(j, ids, b->length[i], b->ends_document[i]));
    ids += b->length[i];
  }
  char count[MOE_TEXT], more[2 * MOE_TEXT];
  snprintf(more, sizeof more, "%s tokens",
           moe_text_count(count, (double)moe_token_writer_tokens(j->writer)));
  moe_progress_show(&j->progress, b->position, moe_text_progress(j->input).total, more);
  return MOE_OK;
}

/* Batch k is worker k % n's; its answer is read just before the worker's next turn. */
static moe_status encode_all(job *j) {
  const int n = moe_encode_pool_workers(j->pool);
  int64_t sent = 0, written = 0;
  for (bool end = false; !end || written < sent;) {
    int w = (int)((end ? written : sent) % n);
    if (end || sent - written == n) {
      MOE_TRY(moe_encode_pool_receive(j->pool, w, &j->batch[w]));
      MOE_TRY(write_batch(j, &j->batch[w]));
      written++;
    }
    if (end) continue;
    MOE_TRY(gather(j, &j->batch[w], &end));
    if (j->batch[w].pieces == 0) continue;
    MOE_TRY(moe_encode_pool_send(j->pool, w, &j->batch[w]));
    sent++;
  }
  return MOE_OK;
}

/* ---- the whole ---- */

static moe_status special(const job *j, bool wanted, int which, const char *name, int32_t *id) {
  *id = wanted ? moe_tokenizer_special(j->tokenizer, which) : -1;
  if (!wanted || *id >= 0) return MOE_OK;
  return moe_fail(MOE_USAGE, "the tokenizer has no <%s>: %s: use --%s", name, j->options->tokenizer,
                  which == MOE_TOKEN_EOS ? "no-append-eos" : "no-prepend-bos");
}

static moe_status set_up(job *j) {
  const moe_tokenize_options *o = j->options;
  MOE_TRY(moe_tokenizer_open(o->tokenizer, &j->tokenizer));
  MOE_TRY(special(j, o->prepend_bos, MOE_TOKEN_BOS, "bos", &j->bos));
  MOE_TRY(special(j, o->append_eos, MOE_TOKEN_EOS, "eos", &j->eos));
  MOE_TRY(moe_text_open(o->inputs, o->input_count, &o->text, &j->input));
  j->batch = calloc((size_t)o->workers, sizeof *j->batch);
  if (!j->batch) return moe_fail(MOE_NO_MEMORY, "out of memory: %d batches", o->workers);
  MOE_TRY(moe_encode_pool_create(j->tokenizer, o->workers, &j->pool));
  return moe_token_writer_create(o->output, moe_tokenizer_vocab_size(j->tokenizer), &j->writer);
}

static void say_result(const job *j, double elapsed_s) {
  moe_text_counts counts = moe_text_progress(j->input);
  int64_t tokens = moe_token_writer_tokens(j->writer);
  int64_t documents = moe_token_writer_documents(j->writer);
  char size[MOE_TEXT], time[MOE_TEXT];
  if (counts.skipped > 0)
    moe_warn("left out %" PRId64 " invalid lines (--skip-invalid)", counts.skipped);
  if (counts.empty > 0) moe_warn("left out %" PRId64 " records without text", counts.empty);
  moe_info("%s.bin, .idx: %" PRId64 " documents, %" PRId64 " tokens (%s, vocabulary %" PRId64
           ") from %s of text, %.2f bytes/token, in %s (%.1f MB/s, %d workers)",
           j->options->output, documents, tokens,
           moe_token_type_name(moe_token_type_for(moe_tokenizer_vocab_size(j->tokenizer))),
           moe_tokenizer_vocab_size(j->tokenizer), moe_text_bytes(size, (double)counts.bytes),
           (double)counts.bytes / (double)tokens, moe_text_seconds(time, elapsed_s),
           (double)counts.bytes / 1e6 / (elapsed_s > 1e-9 ? elapsed_s : 1e-9), j->options->workers);
}

static moe_status run(job *j) {
  MOE_TRY(set_up(j));
  moe_progress_start(&j->progress, "tokenize");
  moe_status status = encode_all(j);
  double elapsed_s = moe_progress_end(&j->progress);
  MOE_TRY(status);
  if (moe_token_writer_tokens(j->writer) == 0)
    return moe_fail(MOE_USAGE, "no text in the input: %s%s: nothing was written",
                    j->options->inputs[0], j->options->input_count > 1 ? ", ..." : "");
  MOE_TRY(moe_token_writer_finish(j->writer));
  say_result(j, elapsed_s);
  return MOE_OK;
}

moe_status moe_tokenize(const moe_tokenize_options *options) {
  job j = {.options = options};
  moe_status status = run(&j);
  moe_token_writer_destroy(j.writer);
  moe_encode_pool_destroy(j.pool);
  for (int w = 0; j.batch && w < options->workers; w++) moe_text_batch_free(&j.batch[w]);
  free(j.batch);
  moe_text_close(j.input);
  moe_tokenizer_close(j.tokenizer);
  return status;
}
