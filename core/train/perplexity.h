/* Perplexity: a model's loss on a token file.
 *
 * The file is one stream, as in training without document masks. Window i sees the S tokens from
 * i * stride on and predicts the token after each; a token that an earlier window has predicted is
 * not counted again. So every token but the first counts once; with stride S most economically,
 * with less each has at least S - stride tokens before it (but in the first window). */
#ifndef MOE_CORE_TRAIN_PERPLEXITY_H
#define MOE_CORE_TRAIN_PERPLEXITY_H

#include "core/model/generate.h"
#include "data/token_file.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t window; /* S: at most the generator's room */
  int64_t stride; /* 1 to S */
  int64_t limit;  /* only the file's first tokens; 0: all */
  bool show;      /* progress, on standard error */
} moe_perplexity_options;

typedef struct {
  double nats;    /* mean of -log p over the tokens predicted; perplexity is its exponential */
  int64_t tokens; /* predicted */
  int64_t fed;    /* went through the model */
  double seconds;
} moe_perplexity_result;

/* Collective over the generator's mesh; the slots are used. MOE_USAGE when the file has fewer than
 * 2 tokens; MOE_DAMAGED names the place of a token outside the vocabulary. */
moe_status moe_perplexity(moe_generator *g, const moe_token_file *file,
                          moe_perplexity_options options, moe_perplexity_result *out);

#ifdef __cplusplus
}
#endif
#endif
