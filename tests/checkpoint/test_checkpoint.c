/* Saving, finding and loading on one rank: what comes back, what is kept, what resumes. */
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint/commit.h"
#include "checkpoint/manifest.h"
#include "core/model/params.h"
#include "tests/checkpoint/fixture.h"

TestSuite(checkpoint, .init = open_world, .fini = close_world);

static bool exists(const char *path) {
  return access(path, F_OK) == 0;
}

/* How many entries of RUN/checkpoints begin so? */
static int count_entries(const char *prefix) {
  moe_command c = moe_command_run(20, "ls -A %s/checkpoints | grep -c '^%s'", run, prefix);
  int n = atoi(c.output);
  moe_command_free(&c);
  return n;
}

/* ---- what is saved comes back -------------------------------------------------------------- */

Test(checkpoint, gives_back_every_bit) {
  EXPECT_OK(save_sample(7, 2));
  EXPECT_OK(load_sample(7, in_step(7, "")));
}

Test(checkpoint, gives_back_the_state_exactly) {
  float bias[6] = {0.1f, -0.0f, 1e-45f, -3.4028235e38f, 0.001f, 1.0f / 3.0f};
  char config[] = "# \"quotes\" \\ tab\t\nanything=\xc3\xa9\n";
  moe_run_state saved = sample_state(3), got;
  saved.loss_scale = 1.0 / 3.0;
  saved.loss_scale_good_steps = 999;
  saved.router_bias_count = 6;
  saved.router_bias = bias;
  moe_piece p = sample_piece(MOE_ROLE_PARAM, 1, 0, 16);
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &saved, &p, 1, 2, NULL, NULL));
  EXPECT_OK(moe_checkpoint_read_state(world, in_step(3, ""), &got));
  cr_expect(got.step == 3 && got.tokens == 3000 && got.samples == saved.samples);
  cr_expect(got.seed == UINT64_MAX && got.data_fingerprint == saved.data_fingerprint);
  cr_expect(got.loss_scale == 1.0 / 3.0 && got.loss_scale_good_steps == 999);
  cr_assert(got.router_bias_count == 6);
  cr_expect(memcmp(got.router_bias, bias, sizeof bias) == 0);
  cr_expect_str_empty(got.config);
  moe_run_state_clear(&got);

  moe_manifest m = {0}, again; /* text of any kind, as the model is not checked here */
  EXPECT_OK(moe_manifest_read(in_step(3, ""), &m));
  free(m.state.config);
  m.state.config = strdup(config);
  EXPECT_OK(moe_manifest_write(&m, run));
  EXPECT_OK(moe_manifest_read(run, &again));
  cr_expect_str_eq(again.state.config, config);
  moe_manifest_clear(&m);
  moe_manifest_clear(&again);
}

Test(checkpoint, converts_between_float_types_with_one_rounding) {
  enum { N = 16 };
  static const moe_dtype types[] = {MOE_F32, MOE_BF16, MOE_F16};
  float values[N], wanted[N];
  for (int i = 0; i < N; i++) values[i] = (float)(i - 7) * 0.123456789f;
  for (int from = 0; from < 3; from++)
    for (int to = 0; to < 3; to++) {
      moe_piece out = sample_piece(MOE_ROLE_ADAM_M, 1, 0, N),
                in = sample_piece(MOE_ROLE_ADAM_M, 1, 0, N);
      uint16_t half[N], expected[N];
      out.dtype = types[from];
      in.dtype = types[to];
      for (int i = 0; i < N; i++) {
        half[i] = from == 1 ? moe_f32_to_bf16(values[i]) : moe_f32_to_f16(values[i]);
        wanted[i] = from == 0   ? values[i]
                    : from == 1 ? moe_bf16_to_f32(half[i])
                                : moe_f16_to_f32(half[i]);
        expected[i] = to == 1 ? moe_f32_to_bf16(wanted[i]) : moe_f32_to_f16(wanted[i]);
      }
      memcpy(out.data, from == 0 ? (void *)values : half, from == 0 ? sizeof values : sizeof half);
      moe_run_state state = sample_state(1);
      EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, &out, 1, 2, NULL, NULL));
      EXPECT_OK(moe_checkpoint_load(world, dev, in_step(1, ""), &in, 1, true));
      cr_expect(memcmp(in.data, to == 0 ? (void *)wanted : expected,
                       to == 0 ? sizeof wanted : sizeof expected) == 0,
                "%s to %s", moe_dtype_name(types[from]), moe_dtype_name(types[to]));
      sample_free((moe_piece[]){out, in}, 2);
    }
}

