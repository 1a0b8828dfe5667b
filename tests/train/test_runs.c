/* Whole runs of moe-train on CPUs: the loss curve does not depend on how the work is divided, and a
 * resumed run goes on as if it had not stopped. */
#include <cjson/cJSON.h>
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/rng.h"
#include "data/token_file.h"
#include "tests/parallel/expect_passed.h"
#include "tests/support/run_command.h"

enum { STEPS = 6, LONG = 200, VOCAB = 97 };
static char folder[] = "/tmp/moe-runs-XXXXXX";

/* A model whose every size differs, 16 experts, batches that 1 to 7 ranks divide. */
static const char model[] =
    "[model]\npreset = tiny\nvocab_size = 97\nhidden_size = 24\nnum_layers = 2\nnum_heads = 4\n"
    "num_kv_heads = 2\nhead_dim = 8\nnum_experts = 16\ntop_k = 3\nffn_size = 20\ncontext = 12\n"
    "[optim]\nlr = 5e-3\nwarmup_steps = 2\n[train]\nsteps = 6\n[checkpoint]\nsave_final = false\n"
    "[run]\ndeterministic = true\nthreads = 1\n[log]\ntensorboard = false\n";

static void set_up(void) {
  cr_assert(mkdtemp(folder));
  char path[256];
  snprintf(path, sizeof path, "%s/tokens", folder);
  moe_token_writer *w;
  cr_assert_eq(moe_token_writer_create(path, VOCAB, &w), MOE_OK);
  for (int d = 0; d < 120;
       d++) { /* documents of words that follow a pattern, so there is something to learn */
    int32_t ids[300];
    int n = 40 + 13 * (d % 20);
    for (int i = 0; i < n; i++) ids[i] = (int32_t)((i * (1 + d % 7) + d) % (VOCAB - 4)) + 4;
    cr_assert_eq(moe_token_writer_append(w, ids, n), MOE_OK);
    cr_assert_eq(moe_token_writer_end_document(w), MOE_OK);
  }
  cr_assert_eq(moe_token_writer_finish(w), MOE_OK);
  moe_token_writer_destroy(w);
  snprintf(path, sizeof path, "%s/cfg.ini", folder);
  FILE *f = fopen(path, "w");
  fprintf(f, "%s[data]\ntrain = %s/tokens\nsequence_length = 12\n", model, folder);
  fclose(f);
}

static void tear_down(void) {
  moe_shell("rm -rf %s", folder);
}

TestSuite(runs, .init = set_up, .fini = tear_down);

/* Start moe-train in run folder `name`; returns the exit code. */
static int train(const char *name, int ranks, const char *more) {
  return moe_shell("mpirun --oversubscribe -np %d %s/moe-train %s/cfg.ini --set run.dir=%s/%s %s "
                   ">%s/%s.log 2>&1",
                   ranks, MOE_BIN_DIR, folder, folder, name, more, folder, name);
}

/* A value of each of the first `steps` steps of a run; NAN where one is missing or twice. */
static void long_curve(const char *name, const char *key, int steps, double *out) {
  char path[256], line[1 << 16];
  int seen[LONG] = {0};
  for (int i = 0; i < steps; i++) out[i] = NAN;
  snprintf(path, sizeof path, "%s/%s/metrics.jsonl", folder, name);
  FILE *f = fopen(path, "r");
  if (!f) moe_shell("cat %s/%s.log >&2", folder, name);
  cr_assert(f, "no %s", path);
  while (fgets(line, sizeof line, f)) {
    cJSON *json = cJSON_Parse(line);
    cJSON *step = cJSON_GetObjectItem(json, "step"), *value = cJSON_GetObjectItem(json, key);
    if (step && value && step->valueint >= 1 && step->valueint <= steps) {
      int i = step->valueint - 1;
      out[i] = seen[i]++ ? NAN : value->valuedouble;
    }
    cJSON_Delete(json);
  }
  fclose(f);
}

static void curve(const char *name, const char *key, double out[STEPS]) {
  long_curve(name, key, STEPS, out);
}

