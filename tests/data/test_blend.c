#include <math.h>

#include "data/blend.h"
#include "fixture.h"

static moe_blend *blend_of(const double *weights, int files) {
  moe_blend *b;
  ok(moe_blend_create(weights, files, &b));
  return b;
}

/* Each file's samples come in order, without gaps, and moe_blend_sample finds them again. */
static void check_places(const moe_blend *b, int64_t samples) {
  int64_t next[MOE_BLEND_FILES] = {0};
  for (int64_t g = 0; g < samples; g++) {
    int file;
    int64_t index;
    moe_blend_place(b, g, &file, &index);
    cr_assert_eq(index, next[file]++);
    if (g % 101 == 0) cr_assert_eq(moe_blend_sample(b, file, index), g);
  }
}

Test(blend, gives_one_file_every_sample) {
  moe_blend *b = blend_of((const double[]){0.3}, 1);
  cr_assert_eq(b->period, 1);
  check_places(b, 100);
  moe_blend_destroy(b);
}

Test(blend, meets_fractions_exactly_in_a_short_period) {
  moe_blend *b = blend_of((const double[]){0.7, 0.2, 0.1}, 3);
  cr_assert_eq(b->period, 10);
  const int64_t counts[] = {7, 2, 1};
  cr_assert_arr_eq(b->count, counts, sizeof counts);
  check_places(b, 1000);
  moe_blend_destroy(b);
  b = blend_of((const double[]){1, 2}, 2);
  cr_assert_eq(b->period, 3);
  moe_blend_destroy(b);
}

Test(blend, is_within_one_sample_of_its_proportions_at_any_time) {
  const double weights[] = {0.61803, 0.27183, 0.11014, 0.31416};
  double sum = 0;
  for (int i = 0; i < 4; i++) sum += weights[i];
  moe_blend *b = blend_of(weights, 4);
  int64_t seen[4] = {0};
  for (int64_t g = 0; g < 3 * b->period; g++) {
    int file;
    int64_t index;
    moe_blend_place(b, g, &file, &index);
    seen[file]++;
    for (int i = 0; i < 4; i++) {
      double wanted = (double)b->count[i] * (double)(g + 1) / (double)b->period;
      cr_assert_lt(fabs((double)seen[i] - wanted), 2.0);
    }
  }
  for (int i = 0; i < 4; i++)
    cr_assert_lt(fabs((double)b->count[i] / (double)b->period - weights[i] / sum), 1.0 / 65536);
  check_places(b, 2 * b->period);
  moe_blend_destroy(b);
}

Test(blend, never_forgets_a_tiny_weight) {
  moe_blend *b = blend_of((const double[]){1.0, 1e-9}, 2);
  cr_assert_eq(b->count[1], 1);
  cr_assert_eq(b->count[0] + b->count[1], b->period);
  moe_blend_destroy(b);
}

static void reads_as(const char *text, int files, double last_weight, const char *last_prefix) {
  moe_blend_spec spec;
  ok(moe_blend_spec_parse(text, "cfg.ini:3", &spec));
  cr_assert_eq(spec.files, files);
  cr_assert_eq(spec.weight[files - 1], last_weight);
  cr_assert_str_eq(spec.prefix[files - 1], last_prefix);
  moe_blend_spec_clear(&spec);
}

Test(blend, is_read_from_the_configurations_text) {
  reads_as("data/web", 1, 1, "data/web");
  reads_as("0.5:data/web", 1, 0.5, "data/web");
  reads_as("3:a, 1.5:b/c", 2, 1.5, "b/c");
  reads_as("odd:name", 1, 1, "odd:name");
}

Test(blend, says_where_a_text_is_malformed) {
  moe_blend_spec spec;
  static const char *const bad[] = {"a,b",   "1:a,b", "0:a",    "-1:a", "nan:a", "inf:a",
                                    "1:a,,", "1:",    "1:a,2:", ",",    ""};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    fails(MOE_USAGE, "cfg.ini:3", moe_blend_spec_parse(bad[i], "cfg.ini:3", &spec));
    moe_blend_spec_clear(&spec);
  }
}
