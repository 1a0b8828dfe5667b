/* What a GPU's driver tells of its power and clocks against what work must draw, and against the
 * count of the clock in profiles. */
#include <criterion/criterion.h>

#include "kernels/power.h"
#include "kernels/profile.h"
#include "tests/gpu/both.h"

enum { N = 4096 };
static moe_device *gpu;
static both a, b, c;

static void set_up(void) {
  both_open();
  gpu = both_dev[GPU_SIDE];
  a = both_random("a", MOE_F16, SHAPE(N, N), 1.0), b = both_random("b", MOE_F16, SHAPE(N, N), 1.0);
  c = both_output("c", MOE_F16, SHAPE(N, N));
}

static void multiply(void) {
  ON_GPU(moe_gemm(dev, MOE_NT, a.t[s], b.t[s], 0.0f, c.t[s]));
}

TestSuite(gpu_power, .init = set_up, .fini = both_close, .timeout = 60);

/* Not more than waiting does: other tests may use the GPU at the same time. */
Test(gpu_power, products_draw_a_good_part_of_the_limit) {
  moe_power *meter = moe_power_open(gpu);
  if (!meter) cr_skip_test("the driver does not tell");
  moe_power_run busy = {.dev = gpu, .meter = meter, .seconds = 0.5};
  while (moe_power_goes_on(&busy)) multiply();
  moe_power_close(meter);
  moe_power_use u = busy.use;
  cr_expect(u.samples >= 5 && busy.calls > 10);
  cr_expect(u.watts > 0.3 * u.limit_watts && u.watts < 1.2 * u.limit_watts, "%g W of %g", u.watts,
            u.limit_watts);
  cr_expect(u.mhz > 0.8 * u.set_mhz && u.mhz <= 1.01 * u.max_mhz, "%g MHz, set %g of %g", u.mhz,
            u.set_mhz, u.max_mhz);
}

/* Rows of what has run since the profile began, which are all products. */
static moe_profile_row profile_of_products(bool clocks, int times) {
  moe_profile_row row[2];
  int rows = 0;
  cr_assert_eq(moe_profile_start(gpu, clocks), MOE_OK);
  for (int i = 0; i < times; i++) multiply();
  cr_assert_eq(moe_profile_stop(gpu, row, 2, &rows), MOE_OK);
  cr_assert_eq(rows, 1);
  cr_assert_eq(row[0].calls, times);
  return row[0];
}

/* The driver does not know what the supply takes off. */
Test(gpu_power, clocks_of_a_profile_are_those_of_the_whole) {
  moe_power *meter = moe_power_open(gpu);
  if (!meter) cr_skip_test("the driver does not tell");
  (void)profile_of_products(true, 1000); /* clocks settle */
  moe_power_begin(meter);
  moe_profile_row counted = profile_of_products(true, 3000);
  moe_power_use told = moe_power_end(meter);
  moe_power_close(meter);
  double mhz = 1e-6 * counted.cycles / counted.cycle_seconds;
  cr_expect(mhz > 0.97 * told.mhz && mhz < 1.03 * told.mhz, "%g MHz, of the whole %g", mhz,
            told.mhz);
  cr_expect(mhz > 0.8 * told.set_mhz && mhz < 1.02 * told.set_mhz, "%g MHz, set %g", mhz,
            told.set_mhz);
}

Test(gpu_power, clocks_are_counted_for_nearly_all_the_time_and_only_when_asked) {
  (void)profile_of_products(false, 10); /* code is loaded */
  moe_profile_row counted = profile_of_products(true, 100);
  double counted_s = counted.cycle_seconds, passed_s = counted.seconds;
  cr_expect(counted_s > 0.9 * passed_s && counted_s < 1.1 * passed_s, "%g of %g s", counted_s,
            passed_s);
  cr_expect_eq(profile_of_products(false, 10).cycle_seconds, 0.0);
}
