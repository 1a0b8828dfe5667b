/* Collectives over MPI, by the worker tests/mpi/comm.c. */
#include <criterion/criterion.h>

#include "tests/support/run_command.h"

static void expect_passed(moe_command c) {
  cr_expect(!c.timed_out && c.exit_code == 0 && moe_command_says(&c, "checks passed"),
            "exit code %d%s:\n%s", c.exit_code, c.timed_out ? " (timed out)" : "", c.output);
  moe_command_free(&c);
}

Test(comm, a_program_without_mpirun_is_a_world_of_one) {
  expect_passed(moe_command_run(60, MOE_BIN_DIR "/mpi_comm"));
}

Test(comm, every_collective_agrees_with_its_definition_on_two_ranks) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("comm"), 2));
}

Test(comm, every_collective_agrees_with_its_definition_on_five_ranks) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("comm"), 5));
}

Test(comm, cuts_data_beyond_the_limit_of_one_call_into_pieces) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("comm 64"), 3));
}
