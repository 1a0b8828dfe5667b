/* Exports that read back as the checkpoint, and imports that give it back. */
#include <math.h>

#include "tests/checkpoint/hf.h"

TestSuite(hf, .init = open_world, .fini = close_world, .timeout = 300);

/* Names in the run's folder that begin so. */
static int count_like(const char *pattern) {
  moe_command c = moe_command_run(20, "ls -d %s/%s 2>/dev/null | wc -l", run, pattern);
  int n = atoi(c.output);
  moe_command_free(&c);
  return n;
}

/* ---- export ------------------------------------------------------------------------------------
 */

Test(hf, an_fp32_export_holds_the_checkpoint_bit_for_bit) {
  make_export(2, MOE_PRECISION_FP32, MOE_EXPORT_RUN_DTYPE);
  expect_export(MOE_F32);
}

Test(hf, a_bf16_export_holds_the_params_the_run_computes_with) {
  make_export(1, MOE_PRECISION_BF16, MOE_EXPORT_RUN_DTYPE);
  expect_export(MOE_BF16);
}

Test(hf, a_bf16_run_can_leave_with_its_fp32_masters) {
  make_export(2, MOE_PRECISION_BF16, MOE_F32);
  expect_export(MOE_F32);
}

Test(hf, an_fp16_export_rounds_once) {
  make_export(2, MOE_PRECISION_BF16, MOE_F16);
  expect_export(MOE_F16);
}

Test(hf, an_export_leaves_nothing_beside_it) {
  make_export(2, MOE_PRECISION_FP32, MOE_F32);
  cr_assert_eq(count_like("hf*"), 1);
  cr_assert(there(out, "config.json") && there(out, "generation_config.json") &&
            there(out, "README.md") && there(out, "model.safetensors"));
  cr_assert(!there(out, "model.safetensors.index.json"));
}

Test(hf, a_large_model_is_cut_into_files_with_an_index) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  free(c);
  moe_export_options o = exporting(MOE_F32);
  o.shard_bytes = 20000;
  EXPECT_OK(moe_export_hf(&o));
  expect_export(MOE_F32);
  cr_assert(there(out, "model.safetensors.index.json"));
  cr_assert_gt(count_like("hf/model-*"), 3);
  SHELL("test -z \"$(find %s -name 'model-*' -size +22k)\"", out); /* header and data */
}

Test(hf, alpha_is_folded_into_the_rotary_base_and_lengthens_the_context) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  free(c);
  moe_export_options o = exporting(MOE_F32);
  o.alpha = 8.0;
  EXPECT_OK(moe_export_hf(&o));
  moe_weights *w;
  EXPECT_OK(moe_weights_open_hf(out, &w));
  cr_assert_float_eq(w->rope_base, 500.0 * pow(8.0, 10.0 / 8.0), 1e-6);
  cr_assert_eq(w->context, 320);
  moe_weights_close(w);
}

Test(hf, an_output_that_exists_is_kept_unless_it_may_be_replaced) {
  make_export(2, MOE_PRECISION_FP32, MOE_F32);
  SHELL("echo mine >%s/mine", out);
  moe_export_options o = exporting(MOE_BF16);
  cr_assert_eq(moe_export_hf(&o), MOE_USAGE);
  EXPECT_SAYS("--overwrite");
  expect_export(MOE_F32);
  o.overwrite = true;
  EXPECT_OK(moe_export_hf(&o));
  expect_export(MOE_BF16);
  cr_assert(!there(out, "mine"));
  cr_assert_eq(count_like("hf*"), 1);
}

Test(hf, a_folder_that_is_no_export_is_never_replaced) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  free(c);
  moe_export_options o = exporting(MOE_F32);
  o.overwrite = true;
  SHELL("mkdir %s && echo mine >%s/mine", out, out);
  cr_assert_eq(moe_export_hf(&o), MOE_USAGE);
  EXPECT_SAYS("no export to replace");
  cr_assert(there(out, "mine"));
}

Test(hf, a_stopped_export_leaves_nothing) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  free(c);
  volatile sig_atomic_t stop = 1;
  moe_export_options o = exporting(MOE_F32);
  o.stop = &stop;
  cr_assert_eq(moe_export_hf(&o), MOE_STOPPED);
  cr_assert_eq(count_like("hf*"), 0);
}

