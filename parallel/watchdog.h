/* The watchdog: a job in which nothing moves any more ends itself, and says who hangs.
 *
 * A thread per rank counts the time since its rank's last sign of life (core/base/place.h). Past
 * the phase's limit it asks all ranks over the side channel. While one answers that it has time
 * left, say because it is writing a checkpoint, the job goes on. When all who answer have used up
 * theirs, the lowest of them prints where each rank is and names those that did not answer or are
 * behind, and all exit with MOE_HUNG's code; mpirun then ends whoever cannot.
 *
 * Time in which a rank's own process did not run (a suspended job, a debugger on all ranks) does
 * not count. The thread sleeps between half seconds and never waits for MPI, NCCL or the device. */
#ifndef MOE_PARALLEL_WATCHDOG_H
#define MOE_PARALLEL_WATCHDOG_H

#include "core/base/place.h"
#include "parallel/comm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moe_watchdog moe_watchdog;

/* Collective. limit_s: per phase, 0 for none; with no limit at all nothing is started. Where a rank
 * cannot open a socket that is a warning and *out is NULL on every rank. */
moe_status moe_watchdog_create(moe_comm *world, const double limit_s[MOE_PHASES],
                               moe_watchdog **out);
/* Local. Accepts NULL. */
void moe_watchdog_destroy(moe_watchdog *w);

#ifdef __cplusplus
}
#endif
#endif
