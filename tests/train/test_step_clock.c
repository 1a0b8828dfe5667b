/* The clock of a step, on a CPU, where marks are the time of day. */
#include <criterion/criterion.h>
#include <math.h>
#include <time.h>

#include "core/train/step_clock.h"

static moe_device *dev;
static moe_step_clock a_clock;

enum { ROOM = 9 /* three passes */ };

static void open_clock(void) {
  moe_device_options options = {.kind = MOE_DEVICE_CPU, .threads = 1};
  cr_assert_eq(moe_device_open(&options, &dev), MOE_OK);
  cr_assert_eq(moe_step_clock_create(dev, ROOM, &a_clock), MOE_OK);
}

static void close_clock(void) {
  moe_step_clock_destroy(&a_clock);
  moe_device_close(dev);
}

TestSuite(step_clock, .init = open_clock, .fini = close_clock);

enum { UNIT_MS = 5 };

static void work(int units) {
  struct timespec t = {0, units * UNIT_MS * 1000000L};
  nanosleep(&t, NULL);
}

/* From one lap's end to another's, in seconds; lap -1 is the start. */
static double between(int from, int to) {
  const moe_mark *first = from < 0 ? &a_clock.start : &a_clock.laps[from].end;
  return moe_device_between(dev, first, &a_clock.laps[to].end);
}

static void expect(const double *seconds, moe_step_part part, double want, int least_units) {
  cr_assert(fabs(seconds[part] - want) < 1e-9, "part %d: %.9g s, not %.9g", (int)part,
            seconds[part], want);
  cr_assert(seconds[part] >= 1e-3 * UNIT_MS * least_units, "part %d: %g s", (int)part,
            seconds[part]);
}

static void pass(int forward, int backward) {
  moe_step_clock_lap(&a_clock, MOE_PART_DATA);
  work(forward);
  moe_step_clock_lap(&a_clock, MOE_PART_FORWARD);
  work(backward);
  moe_step_clock_lap(&a_clock, MOE_PART_BACKWARD);
}

Test(step_clock, gives_each_part_its_time_and_the_rest_to_data) {
  double seconds[MOE_STEP_PARTS] = {0.0};
  moe_step_clock_start(&a_clock);
  work(3);
  pass(1, 2);
  work(2);
  pass(1, 2);
  moe_step_clock_read(&a_clock, seconds);
  expect(seconds, MOE_PART_DATA, between(-1, 0) + between(2, 3), 5);
  expect(seconds, MOE_PART_FORWARD, between(0, 1) + between(3, 4), 2);
  expect(seconds, MOE_PART_BACKWARD, between(1, 2) + between(4, 5), 4);
  expect(seconds, MOE_PART_OPTIMIZER, 0.0, 0);
}

/* What was only recorded does not count; a launch makes its laps' marks anew, as pass does here. */
Test(step_clock, counts_recorded_laps_as_often_as_they_are_launched) {
  double seconds[MOE_STEP_PARTS] = {0.0};
  moe_step_clock_start(&a_clock);
  pass(5, 5);
  cr_assert_eq(moe_step_clock_rewind(&a_clock, 0), 3);
  for (int i = 0; i < 3; i++) {
    pass(1, 2);
    moe_step_clock_rewind(&a_clock, 0);
  }
  for (int i = 0; i < 3; i++) moe_step_clock_repeat(&a_clock, 0, 3);
  moe_step_clock_read(&a_clock, seconds);
  double forward = 3.0 * between(0, 1), backward = 3.0 * between(1, 2);
  expect(seconds, MOE_PART_FORWARD, forward, 3);
  expect(seconds, MOE_PART_BACKWARD, backward, 6);
  double rest = between(-1, 2) - forward - backward;
  expect(seconds, MOE_PART_DATA, rest > 0.0 ? rest : 0.0, 0);
}
