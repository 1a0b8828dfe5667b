/* Text to a SentencePiece model. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/log.h"
#include "data/progress.h"
#include "data/tokenize.h"
#include "data/utf8.h"

/* Lines out of pieces. */
typedef struct {
  moe_text_input *input;
  const char *rest; /* of the current piece */
  int64_t left;
  int64_t sentences;
  bool reading_done;
  moe_progress progress;
} feeder;

static void say_reading_done(feeder *f) {
  if (f->reading_done) return;
  f->reading_done = true;
  moe_progress_end(&f->progress);
  char bytes[MOE_TEXT], count[MOE_TEXT];
  moe_info("read %s, %s sentences; learning pieces (minutes for large vocabularies)",
           moe_text_bytes(bytes, (double)moe_text_progress(f->input).bytes),
           moe_text_count(count, (double)f->sentences));
}

/* The next line that is not empty; one longer than the trainer takes comes in parts, for it would
 * leave the whole line out. */
static moe_status next_sentence(void *context, const char **text, int64_t *length, bool *end) {
  feeder *f = context;
  for (*end = false;;) {
    while (f->left > 0 && *f->rest == '\n') f->rest++, f->left--;
    if (f->left > 0) break;
    moe_text_piece piece;
    MOE_TRY(moe_text_next(f->input, &piece, end));
    if (*end) {
      say_reading_done(f);
      return MOE_OK;
    }
    f->rest = piece.text;
    f->left = piece.length;
  }
  const char *newline = memchr(f->rest, '\n', (size_t)f->left);
  int64_t line = newline ? newline - f->rest : f->left;
  *text = f->rest;
  *length = moe_utf8_cut(f->rest, line, MOE_TOKENIZER_SENTENCE_BYTES);
  f->rest += *length;
  f->left -= *length;
  f->sentences++;
  moe_text_counts counts = moe_text_progress(f->input);
  moe_progress_show(&f->progress, counts.bytes, counts.total, "");
  return MOE_OK;
}

/* Complete or absent, like every file we write. */
static moe_status write_model(const char *prefix, const char *model, int64_t size) {
  char *path = NULL, *temporary = NULL;
  FILE *file = NULL;
  if (asprintf(&path, "%s.model", prefix) < 0 ||
      asprintf(&temporary, "%s.model.tmp-%ld", prefix, (long)getpid()) < 0)
    return moe_fail(MOE_NO_MEMORY, "out of memory: writing %s.model", prefix);
  bool written = (file = fopen(temporary, "wbe")) != NULL &&
                 fwrite(model, 1, (size_t)size, file) == (size_t)size && fflush(file) == 0 &&
                 fsync(fileno(file)) == 0;
  int error = errno;
  if (file) written = fclose(file) == 0 && written;
  written = written && rename(temporary, path) == 0;
  moe_status status = MOE_OK;
  if (!written) {
    status = moe_fail(MOE_IO, "cannot write: %s: %s", path, strerror(error ? error : errno));
    unlink(temporary);
  }
  free(path);
  free(temporary);
  return status;
}

/* The tokenizer we promise: the model loads and has our special tokens. */
static moe_status check_model(const char *model, int64_t size, int64_t *vocab_size) {
  moe_tokenizer *t;
  MOE_TRY(moe_tokenizer_parse(model, size, "the trained model", &t));
  *vocab_size = moe_tokenizer_vocab_size(t);
  bool ours = true;
  for (int which = MOE_TOKEN_PAD; which <= MOE_TOKEN_EOS; which++)
    ours = ours && moe_tokenizer_special(t, which) == which;
  moe_tokenizer_close(t);
  return ours ? MOE_OK
              : moe_fail(MOE_FAILED, "the trained model lacks <pad> <unk> <bos> <eos> = 0..3");
}

moe_status moe_train_tokenizer(const moe_train_tokenizer_options *options) {
  feeder f = {0};
  char *model = NULL;
  int64_t size = 0, vocab_size = 0;
  moe_status status;
  MOE_TRY(moe_text_open(options->inputs, options->input_count, &options->text, &f.input));
  moe_progress_start(&f.progress, "reading");
  double started_s = moe_clock_s();
  MOE_TRY_OR(status, done,
             moe_tokenizer_train(&options->training, next_sentence, &f, &model, &size));
  MOE_TRY_OR(status, done, check_model(model, size, &vocab_size));
  MOE_TRY_OR(status, done, write_model(options->output, model, size));
  char time[MOE_TEXT];
  moe_info("%s.model: %s, %" PRId64 " pieces, in %s", options->output, options->training.model_type,
           vocab_size, moe_text_seconds(time, moe_clock_s() - started_s));
done:
  free(model);
  moe_text_close(f.input);
  return status;
}