static void same_curves(const char *a, const char *b, double tolerance) {
  static const char *const keys[] = {"loss", "grad_norm"};
  for (int k = 0; k < 2; k++) {
    double x[STEPS], y[STEPS];
    curve(a, keys[k], x);
    curve(b, keys[k], y);
    for (int i = 0; i < STEPS; i++) {
      bool same = tolerance == 0.0 ? x[i] == y[i] : fabs(x[i] - y[i]) <= tolerance * fabs(x[i]);
      cr_assert(same, "%s of step %d: %s %.9g, %s %.9g", keys[k], i + 1, a, x[i], b, y[i]);
    }
  }
}

static void succeeds(const char *name, int ranks, const char *more) {
  int code = train(name, ranks, more);
  if (code != 0) moe_shell("tail -5 %s/%s.log >&2", folder, name);
  cr_assert_eq(code, 0, "%s: exit code %d", name, code);
}

#define BATCH(global, micro) \
  "--set train.global_batch=" #global " --set train.micro_batch=" #micro " "

Test(runs, losses_do_not_depend_on_the_number_of_ranks) {
  succeeds("one", 1, BATCH(210, 210));
  succeeds("three", 3, BATCH(210, 70));
  succeeds("five", 5, BATCH(210, 42));
  succeeds("six", 6, BATCH(210, 35));
  succeeds("seven", 7, BATCH(210, 30));
  double loss[STEPS];
  curve("one", "loss", loss);
  cr_assert(loss[STEPS - 1] < loss[0] - 0.05, "nothing was learnt: %g to %g", loss[0],
            loss[STEPS - 1]);
  same_curves("one", "three", 1e-5);
  same_curves("one", "five", 1e-5);
  same_curves("one", "six", 1e-5);
  same_curves("one", "seven", 1e-5);
}

Test(runs, losses_do_not_depend_on_the_mesh_or_zero1) {
  succeeds("ep1", 1, BATCH(16, 16));
  succeeds("ep8", 8, BATCH(16, 2) "--set parallel.ep=8");
  succeeds("ep4", 8, BATCH(16, 2) "--set parallel.ep=4 --set parallel.exchange=allgather");
  succeeds("ep2", 8, BATCH(16, 2) "--set parallel.ep=2 --set parallel.zero1=true");
  same_curves("ep1", "ep8", 1e-5);
  same_curves("ep1", "ep4", 1e-5);
  same_curves("ep1", "ep2", 1e-5);
}

Test(runs, thirty_two_ranks_run) {
  succeeds("many", 32,
           BATCH(32, 1) "--set parallel.ep=16 --set train.steps=2 --set optim.warmup_steps=1");
}

Test(runs, accumulation_changes_nothing_without_the_auxiliary_loss) {
  succeeds("whole", 2, BATCH(8, 4) "--set train.aux_coef=0");
  succeeds("halves", 2, BATCH(8, 2) "--set train.aux_coef=0");
  succeeds("replicas", 2, BATCH(8, 2) "--set train.aux_coef=0 --set parallel.ep=1");
  same_curves("whole", "halves", 1e-5);
  same_curves("whole", "replicas", 1e-5);
}

Test(runs, sequence_scope_is_the_same_on_any_ranks) {
  succeeds("s1", 1, BATCH(8, 8) "--set train.aux_scope=sequence --set train.z_coef=1e-3");
  succeeds("s4", 4, BATCH(8, 2) "--set train.aux_scope=sequence --set train.z_coef=1e-3");
  same_curves("s1", "s4", 1e-5);
}

Test(runs, masks_and_recomputation_agree) {
  succeeds("kept", 2, BATCH(8, 4) "--set data.document_mask=true");
  succeeds("experts", 2, BATCH(8, 4) "--set data.document_mask=true --set train.recompute=experts");
  succeeds("block", 2,
           BATCH(8, 4) "--set data.document_mask=true --set train.recompute=block "
                       "--set train.recompute_layers=1");
  same_curves("kept", "experts", 0.0);
  same_curves("kept", "block", 0.0);
}

/* Gradients lie over what layers keep, or for themselves where all keep it in one place: on their
 * way to owners or to all, beside exchanges of rows. What a layer keeps of 128 sequences is larger
 * than its gradients, of 4 smaller. */
