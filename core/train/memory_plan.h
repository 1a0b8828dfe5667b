/* A plan's memory, for people: by purpose, and when it does not fit. */
#ifndef MOE_CORE_TRAIN_MEMORY_PLAN_H
#define MOE_CORE_TRAIN_MEMORY_PLAN_H

#include <stdio.h>

#include "core/base/arena.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes by purpose, and of the program itself (resident before any of it; 0 on a GPU). */
typedef struct {
  int64_t purpose[MOE_MEM_PURPOSES], program;
} moe_memory_plan;

/* Local. What the arenas were asked for. */
moe_memory_plan moe_memory_plan_of(const moe_memory *memory, int64_t program_bytes);
int64_t moe_memory_plan_total(const moe_memory_plan *p);
/* MOE_NO_MEMORY when the plan exceeds `budget`: both sizes, the largest purpose, and `remedy`. */
moe_status moe_memory_plan_check(const moe_memory_plan *p, int64_t budget, const char *remedy);
/* A line for each purpose that takes any. */
void moe_memory_plan_print(const moe_memory_plan *p, FILE *out);

#ifdef __cplusplus
}
#endif
#endif
