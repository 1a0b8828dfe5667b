/* Gradient reduction: pools' arithmetic here, sums and norms by tests/mpi/grad_sync.c. */
#include "parallel/grad_sync.h"
#include "tests/parallel/expect_passed.h"

Test(grad_sync, pads_pools_to_equal_aligned_chunks) {
  cr_expect_eq(moe_pool_padded(0, 4), 0);
  cr_expect_eq(moe_pool_padded(1, 1), 64);
  cr_expect_eq(moe_pool_padded(257, 4), 512);
  cr_expect_eq(moe_pool_padded(512, 4), 512);
  for (int size = 1; size <= 9; size++) {
    int64_t padded = moe_pool_padded(6880000123, size), end = 0;
    for (int rank = 0; rank < size; rank++) {
      moe_range r = moe_pool_chunk(padded, size, rank);
      cr_expect(r.begin == end && moe_range_size(r) == padded / size && r.begin % 64 == 0);
      end = r.end;
    }
    cr_expect(end == padded && padded - 6880000123 < size * 64);
  }
}

Test(grad_sync, staging_holds_whole_aligned_pieces_of_at_most_a_quarter_of_a_chunk) {
  const int64_t counts[] = {0, 1, 64, 1000, 123456, 6794772480};
  for (int c = 0; c < 6; c++)
    for (int size = 1; size <= 9; size++) {
      int64_t padded = moe_pool_padded(counts[c], size), chunk = padded / size;
      int64_t n = moe_pool_staging(padded, size, MOE_BF16), piece = n / 2 / size;
      cr_expect(piece * 2 * size == n && piece % MOE_POOL_ALIGN == 0);
      cr_expect(n * 2 <= MOE_STAGING && piece <= chunk / 4 + MOE_POOL_ALIGN);
      cr_expect((piece > 0) == (padded > 0), "%lld of %d: %lld", (long long)padded, size,
                (long long)piece);
    }
  cr_expect_eq(moe_pool_staging(6794772480, 2, MOE_BF16), MOE_STAGING / 2);
}

Test(grad_sync, sums_each_pool_over_its_group_and_counts_each_parameter_once) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("grad_sync 2"), 4));
}

Test(grad_sync, works_when_every_rank_owns_its_experts_alone) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("grad_sync 3"), 3));
}

Test(grad_sync, works_when_all_ranks_are_replicas) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("grad_sync 1"), 3));
}

Test(grad_sync, works_on_one_rank) {
  expect_passed(moe_command_run(60, MOE_BIN_DIR "/mpi_grad_sync"));
}

Test(grad_sync, whoever_reads_updated_weights_waits_for_them) {
  expect_passed(moe_command_run(60, MOE_MPIRUN("arrival"), 2));
  expect_passed(moe_command_run(60, MOE_MPIRUN("arrival"), 3));
}
