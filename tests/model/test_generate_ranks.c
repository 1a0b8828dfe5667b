/* Generation on several ranks, by tests/mpi/generate.c. */
#include "tests/parallel/expect_passed.h"

Test(generate_ranks, gives_what_one_rank_gives_on_two_three_and_five) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("generate"), 2));
  expect_passed(moe_command_run(60, MOE_MPIRUN("generate"), 3));
  expect_passed(moe_command_run(60, MOE_MPIRUN("generate"), 5));
}
