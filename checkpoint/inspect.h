/* What a checkpoint holds, for people. */
#ifndef MOE_CHECKPOINT_INSPECT_H
#define MOE_CHECKPOINT_INSPECT_H

#include <signal.h>
#include <stdbool.h>
#include <stdio.h>

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  bool values;  /* read all data: norms, and how experts differ */
  bool tensors; /* and list every tensor */
  bool config;  /* print the run's configuration in full */
  const volatile sig_atomic_t *stop;
} moe_inspect_options;

/* Local. A step folder's state, sizes by role and file, the model, its weights' sizes by kind of
 * tensor, and per layer how far experts are apart. Hashes are checked as data is read. */
moe_status moe_inspect_checkpoint(const char *step_folder, const moe_inspect_options *options,
                                  FILE *out);

#ifdef __cplusplus
}
#endif
#endif
