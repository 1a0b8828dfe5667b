#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"

/* Random123's known answers, kat_vectors, philox4x32 10. */
Test(rng, philox_gives_the_published_answers) {
  static const struct {
    uint64_t key, low, high;
    uint32_t out[4];
  } known[] = {
      {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {~0ull, ~0ull, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {0x299f31d0a4093822,
       0x85a308d3243f6a88,
       0x0370734413198a2e,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
    uint32_t out[4];
    moe_philox(known[i].key, known[i].low, known[i].high, out);
    cr_assert_arr_eq(out, known[i].out, sizeof out);
  }
}

Test(rng, streams_differ_by_each_part_of_their_name) {
  uint64_t s[] = {moe_rng_stream("a", 0, 0), moe_rng_stream("b", 0, 0), moe_rng_stream("a", 1, 0),
                  moe_rng_stream("a", 0, 1), moe_rng_stream("", 0, 0),  moe_rng_stream("a", -1, 0)};
  for (int i = 0; i < 6; i++)
    for (int j = 0; j < i; j++) cr_assert_neq(s[i], s[j]);
  cr_assert_eq(moe_rng_stream("a", 0, 0), s[0]);
}

Test(rng, uniform_draws_fill_the_unit_interval) {
  enum { N = 200000, BINS = 20 };
  int bins[BINS] = {0}, bins64[BINS] = {0};
  for (uint64_t i = 0; i < N; i++) {
    float u = moe_rng_uniform(3, 4, i);
    double v = moe_rng_uniform_f64(3, 5, i);
    cr_assert(u >= 0.0f && u < 1.0f && v >= 0.0 && v < 1.0);
    bins[(int)(u * BINS)]++;
    bins64[(int)(v * BINS)]++;
  }
  for (int b = 0; b < BINS; b++) { /* 5 standard deviations */
    cr_assert_float_eq(bins[b], N / BINS, 5 * sqrt(N / (double)BINS));
    cr_assert_float_eq(bins64[b], N / BINS, 5 * sqrt(N / (double)BINS));
  }
}

Test(rng, normal_draws_have_the_moments_of_a_normal) {
  enum { N = 1 << 20 };
  float *x = malloc(N * sizeof *x);
  moe_rng_normal_fill(11, 12, 0, N, 1.0f, x);
  double m1 = 0, m2 = 0, m3 = 0, m4 = 0, lag = 0;
  int beyond_2 = 0, beyond_4 = 0;
  for (int i = 0; i < N; i++) {
    double v = x[i];
    m1 += v / N, m2 += v * v / N, m3 += v * v * v / N, m4 += v * v * v * v / N;
    if (i > 0) lag += v * x[i - 1] / N;
    beyond_2 += fabs(v) > 2.0;
    beyond_4 += fabs(v) > 4.0;
  }
  double sigma = 1.0 / sqrt(N); /* limits at 5 standard errors */
  cr_assert_float_eq(m1, 0.0, 5 * sigma);
  cr_assert_float_eq(m2, 1.0, 5 * sqrt(2.0) * sigma);
  cr_assert_float_eq(m3, 0.0, 5 * sqrt(15.0) * sigma);
  cr_assert_float_eq(m4, 3.0, 5 * sqrt(96.0) * sigma);
  cr_assert_float_eq(lag, 0.0, 5 * sigma);
  double p2 = erfc(2.0 / sqrt(2.0)), p4 = erfc(4.0 / sqrt(2.0));
  cr_assert_float_eq(beyond_2, N * p2, 5 * sqrt(N * p2));
  cr_assert_float_eq(beyond_4, N * p4, 5 * sqrt(N * p4));
  free(x);
}

Test(rng, normal_draws_do_not_depend_on_how_they_are_cut) {
  enum { N = 3000, FROM = 777 };
  float whole[N + FROM], part[N];
  moe_rng_normal_fill(5, 6, 0, N + FROM, 0.02f, whole);
  for (int64_t cut = 1; cut < 1200; cut = cut * 2 + 1) {
    memset(part, 0xff, sizeof part);
    for (int64_t i = 0; i < N; i += cut)
      moe_rng_normal_fill(5, 6, FROM + i, cut < N - i ? cut : N - i, 0.02f, part + i);
    cr_assert_arr_eq(part, whole + FROM, sizeof part);
  }
}

/* The formula of rng.c in the C library's long double; the float may differ in its last place. */
Test(rng, normal_draws_are_box_mullers) {
  enum { N = 40000 };
  static float x[N];
  moe_rng_normal_fill(21, 22, 0, N, 1.0f, x);
  int rounded_otherwise = 0;
  for (int i = 0; i < N; i++) {
    uint32_t w[4];
    moe_philox(21, (uint64_t)i / 4, 22, w);
    int pair = i % 4 / 2;
    long double r = sqrtl(-2.0L * logl((w[2 * pair] + 0.5L) * 0x1p-32L));
    long double t = 2.0L * acosl(-1.0L) * (long double)w[2 * pair + 1] * 0x1p-32L;
    long double exact = r * (i % 2 == 0 ? cosl(t) : sinl(t));
    cr_assert_float_eq(x[i], exact, fabsl(exact) * 0x1p-23L + 1e-15L);
    rounded_otherwise += x[i] != (float)exact;
  }
  cr_assert_leq(rounded_otherwise, 2);
}

Test(rng, normal_draws_keep_their_bits) {
  /* The first weights of a run must never change under its seed. */
  static const uint32_t bits[4] = {0x3d058175, 0xbaf4ccf5, 0x3c85f81a, 0x3cab2c90};
  float x[4];
  moe_rng_normal_fill(1234, moe_rng_stream("weights", 1, 2), 1000, 4, 0.02f, x);
  uint32_t got[4];
  memcpy(got, x, sizeof got);
  cr_assert_arr_eq(got, bits, sizeof bits, "%08x %08x %08x %08x", got[0], got[1], got[2], got[3]);
}

Test(rng, permute_is_a_bijection) {
  static const int64_t sizes[] = {1, 2, 3, 5, 16, 63, 64, 65, 1000, 4096, 4097, 50000};
  for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
    int64_t n = sizes[s];
    char *seen = calloc(1, (size_t)n);
    for (int64_t i = 0; i < n; i++) {
      int64_t to = moe_rng_permute(9, s, n, i);
      cr_assert(to >= 0 && to < n);
      cr_assert_not(seen[to], "n = %lld: %lld twice", (long long)n, (long long)to);
      seen[to] = 1;
    }
    free(seen);
  }
}

Test(rng, permute_reaches_far_at_any_size) {
  int64_t n = 1ll << 62;
  double mean = 0;
  for (int i = 0; i < 1000; i++) {
    int64_t to = moe_rng_permute(1, 2, n, i);
    cr_assert(to >= 0 && to < n);
    mean += (double)to / (double)n / 1000;
  }
  cr_assert_float_eq(mean, 0.5, 5 * 0.2887 / sqrt(1000));
}

/* Where element i goes, and where its neighbour goes given that, over many streams. */
Test(rng, permute_shuffles_evenly) {
  enum { N = 10, TRIALS = 20000 };
  int place[N][N] = {{0}}, gap[N] = {0};
  for (int t = 0; t < TRIALS; t++) {
    for (int i = 0; i < N; i++) place[i][moe_rng_permute(77, (uint64_t)t, N, i)]++;
    int64_t a = moe_rng_permute(77, (uint64_t)t, N, 0), b = moe_rng_permute(77, (uint64_t)t, N, 1);
    gap[(b - a + N) % N]++;
  }
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++)
      cr_assert_float_eq(place[i][j], TRIALS / N, 5 * sqrt(TRIALS / (double)N));
  cr_assert_eq(gap[0], 0);
  for (int g = 1; g < N; g++)
    cr_assert_float_eq(gap[g], TRIALS / (N - 1), 5 * sqrt(TRIALS / (double)(N - 1)));
}
