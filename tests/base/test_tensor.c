#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/base/tensor.h"

Test(tensor, sizes_and_names_follow_the_table) {
  cr_assert_eq(moe_dtype_size(MOE_F32), 4);
  cr_assert_eq(moe_dtype_size(MOE_BF16), 2);
  cr_assert_eq(moe_dtype_size(MOE_F16), 2);
  cr_assert_eq(moe_dtype_size(MOE_I32), 4);
  cr_assert_eq(moe_dtype_size(MOE_F64), 8);
  cr_assert_str_eq(moe_dtype_name(MOE_BF16), "bf16");
}

Test(tensor, rows_are_a_view) {
  float data[6 * 4];
  moe_tensor t = moe_tensor_3d(data, MOE_F32, 6, 2, 2);
  moe_tensor rows = moe_tensor_rows(t, 2, 3);
  cr_assert_eq(rows.data, (void *)(data + 8));
  cr_assert_eq(rows.shape[0], 3);
  cr_assert_eq(moe_tensor_count(rows), 12);
  cr_assert_eq(moe_tensor_count(moe_tensor_rows(t, 6, 0)), 0);
  cr_assert_not(moe_tensor_present(moe_tensor_rows(moe_tensor_2d(NULL, MOE_F32, 4, 4), 1, 2)));
}

Test(tensor, every_half_survives_the_way_through_float) {
  for (uint32_t h = 0; h < 65536; h++) {
    float f = moe_f16_to_f32((uint16_t)h);
    if (isnan(f)) {
      cr_assert((h & 0x7c00) == 0x7c00 && (h & 0x3ff) != 0);
      cr_assert(isnan(moe_f16_to_f32(moe_f32_to_f16(f))));
    } else {
      cr_assert_eq(moe_f32_to_f16(f), h, "half %04x", h);
    }
  }
}

/* From the definition: sign * 2^(e - 15) * (1 + f / 1024), or 2^-14 * f / 1024. */
Test(tensor, halves_have_ieee_values) {
  for (uint32_t h = 0; h < 65536; h++) {
    int e = (int)(h >> 10 & 31), f = (int)(h & 1023);
    if (e == 31) continue;
    double value = e > 0 ? ldexp(1.0 + f / 1024.0, e - 15) : ldexp(f / 1024.0, -14);
    cr_assert_eq((double)moe_f16_to_f32((uint16_t)h), h & 0x8000 ? -value : value, "half %04x", h);
  }
  cr_assert_eq(moe_f16_to_f32(0x7c00), INFINITY);
  cr_assert_eq(moe_f16_to_f32(0xfc00), -INFINITY);
}

