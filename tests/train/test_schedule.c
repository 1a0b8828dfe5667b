/* The learning-rate schedule against the oracle's values (tests/golden: steps/lr). */
#include "core/train/schedule.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

static moe_schedule golden(void) {
  moe_config c;
  moe_config_defaults(&c);
  c.train.steps = 20;
  c.optim.warmup_steps = 5;
  c.optim.lr = 1e-3;
  c.optim.min_lr = 1e-4;
  return moe_schedule_of(&c);
}

static void same(double got, double wanted) {
  cr_assert(epsilon_eq(dbl, got, wanted, 1e-15 + 1e-12 * wanted));
}

Test(schedule, follows_the_golden_run) {
  static const double lr[20] = {
      0.0002,
      0.0004,
      0.0006000000000000001,
      0.0008,
      0.001,
      0.0009901664203302125,
      0.0009610954559391703,
      0.0009140576474687263,
      0.0008511087728614862,
      0.0007750000000000001,
      0.0006890576474687264,
      0.0005970378084704442,
      0.000502962191529556,
      0.0004109423525312737,
      0.0003250000000000001,
      0.00024889122713851394,
      0.00018594235253127368,
      0.00013890454406082956,
      0.00010983357966978745,
      0.0001,
  };
  moe_schedule s = golden();
  for (int step = 1; step <= 20; step++) same(moe_schedule_lr(&s, step), lr[step - 1]);
}

Test(schedule, rises_in_equal_steps_and_peaks_at_the_end_of_warmup) {
  moe_schedule s = golden();
  s.warmup = 4;
  cr_assert(eq(dbl, moe_schedule_lr(&s, 1), 0.00025));
  cr_assert(eq(dbl, moe_schedule_lr(&s, 4), 0.001));
  cr_assert(lt(dbl, moe_schedule_lr(&s, 5), 0.001));
}

Test(schedule, starts_below_the_peak_without_warmup) {
  moe_schedule s = golden();
  s.warmup = 0;
  s.kind = MOE_SCHEDULE_LINEAR;
  same(moe_schedule_lr(&s, 1), 0.000955); /* one twentieth of the way down */
}

Test(schedule, cosine_reaches_the_floor_at_the_last_step_and_stays) {
  moe_schedule s = golden();
  cr_assert(eq(dbl, moe_schedule_lr(&s, 20), 1e-4));
  cr_assert(eq(dbl, moe_schedule_lr(&s, 21), 1e-4));
  cr_assert(eq(dbl, moe_schedule_lr(&s, INT64_MAX), 1e-4));
}

Test(schedule, linear_falls_by_equal_amounts) {
  moe_schedule s = golden();
  s.kind = MOE_SCHEDULE_LINEAR;
  same(moe_schedule_lr(&s, 5), 1e-3);
  same(moe_schedule_lr(&s, 6), 9.4e-4);
  same(moe_schedule_lr(&s, 10), 7e-4);
  same(moe_schedule_lr(&s, 20), 1e-4);
}

Test(schedule, constant_stays_at_the_peak) {
  moe_schedule s = golden();
  s.kind = MOE_SCHEDULE_CONSTANT;
  same(moe_schedule_lr(&s, 2), 4e-4);
  for (int step = 5; step < 30; step++) same(moe_schedule_lr(&s, step), 1e-3);
}

Test(schedule, wsd_stays_then_decays_over_the_last_steps) {
  moe_schedule s = golden();
  s.kind = MOE_SCHEDULE_WSD;
  s.decay = 4;
  same(moe_schedule_lr(&s, 16), 1e-3);
  same(moe_schedule_lr(&s, 17), 7.75e-4);
  same(moe_schedule_lr(&s, 19), 3.25e-4);
  same(moe_schedule_lr(&s, 20), 1e-4);
}

Test(schedule, wsd_decays_over_a_tenth_of_the_run_by_default) {
  moe_schedule s = golden();
  cr_assert(eq(i64, s.decay, 2));
  s.kind = MOE_SCHEDULE_WSD;
  same(moe_schedule_lr(&s, 18), 1e-3);
  same(moe_schedule_lr(&s, 19), 5.5e-4);
}

Test(schedule, floor_is_a_tenth_of_the_peak_unless_set) {
  moe_config c;
  moe_config_defaults(&c);
  c.optim.lr = 3e-4;
  same(moe_schedule_of(&c).floor, 3e-5);
  c.optim.min_lr = 0.0;
  same(moe_schedule_of(&c).floor, 0.0);
}

Test(schedule, a_run_that_is_all_warmup_ends_where_warmup_got) {
  moe_schedule s = golden();
  s.warmup = 40;
  same(moe_schedule_lr(&s, 20), 5e-4);
  same(moe_schedule_lr(&s, 100), 5e-4);
}