Test(checkpoint, a_master_falls_back_to_the_param_and_f32_params_prefer_the_master) {
  moe_run_state state = sample_state(1);
  moe_piece param = sample_piece(MOE_ROLE_PARAM, 0, 0, sample_total(0));
  moe_piece master = sample_piece(MOE_ROLE_MASTER, 0, 0, sample_total(0)), wish = master;
  for (int64_t i = 0; i < param.count; i++) {
    ((uint16_t *)param.data)[i] = moe_f32_to_bf16(1.5f);
    ((float *)master.data)[i] = 1.501f;
  }
  wish.data = calloc((size_t)wish.count, sizeof(float));
  bool has = true;

  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, &param, 1, 2, NULL, NULL));
  EXPECT_OK(moe_checkpoint_has_role(in_step(1, ""), MOE_ROLE_MASTER, &has));
  cr_expect(!has);
  EXPECT_OK(moe_checkpoint_load(world, dev, in_step(1, ""), &wish, 1, true));
  cr_expect(((float *)wish.data)[591] == 1.5f, "from the param");

  EXPECT_OK(
      moe_checkpoint_save(world, dev, run, &state, (moe_piece[]){param, master}, 2, 2, NULL, NULL));
  EXPECT_OK(moe_checkpoint_has_role(in_step(1, ""), MOE_ROLE_MASTER, &has));
  cr_expect(has);
  wish.role = MOE_ROLE_PARAM;
  EXPECT_OK(moe_checkpoint_load(world, dev, in_step(1, ""), &wish, 1, true));
  cr_expect(((float *)wish.data)[591] == 1.501f, "from the master");
  sample_free((moe_piece[]){param, master, wish}, 3);
}

Test(checkpoint, names_what_is_not_there) {
  EXPECT_OK(save_sample(1, 2));
  moe_piece p = sample_piece(MOE_ROLE_PARAM, 0, 0, 5);
  strcpy(p.name, "no.such.tensor");
  cr_expect(moe_checkpoint_load(world, dev, in_step(1, ""), &p, 1, true) == MOE_DAMAGED);
  EXPECT_SAYS("param no.such.tensor is missing");
  strcpy(p.name, sample_tensors[0].name);
  p.shape[1] = 17;
  cr_expect(moe_checkpoint_load(world, dev, in_step(1, ""), &p, 1, true) == MOE_DAMAGED);
  EXPECT_SAYS("has shape [37, 16], wanted [37, 17]");
  free(p.data);
  p = sample_piece(MOE_ROLE_PARAM, 8, 0, 5);
  p.dtype = MOE_BF16; /* of int32 */
  cr_expect(moe_checkpoint_load(world, dev, in_step(1, ""), &p, 1, true) == MOE_DAMAGED);
  EXPECT_SAYS("does not convert");
  free(p.data);
}

/* ---- what may be saved --------------------------------------------------------------------- */

static moe_status save_pieces(moe_piece *pieces, int n, const char *config) {
  moe_run_state state = sample_state(1);
  state.config = (char *)config;
  return moe_checkpoint_save(world, dev, run, &state, pieces, n, 2, NULL, NULL);
}

Test(checkpoint, refuses_to_save_what_is_not_whole) {
  moe_piece half = sample_piece(MOE_ROLE_PARAM, 0, 0, 100);
  cr_expect(save_pieces(&half, 1, NULL) == MOE_INVALID);
  EXPECT_SAYS("element 100 of 592 is missing");
  moe_piece rest = sample_piece(MOE_ROLE_PARAM, 0, 99, 493);
  cr_expect(save_pieces((moe_piece[]){half, rest}, 2, NULL) == MOE_INVALID);
  EXPECT_SAYS("element 99 is there twice");
  cr_expect(resumed_step() == 0 && count_entries("\\.") == 0, "nothing is left");
  sample_free((moe_piece[]){half, rest}, 2);
}

