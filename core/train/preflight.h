/* The preflight: what a long run needs, checked on every rank before it is started. */
#ifndef MOE_CORE_TRAIN_PREFLIGHT_H
#define MOE_CORE_TRAIN_PREFLIGHT_H

#include <stdio.h>

#include "core/base/config.h"
#include "parallel/comm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Collective over `world` (host values). Runs every check and prints one row each on rank 0: what,
 * pass or FAIL, and in the second case which rank and host, and how to mend it. Checks: the same
 * program and configuration everywhere; devices open, their memory not taken by others; an
 * all-reduce with a known sum; the memory plan; the data on every rank; run.dir shared, and able to
 * fsync, rename and lock from every host; room for keep + 1 checkpoints. Leaves nothing behind but
 * the run directory. MOE_FAILED when any check failed. config is resolved for the world's size. */
moe_status moe_preflight(const moe_config *config, moe_comm *world, FILE *out);

#ifdef __cplusplus
}
#endif
#endif
