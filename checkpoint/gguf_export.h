/* Weights to one GGUF file that llama.cpp loads as it is, and such a file as a source of weights.
 *
 * Architecture `llama` with experts. llama.cpp pairs the rotary dimensions 2i and 2i + 1 where we
 * pair i and i + d/2, so the rows of each head of q and k are exchanged on the way out and back. */
#ifndef MOE_CHECKPOINT_GGUF_EXPORT_H
#define MOE_CHECKPOINT_GGUF_EXPORT_H

#include "checkpoint/gguf.h"
#include "checkpoint/hf.h"
#include "data/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Which of llama.cpp's tokenizers the file asks for.
 *   AUTO   what encodes text as the model's tokenizer does: `t5` for unigram, `llama` otherwise
 *   LLAMA  merges the best pair: SentencePiece's bpe, and our bytes
 *   T5     the best path (Viterbi): SentencePiece's unigram; it has no bytes to fall back to, so
 *          characters without a piece become <unk>, but for ASCII ones, which are given a piece
 *   NONE   no tokenizer in the file */
typedef enum {
  MOE_GGUF_VOCAB_AUTO,
  MOE_GGUF_VOCAB_LLAMA,
  MOE_GGUF_VOCAB_T5,
  MOE_GGUF_VOCAB_NONE
} moe_gguf_vocab;

/* Put the tokenizer's keys for a model of `vocab` tokens; t NULL: that there is none. A vocabulary
 * with fewer pieces than the model is filled with unused ones. MOE_USAGE when it has more, or
 * cannot be expressed. */
moe_status moe_gguf_put_vocab(moe_gguf_writer *w, const moe_tokenizer *t, int64_t vocab,
                              moe_gguf_vocab kind);

enum { MOE_GGUF_RUN_TYPE = -1 };

typedef struct {
  moe_export_options common; /* `out` is the file; `dtype` MOE_EXPORT_RUN_DTYPE */
  int type;                  /* a moe_ggml_type for matrices; MOE_GGUF_RUN_TYPE: the compute type */
  moe_gguf_vocab vocab;
  const char *name; /* general.name; NULL: the run's folder */
} moe_gguf_options;

/* Local. Write beside `out`, read it back (gguf_weights.c), prove it (proof.h), and only then
 * rename. Norms and routers are float32 whatever the type; with Q8_0, matrices whose rows are not
 * multiples of 32 are F16. Q8_0's logits must be within MOE_GGUF_Q8_0_TOLERANCE of the largest
 * logit of the unquantised ones, and equal those of the values dequantised. Errors as
 * moe_export_hf. */
#define MOE_GGUF_Q8_0_TOLERANCE 0.5
moe_status moe_export_gguf(const moe_gguf_options *options);

/* ---- what exporting and reading back share: facts of the layout */

enum { MOE_GGUF_TENSOR_NAME = 96 };
/* llama.cpp's name of the tensor that holds p. Returns name. */
const char *moe_gguf_param_name(const moe_param *p, char name[MOE_GGUF_TENSOR_NAME]);
/* The type a parameter has in a file whose matrices have type `type`. */
moe_ggml_type moe_gguf_param_type(const moe_param *p, moe_ggml_type type);
/* Heads whose rows are exchanged; 0: the rows are as ours. */
int64_t moe_gguf_rotary_heads(const moe_param *p, const moe_dims *dims);

/* Open a file of architecture `llama` with experts. Nothing in it is trusted. MOE_USAGE for models
 * that are not ours, MOE_DAMAGED, MOE_IO. */
moe_status moe_weights_open_gguf(const char *path, moe_weights **out);
/* The values of w as a file with matrices of `type` keeps them: encoded and decoded. Borrows w. */
moe_status moe_weights_as_stored(moe_weights *w, moe_ggml_type type, moe_weights **out);

#ifdef __cplusplus
}
#endif
#endif
