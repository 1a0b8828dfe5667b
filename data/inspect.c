/* Looking at token files, and checking them to the last id. */
#include <inttypes.h>
#include <stdlib.h>

#include "core/base/log.h"
#include "data/progress.h"
#include "data/token_file.h"
#include "data/tokenize.h"

static void print_sizes(const moe_token_file *f, FILE *out) {
  char bytes[MOE_TEXT], count[MOE_TEXT];
  int64_t tokens = moe_token_file_tokens(f), documents = moe_token_file_documents(f);
  fprintf(out, "file         %s.bin, .idx\n", moe_token_file_prefix(f));
  fprintf(out, "size         %s\n", moe_text_bytes(bytes, (double)moe_token_file_bytes(f)));
  fprintf(out, "token type   %s\n", moe_token_type_name(moe_token_file_type(f)));
  fprintf(out, "tokens       %" PRId64 " (%s)\n", tokens, moe_text_count(count, (double)tokens));
  fprintf(out, "documents    %" PRId64 "\n", documents);
  fprintf(out, "sequences    %" PRId64 "\n", moe_token_file_sequences(f));
  fprintf(out, "fingerprint  %016" PRIx64 "\n", moe_token_file_fingerprint(f));
  if (documents == 0) return;
  int64_t least = INT64_MAX, most = 0;
  for (int64_t d = 0; d < documents; d++) {
    int64_t length = moe_token_file_document_begin(f, d + 1) - moe_token_file_document_begin(f, d);
    if (length < least) least = length;
    if (length > most) most = length;
  }
  fprintf(out, "document     mean %.1f tokens, least %" PRId64 ", most %" PRId64 "\n",
          (double)tokens / (double)documents, least, most);
}

static moe_status print_beginning(const moe_token_file *f, const char *tokenizer, FILE *out) {
  enum { SHOWN = 256 };
  int32_t ids[SHOWN];
  moe_tokenizer *t = NULL;
  char *text = NULL;
  moe_status status;
  int64_t end = moe_token_file_documents(f) > 0 ? moe_token_file_document_begin(f, 1) : 0;
  int64_t count = end < SHOWN ? end : SHOWN;
  MOE_TRY(moe_tokenizer_open(tokenizer, &t));
  MOE_TRY_OR(status, done, moe_token_file_read(f, 0, count, moe_tokenizer_vocab_size(t), ids));
  MOE_TRY_OR(status, done, moe_tokenizer_decode(t, ids, count, &text, NULL));
  fprintf(out, "beginning    %" PRId64 " of %" PRId64 " tokens of the first document:\n", count,
          end);
  for (int64_t i = 0; i < count && i < 16; i++) fprintf(out, "%s%d", i ? " " : "", ids[i]);
  fprintf(out, "%s\n%s\n", count > 16 ? " ..." : "", text);
done:
  free(text);
  moe_tokenizer_close(t);
  return status;
}

moe_status moe_inspect_tokens(const char *prefix, const char *tokenizer, FILE *out) {
  moe_token_file *f;
  MOE_TRY(moe_token_file_open(prefix, &f));
  print_sizes(f, out);
  moe_status status = tokenizer ? print_beginning(f, tokenizer, out) : MOE_OK;
  moe_token_file_close(f);
  return status;
}

static moe_status check_ids(const moe_token_file *f, int64_t vocab_size,
                            const volatile sig_atomic_t *stop) {
  enum { CHUNK = 1 << 16 };
  static int32_t ids[CHUNK];
  const int64_t tokens = moe_token_file_tokens(f),
                size = moe_token_type_size(moe_token_file_type(f));
  moe_progress progress;
  moe_progress_start(&progress, "verify");
  moe_status status = MOE_OK;
  for (int64_t at = 0; at < tokens && status == MOE_OK; at += CHUNK) {
    int64_t n = tokens - at < CHUNK ? tokens - at : CHUNK;
    status = moe_token_file_read(f, at, n, vocab_size, ids);
    if (stop && *stop) status = moe_fail(MOE_FAILED, "interrupted");
    moe_progress_show(&progress, (at + n) * size, tokens * size, "");
  }
  moe_progress_end(&progress);
  return status;
}

moe_status moe_verify_tokens(const char *prefix, int64_t vocab_size,
                             const volatile sig_atomic_t *stop) {
  moe_token_file *f;
  MOE_TRY(moe_token_file_open(prefix, &f));
  moe_status status = check_ids(f, vocab_size, stop);
  if (status == MOE_OK)
    moe_info("%s.bin, .idx: sound: %" PRId64 " documents, %" PRId64 " tokens below %" PRId64,
             moe_token_file_prefix(f), moe_token_file_documents(f), moe_token_file_tokens(f),
             vocab_size);
  moe_token_file_close(f);
  return status;
}
