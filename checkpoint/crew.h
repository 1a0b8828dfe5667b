/* A crew: numbered jobs, shared out to a few threads. One thread neither keeps a fast disk busy nor
 * copies from the kernel's cache as fast as memory allows; a few do. */
#ifndef MOE_CHECKPOINT_CREW_H
#define MOE_CHECKPOINT_CREW_H

#include <stdint.h>

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_CREW = 4 }; /* threads at most, the caller's among them */

/* work(context, worker, i) for i = 0 .. n - 1, each once: a thread, number `worker` below MOE_CREW,
 * takes the next i. After a failure no more are begun. Returns the failure of the lowest i, with
 * its message. Local. */
moe_status moe_crew_work(int64_t n, moe_status (*work)(void *context, int worker, int64_t i),
                         void *context);

#ifdef __cplusplus
}
#endif
#endif
