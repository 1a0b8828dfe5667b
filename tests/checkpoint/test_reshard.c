/* Checkpoints rewritten for other ranks, and the comparison that would show a lost bit. */
#include <inttypes.h>

#include "checkpoint/audit.h"
#include "checkpoint/diff.h"
#include "checkpoint/manifest.h"
#include "checkpoint/reshard.h"
#include "tests/checkpoint/fixture.h"
#include "tests/checkpoint/model.h"

TestSuite(reshard, .init = open_world, .fini = close_world, .timeout = 120);

static const volatile sig_atomic_t go_on = 0;
static char report[1 << 16];

/* Do two step folders differ? What the report says is in `report`. */
static bool differ(const char *a, const char *b, double tolerance, bool all) {
  bool answer = true;
  char *text = NULL;
  size_t size = 0;
  FILE *out = open_memstream(&text, &size);
  const moe_diff_options options = {.tolerance = tolerance, .all = all, .stop = &go_on, .out = out};
  EXPECT_OK(moe_diff_checkpoints(a, b, &options, &answer));
  fclose(out);
  snprintf(report, sizeof report, "%s", text);
  free(text);
  return answer;
}

static char *run_path(const char *name) {
  char *path = NULL;
  cr_assert(asprintf(&path, "%s/%s", run, name) > 0);
  return path;
}

static char *step_of(const char *run_dir, int step) {
  char *path = NULL;
  cr_assert(asprintf(&path, "%s/checkpoints/step-%08d", run_dir, step) > 0);
  return path;
}

static void save(int precision, uint64_t seed, int64_t step) {
  moe_config *c = model_config(2, precision);
  save_model(c, seed, step);
  free(c);
}

/* ---- reshard ---- */

static void reshard_to(const char *from, const char *name, int ranks) {
  char *to = run_path(name), *place = step_of(to, 1);
  moe_manifest m;
  EXPECT_OK(moe_reshard(world, from, to, ranks, &go_on));
  cr_assert(!differ(from, place, 0.0, false), "%s", report);
  EXPECT_OK(moe_manifest_read(place, &m));
  cr_assert(m.ranks == ranks && m.files == ranks);
  int64_t least = INT64_MAX, most = 0;
  for (int i = 0; i < m.files; i++) {
    int64_t bytes = 0;
    for (int64_t k = m.first[i]; k < m.first[i + 1]; k++) bytes += moe_slice_bytes(m.by_offset[k]);
    least = bytes < least ? bytes : least;
    most = bytes > most ? bytes : most;
  }
  cr_assert_leq(most - least, 16, "files of %" PRId64 " to %" PRId64 " bytes", least, most);
  moe_manifest_clear(&m);
  free(place);
  free(to);
}

Test(reshard, any_number_of_files_holds_the_same_bits_evenly) {
  save(MOE_PRECISION_BF16, 5, 1);
  reshard_to(in_step(1, ""), "one", 1);
  reshard_to(in_step(1, ""), "seven", 7);
  char *seven = run_path("seven"), *from = step_of(seven, 1);
  reshard_to(from, "three", 3); /* tensors cut in one place are cut in another */
  reshard_to(from, "single", 1);
  free(from);
  free(seven);
}

Test(reshard, gathering_into_one_file_makes_tensors_whole_again) {
  save(MOE_PRECISION_FP32, 5, 1);
  reshard_to(in_step(1, ""), "five", 5);
  char *five = run_path("five"), *from = step_of(five, 1);
  reshard_to(from, "one", 1);
  char *one = run_path("one"), *place = step_of(one, 1);
  moe_manifest m;
  EXPECT_OK(moe_manifest_read(place, &m));
  for (int64_t i = 0; i < m.slices; i++)
    cr_assert_eq(m.slice[i].count, moe_slice_total(&m.slice[i]), "%s", m.slice[i].name);
  moe_manifest_clear(&m);
  free(place);
  free(one);
  free(from);
  free(five);
}

