/* moe-generate's texts: from the command line and files to token ids, and back to standard output
 * as they come. Every rank does the same with them; rank 0 alone prints. */
#ifndef MOE_LAUNCH_GENERATE_TEXTS_H
#define MOE_LAUNCH_GENERATE_TEXTS_H

#include "core/model/generate_loop.h"
#include "data/text_stream.h"
#include "launch/generate_options.h"

typedef struct moe_texts moe_texts;

/* Local. Read and encode the prompts. tokenizer: borrowed; NULL with --ids. show: this rank prints.
 * MOE_USAGE, MOE_DAMAGED for text that is not UTF-8. */
moe_status moe_texts_create(const moe_generate_request *r, const moe_tokenizer *tokenizer,
                            int64_t vocab_size, bool show, moe_texts **out);
void moe_texts_destroy(moe_texts *t);

int64_t moe_texts_count(const moe_texts *t);
/* The longest prompt, tokens. */
int64_t moe_texts_longest(const moe_texts *t);
/* Cut texts to `room` tokens with their prompts. MOE_USAGE names a prompt that has no room for a
 * new token; `limit` says what could be had. */
moe_status moe_texts_fit(moe_texts *t, int64_t room, const char *limit);
const moe_prompt *moe_texts_prompts(const moe_texts *t);

/* moe_take_token; context is the moe_texts. */
moe_status moe_texts_take(void *context, int64_t prompt, int32_t token, bool *end);

#endif
