/* Worker processes that encode batches of text, in order.
 *
 * Processes rather than threads, so that a fault of the tokenizer library on some text ends with a
 * message that says where the text is. Batch number k goes to worker k % workers, which holds one
 * batch at a time: the caller reads a worker's answer before giving it the next, so neither side
 * ever waits to write while the other does, and answers come back in the order of the batches. */
#ifndef MOE_DATA_ENCODE_POOL_H
#define MOE_DATA_ENCODE_POOL_H

#include "core/base/status.h"
#include "data/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Pieces of text one after another, and their tokens once encoded. Zero-initialise. */
typedef struct {
  char *text;
  int64_t bytes, text_room;
  int64_t *length;     /* [pieces] bytes, then tokens */
  bool *ends_document; /* [pieces] */
  int64_t pieces, pieces_room;
  const char *file; /* where the batch begins */
  int64_t offset;
  int64_t position;   /* input bytes read when it was complete, for progress */
  moe_token_list ids; /* of all pieces */
} moe_text_batch;

moe_status moe_text_batch_add(moe_text_batch *b, const char *text, int64_t length,
                              bool ends_document);
void moe_text_batch_reset(moe_text_batch *b); /* keeps the memory */
void moe_text_batch_free(moe_text_batch *b);

typedef struct moe_encode_pool moe_encode_pool;

enum { MOE_ENCODE_WORKERS = 1024 };

/* Starts `workers` processes (1 to MOE_ENCODE_WORKERS). `tokenizer` stays the caller's. */
moe_status moe_encode_pool_create(const moe_tokenizer *tokenizer, int workers,
                                  moe_encode_pool **out);
/* Ends the processes and waits for them. */
void moe_encode_pool_destroy(moe_encode_pool *p);
int moe_encode_pool_workers(const moe_encode_pool *p);
/* Give worker w, which is idle, a batch. MOE_FAILED when it died. */
moe_status moe_encode_pool_send(moe_encode_pool *p, int w, const moe_text_batch *b);
/* Wait for the tokens of the batch that worker w has: fills b->ids and b->length. */
moe_status moe_encode_pool_receive(moe_encode_pool *p, int w, moe_text_batch *b);

#ifdef __cplusplus
}
#endif
#endif