static float any_float(uint32_t i) {
  uint32_t words[4];
  moe_philox(7, i, 0, words);
  uint32_t bits = words[0];
  if (i % 2) bits = (bits & 0x8fffffffu) | 0x30000000u; /* half of them near the range of halves */
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

/* The nearest of the result and its neighbours, ties to the even one. */
static void assert_nearest(float f, uint16_t got, float (*widen)(uint16_t)) {
  double here = fabs((double)widen(got) - (double)f);
  for (int step = -1; step <= 1; step += 2) {
    uint16_t other = (uint16_t)(got + step);
    float value = widen(other);
    if (!isfinite(value) || (other ^ got) & 0x8000) continue;
    double there = fabs((double)value - (double)f);
    cr_assert(here < there || (here == there && got % 2 == 0), "%a became %04x", f, got);
  }
}

Test(tensor, halves_round_to_the_nearest_even) {
  for (uint32_t i = 0; i < 300000; i++) {
    float f = any_float(i);
    uint16_t got = moe_f32_to_f16(f);
    if (isnan(f))
      cr_assert(isnan(moe_f16_to_f32(got)));
    else if (fabsf(f) >= 65520.0f)
      cr_assert_eq(moe_f16_to_f32(got), copysignf(INFINITY, f));
    else
      assert_nearest(f, got, moe_f16_to_f32);
  }
  cr_assert_eq(moe_f32_to_f16(65519.996f), 0x7bff);
  cr_assert_eq(moe_f32_to_f16(-0.0f), 0x8000);
  cr_assert_eq(moe_f32_to_f16(0x1p-25f), 0);          /* tie to even */
  cr_assert_eq(moe_f32_to_f16(0x1.000002p-25f), 1);   /* just above it */
  cr_assert_eq(moe_f32_to_f16(0x1.ff8p-15f), 0x03ff); /* largest subnormal */
}

Test(tensor, bfloats_round_to_the_nearest_even) {
  for (uint32_t i = 0; i < 300000; i++) {
    float f = any_float(i);
    uint16_t got = moe_f32_to_bf16(f);
    if (isnan(f))
      cr_assert(isnan(moe_bf16_to_f32(got)));
    else if (isfinite(moe_bf16_to_f32(got)))
      assert_nearest(f, got, moe_bf16_to_f32);
    else
      cr_assert_gt(fabsf(f), 0x1.fep127f);
  }
  cr_assert_eq(moe_f32_to_bf16(1.0f), 0x3f80);
  cr_assert_eq(moe_f32_to_bf16(0x1.01p0f), 0x3f80); /* tie to even */
  cr_assert_eq(moe_f32_to_bf16(0x1.03p0f), 0x3f82);
  cr_assert_eq(moe_f32_to_bf16(INFINITY), 0x7f80);
  for (uint32_t b = 0; b < 65536; b++)
    if (!isnan(moe_bf16_to_f32((uint16_t)b)))
      cr_assert_eq(moe_f32_to_bf16(moe_bf16_to_f32((uint16_t)b)), b);
}

/* ---- many at a time ---- */

static float one_to_f32(const void *data, moe_dtype type, int64_t i) {
  if (type == MOE_F32) return ((const float *)data)[i];
  uint16_t bits = ((const uint16_t *)data)[i];
  return type == MOE_BF16 ? moe_bf16_to_f32(bits) : moe_f16_to_f32(bits);
}

Test(tensor, many_elements_convert_as_each_does_alone) {
  static const moe_dtype types[] = {MOE_F32, MOE_BF16, MOE_F16};
  enum { N = 65536 + 13 };
  static uint32_t from[N];
  static char to[4 * N];
  for (int64_t i = 0; i < N; i++) { /* any bits: NaNs, infinities, subnormals of each type */
    uint32_t draw[4];
    moe_philox(3, (uint64_t)i, 0, draw);
    from[i] = draw[0];
  }
  for (int a = 0; a < 3; a++)
    for (int b = 0; b < 3; b++) {
      moe_convert(from, types[a], to, types[b], N);
      for (int64_t i = 0; i < N; i++) {
        float x = one_to_f32(from, types[a], i);
        uint32_t bits;
        uint16_t half = types[b] == MOE_BF16 ? moe_f32_to_bf16(x) : moe_f32_to_f16(x);
        if (a == b) half = ((uint16_t *)from)[i];
        memcpy(&bits, &x, sizeof bits);
        if (types[b] == MOE_F32)
          cr_assert_eq(((uint32_t *)to)[i], bits, "%d to %d, element %d", a, b, (int)i);
        else
          cr_assert_eq(((uint16_t *)to)[i], half, "%d to %d, element %d", a, b, (int)i);
      }
    }
}

Test(tensor, one_value_that_is_not_finite_is_found_anywhere) {
  static float wide[1000];
  static uint16_t narrow[1000];
  for (int at = 0; at < 1000; at += 37) {
    for (int i = 0; i < 1000; i++) wide[i] = 3e38f, narrow[i] = 0x7bff;
    cr_assert(moe_all_finite(wide, MOE_F32, 1000));
    cr_assert(moe_all_finite(narrow, MOE_F16, 1000) && moe_all_finite(narrow, MOE_BF16, 1000));
    wide[at] = at % 2 ? INFINITY : -NAN;
    narrow[at] = at % 2 ? 0xfc00 : 0x7c01;
    cr_assert(!moe_all_finite(wide, MOE_F32, 1000));
    cr_assert(!moe_all_finite(narrow, MOE_F16, 1000));
    narrow[at] = at % 2 ? 0xff80 : 0x7fff;
    cr_assert(!moe_all_finite(narrow, MOE_BF16, 1000));
  }
}

/* ---- halves --------------------------------------------------------------------------------- */

/* A master [upper, low] parted and joined: itself, but for the tie that goes down to an even
 * weight, which gives up one unit of its last place. The weight stays its rounding. */
static void expect_halves(uint32_t upper, uint32_t low) {
  uint32_t bits = upper << 16 | low;
  bool tie_down = low == 0x8000 && upper % 2 == 0;
  float value, joined;
  memcpy(&value, &bits, sizeof bits);
  uint16_t w = moe_f32_to_bf16(value), kept;
  moe_convert(&value, MOE_F32, &kept, MOE_LOW16, 1);
  moe_join_halves(&w, &kept, &joined, 1);
  uint32_t got;
  memcpy(&got, &joined, sizeof got);
  if (got == (tie_down ? bits - 1 : bits) && moe_f32_to_bf16(joined) == w) return;
  cr_assert(false, "%08x came back as %08x", bits, got);
}

Test(tensor, a_float_in_halves_is_itself_but_for_ties) {
  for (uint32_t upper = 0; upper <= 0x7f7f; upper += 127) /* zero to the largest */
    for (uint32_t low = 0; low < 65536; low++) {
      expect_halves(upper, low);
      expect_halves(upper | 0x8000, low);
    }
}

Test(tensor, values_of_half_precision_have_their_own_lower_halves) {
  const uint16_t bf16[] = {0x3f80, 0x0001, 0xff7f}, f16[] = {0x3c01, 0x0001, 0xfbff};
  uint16_t low[3], w[3];
  float joined[3];
  moe_convert(bf16, MOE_BF16, low, MOE_LOW16, 3);
  moe_join_halves(bf16, low, joined, 3);
  for (int i = 0; i < 3; i++) cr_assert_eq(joined[i], moe_bf16_to_f32(bf16[i]));
  moe_convert(f16, MOE_F16, low, MOE_LOW16, 3);
  moe_convert(f16, MOE_F16, w, MOE_BF16, 3);
  moe_join_halves(w, low, joined, 3);
  for (int i = 0; i < 3; i++) cr_assert_eq(joined[i], moe_f16_to_f32(f16[i]));
}
