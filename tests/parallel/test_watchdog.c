/* The watchdog, by the worker tests/mpi/watchdog.c: hanging jobs end in time and say who hung, and
 * nothing else ends. */
#include <criterion/criterion.h>

#include "core/base/log.h"
#include "tests/support/run_command.h"

enum { RANKS = 3 };

/* The job ends with `code` within `limit_s` + 5 s (and 3 s for mpirun to start and end), and says
 * each of `words`. */
static void ends(const char *what, int rank, double limit_s, int code, const char *const *words) {
  double start = moe_clock_s();
  moe_command c = moe_command_run(60, MOE_MPIRUN("watchdog %s %d %g"), RANKS, what, rank, limit_s);
  double seconds = moe_clock_s() - start;
  cr_expect_eq(c.exit_code, code, "exit code %d:\n%s", c.exit_code, c.output);
  cr_expect_lt(seconds, limit_s + 8.0, "ended after %.1f s", seconds);
  for (; *words; words++)
    cr_expect(moe_command_says(&c, *words), "no \"%s\":\n%s", *words, c.output);
  moe_command_free(&c);
}

#define SAYS(...) ((const char *const[]){__VA_ARGS__, NULL})

Test(watchdog, names_a_stopped_rank_even_if_it_is_the_one_that_others_would_report_to) {
  ends("stop", 0, 1.0, 76,
       SAYS("no answer from rank 0", "step 7, experts forward of layer 3: in barrier",
            "run.watchdog_step_s = 1"));
}

Test(watchdog, names_a_rank_in_an_endless_loop_that_holds_stderr) {
  ends("loop", 1, 1.0, 76,
       SAYS("rank 1 (pid", "hung: the others waited in step 7",
            "experts forward of layer 3: outside any wait"));
}

Test(watchdog, ends_a_rank_whose_transport_failed_while_it_waits) {
  ends("guard", 2, 10.0, 1, SAYS("the cable of rank 2 is torn"));
}

/* At the same time, for they mostly sleep. */
Test(watchdog, leaves_jobs_alone_that_work_save_slowly_or_were_suspended) {
  moe_command c = moe_command_run(
      60,
      MOE_MPIRUN("watchdog work 0 1") " & a=$!; " MOE_MPIRUN(
          "watchdog save 1 1") " & b=$!; " MOE_MPIRUN("watchdog suspend 0 1") " & c=$!; wait $a && "
                                                                              "wait $b && wait $c",
      RANKS, RANKS, RANKS);
  cr_expect(!c.timed_out && c.exit_code == 0, "exit code %d:\n%s", c.exit_code, c.output);
  moe_command_free(&c);
}
