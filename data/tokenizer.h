/* Tokenizers: SentencePiece models, or plain bytes.
 *
 * A tokenizer trained here has <pad> <unk> <bos> <eos> = 0..3 and keeps the text exactly: no
 * normalisation, no added space, bytes for characters it has not seen (but U+2581 comes back as the
 * space that SentencePiece writes with it). No piece holds a newline, so a text may be cut before
 * any newline and encoded in parts. `bytes` has the same four and then byte b = 4 + b: a vocabulary
 * of 260. */
#ifndef MOE_DATA_TOKENIZER_H
#define MOE_DATA_TOKENIZER_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_TOKEN_PAD = 0, MOE_TOKEN_UNK = 1, MOE_TOKEN_BOS = 2, MOE_TOKEN_EOS = 3 };
enum { MOE_BYTES_FIRST = 4, MOE_BYTES_VOCAB = 260 };

typedef struct moe_tokenizer moe_tokenizer;

/* Token ids that grow as they are appended. Zero-initialise; free(ids). */
typedef struct {
  int32_t *ids;
  int64_t count, room;
} moe_token_list;

moe_status moe_token_list_append(moe_token_list *list, const int32_t *ids, int64_t count);

/* `name`: "bytes" or the path of a SentencePiece .model. MOE_IO when it cannot be read, MOE_DAMAGED
 * when it is no model. Local. A tokenizer may be used by several threads. */
moe_status moe_tokenizer_open(const char *name, moe_tokenizer **out);
/* A SentencePiece model from memory; `name` stands for the file in messages. */
moe_status moe_tokenizer_parse(const void *model, int64_t size, const char *name,
                               moe_tokenizer **out);
void moe_tokenizer_close(moe_tokenizer *t);

int64_t moe_tokenizer_vocab_size(const moe_tokenizer *t);
/* The id of MOE_TOKEN_PAD .. MOE_TOKEN_EOS in this tokenizer, -1 when it has none. Models made
 * elsewhere may number them otherwise. */
int32_t moe_tokenizer_special(const moe_tokenizer *t, int which);

/* Append the ids of a UTF-8 text (bytes: any), without bos and eos. */
moe_status moe_tokenizer_encode(const moe_tokenizer *t, const char *text, int64_t length,
                                moe_token_list *out);
/* The text of ids; special tokens give none. The caller frees *text, which ends in a NUL that
 * *length (may be NULL) does not count. MOE_INVALID names an id outside the vocabulary. */
moe_status moe_tokenizer_decode(const moe_tokenizer *t, const int32_t *ids, int64_t count,
                                char **text, int64_t *length);
/* The piece of an id as SentencePiece writes it ("<eos>", "<0x0A>", "\u2581the"), NULL outside the
 * vocabulary; valid as long as the tokenizer. */
const char *moe_tokenizer_piece(const moe_tokenizer *t, int32_t id);
/* The id of a piece, -1 when there is none. */
int32_t moe_tokenizer_id(const moe_tokenizer *t, const char *piece);

/* ---- what a tokenizer is made of, for those who write it in other formats ---- */

typedef enum {
  MOE_TOKENIZER_BYTES,
  MOE_TOKENIZER_UNIGRAM,
  MOE_TOKENIZER_BPE,
  MOE_TOKENIZER_WORD,
  MOE_TOKENIZER_CHAR
} moe_tokenizer_type;

typedef struct {
  moe_tokenizer_type type;
  bool byte_fallback; /* characters without a piece become byte pieces */
  /* Text reaches the model as it is, but with U+2581 for spaces: no normalisation, no blanks
   * removed, no word-final spaces. */
  bool verbatim;
  bool dummy_prefix; /* a space is put before every text */
  int user_defined;  /* pieces that are matched before all others */
} moe_tokenizer_spec;

/* MOE_DAMAGED when the model file does not say. */
moe_status moe_tokenizer_describe(const moe_tokenizer *t, moe_tokenizer_spec *out);

typedef enum {
  MOE_PIECE_NORMAL, /* user-defined ones too */
  MOE_PIECE_UNKNOWN,
  MOE_PIECE_CONTROL, /* not found in texts: <bos> */
  MOE_PIECE_BYTE,    /* <0x0A> */
  MOE_PIECE_UNUSED
} moe_piece_kind;

/* Both need an id inside the vocabulary. Scores: log probability (unigram), minus the rank (bpe),
 * 0 (bytes). */
moe_piece_kind moe_tokenizer_piece_kind(const moe_tokenizer *t, int32_t id);
float moe_tokenizer_piece_score(const moe_tokenizer *t, int32_t id);

/* ---- training ---- */

typedef struct {
  const char *model_type; /* "unigram" or "bpe" */
  int64_t vocab_size;
  double character_coverage; /* the share of characters that get pieces of their own */
  int64_t max_sentences;     /* a random sample of this many is learnt from */
  int threads;
} moe_tokenizer_training;

enum { MOE_TOKENIZER_SENTENCE_BYTES = 4096 };

/* Gives the next sentence (one line without its newline, at most MOE_TOKENIZER_SENTENCE_BYTES,
 * valid until the next call), or sets *end. */
typedef moe_status (*moe_next_sentence)(void *context, const char **text, int64_t *length,
                                        bool *end);

/* Train a SentencePiece model; the caller frees *model. MOE_USAGE when the text cannot give a
 * vocabulary of that size, or what `next` returned. */
moe_status moe_tokenizer_train(const moe_tokenizer_training *options, moe_next_sentence next,
                               void *context, char **model, int64_t *size);

#ifdef __cplusplus
}
#endif
#endif
