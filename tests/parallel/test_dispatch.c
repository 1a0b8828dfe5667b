/* Dispatch over real exchanges, by the worker tests/mpi/dispatch.c: all-to-all and all-gather, f32
 * and bf16, seven kinds of routing, forward and backward, each token against its own arithmetic. */
#include "tests/parallel/expect_passed.h"

Test(dispatch, moves_nothing_on_one_rank) {
  expect_passed(moe_command_run(60, MOE_BIN_DIR "/mpi_dispatch"));
}

Test(dispatch, carries_tokens_to_their_experts_on_two_ranks) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("dispatch 2"), 2));
}

Test(dispatch, carries_tokens_to_their_experts_on_three_ranks) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("dispatch 3"), 3));
}

Test(dispatch, carries_tokens_to_their_experts_on_four_ranks) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("dispatch 4"), 4));
}

Test(dispatch, carries_tokens_to_their_experts_on_seven_ranks) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("dispatch 7"), 7));
}

Test(dispatch, stays_within_its_group_when_groups_replicate_experts) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("dispatch 2"), 4));
}