Test(checkpoint, refuses_to_save_a_model_without_one_of_its_experts) {
  moe_config *config = malloc(sizeof *config);
  moe_config_defaults(config);
  EXPECT_OK(moe_config_set(config, "model.preset=tiny"));
  EXPECT_OK(moe_config_resolve(config, 0));
  char *text = moe_config_text(config);
  moe_dims dims = moe_dims_of(config);
  moe_params params;
  EXPECT_OK(moe_params_create(&dims, (moe_range){0, dims.experts}, &params));
  moe_piece *pieces = calloc((size_t)params.count, sizeof *pieces);
  int expert = -1;
  for (int i = 0; i < params.count; i++) {
    const moe_param *p = &params.list[i];
    moe_piece *to = &pieces[i];
    *to = (moe_piece){.dtype = MOE_F32, .dims = p->dims, .count = p->count};
    memcpy(to->shape, p->shape, sizeof to->shape);
    strcpy(to->name, p->name);
    to->data = calloc((size_t)p->count, sizeof(float));
    if (strstr(p->name, "layers.1") && strstr(p->name, "experts.3.w2")) expert = i;
  }
  EXPECT_OK(save_pieces(pieces, params.count, text));
  cr_assert(expert >= 0);
  moe_piece last = pieces[params.count - 1], lost = pieces[expert];
  pieces[expert] = last;
  cr_expect(save_pieces(pieces, params.count - 1, text) == MOE_INVALID);
  EXPECT_SAYS("param model.layers.1.block_sparse_moe.experts.3.w2.weight of its model is missing");
  cr_expect(resumed_step() == 1);
  free(lost.data);
  sample_free(pieces, params.count - 1);
  free(pieces);
  free(text);
  free(config);
  moe_params_destroy(&params);
}

/* ---- what is kept and what resumes --------------------------------------------------------- */

Test(checkpoint, keeps_the_newest_and_prunes_the_rest) {
  for (int64_t step = 1; step <= 5; step++) EXPECT_OK(save_sample(step, 3));
  cr_expect(!exists(in_step(1, "")) && !exists(in_step(2, "")));
  for (int64_t step = 3; step <= 5; step++) EXPECT_OK(load_sample(step, in_step(step, "")));
  cr_expect(count_entries("") == 4, "three checkpoints and `latest`");
}

Test(checkpoint, never_keeps_fewer_than_two) {
  for (int64_t step = 1; step <= 3; step++) EXPECT_OK(save_sample(step, 0));
  cr_expect(count_entries("step-") == 2);
}

Test(checkpoint, replaces_a_checkpoint_of_the_same_step) {
  EXPECT_OK(save_sample(4, 2));
  moe_piece p = sample_piece(MOE_ROLE_PARAM, 1, 0, 16);
  moe_run_state state = sample_state(4);
  EXPECT_OK(moe_checkpoint_save(world, dev, run, &state, &p, 1, 2, NULL, NULL));
  EXPECT_OK(moe_checkpoint_load(world, dev, in_step(4, ""), &p, 1, true));
  bool has = true;
  EXPECT_OK(moe_checkpoint_has_role(in_step(4, ""), MOE_ROLE_ADAM_V, &has));
  cr_expect(!has, "it is the new one");
  cr_expect(count_entries("\\.") == 0 && count_entries("step-") == 1);
  free(p.data);
}

Test(checkpoint, sets_steps_of_an_abandoned_attempt_aside) {
  EXPECT_OK(save_sample(10, 2));
  EXPECT_OK(save_sample(20, 2));
  EXPECT_OK(save_sample(15, 2)); /* someone went back to 10 */
  cr_expect(resumed_step() == 15);
  cr_expect(count_entries("step-") == 2 && count_entries("aside-step-00000020") == 1);
}

Test(checkpoint, latest_is_only_a_hint) {
  EXPECT_OK(save_sample(1, 2));
  EXPECT_OK(save_sample(2, 2));
  SHELL("grep -qx step-00000002 %s/checkpoints/latest", run);
  SHELL("echo step-00000001 > %s/checkpoints/latest", run);
  cr_expect(resumed_step() == 2);
  SHELL("rm %s/checkpoints/latest", run);
  cr_expect(resumed_step() == 2);
}

