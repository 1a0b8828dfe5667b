/* Collectives over MPI, by the worker tests/mpi/comm.c. */
#include "tests/parallel/expect_passed.h"

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
