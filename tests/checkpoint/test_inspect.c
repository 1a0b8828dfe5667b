/* What moe-convert inspect says must be so: its numbers against the values that were saved. */
#include <math.h>

#include "checkpoint/inspect.h"
#include "tests/checkpoint/fixture.h"
#include "tests/checkpoint/model.h"

TestSuite(inspect, .init = open_world, .fini = close_world, .timeout = 60);

static const volatile sig_atomic_t go_on = 0;

static char *inspected(const char *path, moe_inspect_options options, moe_status expected) {
  char *text = NULL;
  size_t size = 0;
  options.stop = &go_on;
  FILE *out = open_memstream(&text, &size);
  cr_assert_eq(moe_inspect_checkpoint(path, &options, out), expected, "%s", moe_error_message());
  fclose(out);
  return text;
}

static void says(const char *report, const char *text) {
  cr_assert(strstr(report, text), "\"%s\" is not in:\n%s", text, report);
}

/* Root mean square and largest of a tensor, as the report prints them. */
static void norms(const moe_config *c, const char *name, double *rms, double *largest) {
  moe_dims dims = moe_dims_of(c);
  moe_params params;
  EXPECT_OK(moe_params_create(&dims, (moe_range){0, dims.experts}, &params));
  const moe_param *p = moe_params_find(&params, name);
  float *x = model_values(p, 5);
  *rms = *largest = 0.0;
  for (int64_t i = 0; i < p->count; i++) {
    *rms += (double)x[i] * (double)x[i];
    *largest = fmax(*largest, fabs((double)x[i]));
  }
  *rms = sqrt(*rms / (double)p->count);
  free(x);
  moe_params_destroy(&params);
}

Test(inspect, state_sizes_and_model_are_told_without_reading_data) {
  moe_config *c = model_config(2, MOE_PRECISION_BF16);
  save_model(c, 5, 1);
  char *report = inspected(in_step(1, ""), (moe_inspect_options){.values = false}, MOE_OK);
  says(report, "step         1; 1.00 K tokens, 10 samples");
  says(report, "vocabulary 101, hidden 24, layers 3, heads 6 x 10 (2 key/value)");
  says(report, "5 experts of 14, 3 per token");
  says(report, "fp32 bf16");
  cr_assert(!strstr(report, "rms"));
  free(report);
  free(c);
}

Test(inspect, norms_are_those_of_the_values) {
  char expected[64];
  double rms, largest;
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  char *report = inspected(in_step(1, ""), (moe_inspect_options){true, true, true, NULL}, MOE_OK);
  norms(c, "lm_head.weight", &rms, &largest);
  snprintf(expected, sizeof expected, "[101, 24]  rms %.5g  largest %.5g", rms, largest);
  says(report, expected);
  double least = INFINITY, most = 0.0;
  for (int e = 0; e < 5; e++) {
    char name[96];
    snprintf(name, sizeof name, "model.layers.2.block_sparse_moe.experts.%d.w3.weight", e);
    norms(c, name, &rms, &largest);
    least = fmin(least, rms * sqrt(24.0 * 14.0));
    most = fmax(most, rms * sqrt(24.0 * 14.0));
  }
  snprintf(expected, sizeof expected, "w3 %.4g %.4g", least, most);
  says(strstr(report, "layer 2"), expected);
  says(report, "rope_base = 500");
  free(report);
  free(c);
}

Test(inspect, values_that_are_no_numbers_are_pointed_out) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  int n;
  moe_piece *pieces = model_pieces(c, 5, &n);
  ((float *)pieces[0].data)[3] = NAN;
  moe_run_state state = {.step = 1, .config = moe_config_text(c)};
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, pieces, n, 2, NULL, NULL));
  char *report = inspected(in_step(1, ""), (moe_inspect_options){.values = true}, MOE_OK);
  says(report, "1 NOT FINITE");
  free(report);
  free(c);
}

Test(inspect, damaged_data_is_an_error) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  SHELL("f=%s; s=$(stat -c %%s $f); printf '\\377' | dd of=$f bs=1 seek=$((s / 2)) conv=notrunc "
        "2>/dev/null",
        in_step(1, "shard-00000-of-00001.h5"));
  free(inspected(in_step(1, ""), (moe_inspect_options){.values = true}, MOE_DAMAGED));
  EXPECT_SAYS("hash");
  free(c);
}
