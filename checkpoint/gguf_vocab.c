/* A tokenizer's keys in GGUF.
 *
 * llama.cpp chooses its algorithm by tokenizer.ggml.model. For each kind of SentencePiece model one
 * of them gives the same tokens: `llama` merges the pair of best score first, which is what bpe
 * does; `t5` takes the path of best total score, which is what unigram does. `t5` knows no
 * fall-back to bytes, and no unigram piece of ours holds a newline; so there the byte pieces of
 * ASCII characters that have no piece of their own appear as those characters. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/gguf_export.h"
#include "core/base/log.h"

/* llama.cpp's token types. */
enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, UNUSED = 5, BYTE = 6 };
#define SPACE "\xe2\x96\x81" /* U+2581: how a space is written in pieces */

typedef struct {
  const char **text; /* [n]; those made here are in `made` */
  float *score;
  int32_t *type;
  int64_t n;
  char (*made)[32];
} tokens;

static void tokens_destroy(tokens *t) {
  free(t->text);
  free(t->score);
  free(t->type);
  free(t->made);
}

static moe_status tokens_create(int64_t n, tokens *out) {
  *out = (tokens){.n = n};
  out->text = calloc((size_t)n, sizeof *out->text);
  out->score = calloc((size_t)n, sizeof *out->score);
  out->type = calloc((size_t)n, sizeof *out->type);
  out->made = calloc((size_t)n, sizeof *out->made);
  if (out->text && out->score && out->type && out->made) return MOE_OK;
  tokens_destroy(out);
  return moe_fail(MOE_NO_MEMORY, "no memory for %" PRId64 " tokens", n);
}

static int32_t type_of(const moe_tokenizer *t, int32_t id) {
  switch (moe_tokenizer_piece_kind(t, id)) {
  case MOE_PIECE_UNKNOWN:
    return UNKNOWN;
  case MOE_PIECE_CONTROL:
    return CONTROL;
  case MOE_PIECE_BYTE:
    return BYTE;
  case MOE_PIECE_UNUSED:
    return UNUSED;
  default:
    return NORMAL;
  }
}

static void fill(tokens *k, const moe_tokenizer *t) {
  int64_t size = t ? moe_tokenizer_vocab_size(t) : 0;
  for (int64_t i = 0; i < k->n; i++) {
    if (i < size) {
      k->text[i] = moe_tokenizer_piece(t, (int32_t)i);
      k->score[i] = moe_tokenizer_piece_score(t, (int32_t)i);
      k->type[i] = type_of(t, (int32_t)i);
      continue;
    }
    snprintf(k->made[i], sizeof k->made[i], "[PAD%" PRId64 "]", i);
    k->text[i] = k->made[i];
    k->score[i] = -10000.0f;
    k->type[i] = UNUSED;
  }
}

/* The id of byte b's piece, or -1. */
static int32_t byte_piece(const moe_tokenizer *t, int b) {
  char text[8];
  snprintf(text, sizeof text, "<0x%02X>", (unsigned)b);
  int32_t id = moe_tokenizer_id(t, text);
  return id >= 0 && moe_tokenizer_piece_kind(t, id) == MOE_PIECE_BYTE ? id : -1;
}

/* Characters that SentencePiece gives to a byte piece, for an algorithm that knows no such thing;
 * with a score that no other path can lose to, as SentencePiece's unknown pieces have. */
static void spell_out_ascii(tokens *k, const moe_tokenizer *t) {
  float least = 0.0f;
  for (int64_t i = 0; i < k->n; i++)
    if (k->type[i] == NORMAL && k->score[i] < least) least = k->score[i];
  for (int b = 1; b < 128; b++) {
    char text[2] = {(char)b, 0};
    int32_t id = byte_piece(t, b);
    if (b == ' ' || id < 0 || moe_tokenizer_id(t, text) >= 0) continue;
    memcpy(k->made[id], text, sizeof text);
    k->text[id] = k->made[id];
    k->type[id] = NORMAL;
    k->score[id] = least - 10.0f;
  }
}

