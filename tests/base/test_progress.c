/* Where a process says it is. */
#include "core/base/progress.h"

#include <criterion/criterion.h>
#include <string.h>

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
