/* Checkpoints over several ranks, and savers killed at any instant. */
#include <criterion/criterion.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/run_command.h"

#define WORKER "checkpoint_worker"
static char run[64];

static void make_run(void) {
  strcpy(run, "/dev/shm/moe-ranks-XXXXXX");
  if (mkdtemp(run)) return;
  strcpy(run, "/tmp/moe-ranks-XXXXXX");
  cr_assert(mkdtemp(run));
}

static void remove_run(void) {
  moe_command c = moe_command_run(20, "rm -rf %s", run);
  moe_command_free(&c);
}

TestSuite(ranks, .init = make_run, .fini = remove_run);

static void expect_passed(moe_command c) {
  cr_assert(!c.timed_out && c.exit_code == 0 && moe_command_says(&c, "checks passed"),
            "exit code %d%s:\n%s", c.exit_code, c.timed_out ? " (timed out)" : "", c.output);
  moe_command_free(&c);
}

Test(ranks, what_1_to_4_ranks_save_1_to_4_ranks_load_bit_for_bit) {
  expect_passed(moe_command_run(100, MOE_MPIRUN(WORKER " reshard %s"), 4, run));
}

Test(ranks, a_failure_on_one_rank_reaches_all_and_leaves_the_previous) {
  expect_passed(moe_command_run(60, MOE_MPIRUN(WORKER " fail %s"), 3, run));
}

Test(ranks, saves_in_the_background_end_alike_on_all) {
  expect_passed(moe_command_run(60, MOE_MPIRUN(WORKER " background %s"), 3, run));
}

Test(ranks, a_second_job_is_refused_while_the_first_lives) {
  moe_command c =
      moe_command_run(60,
                      "cd %s; mkfifo hold out; " MOE_BIN_DIR "/mpi_" WORKER
                      " lock %s < hold > out & exec 3> %s/hold; "
                      "read line < %s/out; echo first $line; " MOE_MPIRUN(
                          WORKER " lock %s") " < /dev/null; "
                                             "echo second $?; exec 3>&-; wait; " MOE_BIN_DIR
                                             "/mpi_" WORKER " lock %s < /dev/null",
                      run, run, run, run, 2, run, run);
  cr_expect(moe_command_says(&c, "first locked"), "%s", c.output);
  cr_expect(moe_command_says(&c, "another job (process "), "%s", c.output);
  cr_expect(moe_command_says(&c, "second 1"), "%s", c.output);
  cr_expect(c.exit_code == 0, "%s", c.output);
  moe_command_free(&c);
}

/* ---- kill -9 ------------------------------------------------------------------------------- */

/* Start a saver that saves first, first + 1, ...; kill one of its processes `delay_us` after its
 * first save; returns the last step it said was saved. */
static long kill_a_saver(int ranks, long first, unsigned delay_us) {
  char line[512], word[512];
  snprintf(line, sizeof line,
           ranks == 1 ? "exec " MOE_BIN_DIR "/mpi_" WORKER " loop %s %ld"
                      : "exec mpirun --oversubscribe --bind-to none -np 2 " MOE_BIN_DIR
                        "/mpi_" WORKER " loop %s %ld 2>&1",
           run, first);
  setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
  setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
  FILE *out = popen(line, "r");
  cr_assert(out);
  long saved = 0, victim = 0;
  int rank, id;
  while (fgets(word, sizeof word, out)) {
    if (sscanf(word, "rank %d is process %d", &rank, &id) == 2 && rank == ranks - 1) victim = id;
    if (sscanf(word, "saved %ld", &saved) == 1 && saved == first) {
      usleep(delay_us);
      cr_assert(victim > 1);
      kill((pid_t)victim, SIGKILL);
    }
  }
  int status = pclose(out);
  cr_assert(status != 0, "the saver must not end by itself");
  cr_assert(saved >= first, "it saved nothing");
  return saved;
}

/* What resumes now, read and compared to the last bit. */
static long resumed(void) {
  moe_command c = moe_command_run(60, MOE_BIN_DIR "/mpi_" WORKER " check %s", run);
  char *found = strstr(c.output, "found ");
  cr_assert(c.exit_code == 0 && found, "%s", c.output);
  long step = atol(found + 6);
  moe_command_free(&c);
  return step;
}

static void kill_savers(int ranks, int trials) {
  long next = 1;
  srand(7);
  for (int i = 0; i < trials; i++) {
    long acknowledged = kill_a_saver(ranks, next, (unsigned)(rand() % 60000));
    long step = resumed();
    cr_assert(step >= acknowledged, "step %ld was saved, step %ld resumes", acknowledged, step);
    next = step + 1;
  }
}

Test(ranks, a_saver_killed_at_any_instant_loses_nothing_it_acknowledged) {
  kill_savers(1, 20);
}

Test(ranks, nor_does_a_job_of_which_one_rank_is_killed) {
  kill_savers(2, 5);
}
