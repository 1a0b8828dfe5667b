/* The work of moe-data: text -> token files, text -> tokenizer, and looking at token files. */
#ifndef MOE_DATA_TOKENIZE_H
#define MOE_DATA_TOKENIZE_H

#include <stdio.h>

#include "core/base/status.h"
#include "data/text_input.h"
#include "data/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const char *const *inputs;
  int input_count;
  moe_text_options text;
  const char *tokenizer; /* "bytes" or a model's path */
  const char *output;    /* prefix of .bin and .idx */
  int workers;
  bool append_eos, prepend_bos;
} moe_tokenize_options;

/* Encode every document of the inputs, in order, into a token file; says how far it is on stderr.
 * The output appears only when all is well. MOE_USAGE when the tokenizer lacks the asked special
 * tokens or there is no text at all. */
moe_status moe_tokenize(const moe_tokenize_options *options);

typedef struct {
  const char *const *inputs;
  int input_count;
  moe_text_options text;
  const char *output; /* prefix of .model */
  moe_tokenizer_training training;
} moe_train_tokenizer_options;

/* Train a SentencePiece model and write PREFIX.model (complete or not at all). */
moe_status moe_train_tokenizer(const moe_train_tokenizer_options *options);

/* Print a token file's sizes, and its first document's beginning when `tokenizer` is not NULL. */
moe_status moe_inspect_tokens(const char *prefix, const char *tokenizer, FILE *out);
/* Check the structure and every token id. MOE_DAMAGED names file and byte offset. */
moe_status moe_verify_tokens(const char *prefix, int64_t vocab_size,
                             const volatile sig_atomic_t *stop);

#ifdef __cplusplus
}
#endif
#endif