Test(reshard, the_new_run_has_the_state_and_a_configuration_of_its_own) {
  save(MOE_PRECISION_BF16, 5, 1);
  reshard_to(in_step(1, ""), "new", 2);
  char *to = run_path("new"), *place = step_of(to, 1), path[256];
  moe_run_state state;
  EXPECT_OK(moe_checkpoint_read_state(world, place, &state));
  cr_assert(state.step == 1 && state.tokens == 1000 && state.samples == 10 && state.seed == 5);
  moe_run_state_clear(&state);
  moe_config *c = malloc(sizeof *c);
  moe_config_defaults(c);
  snprintf(path, sizeof path, "%s/config.ini", to);
  EXPECT_OK(moe_config_read(c, path));
  cr_assert_str_eq(c->run.dir, to);
  cr_assert_eq(c->model.num_experts, 5);
  free(c);
  free(place);
  free(to);
}

Test(reshard, a_run_with_checkpoints_is_not_written_into) {
  save(MOE_PRECISION_FP32, 5, 1);
  cr_assert_eq(moe_reshard(world, in_step(1, ""), run, 2, &go_on), MOE_USAGE);
  EXPECT_SAYS("has checkpoints");
  cr_assert_eq(moe_reshard(world, in_step(1, ""), "/dev/null/x", 2, &go_on), MOE_IO);
}

/* Change the byte at the middle of a step's shard. */
static void damage(int64_t step) {
  SHELL("f=%s; s=$(stat -c %%s $f); printf '\\377' | dd of=$f bs=1 seek=$((s / 2)) conv=notrunc "
        "2>/dev/null",
        in_step(step, "shard-00000-of-00001.h5"));
}

Test(reshard, a_damaged_or_stopped_source_leaves_nothing) {
  const volatile sig_atomic_t stop = 1;
  char *to = run_path("new"), path[256];
  save(MOE_PRECISION_FP32, 5, 1);
  cr_assert_eq(moe_reshard(world, in_step(1, ""), to, 2, &stop), MOE_STOPPED);
  damage(1);
  cr_assert_eq(moe_reshard(world, in_step(1, ""), to, 2, &go_on), MOE_DAMAGED);
  EXPECT_SAYS("shard-00000-of-00001.h5");
  snprintf(path, sizeof path, "%s/checkpoints", to);
  SHELL("test -z \"$(ls -A %s)\"", path);
  free(to);
}

/* ---- diff ---- */

Test(reshard, diff_names_the_tensor_that_differs_and_by_how_much) {
  moe_config *c = model_config(2, MOE_PRECISION_FP32);
  save_model(c, 5, 1);
  int n;
  moe_piece *pieces = model_pieces(c, 5, &n);
  moe_run_state state = {.step = 1, .tokens = 1000, .samples = 10, .seed = 5};
  state.config = moe_config_text(c);
  char *other = run_path("other"), *b = step_of(other, 1);
  for (int i = 0; i < n; i++)
    if (pieces[i].role == MOE_ROLE_ADAM_V && strcmp(pieces[i].name, "lm_head.weight") == 0)
      ((float *)pieces[i].data)[77] += 0.5f;
  EXPECT_OK(moe_checkpoint_save(world, dev, other, &state, pieces, n, 2, NULL, NULL));
  cr_assert(differ(in_step(1, ""), b, 0.0, false));
  cr_assert(strstr(report, "lm_head.weight") && strstr(report, "largest 0.5"), "%s", report);
  cr_assert(strstr(report, "adam_v  68 tensors equal, 1 differ"), "%s", report);
  cr_assert(strstr(report, "param   69 tensors equal, 0 differ"), "%s", report);
  cr_assert(differ(in_step(1, ""), b, 1e-3, false), "0.5 of a norm of about 12");
  cr_assert(!differ(in_step(1, ""), b, 0.1, false), "%s", report);
  free(b);
  free(other);
}

