/* Matrix products: every form, type and awkward size against float64. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "tests/support/op_check.h"

typedef struct {
  int64_t m, n, k;
} sizes;

/* reference [m, n] = form(a, b) + beta c */
static void multiply(moe_gemm_form form, sizes s, const double *a, const double *b, double beta,
                     const double *c, double *reference) {
  for (int64_t i = 0; i < s.m * s.n; i++) reference[i] = beta > 0.0 ? c[i] : 0.0;
  for (int64_t i = 0; i < s.m; i++)
    for (int64_t l = 0; l < s.k; l++) {
      double left = form == MOE_TN ? a[l * s.m + i] : a[i * s.k + l];
      for (int64_t j = 0; j < s.n; j++)
        reference[i * s.n + j] += left * (form == MOE_NT ? b[j * s.k + l] : b[l * s.n + j]);
    }
}

static op_tensor left_of(moe_device *dev, moe_gemm_form form, sizes s, moe_dtype act) {
  op_shape shape = form == MOE_TN ? OP_SHAPE(s.k, s.m) : OP_SHAPE(s.m, s.k);
  return op_random(dev, "a", act, shape, 1.0);
}

static op_tensor right_of(moe_device *dev, moe_gemm_form form, sizes s, moe_dtype act) {
  op_shape shape = form == MOE_NT ? OP_SHAPE(s.n, s.k) : OP_SHAPE(s.k, s.n);
  return op_random(dev, "b", act, shape, 1.0);
}

static void check(moe_device *dev, moe_gemm_form form, sizes s, moe_dtype act, moe_dtype out,
                  float beta) {
  op_tensor a = left_of(dev, form, s, act), b = right_of(dev, form, s, act);
  op_tensor c = beta > 0.0f ? op_random(dev, "c", out, OP_SHAPE(s.m, s.n), 1.0)
                            : op_output(dev, "c", out, OP_SHAPE(s.m, s.n));
  double *reference = op_doubles(s.m * s.n);
  multiply(form, s, a.v, b.v, (double)beta, c.v, reference);
  op_ok(moe_gemm(dev, form, a.t, b.t, beta, c.t));
  op_close(c, reference, out == MOE_F32 ? op_sum_tolerance(dev, act) : op_tolerance(out));
}

static void all_forms(moe_device *dev, moe_dtype act) {
  const sizes list[] = {{1, 1, 1},      {3, 17, 1},      {1, 129, 3},  {17, 3, 127},
                        {127, 129, 17}, {129, 127, 129}, {64, 64, 64}, {2, 5, 1100}};
  for (int f = MOE_NN; f <= MOE_TN; f++)
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
      for (int beta = 0; beta <= 1; beta++) {
        check(dev, (moe_gemm_form)f, list[i], act, act, (float)beta);
        check(dev, (moe_gemm_form)f, list[i], act, MOE_F32, (float)beta);
      }
}

Test(gemm, agrees_with_float64_in_every_form_type_and_odd_size) {
  op_each(all_forms);
}

static void many_blocks(moe_device *dev, moe_dtype act) {
  for (int f = MOE_NN; f <= MOE_TN; f++) {
    check(dev, (moe_gemm_form)f, (sizes){33, 1030, 520}, act, act, 1.0f);
    check(dev, (moe_gemm_form)f, (sizes){1030, 33, 520}, act, MOE_F32, 0.0f);
    check(dev, (moe_gemm_form)f, (sizes){65, 67, 1600}, act, act, 0.0f);
  }
}

Test(gemm, agrees_with_float64_when_it_works_in_many_blocks) {
  op_each(many_blocks);
}

