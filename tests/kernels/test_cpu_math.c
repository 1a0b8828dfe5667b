/* The CPU kernels' exp and row conversions. */
#include <criterion/criterion.h>
#include <math.h>

#include "kernels/cpu/cpu_math.h"

Test(cpu_math, exp_is_within_two_units_in_the_last_place) {
  double worst = 0.0;
  for (int64_t i = 0; i <= 2000000; i++) {
    float x = (float)(-87.33 + (88.72 + 87.33) * (double)i / 2e6);
    double exact = exp((double)x);
    float near = (float)exact;
    double unit = (double)(nextafterf(near, INFINITY) - near);
    worst = fmax(worst, fabs((double)moe_expf(x) - exact) / unit);
  }
  cr_assert_leq(worst, 2.0, "%.3f units", worst);
}

Test(cpu_math, exp_is_exact_at_zero_and_right_at_the_ends) {
  cr_assert_eq(moe_expf(0.0f), 1.0f);
  cr_assert_eq(moe_expf(-0.0f), 1.0f);
  cr_assert_eq(moe_expf(-87.4f), 0.0f);
  cr_assert_eq(moe_expf(-INFINITY), 0.0f);
  cr_assert(isfinite(moe_expf(88.72f)));
  cr_assert(isinf(moe_expf(88.8f)));
  cr_assert(isinf(moe_expf(INFINITY)));
  cr_assert(isnan(moe_expf(NAN)));
}

/* Vector loops have a body and a tail: every length and offset must give the scalar's bits. */
Test(cpu_math, conversions_of_any_length_and_offset_match_the_scalar_ones) {
  enum { N = 100 };
  uint16_t bits[N], back[N];
  float values[N];
  for (int i = 0; i < N; i++) bits[i] = (uint16_t)(i * 311 + 7);
  for (int half = 0; half < 2; half++)
    for (int64_t at = 0; at < 9; at++)
      for (int64_t n = 0; n < N - at; n++) {
        moe_tensor from = moe_tensor_1d(bits, half ? MOE_F16 : MOE_BF16, N);
        moe_tensor to = moe_tensor_1d(back, half ? MOE_F16 : MOE_BF16, N);
        memset(back, 0, sizeof back);
        moe_cpu_load(from, at, n, values);
        moe_cpu_store(to, at, n, values);
        for (int64_t i = 0; i < N; i++) cr_assert_eq(back[i], i >= at && i < at + n ? bits[i] : 0);
        for (int64_t i = 0; i < n; i++)
          cr_assert_eq(values[i],
                       half ? moe_f16_to_f32(bits[at + i]) : moe_bf16_to_f32(bits[at + i]));
      }
}

Test(cpu_math, a_view_of_f32_is_the_tensor_itself) {
  float data[5] = {1, 2, 3, 4, 5}, buffer[5];
  moe_tensor t = moe_tensor_1d(data, MOE_F32, 5);
  cr_assert_eq(moe_cpu_view(t, 2, 3, buffer), data + 2);
}
