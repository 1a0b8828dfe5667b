/* The preflight as users meet it: a row per check, and the one that fails names rank and remedy.
 * mpirun can start different programs in one job, which is how hosts that disagree are played. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/support/expect_command.h"

static char folder[] = "/tmp/moe-preflight-XXXXXX";

static moe_command shell(const char *line) {
  return moe_command_run(60,
                         "cd %s; B=%s; M='mpirun --oversubscribe --bind-to none'; "
                         "T=\"$B/moe-train cfg.ini --preflight\"; %s",
                         folder, MOE_BIN_DIR, line);
}

#define expect(line, ...) expect_command(shell(line), line, __VA_ARGS__)

static void set_up(void) {
  cr_assert(mkdtemp(folder));
  expect("seq 9999 >text && $B/moe-data tokenize --input text --tokenizer bytes --output tokens && "
         "printf '[model]\\npreset = tiny\\nvocab_size = 260\\ncontext = 16\\n[data]\\ntrain = "
         "tokens\\nvalid_fraction = 0\\n[optim]\\nwarmup_steps = 2\\n[run]\\ndir = run\\nthreads = "
         "1\\n' >cfg.ini",
         0, NULL);
}

static void tear_down(void) {
  expect("cd / && rm -rf \"$OLDPWD\"", 0, NULL);
}

TestSuite(preflight, .init = set_up, .fini = tear_down);

Test(preflight, passes_where_a_run_can_start_and_leaves_no_probe) {
  expect("$M -np 2 $T | tee out; test $(grep -c ' pass ' out) -eq 8 && test -d run && "
         "test ! -e run/.preflight && $B/moe-train cfg.ini --set train.steps=4",
         0, "4.00 MiB over 2 ranks, sums exact", "shared, fsync, rename and lock on 1 host", NULL);
}

Test(preflight, names_the_rank_that_runs_another_program) {
  expect("cp $B/moe-train other && echo >>other && $M -np 1 $T : -np 1 ./other cfg.ini --preflight",
         1, "same program         FAIL  rank 1 (", "/other is not the program of rank 0",
         "1 of 8 checks failed", NULL);
}

Test(preflight, names_the_rank_with_other_settings) {
  expect("$M -np 2 $T : -np 1 $T --set train.seed=5", 1, "same configuration   FAIL  rank 2 (",
         "not those of rank 0", NULL);
}

Test(preflight, names_the_rank_with_other_data) {
  expect("seq 8888 >text && $B/moe-data tokenize --input text --tokenizer bytes --output others && "
         "mkdir there && cd there && cp ../cfg.ini . && mv ../others.bin tokens.bin && "
         "mv ../others.idx tokens.idx && cd .. && $M -np 1 $T : -np 1 --wdir there $T",
         1, "training data        FAIL  rank 1 (", "are not the token files rank 0 has", NULL);
}

Test(preflight, says_why_the_run_directory_cannot_be_made) {
  expect("touch run; $M -np 2 $T", 1, "run directory        FAIL  rank 0 (", "run", NULL);
}

Test(preflight, refuses_a_run_that_another_job_works_on) {
  expect("mkdir run; flock run/.lock $M -np 2 $T", 1, "run directory        FAIL  rank 0 (",
         "another job", NULL);
}

Test(preflight, counts_the_room_for_checkpoints) {
  expect("$M -np 2 $T --set checkpoint.keep=1000000", 1, "disk space           FAIL",
         "1000001 more checkpoints", "lower checkpoint.keep", NULL);
}

Test(preflight, a_plan_beyond_memory_fails) {
  expect("$M -np 2 $T --set run.memory_gib=0.001", 1, "memory               FAIL", "the plan needs",
         NULL);
}

Test(preflight, get_prints_settings_as_they_will_be_used) {
  expect("$B/moe-train cfg.ini --set train.seed=7 --get run.dir --get train.seed --get "
         "model.num_experts",
         0, "run\n7\n4\n", NULL);
  expect("$B/moe-train cfg.ini --get train.speed", 2, "train.speed: no such setting", NULL);
}
