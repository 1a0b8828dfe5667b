/* Agreement and abort, by the worker tests/mpi/groups.c. */
#include "tests/parallel/expect_passed.h"

Test(agree, gives_every_rank_the_worst_status_and_names_its_rank) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("groups agree"), 4));
}

Test(agree, names_no_rank_in_a_world_of_one) {
  moe_command c = moe_command_run(60, MOE_BIN_DIR "/mpi_groups ep 2 16");
  cr_expect_eq(c.exit_code, 2);
  cr_expect(moe_command_says(&c, "worker: parallel.ep = 2 does not divide"), "%s", c.output);
  moe_command_free(&c);
}

Test(abort, ends_all_ranks_with_the_failed_ones_message_and_exit_code) {
  moe_command c = moe_command_run(60, MOE_MPIRUN("groups abort 2"), 4);
  cr_expect(!c.timed_out && c.exit_code == 3, "exit code %d:\n%s", c.exit_code, c.output);
  cr_expect(moe_command_says(&c, "the file is torn: data.bin: make it again"), "%s", c.output);
  moe_command_free(&c);
}

Test(abort, ends_a_world_of_one_too) {
  moe_command c = moe_command_run(60, MOE_BIN_DIR "/mpi_groups abort 0");
  cr_expect(!c.timed_out && c.exit_code == 3, "exit code %d:\n%s", c.exit_code, c.output);
  moe_command_free(&c);
}
