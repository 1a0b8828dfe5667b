/* Tensors on their way through forward passes: a few rows at a time, for all passes together.
 *
 * The idea: passes that are to be compared go through the model side by side, so that one whose
 * weights are another's rounded takes them from memory while they are in cache: what is read from
 * disk is read once. All functions are local. */
#ifndef MOE_CHECKPOINT_WEIGHTS_STREAM_H
#define MOE_CHECKPOINT_WEIGHTS_STREAM_H

#include "checkpoint/proof.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What all tensors pass. */
typedef struct {
  const moe_weights_pass *pass;
  int passes; /* up to MOE_WEIGHTS_PASSES */
  const moe_weights_watch *watch;
} moe_weights_gate;

/* A tensor; one thread's. Zeroed before its first. */
typedef struct {
  const moe_param *param; /* pass 0's */
  int64_t at[MOE_WEIGHTS_PASSES];
  XXH3_state_t *hash[MOE_WEIGHTS_PASSES]; /* made when first needed */
} moe_weights_stream;

/* Begin with a tensor, named by the table's pattern: s->param. */
moe_status moe_weights_stream_begin(const moe_weights_gate *gate, moe_weights_stream *s,
                                    const char *pattern, int64_t layer, int64_t expert);
/* Its next `count` elements (whole blocks of MOE_WEIGHTS_BLOCK, or the last ones) for pass i:
 * passes take turns, from 0, and hand over `values` as the one before left it. After the tensor's
 * last elements its hash is the pass's. MOE_STOPPED when that is asked for. */
moe_status moe_weights_stream_next(const moe_weights_gate *gate, moe_weights_stream *s, int i,
                                   int64_t count, float *values);
void moe_weights_stream_release(moe_weights_stream *s);

#ifdef __cplusplus
}
#endif
#endif
