/* Power meters: what samples add up to, and libraries that tell little or nothing. */
#include <criterion/criterion.h>
#include <criterion/redirect.h>
#include <stdlib.h>
#include <unistd.h>

#include "core/base/log.h"
#include "kernels/power.h"

#define LIBRARY(age) MOE_BIN_DIR "/libmoe_fake_nvml_" age ".so"
static const char place[] = "0000:19:00.0";

/* ---- arithmetic ------------------------------------------------------------------------------ */

static moe_power_sum sum;

static void told(double at_s, int64_t millijoules, double watts) {
  moe_nvml_sample sample = {.millijoules = millijoules, .watts = watts, .sm_mhz = 1500};
  moe_power_add(&sum, at_s, &sample);
}

/* Each 10 ms from `from` on: a counter that moves each 100 ms, by 70 J and at first by `before`. */
static void tell_700_watts(int from_ms, int to_ms, int64_t before) {
  for (int t = from_ms; t < to_ms; t += 10) {
    int steps = t / 100;
    told(1e-3 * t, 1000000 + (steps > 0 ? before + 70000 * (int64_t)(steps - 1) : 0), 650);
  }
}

Test(power, is_counted_between_two_steps_of_the_counter) {
  tell_700_watts(50, 560, 70000);
  moe_power_use use = moe_power_total(&sum, 0.51);
  cr_expect_float_eq(use.watts, 700.0, 1e-9);
  cr_expect_float_eq(use.joules, 357.0, 1e-9);
  cr_expect_eq(use.samples, 51);
}

Test(power, of_before_the_first_step_does_not_count) {
  tell_700_watts(50, 560, 20000);
  cr_expect_float_eq(moe_power_total(&sum, 0.51).watts, 700.0, 1e-9);
}

Test(power, loses_one_step_where_the_counter_begins_anew) {
  int64_t counter[] = {10, 5000, 10000, 15000, 3, 5003, 10003};
  for (int i = 0; i < 7; i++) told(0.01 * i, counter[i], 0);
  moe_power_use use = moe_power_total(&sum, 1.0);
  cr_expect_float_eq(use.watts, 500.0, 1e-9);
  cr_expect_float_eq(sum.counted_s, 0.04, 1e-12);
}

Test(power, is_a_mean_where_no_counter_moves) {
  for (int i = 0; i < 4; i++) told(0.01 * i, 7, 400.0 + 100.0 * i);
  moe_power_use use = moe_power_total(&sum, 2.0);
  cr_expect_float_eq(use.watts, 550.0, 1e-9);
  cr_expect_float_eq(use.joules, 1100.0, 1e-9);
}

Test(power, that_is_told_now_and_then_is_the_mean_of_what_was_told) {
  told(0.00, -1, 600);
  told(0.01, -1, 0);
  told(0.02, -1, 400);
  cr_expect_float_eq(moe_power_total(&sum, 1.0).watts, 500.0, 1e-9);
}

Test(power, counts_how_often_the_limit_held_the_clock_down) {
  const uint64_t reasons[] = {0x4, 0x1, 0x44, 0x4, 0x20};
  for (int i = 0; i < 5; i++)
    moe_power_add(&sum, 0.01 * i,
                  &(moe_nvml_sample){.millijoules = -1, .reasons = reasons[i], .sm_mhz = 1000 + i});
  moe_power_use use = moe_power_total(&sum, 1.0);
  cr_expect_float_eq(use.capped, 0.6, 1e-12);
  cr_expect_float_eq(use.slowed, 0.4, 1e-12);
  cr_expect_float_eq(use.set_mhz, 1002.0, 1e-9);
  cr_expect_eq(use.watts, 0.0);
}

Test(power, of_no_samples_is_not_known) {
  moe_power_use use = moe_power_total(&sum, 1.0);
  cr_expect_eq(use.samples, 0.0);
  cr_expect_eq(use.joules, 0.0);
}

/* ---- libraries ------------------------------------------------------------------------------- */

static void need_libraries(void) {
  if (access(LIBRARY("new"), R_OK) != 0 || access(LIBRARY("old"), R_OK) != 0)
    cr_skip_test("the libraries are not beside this program");
}

static moe_power_use measure(const char *library) {
  moe_power *meter = moe_power_open_at(library, place);
  cr_assert(meter);
  moe_power_begin(meter);
  usleep(300000);
  moe_power_use use = moe_power_end(meter);
  moe_power_close(meter);
  return use;
}

static void expect_500_watts(moe_power_use use) {
  cr_expect_float_eq(use.watts, 500.0, 50.0, "%g W", use.watts);
  cr_expect_float_eq(use.joules, use.watts * use.seconds, 1e-9);
  cr_expect_geq(use.seconds, 0.3);
  cr_expect_eq(use.set_mhz, 1500.0);
  cr_expect_eq(use.max_mhz, 1980.0);
  cr_expect_eq(use.memory_mhz, 3201.0);
  cr_expect_eq(use.mhz, 0.0); /* no device that counts */
  cr_expect_eq(use.capped, 1.0);
}

TestSuite(power_library, .init = need_libraries, .timeout = 20);

Test(power_library, is_read_while_a_span_lasts) {
  moe_power_use use = measure(LIBRARY("new"));
  expect_500_watts(use);
  cr_expect_eq(use.limit_watts, 700.0);
  cr_expect_geq(use.samples, 3.0);
}

