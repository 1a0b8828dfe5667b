/* Is a checkpoint whole and undamaged? */
#ifndef MOE_CHECKPOINT_VERIFY_H
#define MOE_CHECKPOINT_VERIFY_H

#include "checkpoint/manifest.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Collective. Read the manifest, all files (shared out over the ranks) and every hash, and check
 * that each tensor of the model its configuration describes is there. MOE_DAMAGED names what is
 * not. */
moe_status moe_checkpoint_verify(moe_comm *world, const char *dir);
/* Local. The part of that which falls to one rank of `size`. */
moe_status moe_checkpoint_verify_share(const char *dir, int rank, int size);
/* Local. Has the manifest each parameter of the model (so every expert of every layer once) in its
 * shape? A checkpoint without configuration text describes no model: nothing to check. */
moe_status moe_checkpoint_check_model(const moe_manifest *m, const char *where);

#ifdef __cplusplus
}
#endif
#endif
