/* The mesh: alone where it is arithmetic, by the worker tests/mpi/groups.c where ranks meet. */
#include "parallel/mesh.h"
#include "tests/parallel/expect_passed.h"

Test(mesh, takes_the_largest_group_that_divides_the_world_by_default) {
  cr_expect_eq(moe_mesh_default_ep(1, 16), 1);
  cr_expect_eq(moe_mesh_default_ep(8, 16), 8);
  cr_expect_eq(moe_mesh_default_ep(32, 16), 16);
  cr_expect_eq(moe_mesh_default_ep(24, 16), 12);
  cr_expect_eq(moe_mesh_default_ep(7, 16), 7);
  cr_expect_eq(moe_mesh_default_ep(17, 16), 1);
}

Test(mesh, shares_experts_out_in_ranges_that_differ_by_at_most_one) {
  for (int ep = 1; ep <= 16; ep++) {
    int64_t end = 0;
    for (int rank = 0; rank < ep; rank++) {
      moe_range r = moe_shard_range(16, ep, rank);
      cr_expect(r.begin == end && moe_range_size(r) >= 16 / ep &&
                moe_range_size(r) <= (16 + ep - 1) / ep);
      for (int64_t e = r.begin; e < r.end; e++) cr_expect_eq(moe_shard_owner(16, ep, e), rank);
      end = r.end;
    }
    cr_expect_eq(end, 16);
  }
}

Test(mesh, cuts_eight_ranks_into_every_shape) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("groups mesh"), 8));
}

static void expect_refusal(moe_command c, const char *message) {
  cr_expect(!c.timed_out && c.exit_code == 2, "exit code %d:\n%s", c.exit_code, c.output);
  cr_expect(moe_command_says(&c, message), "not said: %s\nbut:\n%s", message, c.output);
  moe_command_free(&c);
}

Test(mesh, refuses_a_group_that_does_not_divide_the_world) {
  expect_refusal(moe_command_run(60, MOE_MPIRUN("groups ep 3 16"), 4),
                 "parallel.ep = 3 does not divide the 4 ranks: choose one of 1, 2, 4, or 0");
}

Test(mesh, refuses_more_ranks_in_a_group_than_experts) {
  expect_refusal(moe_command_run(60, MOE_MPIRUN("groups ep 4 2"), 4),
                 "parallel.ep = 4, but a layer has 2 experts: choose one of 1, 2, or 0");
}
