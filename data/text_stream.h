/* Text as it comes: tokens in, whole UTF-8 characters out, as soon as they are certain.
 *
 * A token may be a part of a character, and what a token reads as may depend on its neighbours, so
 * the newest tokens are decoded together with the ones before them and what is new is cut off. What
 * might be the beginning of a stop string waits until it is not. */
#ifndef MOE_DATA_TEXT_STREAM_H
#define MOE_DATA_TEXT_STREAM_H

#include "data/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_text_stream moe_text_stream;

/* A text that goes on after `context` [n] (the prompt's tokens; its end is copied). stops: strings
 * that end it, none empty; borrowed, like the tokenizer. Local. */
moe_status moe_text_stream_create(const moe_tokenizer *t, const char *const *stops, int stop_count,
                                  const int32_t *context, int64_t n, moe_text_stream **out);
void moe_text_stream_destroy(moe_text_stream *s);

/* Append a token. *text [*length] is what became certain, valid until the next call; always whole
 * characters, U+FFFD for bytes that are none. *stopped: a stop string came; the text ended before
 * it. An id outside the tokenizer's vocabulary (models may have more) reads as nothing. */
moe_status moe_text_stream_add(moe_text_stream *s, int32_t id, const char **text, int64_t *length,
                               bool *stopped);
/* No more tokens: the rest. */
moe_status moe_text_stream_end(moe_text_stream *s, const char **text, int64_t *length);

#ifdef __cplusplus
}
#endif
#endif