Test(runs, gradients_over_activations_are_the_same) {
  static const struct {
    int ranks;
    const char *more, *other;
  } cases[] = {{2, BATCH(256, 128) "--set parallel.ep=1 --set parallel.zero1=true", "experts"},
               {2,
                BATCH(256, 128) "--set parallel.ep=1 --set precision.dtype=bf16 "
                                "--set precision.grad_dtype=bf16",
                "block"},
               {3, BATCH(12, 4) "--set parallel.ep=3", "experts"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const char *const modes[] = {"swiglu", cases[i].other};
    for (int mode = 0; mode < 2; mode++) {
      char more[512];
      snprintf(more, sizeof more, "%s --set model.num_layers=4 --set train.recompute=%s",
               cases[i].more, modes[mode]);
      moe_shell("rm -rf %s/%s", folder, modes[mode]);
      succeeds(modes[mode], cases[i].ranks, more);
    }
    same_curves(modes[0], modes[1], 0.0);
  }
}

/* With tokens pushed to few experts, so that their rows need more than one round: of those after
 * the first nothing is kept. Gradients from what is kept are rounded elsewhere. */
Test(runs, keeping_the_experts_activation_changes_no_more_than_rounding) {
  static const char *const types[] = {"fp32", "bf16"};
  static const double close[] = {1e-6, 5e-3};
  for (int i = 0; i < 2; i++) {
    char kept[256], partly[256], again[256];
    const char *more = BATCH(8, 2) "--set train.bias_update_rate=1 --set train.recompute";
    snprintf(kept, sizeof kept, "--set precision.dtype=%s %s=none", types[i], more);
    snprintf(partly, sizeof partly, "--set precision.dtype=%s %s=swiglu %s_layers=1", types[i],
             more, "--set train.recompute");
    snprintf(again, sizeof again, "--set precision.dtype=%s %s=swiglu", types[i], more);
    succeeds("kept", 4, kept);
    succeeds("partly", 4, partly);
    succeeds("again", 4, again);
    same_curves("kept", "again", close[i]);
    same_curves("partly", "again", close[i]);
  }
}

Test(runs, bf16_follows_fp32) {
  succeeds("fp32", 2, BATCH(8, 4));
  succeeds("bf16", 2, BATCH(8, 4) "--set precision.dtype=bf16 --set parallel.zero1=true");
  succeeds("fp16", 2, BATCH(8, 4) "--set precision.dtype=fp16");
  double a[STEPS], b[STEPS], c[STEPS];
  curve("fp32", "loss", a);
  curve("bf16", "loss", b);
  curve("fp16", "loss", c);
  for (int i = 0; i < STEPS; i++) {
    cr_assert(fabs(a[i] - b[i]) < 0.02 * a[i], "bf16 step %d: %g, %g", i + 1, a[i], b[i]);
    cr_assert(fabs(a[i] - c[i]) < 0.02 * a[i], "fp16 step %d: %g, %g", i + 1, a[i], c[i]);
  }
}

/* |a - b| of two runs' losses, as a share of a, at every step. */
static void near_curves(const char *a, const char *b, double share) {
  double x[STEPS], y[STEPS];
  curve(a, "loss", x);
  curve(b, "loss", y);
  for (int i = 0; i < STEPS; i++)
    cr_assert(fabs(x[i] - y[i]) < share * x[i], "step %d: %s %.9g, %s %.9g", i + 1, a, x[i], b,
              y[i]);
}

#define MOMENTS "--set precision.moment_dtype=bf16 "
#define GRADS "--set precision.dtype=bf16 --set precision.grad_dtype=bf16 "
/* Large steps on large weights: what rounding changes shows soon. */
#define LIVELY "--set optim.lr=2e-2 --set model.init_std=0.2 --set optim.warmup_steps=0 "

/* Rounding belongs to an element wherever it lives, so the ranks agree as without it: what little
 * their sums differ by sends few moments to their other neighbour. */
Test(runs, rounded_moments_do_not_depend_on_the_number_of_ranks) {
  succeeds("wide", 1, BATCH(8, 8) LIVELY);
  succeeds("one", 1, BATCH(8, 8) LIVELY MOMENTS);
  succeeds("two", 2, BATCH(8, 4) LIVELY MOMENTS);
  succeeds("zero", 4, BATCH(8, 2) LIVELY MOMENTS "--set parallel.ep=2 --set parallel.zero1=true");
  near_curves("wide", "one", 1e-4);
  near_curves("one", "two", 1e-6);
  near_curves("one", "zero", 1e-6);
}

Test(runs, rounded_gradients_follow_bf16) {
  succeeds("sums", 2, BATCH(8, 4) "--set precision.dtype=bf16");
  succeeds("one", 1, BATCH(8, 8) GRADS MOMENTS);
  succeeds("two", 2, BATCH(8, 4) GRADS MOMENTS);
  succeeds("replicas", 4, BATCH(8, 2) GRADS MOMENTS "--set parallel.ep=2");
  near_curves("sums", "one", 1e-4);
  near_curves("sums", "two", 1e-4);
  near_curves("sums", "replicas", 1e-4);
}

/* The experts' gradients travel while backward goes on and their weights while they are updated. */
Test(runs, losses_do_not_depend_on_zero1) {
  const char *three = BATCH(12, 4) "--set parallel.ep=1 ";
  const char *four = BATCH(8, 2) GRADS MOMENTS LIVELY "--set parallel.ep=2 ";
  char sharded[512];
  succeeds("three", 3, three);
  snprintf(sharded, sizeof sharded, "%s--set parallel.zero1=true", three);
  succeeds("three-sharded", 3, sharded);
  same_curves("three", "three-sharded", 1e-5);
  succeeds("four", 4, four);
  snprintf(sharded, sizeof sharded, "%s--set parallel.zero1=true", four);
  succeeds("four-sharded", 4, sharded);
  succeeds("four-again", 4, sharded);
  near_curves("four", "four-sharded", 1e-3);
  same_curves("four-sharded", "four-again", 0.0);
}

static double last_losses(const char *name) {
  double loss[LONG], sum = 0.0;
  long_curve(name, "loss", LONG, loss);
  for (int i = LONG - 20; i < LONG; i++) sum += loss[i] / 20.0;
  return sum;
}

/* beta2 = 0.999: where rounding to nearest would hold the second moments up. */
Test(runs, rounded_state_learns_as_much) {
  const char *more = BATCH(8, 8) "--set train.steps=200 --set optim.beta2=0.999 --set "
                                 "log.interval=50 ";
  char rounded[512];
  snprintf(rounded, sizeof rounded, "%s" GRADS MOMENTS, more);
  succeeds("full", 1, more);
  succeeds("rounded", 1, rounded);
  double full = last_losses("full"), half = last_losses("rounded");
  cr_assert(full < 3.5, "nothing was learnt: %g", full);
  cr_assert(fabs(full - half) < 0.03 * full, "fp32 %g, bf16 %g", full, half);
}

static void plan_says(const char *arguments, const char *text) {
  succeeds("plan", 1, arguments);
  cr_assert_eq(moe_shell("grep -q '%s' %s/plan.log || { cat %s/plan.log >&2; false; }", text,
                         folder, folder),
               0);
}

/* A layer's a takes 0.69 GiB here, its gate and up projections 1.37; the program 0.02 to 0.2. */
Test(runs, auto_recomputes_no_more_than_memory_demands) {
  const struct {
    const char *gib, *says;
  } plans[] = {{"7.7", "recompute none"},
               {"7.1", "recompute swiglu in 1 of 3 layers"},
               {"5.7", "recompute swiglu in 3 of 3 layers"},
               {"4.4", "recompute experts in 1 of 3 layers"},
               {"3", "recompute experts in 2 of 3 layers"}};
  for (int i = 0; i < 5; i++) {
    char all[512];
    snprintf(all, sizeof all,
             BATCH(512, 512) "--dry-run --set model.num_layers=3 --set model.ffn_size=10000 "
                             "--set train.recompute=auto --set run.memory_gib=%s",
             plans[i].gib);
    plan_says(all, plans[i].says);
  }
}

/* Memory enough for full recomputation with bf16 state and not with fp32: the plan finds it. The
 * steps between the plans are larger than what the program itself may take (20 to 200 MiB). */
Test(runs, auto_rounds_state_only_when_nothing_else_fits) {
  const char *more = BATCH(2, 2) "--dry-run --set model.ffn_size=60000 --set precision.dtype=bf16 "
                                 "--set train.recompute=auto --set precision.grad_dtype=auto "
                                 "--set precision.moment_dtype=auto --set run.memory_gib=";
  const struct {
    const char *gib, *says;
  } plans[] = {{"8", "gradients fp32, moments fp32"},
               {"2.15", "gradients bf16, moments fp32"},
               {"1.75", "gradients bf16, moments bf16"}};
  for (int i = 0; i < 3; i++) {
    char all[512];
    snprintf(all, sizeof all, "%s%s", more, plans[i].gib);
    plan_says(all, plans[i].says);
  }
}

/* Train with a checkpoint half-way, go back to it, and train on with other ranks. */
static void resume(const char *name, int before, int after, const char *batch_before,
                   const char *batch_after, double tolerance) {
  char half[64];
  snprintf(half, sizeof half, "%s-half", name);
  char saving[512];
  snprintf(saving, sizeof saving, "%s--set checkpoint.interval=3 --set checkpoint.keep=4",
           batch_before);
  succeeds("through", before, saving);
  cr_assert_eq(moe_shell("cp -r %s/through %s/%s && rm -rf %s/%s/checkpoints/step-00000006", folder,
                         folder, half, folder, half),
               0);
  succeeds(half, after, batch_after);
  same_curves("through", half, tolerance);
  cr_assert_eq(moe_shell("grep -q 'resuming after step 3' %s/%s.log", folder, half), 0);
}

Test(runs, resume_is_bitwise_on_the_same_ranks) {
  resume("two", 2, 2, BATCH(12, 3), BATCH(12, 3), 0.0);
}

Test(runs, resume_with_rounded_state_is_bitwise) {
  resume("same", 2, 2, BATCH(12, 6) GRADS MOMENTS, BATCH(12, 6) GRADS MOMENTS, 0.0);
}

Test(runs, resume_with_zero1_is_bitwise) {
  const char *more = BATCH(12, 3) "--set parallel.ep=2 --set parallel.zero1=true ";
  resume("sharded", 4, 4, more, more, 0.0);
}

Test(runs, resume_works_with_and_without_zero1) {
  resume("whole", 3, 3, BATCH(12, 4) "--set parallel.ep=1 --set parallel.zero1=true ",
         BATCH(12, 4) "--set parallel.ep=1", 1e-5);
}

Test(runs, resume_converts_moments_to_bf16) {
  resume("narrower", 1, 2, BATCH(12, 12) LIVELY, BATCH(12, 6) LIVELY MOMENTS, 1e-3);
}

Test(runs, resume_converts_moments_from_bf16) {
  resume("wider", 2, 1, BATCH(12, 6) LIVELY MOMENTS, BATCH(12, 12) LIVELY, 1e-3);
}

Test(runs, resume_works_on_other_ranks) {
  resume("four", 4, 1, BATCH(12, 3), BATCH(12, 12), 1e-5);
}

Test(runs, resume_with_other_mathematics_is_refused) {
  succeeds("first", 1, BATCH(4, 4) "--set checkpoint.interval=3");
  cr_assert_eq(train("first", 1, BATCH(4, 4) "--set model.rope_alpha=2"), 2);
  cr_assert_eq(moe_shell("grep -q 'model.rope_alpha' %s/first.log", folder), 0);
}

Test(runs, capacity_factor_reports_what_it_drops) {
  double dropped[STEPS];
  succeeds("tight", 2, BATCH(8, 4) "--set train.capacity_factor=0.5");
  curve("tight", "dropped", dropped);
  for (int i = 0; i < STEPS; i++) cr_assert(dropped[i] > 0.0, "step %d: %g", i + 1, dropped[i]);
  succeeds("loose", 2, BATCH(8, 4));
  curve("loose", "dropped", dropped);
  for (int i = 0; i < STEPS; i++) cr_assert_eq(dropped[i], 0.0);
}

Test(runs, divergence_ends_the_run_with_exit_4) {
  cr_assert_eq(train("wild", 2,
                     BATCH(4, 2) "--set optim.lr=100 --set optim.clip=0 --set model.init_std=10 "
                                 "--set train.nonfinite_limit=2 --set train.steps=50"),
               4);
  cr_assert_eq(moe_shell("grep -q 'training diverged' %s/wild.log", folder), 0);
}

Test(runs, dry_run_prints_the_plan_and_touches_nothing) {
  cr_assert_eq(train("dry", 2, BATCH(4, 2) "--dry-run"), 0);
  cr_assert_eq(moe_shell("grep -q 'experts   0 to   7 of every layer: rank 0' %s/dry.log", folder),
               0);
  cr_assert_neq(moe_shell("test -e %s/dry", folder), 0);
}

Test(recorded_steps, of_several_ranks_give_the_same_bits) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("recorded"), 2));
  expect_passed(moe_command_run(60, MOE_MPIRUN("recorded"), 3));
}
