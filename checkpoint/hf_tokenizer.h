/* A tokenizer as the files transformers and vLLM read. Private to checkpoint/hf_*.c and tests. */
#ifndef MOE_CHECKPOINT_HF_TOKENIZER_H
#define MOE_CHECKPOINT_HF_TOKENIZER_H

#include "data/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and, from the SentencePiece
 * model at `model` (NULL: there is none), tokenizer.model into a folder, fsynced. tokenizer.json is
 * left out with a warning when its format cannot give the same tokens (models that normalise text,
 * or are neither unigram nor bpe). context: longest text, in tokens. Local. */
moe_status moe_hf_tokenizer_write(const moe_tokenizer *t, const char *model, int64_t context,
                                  const char *folder);

#ifdef __cplusplus
}
#endif
#endif
