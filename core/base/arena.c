/* Arenas: set-up code runs twice, first to count, then over memory of exactly that size. */
#include "core/base/arena.h"

#include <stdio.h>
#include <stdlib.h>

/* What moe_arena_take returns while measuring: no processor we run on maps it, so a use faults at
 * once instead of spoiling other memory. */
static const uintptr_t token = (uintptr_t)0x4d4f450000000000u;

void moe_memory_measure(moe_memory *m) {
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) m->arena[i] = (moe_arena){.measuring = true};
}

moe_status moe_memory_commit(moe_memory *m, void *(*alloc)(void *, int64_t), void *context) {
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) {
    moe_arena *a = &m->arena[i];
    if (a->used > 0 && a->base == NULL) {
      const char *purpose = moe_memory_purpose_text((moe_memory_purpose)i);
      a->base = alloc(context, a->used);
      if (a->base == NULL)
        return moe_fail(MOE_NO_MEMORY,
                        "out of memory: %lld bytes for %s: use more ranks, a smaller "
                        "train.micro_batch or data.sequence_length, or train.recompute",
                        (long long)a->used, purpose);
      if ((uintptr_t)a->base % MOE_ARENA_ALIGN != 0)
        return moe_fail(MOE_INVALID, "memory for %s at %p: must be aligned to %d bytes", purpose,
                        (void *)a->base, MOE_ARENA_ALIGN);
    }
    a->size = a->used;
    a->used = 0;
    a->measuring = false;
  }
  return MOE_OK;
}

int64_t moe_memory_total(const moe_memory *m) {
  int64_t total = 0;
  for (int i = 0; i < MOE_MEM_PURPOSES; i++)
    total += m->arena[i].measuring ? m->arena[i].used : m->arena[i].size;
  return total;
}

const char *moe_memory_purpose_text(moe_memory_purpose purpose) {
  switch (purpose) {
#define X(name, text)  \
  case MOE_MEM_##name: \
    return text;
    MOE_MEMORY_MAP(X)
#undef X
  case MOE_MEM_PURPOSES:
    break;
  }
  return "unknown purpose";
}

_Noreturn static void overflow(const moe_arena *a, int64_t bytes) {
  fprintf(stderr,
          "bug in the memory plan: arena of %lld bytes with %lld in use was asked for %lld more: "
          "set-up must take the same tensors when it measures and when it runs\n",
          (long long)a->size, (long long)a->used, (long long)bytes);
  abort();
}

void *moe_arena_take(moe_arena *a, int64_t bytes) {
  if (bytes < 0 || bytes > INT64_MAX / 2) overflow(a, bytes);
  /* An empty tensor takes a place too: its pointer is as present as any other. */
  int64_t need = (bytes > 0 ? bytes : 1) + MOE_ARENA_ALIGN - 1;
  need -= need % MOE_ARENA_ALIGN;
  int64_t limit = a->measuring ? INT64_MAX : a->size;
  if (need > limit - a->used) overflow(a, bytes);
  void *place = a->measuring ? (void *)token : a->base + a->used;
  a->used += need;
  return place;
}

moe_tensor moe_arena_tensor_1d(moe_arena *a, moe_dtype dtype, int64_t n) {
  moe_tensor t = moe_tensor_1d(NULL, dtype, n);
  t.data = moe_arena_take(a, moe_tensor_bytes(t));
  return t;
}

moe_tensor moe_arena_tensor_2d(moe_arena *a, moe_dtype dtype, int64_t rows, int64_t columns) {
  moe_tensor t = moe_tensor_2d(NULL, dtype, rows, columns);
  t.data = moe_arena_take(a, moe_tensor_bytes(t));
  return t;
}
