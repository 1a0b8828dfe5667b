/* A checkpoint for another number of writing ranks.
 *
 * Any number of ranks loads any checkpoint, so this is never needed to go on; it evens out who
 * reads what, and gathers a checkpoint into one file, or spreads it over several. */
#ifndef MOE_CHECKPOINT_RESHARD_H
#define MOE_CHECKPOINT_RESHARD_H

#include <signal.h>

#include "checkpoint/checkpoint.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Write the step folder `from`, with all roles and its state, to the new run `run_dir` as `ranks`
 * files of equal size, by the commit protocol; then compare every tensor with the original.
 * Streams: memory does not grow with the model. Collective, for a world of one rank. MOE_USAGE when
 * the run has checkpoints already; on any failure nothing is left of the new one. */
moe_status moe_reshard(moe_comm *world, const char *from, const char *run_dir, int ranks,
                       const volatile sig_atomic_t *stop);

#ifdef __cplusplus
}
#endif
#endif
