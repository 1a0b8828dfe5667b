/* SentencePiece behind C functions: no exception and no C++ type crosses. Used by tokenizer.c
 * alone, which checks ranges and reports errors; here `error` gets the library's own words. */
#ifndef MOE_DATA_SENTENCEPIECE_H
#define MOE_DATA_SENTENCEPIECE_H

#include "data/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_sentencepiece moe_sentencepiece;
enum { MOE_SENTENCEPIECE_ERROR = 256 };

moe_sentencepiece *moe_sentencepiece_load(const void *model, int64_t size,
                                          char error[MOE_SENTENCEPIECE_ERROR]);
void moe_sentencepiece_free(moe_sentencepiece *p);
int moe_sentencepiece_size(const moe_sentencepiece *p);
int moe_sentencepiece_special(const moe_sentencepiece *p, int which);
bool moe_sentencepiece_encode(const moe_sentencepiece *p, const char *text, int64_t length,
                              moe_token_list *out, char error[MOE_SENTENCEPIECE_ERROR]);
/* malloc'd text or NULL. */
char *moe_sentencepiece_decode(const moe_sentencepiece *p, const int32_t *ids, int64_t count,
                               int64_t *length, char error[MOE_SENTENCEPIECE_ERROR]);
const char *moe_sentencepiece_piece(const moe_sentencepiece *p, int id);
int moe_sentencepiece_id(const moe_sentencepiece *p, const char *piece); /* -1: none */
moe_piece_kind moe_sentencepiece_kind(const moe_sentencepiece *p, int id);
float moe_sentencepiece_score(const moe_sentencepiece *p, int id);
/* The model file's bytes; malloc'd, or NULL. */
char *moe_sentencepiece_serialize(const moe_sentencepiece *p, int64_t *size,
                                  char error[MOE_SENTENCEPIECE_ERROR]);
/* *status gets what `next` returned. malloc'd model or NULL. */
char *moe_sentencepiece_train(const moe_tokenizer_training *options, moe_next_sentence next,
                              void *context, int64_t *size, moe_status *status,
                              char error[MOE_SENTENCEPIECE_ERROR]);

#ifdef __cplusplus
}
#endif
#endif
