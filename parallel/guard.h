/* Guards: transports that the watchdog asks after, while the training thread waits for the device
 * and cannot see that a transfer has failed. Private to parallel/. */
#ifndef MOE_PARALLEL_GUARD_H
#define MOE_PARALLEL_GUARD_H

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Ask check(about), which must return at once, until moe_guard_remove(about). Any thread. */
moe_status moe_guard_add(moe_status (*check)(void *about), void *about);
void moe_guard_remove(void *about);

/* Ask all, from one thread. The first that failed three times in a row: the training thread meets
 * most errors itself, and says more. Never waits. */
moe_status moe_guard_look(void);

#ifdef __cplusplus
}
#endif
#endif
