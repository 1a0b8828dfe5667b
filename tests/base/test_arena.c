#include <criterion/criterion.h>
#include <criterion/redirect.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/arena.h"

typedef struct {
  int calls, fail_at;
  int64_t bytes;
} counter;

static void *count_alloc(void *context, int64_t bytes) {
  counter *c = context;
  if (c->calls++ == c->fail_at) return NULL;
  c->bytes += bytes;
  void *p = aligned_alloc(MOE_ARENA_ALIGN, (size_t)bytes);
  return p ? memset(p, 0, (size_t)bytes) : NULL;
}

typedef struct {
  moe_tensor weights, empty, grads;
  void *odd;
} set_up;

static set_up take_all(moe_memory *m) {
  set_up s;
  s.weights = moe_arena_tensor_2d(&m->arena[MOE_MEM_WEIGHTS], MOE_BF16, 3, 7);
  s.odd = moe_arena_take(&m->arena[MOE_MEM_WEIGHTS], 300);
  s.empty = moe_arena_tensor_2d(&m->arena[MOE_MEM_WEIGHTS], MOE_F32, 0, 7);
  s.grads = moe_arena_tensor_1d(&m->arena[MOE_MEM_GRADIENTS], MOE_F32, 1000);
  return s;
}

Test(arena, measures_then_gives_exactly_that) {
  moe_memory m;
  moe_memory_measure(&m);
  set_up s = take_all(&m);
  cr_assert_not_null(s.weights.data);
  cr_assert_not_null(s.odd);
  int64_t planned = moe_memory_total(&m);
  cr_assert_eq(planned, 256 + 512 + 256 + 4096);

  counter c = {.fail_at = -1};
  cr_assert_eq(moe_memory_commit(&m, count_alloc, &c), MOE_OK);
  cr_assert_eq(c.bytes, planned);
  cr_assert_eq(c.calls, 2, "purposes that take nothing allocate nothing");
  cr_assert_eq(moe_memory_total(&m), planned);

  s = take_all(&m);
  cr_assert_eq((uintptr_t)s.odd % MOE_ARENA_ALIGN, 0);
  cr_assert_eq((char *)s.odd - (char *)s.weights.data, 256);
  cr_assert_eq((char *)s.empty.data - (char *)s.odd, 512);
  cr_assert(moe_tensor_present(s.empty));
  memset(s.grads.data, 1, 4000);
  for (int i = 0; i < MOE_MEM_PURPOSES; i++)
    cr_assert_eq(m.arena[i].used, m.arena[i].size, "%s",
                 moe_memory_purpose_text((moe_memory_purpose)i));
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) free(m.arena[i].base);
}

Test(arena, failed_commit_names_purpose_and_bytes) {
  moe_memory m;
  moe_memory_measure(&m);
  take_all(&m);
  counter c = {.fail_at = 1};
  cr_assert_eq(moe_memory_commit(&m, count_alloc, &c), MOE_NO_MEMORY);
  cr_assert_not_null(strstr(moe_error_message(), "gradients"));
  cr_assert_not_null(strstr(moe_error_message(), "4096"));
  free(m.arena[MOE_MEM_WEIGHTS].base);
}

static void *misaligned(void *context, int64_t bytes) {
  return (char *)count_alloc(context, bytes + 256) + 16;
}

Test(arena, refuses_misaligned_memory) {
  moe_memory m;
  moe_memory_measure(&m);
  moe_arena_take(&m.arena[MOE_MEM_WORK], 10);
  counter c = {.fail_at = -1};
  cr_assert_eq(moe_memory_commit(&m, misaligned, &c), MOE_INVALID);
  free(m.arena[MOE_MEM_WORK].base - 16);
}

Test(arena, overflow_aborts, .signal = SIGABRT, .init = cr_redirect_stderr) {
  moe_memory m;
  moe_memory_measure(&m);
  moe_arena_take(&m.arena[MOE_MEM_WORK], 256);
  counter c = {.fail_at = -1};
  cr_assert_eq(moe_memory_commit(&m, count_alloc, &c), MOE_OK);
  moe_arena_take(&m.arena[MOE_MEM_WORK], 256);
  moe_arena_take(&m.arena[MOE_MEM_WORK], 1);
}

Test(arena, negative_size_aborts, .signal = SIGABRT, .init = cr_redirect_stderr) {
  moe_memory m;
  moe_memory_measure(&m);
  moe_arena_take(&m.arena[MOE_MEM_WORK], -1);
}

Test(arena, sum_beyond_64_bits_aborts, .signal = SIGABRT, .init = cr_redirect_stderr) {
  moe_memory m;
  moe_memory_measure(&m);
  for (int i = 0; i < 3; i++) moe_arena_take(&m.arena[MOE_MEM_WORK], INT64_MAX / 2);
}
