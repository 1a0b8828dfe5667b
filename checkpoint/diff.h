/* What differs between two checkpoints, or between a checkpoint and other sources of weights. */
#ifndef MOE_CHECKPOINT_DIFF_H
#define MOE_CHECKPOINT_DIFF_H

#include <signal.h>
#include <stdio.h>

#include "checkpoint/weights.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  /* A tensor counts as equal when |a - b| (norms over the tensor) is at most this share of |a|; 0:
   * only the same bits are equal. */
  double tolerance;
  bool all; /* list every tensor that differs, not the first few of each role */
  const volatile sig_atomic_t *stop;
  FILE *out; /* the report; NULL: none */
} moe_diff_options;

/* Two step folders, tensor by tensor in all roles, whatever ranks wrote them, and their states.
 * Settings that differ are listed, and count when they are of those a resumed run must share.
 * *differ tells. Local. MOE_DAMAGED for what cannot be read. */
moe_status moe_diff_checkpoints(const char *a, const char *b, const moe_diff_options *options,
                                bool *differ);
/* Two sources of weights, as float32 values. MOE_USAGE when they are of different shapes. */
moe_status moe_diff_weights(moe_weights *a, moe_weights *b, const moe_diff_options *options,
                            bool *differ);

#ifdef __cplusplus
}
#endif
#endif
