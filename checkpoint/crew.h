/* A crew: numbered jobs, shared out to a few threads. One thread neither keeps a fast disk busy nor
 * copies from the kernel's cache as fast as memory allows; a few do. */
#ifndef MOE_CHECKPOINT_CREW_H
#define MOE_CHECKPOINT_CREW_H

#include <stdint.h>

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  MOE_CREW = 4,      /* threads that keep a disk busy, on a host of many ranks */
  MOE_CREW_MOST = 16 /* and at most */
};

/* Threads for a process that has its processors to itself: as many, from MOE_CREW to MOE_CREW_MOST.
 */
int moe_crew_cores(void);
/* work(context, worker, i) for i = 0 .. n - 1, each once: one of at most `threads` threads, the
 * caller's among them, number `worker` from 0, takes the next i. After a failure no more are begun.
 * Returns the failure of the lowest i, with its message. Local. */
moe_status moe_crew_work(int threads, int64_t n,
                         moe_status (*work)(void *context, int worker, int64_t i), void *context);

#ifdef __cplusplus
}
#endif
#endif
