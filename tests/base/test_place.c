/* Where a process says it is. */
#include "core/base/place.h"

#include <criterion/criterion.h>
#include <string.h>

Test(place, tells_phase_place_and_call) {
  moe_place_enter(MOE_PHASE_STEP, 7);
  moe_place_label("experts forward", 3);
  moe_place_collective("all_to_all");
  moe_place p = moe_place_read();
  cr_assert(p.phase == MOE_PHASE_STEP && p.step == 7 && p.layer == 3);
  cr_assert_str_eq(p.what, "experts forward");
  cr_assert_str_eq(p.inside, "all_to_all");
  moe_place_return();
  moe_place_wait("the device's work");
  p = moe_place_read();
  cr_assert_str_eq(p.inside, "the device's work");
  cr_assert_str_eq(p.collective, "all_to_all");
  moe_place_return();
  cr_assert_str_eq(moe_place_read().inside, "");
}

Test(place, a_new_phase_forgets_the_last_place) {
  moe_place_label("experts forward", 3);
  moe_place_enter(MOE_PHASE_SAVE, 8);
  moe_place p = moe_place_read();
  cr_assert_str_eq(p.what, "");
  cr_assert_eq(p.layer, -1);
}

Test(place, counts_collectives_but_not_other_waits) {
  int64_t before = moe_place_read().collectives;
  moe_place_collective("a");
  moe_place_return();
  moe_place_wait("b");
  moe_place_return();
  moe_place_collective("c");
  moe_place_return();
  cr_assert_eq(moe_place_read().collectives, before + 2);
}

Test(place, every_phase_has_a_name_and_a_setting) {
  for (int i = 0; i < MOE_PHASES; i++) {
    cr_assert(moe_phase_name((moe_phase)i)[0]);
    cr_assert_eq(strncmp(moe_phase_setting((moe_phase)i), "run.watchdog_", 13), 0);
  }
}
