/* Where a process says it is. */
#include "core/base/progress.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>

Test(progress, tells_phase_place_and_call) {
  moe_progress_enter(MOE_PHASE_STEP, 7);
  moe_progress_label("experts forward", 3);
  moe_progress_collective("all_to_all");
  moe_place p = moe_progress_read();
  cr_assert(p.phase == MOE_PHASE_STEP && p.step == 7 && p.layer == 3);
  cr_assert_str_eq(p.what, "experts forward");
  cr_assert_str_eq(p.inside, "all_to_all");
  moe_progress_return();
  moe_progress_wait("the device's work");
  p = moe_progress_read();
  cr_assert_str_eq(p.inside, "the device's work");
  cr_assert_str_eq(p.collective, "all_to_all");
  moe_progress_return();
  cr_assert_str_eq(moe_progress_read().inside, "");
}

Test(progress, a_new_phase_forgets_the_last_place) {
  moe_progress_label("experts forward", 3);
  moe_progress_enter(MOE_PHASE_SAVE, 8);
  moe_place p = moe_progress_read();
  cr_assert_str_eq(p.what, "");
  cr_assert_eq(p.layer, -1);
}

Test(progress, counts_collectives_but_not_other_waits) {
  int64_t before = moe_progress_read().collectives;
  moe_progress_collective("a");
  moe_progress_return();
  moe_progress_wait("b");
  moe_progress_return();
  moe_progress_collective("c");
  moe_progress_return();
  cr_assert_eq(moe_progress_read().collectives, before + 2);
}

Test(progress, every_phase_has_a_name_and_a_setting) {
  for (int i = 0; i < MOE_PHASES; i++) {
    cr_assert(moe_phase_name((moe_phase)i)[0]);
    cr_assert_eq(strncmp(moe_phase_setting((moe_phase)i), "run.watchdog_", 13), 0);
  }
}

static atomic_bool done;

static void *read_on(void *unused) {
  (void)unused;
  moe_place a = moe_progress_read(), b;
  int64_t wrong = 0;
  while (!atomic_load(&done)) {
    b = moe_progress_read();
    if (b.step != a.step && b.signs == a.signs) wrong++;
    a = b;
  }
  return (void *)wrong;
}

Test(progress, a_new_place_is_never_seen_without_a_new_sign) {
  pthread_t reader;
  void *wrong;
  cr_assert_eq(pthread_create(&reader, NULL, read_on, NULL), 0);
  for (int64_t i = 0; i < 3000000; i++) moe_progress_enter(MOE_PHASE_STEP, i);
  atomic_store(&done, true);
  pthread_join(reader, &wrong);
  cr_assert_null(wrong, "%lld times", (long long)(intptr_t)wrong);
}
