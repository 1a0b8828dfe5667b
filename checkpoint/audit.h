/* Looking at every byte of a checkpoint: verification that says how it goes, and the choice of a
 * checkpoint to export. For a program of one process; training verifies in verify.h. */
#ifndef MOE_CHECKPOINT_AUDIT_H
#define MOE_CHECKPOINT_AUDIT_H

#include <signal.h>

#include "checkpoint/checkpoint.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Verify one step folder: manifest, model, every file and hash, with progress on stderr. `report`
 * (NULL: none) gets a line per file with its rate, and the outcome. MOE_DAMAGED names the first
 * fault; with a report all files are looked at. MOE_STOPPED when *stop became non-zero. */
moe_status moe_audit_checkpoint(const char *step_folder, const volatile sig_atomic_t *stop,
                                FILE *report);
/* `place`: a step folder, or a run, of which the newest, or with `all` every checkpoint is
 * verified. MOE_USAGE when there is none. */
moe_status moe_audit(const char *place, bool all, const volatile sig_atomic_t *stop, FILE *report);
/* The step folder that `place` means: itself, or of a run the newest; with `verify` it is verified,
 * and of a run the newest that verifies is taken, with warnings about those that do not.
 * MOE_DAMAGED when none is valid. */
moe_status moe_audit_choose(const char *place, bool verify, const volatile sig_atomic_t *stop,
                            char path[MOE_PATH]);

#ifdef __cplusplus
}
#endif
#endif