static void rounds_once(moe_device *dev, moe_dtype act) {
  if (act == MOE_F32) return;
  sizes s = {31, 43, 1300};
  op_tensor a = left_of(dev, MOE_NT, s, act), b = right_of(dev, MOE_NT, s, act);
  op_tensor c = op_random(dev, "c", act, OP_SHAPE(s.m, s.n), 30.0);
  double *reference = op_doubles(c.count);
  multiply(MOE_NT, s, a.v, b.v, 1.0, c.v, reference);
  op_ok(moe_gemm(dev, MOE_NT, a.t, b.t, 1.0f, c.t));
  op_read(&c);
  int64_t differ = 0;
  for (int64_t i = 0; i < c.count; i++) differ += c.v[i] != op_round(act, reference[i]);
  op_require(differ * 100 <= c.count, "%lld of %lld elements are not the exact sum, rounded",
             (long long)differ, (long long)c.count);
}

Test(gemm, rounds_half_precision_results_once) {
  op_each(rounds_once);
}

static void empty_sizes(moe_device *dev, moe_dtype act) {
  op_tensor none = op_output(dev, "none", act, OP_SHAPE(0, 5));
  op_tensor b = op_random(dev, "b", act, OP_SHAPE(5, 7), 1.0);
  op_tensor no_rows = op_output(dev, "no rows", act, OP_SHAPE(0, 7));
  op_ok(moe_gemm(dev, MOE_NN, none.t, b.t, 0.0f, no_rows.t));
  op_tensor c = op_output(dev, "c", act, OP_SHAPE(5, 5));
  op_ok(moe_gemm(dev, MOE_TN, none.t, none.t, 0.0f, c.t));
  op_equal(c, op_doubles(25));
  op_tensor kept = op_random(dev, "kept", act, OP_SHAPE(5, 5), 1.0), before = op_clone(dev, kept);
  op_ok(moe_gemm(dev, MOE_TN, none.t, none.t, 1.0f, kept.t));
  op_equal(kept, before.v);
}

Test(gemm, without_terms_clears_or_keeps_what_is_there) {
  op_each(empty_sizes);
}

static void passes_nan(moe_device *dev, moe_dtype act) {
  sizes s = {9, 11, 13};
  op_tensor b = right_of(dev, MOE_NN, s, act), c = op_output(dev, "c", act, OP_SHAPE(9, 11));
  double *values = op_doubles(9 * 13);
  values[4 * 13 + 5] = (double)NAN;
  op_tensor a = op_values(dev, "a", act, OP_SHAPE(9, 13), values);
  op_ok(moe_gemm(dev, MOE_NN, a.t, b.t, 0.0f, c.t));
  op_read(&c);
  for (int64_t i = 0; i < c.count; i++)
    op_require(isnan(c.v[i]) == (i / 11 == 4), "element %lld is %g", (long long)i, c.v[i]);
}

Test(gemm, passes_a_nan_on_to_its_row_alone) {
  op_each(passes_nan);
}

/* ---- threads ----------------------------------------------------------------------------- */

enum { M = 300, N = 200, K = 700 };
static double kept[4][M * N];
static int run;

static void keep_bits(moe_device *dev) {
  sizes s = {M, N, K};
  for (int i = 0; i < 2; i++) {
    moe_dtype act = i == 0 ? MOE_F32 : MOE_BF16;
    op_tensor a = left_of(dev, MOE_TN, s, act), b = right_of(dev, MOE_TN, s, act);
    op_tensor c = op_output(dev, "c", MOE_F32, OP_SHAPE(M, N));
    op_ok(moe_gemm(dev, MOE_TN, a.t, b.t, 0.0f, c.t));
    memcpy(kept[2 * run + i], op_read(&c), sizeof kept[0]);
  }
  run++;
}

Test(gemm, gives_the_same_bits_on_any_number_of_threads) {
  op_with_threads(1, keep_bits);
  op_with_threads(3, keep_bits);
  cr_assert_eq(memcmp(kept[0], kept[2], sizeof kept[0]), 0);
  cr_assert_eq(memcmp(kept[1], kept[3], sizeof kept[0]), 0);
}
