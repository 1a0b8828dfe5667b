/* Guarded transports. */
#include "parallel/guard.h"

#include <criterion/criterion.h>

/* Fails as long as *left counts down. */
static moe_status fails_for_a_while(void *left) {
  int *n = left;
  return (*n)-- > 0 ? moe_fail(MOE_FAILED, "torn") : MOE_OK;
}

static int failures_in(int looks) {
  int n = 0;
  for (int i = 0; i < looks; i++) n += moe_guard_look() != MOE_OK;
  return n;
}

Test(guard, a_passing_error_is_left_to_the_training_thread) {
  int left = 2;
  cr_assert_eq(moe_guard_add(fails_for_a_while, &left), MOE_OK);
  cr_assert_eq(failures_in(6), 0);
}

Test(guard, an_error_that_stays_is_told_with_its_message) {
  int left = 3;
  cr_assert_eq(moe_guard_add(fails_for_a_while, &left), MOE_OK);
  cr_assert_eq(failures_in(2), 0);
  cr_assert_eq(moe_guard_look(), MOE_FAILED);
  cr_assert_str_eq(moe_error_message(), "torn");
}

Test(guard, what_was_removed_is_not_asked) {
  int one = 100, two = 100;
  cr_assert_eq(moe_guard_add(fails_for_a_while, &one), MOE_OK);
  cr_assert_eq(moe_guard_add(fails_for_a_while, &two), MOE_OK);
  moe_guard_remove(&two);
  moe_guard_remove(&one);
  moe_guard_remove(&one);
  cr_assert_eq(failures_in(6), 0);
  cr_assert(one == 100 && two == 100);
}
