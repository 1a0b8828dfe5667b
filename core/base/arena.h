/* Arenas: memory planned before step 1.
 *
 * One arena per purpose. An arena starts in measuring mode, where moe_arena_take only counts; the
 * same set-up code then runs again over real memory. So the plan that --dry-run prints is, by
 * construction, what a run uses, and no step allocates. */
#ifndef MOE_CORE_BASE_ARENA_H
#define MOE_CORE_BASE_ARENA_H

#include "core/base/status.h"
#include "core/base/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* purpose, text for the plan */
#define MOE_MEMORY_MAP(X)                    \
  X(WEIGHTS, "weights")                      \
  X(MASTER, "master weights")                \
  X(MOMENTS, "optimizer moments")            \
  X(GRADIENTS, "gradients")                  \
  X(OVERLAID, "activations, then gradients") \
  X(STASH, "activations kept for backward")  \
  X(WORK, "activations in work")             \
  X(CACHE, "key/value cache")                \
  X(EXCHANGE, "exchange buffers")            \
  X(SCRATCH, "kernel scratch")

typedef enum {
#define X(name, text) MOE_MEM_##name,
  MOE_MEMORY_MAP(X)
#undef X
      MOE_MEM_PURPOSES
} moe_memory_purpose;

typedef struct {
  char *base;   /* NULL while measuring */
  int64_t size; /* bytes at base */
  int64_t used; /* bytes taken so far */
  bool measuring;
} moe_arena;

/* All memory of one rank's training, by purpose. Zero-initialise, set measuring, run set-up; then
 * moe_memory_commit allocates every arena through `alloc` and resets `used`. */
typedef struct {
  moe_arena arena[MOE_MEM_PURPOSES];
} moe_memory;

enum { MOE_ARENA_ALIGN = 256 };

void moe_memory_measure(moe_memory *m);
/* alloc(context, bytes) returns zeroed memory or NULL; it is not asked for an arena whose base the
 * caller has set. Local. MOE_NO_MEMORY names the purpose and the bytes. */
moe_status moe_memory_commit(moe_memory *m, void *(*alloc)(void *, int64_t), void *context);
int64_t moe_memory_total(const moe_memory *m);
const char *moe_memory_purpose_text(moe_memory_purpose purpose);

/* Take `bytes`, aligned to MOE_ARENA_ALIGN. While measuring the pointer is an unusable non-NULL
 * token. Aborts the process when a committed arena overflows: a bug in the plan. */
void *moe_arena_take(moe_arena *a, int64_t bytes);
moe_tensor moe_arena_tensor_1d(moe_arena *a, moe_dtype dtype, int64_t n);
moe_tensor moe_arena_tensor_2d(moe_arena *a, moe_dtype dtype, int64_t rows, int64_t columns);

#ifdef __cplusplus
}
#endif
#endif