Test(checkpoint, incomplete_folders_never_count_and_are_cleaned_at_the_next_save) {
  EXPECT_OK(save_sample(1, 2));
  SHELL("cd %s/checkpoints && cp -r step-00000001 .tmp-step-00000009-0 && "
        "cp -r step-00000001 .del-step-00000008 && mkdir step-7 step-000000000007 step-x",
        run);
  cr_expect(resumed_step() == 1, "only our spelling of a step's name counts");
  EXPECT_OK(save_sample(2, 2));
  cr_expect(count_entries("\\.") == 0);
}

Test(checkpoint, resumes_from_nothing_from_a_path_or_from_a_run) {
  char path[MOE_PATH], last[MOE_PATH];
  EXPECT_OK(moe_checkpoint_find(world, run, "auto", path));
  cr_expect_str_empty(path);
  cr_expect(moe_checkpoint_find(world, run, "/no/such/place", path) == MOE_USAGE);
  EXPECT_SAYS("/no/such/place: there is no such folder");
  SHELL("mkdir %s/checkpoints", run);
  cr_expect(moe_checkpoint_find(world, "unused", run, path) == MOE_USAGE);
  EXPECT_SAYS("no checkpoint yet");
  EXPECT_OK(save_sample(1, 2));
  EXPECT_OK(save_sample(2, 2));
  EXPECT_OK(moe_checkpoint_find(world, run, "none", path));
  cr_expect_str_empty(path);
  strcpy(last, in_step(2, ""));
  EXPECT_OK(moe_checkpoint_find(world, "unused", run, path));
  cr_expect_str_eq(path, last);
  EXPECT_OK(moe_checkpoint_find(world, "unused", in_step(1, ""), path));
  cr_expect_str_eq(path, in_step(1, ""));
}

/* ---- failures ------------------------------------------------------------------------------ */

Test(checkpoint, a_full_disk_leaves_the_previous_one_and_no_rubbish) {
  struct rlimit free_limit, limit;
  EXPECT_OK(save_sample(1, 2));
  getrlimit(RLIMIT_FSIZE, &free_limit);
  for (rlim_t bytes = 1000; bytes < 600000; bytes = bytes * 3 / 2) {
    limit = (struct rlimit){bytes, free_limit.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
    moe_status status = save_sample(2, 2);
    setrlimit(RLIMIT_FSIZE, &free_limit);
    if (status == MOE_OK) break;
    cr_assert(status == MOE_IO, "%s", moe_error_message());
    EXPECT_SAYS("File too large");
    cr_expect(strstr(moe_error_message(), "shard-") || strstr(moe_error_message(), "manifest"));
    cr_expect(count_entries("\\.") == 0 && count_entries("step-") == 1);
    EXPECT_OK(load_sample(1, in_step(1, "")));
  }
  EXPECT_OK(save_sample(3, 2));
  EXPECT_OK(load_sample(3, in_step(3, "")));
}

Test(checkpoint, says_which_folder_cannot_be_made) {
  SHELL("touch %s/file", run);
  moe_run_lock *lock;
  char below[128];
  snprintf(below, sizeof below, "%s/file/run", run);
  cr_expect(moe_run_lock_take(world, below, &lock) == MOE_IO);
  EXPECT_SAYS("/file");
  snprintf(below, sizeof below, "%s/a/b//c/", run);
  EXPECT_OK(moe_run_lock_take(world, below, &lock));
  moe_run_lock_release(lock);
}

Test(checkpoint, a_second_job_on_the_run_is_refused) {
  moe_run_lock *first, *second;
  EXPECT_OK(moe_run_lock_take(world, run, &first));
  cr_expect(moe_run_lock_take(world, run, &second) == MOE_FAILED);
  char who[32];
  snprintf(who, sizeof who, "process %d", (int)getpid());
  EXPECT_SAYS("another job");
  EXPECT_SAYS(who);
  moe_run_lock_release(first);
  EXPECT_OK(moe_run_lock_take(world, run, &second));
  moe_run_lock_release(second);
}
