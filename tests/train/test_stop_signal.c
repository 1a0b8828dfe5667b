/* Stopping on request and by the wall clock. Each test is a process of its own, so each begins
 * without a request. */
#include "core/train/stop_signal.h"

#include <criterion/criterion.h>
#include <signal.h>

static void asks(int number) {
  moe_stop_listen();
  cr_assert_not(moe_stop_requested());
  raise(number);
  cr_assert(moe_stop_requested());
}

Test(stop_signal, term_asks_for_an_end) {
  asks(SIGTERM);
}

Test(stop_signal, usr2_asks_for_an_end) {
  asks(SIGUSR2);
}

Test(stop_signal, one_int_asks_also_after_other_signals) {
  asks(SIGTERM);
  raise(SIGUSR2);
  raise(SIGTERM);
  raise(SIGINT);
  cr_assert(moe_stop_requested());
}

Test(stop_signal, a_second_int_ends_the_process, .signal = SIGINT) {
  asks(SIGINT);
  raise(SIGINT);
}

Test(stop_signal, listening_again_forgets_nothing) {
  asks(SIGUSR2);
  moe_stop_listen();
  cr_assert(moe_stop_requested());
}

Test(stop_signal, what_cannot_stop_that_way_ends_by_the_signal_that_came, .signal = SIGTERM) {
  asks(SIGTERM);
  moe_stop_unlisten();
}

Test(stop_signal, what_cannot_stop_that_way_ends_by_signals_to_come, .signal = SIGUSR2) {
  moe_stop_listen();
  moe_stop_unlisten();
  raise(SIGUSR2);
}

Test(wall_clock, no_limit_is_never_up) {
  moe_stop_listen();
  moe_wall_clock w = moe_wall_clock_start(0.0, 1e6);
  cr_assert_not(moe_wall_clock_is_up(&w));
}

Test(wall_clock, leaves_time_for_two_expected_saves) {
  moe_stop_listen();
  moe_wall_clock enough = moe_wall_clock_start(100.0, 40.0);
  moe_wall_clock scarce = moe_wall_clock_start(100.0, 50.0);
  cr_assert_not(moe_wall_clock_is_up(&enough));
  cr_assert(moe_wall_clock_is_up(&scarce));
}

Test(wall_clock, a_measured_save_counts_when_it_took_longer_than_expected) {
  moe_stop_listen();
  moe_wall_clock w = moe_wall_clock_start(100.0, 10.0);
  moe_wall_clock_saved(&w, 5.0);
  moe_wall_clock_saved(&w, 20.0);
  cr_assert_not(moe_wall_clock_is_up(&w));
  moe_wall_clock_saved(&w, 50.0);
  moe_wall_clock_saved(&w, 5.0);
  cr_assert(moe_wall_clock_is_up(&w));
}

Test(wall_clock, leaves_time_for_two_stretches_between_boundaries) {
  moe_stop_listen();
  moe_wall_clock w = moe_wall_clock_start(100.0, 0.0);
  w.last_s -= 40.0; /* as if the boundary before had been 40 s ago */
  cr_assert_not(moe_wall_clock_is_up(&w));
  cr_assert_not(moe_wall_clock_is_up(&w));
  w.last_s -= 50.0;
  cr_assert(moe_wall_clock_is_up(&w));
  cr_assert(moe_wall_clock_is_up(&w), "the longest stretch counts, not the last");
}
