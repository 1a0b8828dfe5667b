/* What the operating system says this process holds. */
#ifndef MOE_CORE_BASE_PROCESS_MEMORY_H
#define MOE_CORE_BASE_PROCESS_MEMORY_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Resident bytes now, and the most so far; 0 when /proc cannot tell. */
int64_t moe_process_resident(void);
int64_t moe_process_peak(void);
/* Bytes all processes of this host may still take before it swaps or kills: what is free or can be
 * made so, within the control group's limit. INT64_MAX when nobody can tell. */
int64_t moe_host_available(void);

#ifdef __cplusplus
}
#endif
#endif