Test(reshard, diff_tells_states_settings_and_what_only_one_has) {
  save(MOE_PRECISION_FP32, 5, 1);
  char *a = strdup(in_step(1, ""));
  save(MOE_PRECISION_BF16, 5, 2);
  cr_assert(differ(a, in_step(2, ""), 0.0, false));
  cr_assert(strstr(report, "step: 1, 2"), "%s", report);
  cr_assert(strstr(report, "precision.dtype = fp32, bf16"), "%s", report);
  cr_assert(strstr(report, "(fp32, bf16)"), "%s", report);
  cr_assert(strstr(report, "only in the second"), "%s", report);
  free(a);
}

Test(reshard, diff_refuses_what_is_damaged) {
  bool answer;
  const moe_diff_options options = {.stop = &go_on};
  save(MOE_PRECISION_FP32, 5, 1);
  save(MOE_PRECISION_FP32, 5, 2);
  damage(2);
  char *a = strdup(in_step(1, ""));
  cr_assert_eq(moe_diff_checkpoints(a, in_step(2, ""), &options, &answer), MOE_DAMAGED);
  EXPECT_SAYS("step-00000002");
  free(a);
}

Test(reshard, diff_of_weights_sees_one_bit) {
  moe_weights *w, *rounded;
  bool answer = true;
  const moe_diff_options options = {.stop = &go_on};
  save(MOE_PRECISION_BF16, 5, 1);
  EXPECT_OK(moe_weights_open_checkpoint(in_step(1, ""), &w));
  EXPECT_OK(moe_weights_round(w, MOE_BF16, &rounded));
  EXPECT_OK(moe_diff_weights(w, w, &options, &answer));
  cr_assert(!answer);
  EXPECT_OK(moe_diff_weights(w, rounded, &options, &answer));
  cr_assert(answer);
  moe_weights_close(rounded);
  moe_weights_close(w);
}

/* ---- verify and choose ---- */

Test(reshard, the_newest_that_verifies_is_chosen) {
  char path[MOE_PATH];
  for (int step = 1; step <= 3; step++) save(MOE_PRECISION_FP32, 5, step);
  EXPECT_OK(moe_audit_choose(run, true, &go_on, path));
  cr_assert_str_eq(path, in_step(3, ""));
  damage(3);
  EXPECT_OK(moe_audit_choose(run, true, &go_on, path));
  cr_assert_str_eq(path, in_step(2, ""));
  cr_assert_eq(moe_audit_choose(in_step(3, ""), true, &go_on, path), MOE_DAMAGED);
  damage(2);
  damage(1);
  cr_assert_eq(moe_audit_choose(run, true, &go_on, path), MOE_DAMAGED);
  EXPECT_SAYS("none of its checkpoints is valid");
}

static char *audit_report(const char *place, bool all, moe_status *status) {
  char *text = NULL;
  size_t size = 0;
  FILE *out = open_memstream(&text, &size);
  *status = moe_audit(place, all, &go_on, out);
  fclose(out);
  return text;
}

Test(reshard, verify_names_every_damaged_file_and_goes_on) {
  moe_status status;
  save(MOE_PRECISION_FP32, 5, 1);
  save(MOE_PRECISION_FP32, 5, 2);
  damage(1);
  char *text = audit_report(run, false, &status);
  cr_assert(status == MOE_OK && strstr(text, "every hash is right"), "%s", text);
  free(text);
  text = audit_report(run, true, &status);
  cr_assert_eq(status, MOE_DAMAGED);
  EXPECT_SAYS("1 of 2");
  cr_assert(strstr(text, "step-00000002: step 2") && strstr(text, "shard-00000-of-00001.h5"), "%s",
            text);
  free(text);
}

Test(reshard, a_place_without_checkpoints_is_named) {
  char path[MOE_PATH];
  cr_assert_eq(moe_audit_choose("/nowhere", true, &go_on, path), MOE_USAGE);
  EXPECT_SAYS("/nowhere");
  SHELL("mkdir -p %s/checkpoints", run);
  cr_assert_eq(moe_audit_choose(run, true, &go_on, path), MOE_USAGE);
  EXPECT_SAYS("no checkpoint yet");
}