/* llama.cpp turns spaces into U+2581 before it looks for pieces. */
static void spell_out_space(tokens *k, const moe_tokenizer *t) {
  int32_t id = byte_piece(t, ' ');
  if (id < 0 || moe_tokenizer_id(t, SPACE) >= 0) return;
  k->text[id] = SPACE;
  k->type[id] = NORMAL;
}

static moe_gguf_vocab choose(const moe_tokenizer_spec *spec) {
  return spec->type == MOE_TOKENIZER_UNIGRAM ? MOE_GGUF_VOCAB_T5 : MOE_GGUF_VOCAB_LLAMA;
}

static moe_status check(const moe_tokenizer *t, const moe_tokenizer_spec *spec, int64_t vocab) {
  if (moe_tokenizer_vocab_size(t) > vocab)
    return moe_fail(MOE_USAGE,
                    "the tokenizer has %" PRId64 " pieces, the model %" PRId64
                    ": it is another model's: choose one with --tokenizer",
                    moe_tokenizer_vocab_size(t), vocab);
  if (spec->type == MOE_TOKENIZER_WORD || spec->type == MOE_TOKENIZER_CHAR)
    return moe_fail(MOE_USAGE, "llama.cpp has no tokenizer for SentencePiece's word and char "
                               "models: export without: --tokenizer none");
  if (!spec->verbatim)
    moe_warn("this tokenizer changes its text (normalisation, spaces), which the file cannot ask "
             "of llama.cpp: texts may be encoded differently there");
  return MOE_OK;
}

static void put_specials(moe_gguf_writer *w, const moe_tokenizer *t) {
  static const char *const keys[] = {"tokenizer.ggml.padding_token_id",
                                     "tokenizer.ggml.unknown_token_id",
                                     "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"};
  for (int which = MOE_TOKEN_PAD; which <= MOE_TOKEN_EOS; which++) {
    int32_t id = moe_tokenizer_special(t, which);
    if (id >= 0) moe_gguf_put_u32(w, keys[which], (uint32_t)id);
  }
}

moe_status moe_gguf_put_vocab(moe_gguf_writer *w, const moe_tokenizer *t, int64_t vocab,
                              moe_gguf_vocab kind) {
  moe_tokenizer_spec spec;
  tokens k;
  if (!t || kind == MOE_GGUF_VOCAB_NONE) {
    moe_gguf_put_string(w, "tokenizer.ggml.model", "none");
    return MOE_OK;
  }
  MOE_TRY(moe_tokenizer_describe(t, &spec));
  MOE_TRY(check(t, &spec, vocab));
  if (kind == MOE_GGUF_VOCAB_AUTO) kind = choose(&spec);
  MOE_TRY(tokens_create(vocab, &k));
  fill(&k, t);
  if (kind == MOE_GGUF_VOCAB_T5)
    spell_out_ascii(&k, t);
  else if (spec.type == MOE_TOKENIZER_BYTES)
    spell_out_space(&k, t);
  moe_gguf_put_string(w, "tokenizer.ggml.model", kind == MOE_GGUF_VOCAB_T5 ? "t5" : "llama");
  moe_gguf_put_string(w, "tokenizer.ggml.pre", "default");
  moe_gguf_put_strings(w, "tokenizer.ggml.tokens", k.text, k.n);
  moe_gguf_put_f32s(w, "tokenizer.ggml.scores", k.score, k.n);
  moe_gguf_put_i32s(w, "tokenizer.ggml.token_type", k.type, k.n);
  tokens_destroy(&k);
  put_specials(w, t);
  moe_gguf_put_bool(w, "tokenizer.ggml.add_bos_token", false); /* as texts are tokenised to train */
  moe_gguf_put_bool(w, "tokenizer.ggml.add_eos_token", false);
  moe_gguf_put_bool(w, "tokenizer.ggml.add_space_prefix", spec.dummy_prefix);
  moe_gguf_put_bool(w, "tokenizer.ggml.remove_extra_whitespaces", false);
  return MOE_OK;
}