Test(power_library, may_be_asked_again_and_again) {
  moe_power *meter = moe_power_open_at(LIBRARY("new"), place);
  for (int i = 0; i < 3; i++) {
    moe_power_begin(meter);
    moe_power_begin(meter); /* goes on */
    usleep(50000);
    moe_power_use use = moe_power_end(meter);
    cr_expect(use.samples >= 1 && use.samples < 20);
    cr_expect_eq(moe_power_end(meter).samples, 0.0); /* nothing was begun */
  }
  moe_power_begin(meter);
  moe_power_close(meter);
}

Test(power_library, may_wrap_its_counter) {
  setenv("FAKE_NVML", "wraps", 1);
  expect_500_watts(measure(LIBRARY("new")));
}

Test(power_library, of_an_old_driver_has_no_counter_and_other_names) {
  moe_power_use use = measure(LIBRARY("old"));
  expect_500_watts(use);
  cr_expect_eq(use.limit_watts, 0.0);
}

Test(power_library, that_refuses_figures_leaves_those_out) {
  setenv("FAKE_NVML", "refuses-figures", 1);
  moe_power_use use = measure(LIBRARY("new"));
  cr_expect_geq(use.samples, 1.0);
  cr_expect_eq(use.set_mhz, 1500.0);
  cr_expect_eq(use.watts, 0.0);
  cr_expect_eq(use.limit_watts, 0.0);
  cr_expect_eq(use.capped, 0.0);
}

static void expect_none(const char *library, const char *bus_id, const char *wish,
                        const char *message) {
  setenv("FAKE_NVML", wish, 1);
  moe_log_init("test", -1);
  cr_redirect_stderr();
  cr_expect_null(moe_power_open_at(library, bus_id));
  cr_expect_null(moe_power_open_at(library, bus_id));
  fflush(stderr);
  cr_expect_stderr_eq_str(message); /* once */
}
#define NOT_AVAILABLE "test: power and clocks: not available: "

Test(power_library, that_does_not_start_is_said_once) {
  expect_none(LIBRARY("new"), place, "refuses-start",
              NOT_AVAILABLE "libnvidia-ml does not start: is the driver's version its own?\n");
}
Test(power_library, that_refuses_the_gpu_is_said_once) {
  expect_none(LIBRARY("new"), place, "refuses-gpu",
              NOT_AVAILABLE "libnvidia-ml does not show this GPU: is it this user's to see?\n");
}
Test(power_library, that_does_not_know_the_gpu_is_said_once) {
  expect_none(LIBRARY("new"), "0000:1A:00.0", "",
              NOT_AVAILABLE "libnvidia-ml does not show this GPU: is it this user's to see?\n");
}
Test(power_library, without_the_calls_is_said_once) {
  expect_none("libm.so.6", place, "", NOT_AVAILABLE "the driver's libnvidia-ml is too old\n");
}
Test(power_library, that_is_missing_is_said_once) {
  expect_none("libnvidia-ml-of-no-driver.so", place, "",
              NOT_AVAILABLE "no libnvidia-ml, which comes with the driver\n");
}

/* ---- hosts ----------------------------------------------------------------------------------- */

static moe_device *host(void) {
  moe_device *dev = NULL;
  moe_device_options options = {.kind = MOE_DEVICE_CPU, .threads = 1};
  cr_assert_eq(moe_device_open(&options, &dev), MOE_OK);
  return dev;
}

Test(power, of_a_host_is_not_told_and_nothing_is_said) {
  moe_device *dev = host();
  moe_log_init("test", -1);
  cr_redirect_stderr();
  moe_power *meter = moe_power_open(dev);
  cr_expect_null(meter);
  moe_power_begin(meter);
  cr_expect_eq(moe_power_end(meter).samples, 0.0);
  moe_power_close(meter);
  moe_device_close(dev);
  fflush(stderr);
  cr_expect_stderr_eq_str("");
}

/* Returns what was measured; *calls of the work in all, *worked_s from the first to the last's end.
 */
static moe_power_run go_on(moe_power *meter, int64_t *calls, double *worked_s) {
  moe_device *dev = host();
  moe_power_run run = {.dev = dev, .meter = meter, .seconds = 0.1};
  double begin = moe_clock_s();
  for (*calls = 0; moe_power_goes_on(&run); ++*calls) {
    usleep(1000);
    *worked_s = moe_clock_s() - begin;
  }
  cr_expect_eq(run.status, MOE_OK);
  moe_device_close(dev);
  return run;
}

Test(power, is_measured_of_work_that_goes_on) {
  int64_t calls;
  double worked_s;
  moe_power_run run = go_on(NULL, &calls, &worked_s);
  cr_expect(run.calls >= 1 && run.calls < calls, "%lld of %lld", (long long)run.calls,
            (long long)calls);
  cr_expect(run.use.seconds >= 0.1 && run.use.seconds + 0.05 <= worked_s + 0.005);
  cr_expect_eq(run.use.samples, 0.0);
}

Test(power_library, does_not_lengthen_the_time_of_work) {
  int64_t calls;
  double worked_s;
  moe_power *meter = moe_power_open_at(LIBRARY("new"), place);
  moe_power_run run = go_on(meter, &calls, &worked_s);
  moe_power_close(meter);
  cr_expect(run.use.seconds + 0.05 <= worked_s + 0.005, "%g s of %g", run.use.seconds, worked_s);
  cr_expect_float_eq(run.use.watts, 500.0, 50.0);
}
