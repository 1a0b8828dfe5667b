/* What the tests of Hugging Face folders share: a model, saved and exported. */
#ifndef MOE_TESTS_CHECKPOINT_HF_H
#define MOE_TESTS_CHECKPOINT_HF_H

#include <sys/stat.h>

#include "checkpoint/hf.h"
#include "tests/checkpoint/fixture.h"
#include "tests/checkpoint/model.h"

/* The export. */
static char out[128];

/* Options for an export of step 1 to `out`. */
static inline moe_export_options exporting(int dtype) {
  snprintf(out, sizeof out, "%s/hf", run);
  return (moe_export_options){
      .checkpoint = in_step(1, ""), .out = out, .dtype = dtype, .tokenizer = "none"};
}

/* Save a model of this precision and export it. */
static inline void make_export(int groups, int precision, int dtype) {
  moe_config *c = model_config(groups, precision);
  save_model(c, 5, 1);
  free(c);
  moe_export_options o = exporting(dtype);
  EXPECT_OK(moe_export_hf(&o));
}

/* It holds the values of save_model in this type, and the sizes. */
static inline void expect_export(moe_dtype dtype) {
  moe_weights *w;
  EXPECT_OK(moe_weights_open_hf(out, &w));
  expect_values(w, dtype);
  cr_assert_eq(w->dims.heads, 6);
  cr_assert_eq(w->dims.head_dim, 10);
  cr_assert_eq(w->context, 40);
  cr_assert_float_eq(w->norm_eps, 3e-5, 1e-12);
  cr_assert_float_eq(w->rope_base, 500.0, 1e-9);
  moe_weights_close(w);
}

static inline bool there(const char *folder, const char *name) {
  char path[256];
  struct stat st;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return stat(path, &st) == 0;
}

#endif