Test(hf, a_value_beyond_the_range_of_fp16_is_no_infinity_in_the_export) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  int n;
  moe_piece *pieces = model_pieces(c, 5, &n);
  ((float *)pieces[0].data)[3] = 70000.0f;
  moe_run_state state = {.step = 1, .config = moe_config_text(c)};
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, pieces, n, 2, NULL, NULL));
  moe_export_options o = exporting(MOE_F16);
  cr_assert_eq(moe_export_hf(&o), MOE_FAILED);
  EXPECT_SAYS(pieces[0].name);
  cr_assert_eq(count_like("hf*"), 0);
  o.dtype = MOE_BF16;
  EXPECT_OK(moe_export_hf(&o));
}

Test(hf, a_router_bias_is_not_lost_in_silence) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  int n;
  moe_piece *pieces = model_pieces(c, 5, &n);
  float bias[15] = {0.5f};
  moe_run_state state = {.step = 1, .config = moe_config_text(c)};
  state.router_bias = bias;
  state.router_bias_count = 15;
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, pieces, n, 2, NULL, NULL));
  moe_export_options o = exporting(MOE_F32);
  cr_assert_eq(moe_export_hf(&o), MOE_USAGE);
  EXPECT_SAYS("--drop-router-bias");
  o.drop_router_bias = true;
  EXPECT_OK(moe_export_hf(&o));
}

Test(hf, a_tokenizer_of_more_pieces_than_the_vocabulary_is_refused) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  free(c);
  moe_export_options o = exporting(MOE_F32);
  o.tokenizer = "bytes";
  cr_assert_eq(moe_export_hf(&o), MOE_USAGE);
  EXPECT_SAYS("260 pieces");
  cr_assert_eq(count_like("hf*"), 0);
}

/* ---- round trip --------------------------------------------------------------------------------
 */

static const char *imported(void) {
  static char path[128];
  snprintf(path, sizeof path, "%s/imported", run);
  return path;
}

static void round_trip(int groups, int precision) {
  make_export(groups, precision, MOE_EXPORT_RUN_DTYPE);
  moe_import_options o = {.folder = out, .run_dir = imported(), .dtype = MOE_EXPORT_RUN_DTYPE};
  EXPECT_OK(moe_import_hf(world, &o));
  char step[192];
  snprintf(step, sizeof step, "%s/checkpoints/step-00000000", imported());
  moe_weights *w;
  EXPECT_OK(moe_weights_open_checkpoint(step, &w));
  moe_dtype dtype = precision == MOE_PRECISION_FP32 ? MOE_F32 : MOE_BF16;
  expect_values(w, dtype);
  for (int i = 0; i < w->params.count; i++) /* in the same types, so the same bits */
    cr_assert_eq(moe_weights_dtype(w, &w->params.list[i]),
                 moe_pool_dtype(w->params.list[i].row->pool, dtype));
  bool moments;
  EXPECT_OK(moe_checkpoint_has_role(step, MOE_ROLE_ADAM_M, &moments));
  cr_assert(!moments);
  moe_weights_close(w);
}

Test(hf, fp32_weights_come_back_bit_for_bit) {
  round_trip(2, MOE_PRECISION_FP32);
}
Test(hf, bf16_weights_come_back_bit_for_bit) {
  round_trip(1, MOE_PRECISION_BF16);
}

Test(hf, fp32_files_become_the_masters_of_a_bf16_run) {
  make_export(2, MOE_PRECISION_FP32, MOE_F32);
  moe_import_options o = {.folder = out, .run_dir = imported(), .step = 7, .dtype = MOE_BF16};
  EXPECT_OK(moe_import_hf(world, &o));
  char step[192];
  snprintf(step, sizeof step, "%s/checkpoints/step-00000007", imported());
  moe_weights *w;
  bool masters;
  EXPECT_OK(moe_weights_open_checkpoint(step, &w));
  EXPECT_OK(moe_checkpoint_has_role(step, MOE_ROLE_MASTER, &masters));
  cr_assert(masters);
  expect_values(w, MOE_F32);
  cr_assert_eq(w->compute, MOE_BF16);
  moe_weights_close(w);
}

Test(hf, a_run_with_checkpoints_is_not_imported_into) {
  make_export(2, MOE_PRECISION_FP32, MOE_F32);
  moe_import_options o = {.folder = out, .run_dir = run, .dtype = MOE_EXPORT_RUN_DTYPE};
  cr_assert_eq(moe_import_hf(world, &o), MOE_USAGE);
  EXPECT_SAYS("has checkpoints");
}
