/* The table of matrix products' plans: host code, no GPU needed. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "kernels/cuda/plans.h"

static cuda_plan_index *make_index(void) {
  cuda_plan_index *index = calloc(1, sizeof *index);
  cr_assert_not_null(index);
  return index;
}

/* Operands at these addresses, of no particular contents. */
static cuda_plan_key key_of(int64_t m, uintptr_t a, float beta) {
  return cuda_plan_key_of(1, m, 64, 96, 1, 0, (void *)a, (void *)4096, (void *)8192, 96, 96, 64,
                          beta);
}

Test(matrix_plans, knows_a_shape_again_and_tells_others_apart) {
  cuda_plan_index *index = make_index();
  bool known;
  cuda_plan_key first = key_of(10, 256, 0.0f), again = key_of(10, 512, 0.0f);
  int at = cuda_plan_place(index, &first, &known);
  cr_assert_not(known);
  cr_assert_eq(cuda_plan_place(index, &again, &known), at, "the same shape at another address");
  cr_assert(known);
  cuda_plan_key others[] = {key_of(11, 256, 0.0f), key_of(10, 256 + 16, 0.0f),
                            key_of(10, 256, 1.0f)};
  for (int i = 0; i < 3; i++) {
    cuda_plan_place(index, &others[i], &known);
    cr_assert_not(known, "key %d differs from the first", i);
  }
  free(index);
}

Test(matrix_plans, measures_alignment_up_to_256_bytes) {
  cr_assert_eq(cuda_alignment((void *)1), 1u);
  cr_assert_eq(cuda_alignment((void *)(4096 + 2)), 2u);
  cr_assert_eq(cuda_alignment((void *)(4096 + 48)), 16u);
  cr_assert_eq(cuda_alignment((void *)(4096 + 128)), 128u);
  cr_assert_eq(cuda_alignment((void *)4096), 256u);
  cr_assert_eq(cuda_alignment(NULL), 256u);
}

Test(matrix_plans, keeps_what_is_used_when_many_shapes_pass_by) {
  cuda_plan_index *index = make_index();
  bool known;
  cuda_plan_key kept = key_of(7, 256, 0.0f);
  int place = cuda_plan_place(index, &kept, &known);
  for (int64_t m = 100; m < 100 + 20 * CUDA_PLAN_COUNT; m++) {
    cuda_plan_key passing = key_of(m, 256, 0.0f);
    int at = cuda_plan_place(index, &passing, &known);
    cr_assert_not(known, "m = %lld was never asked for", (long long)m);
    cr_assert(at >= 0 && at < CUDA_PLAN_COUNT);
    cr_assert_neq(at, place, "the plan in use was given up");
    cr_assert_eq(cuda_plan_place(index, &kept, &known), place);
    cr_assert(known);
  }
  free(index);
}

Test(matrix_plans, spreads_shapes_over_the_whole_table) {
  cuda_plan_index *index = make_index();
  bool known, used[CUDA_PLAN_COUNT] = {false};
  int places = 0, forgotten = 0;
  for (int64_t rows = 0; rows < CUDA_PLAN_COUNT / 2; rows++) { /* expert rows: multiples of 128 */
    cuda_plan_key key = key_of(128 * rows, 256, 0.0f);
    used[cuda_plan_place(index, &key, &known)] = true;
  }
  for (int i = 0; i < CUDA_PLAN_COUNT; i++) places += used[i];
  for (int64_t rows = 0; rows < CUDA_PLAN_COUNT / 2; rows++) {
    cuda_plan_key key = key_of(128 * rows, 256, 0.0f);
    cuda_plan_place(index, &key, &known);
    forgotten += !known;
  }
  cr_assert_gt(places, CUDA_PLAN_COUNT * 2 / 5, "only %d places are used", places);
  cr_assert_lt(forgotten, CUDA_PLAN_COUNT / 20, "%d of the plans were lost", forgotten);
  free(index);
}

Test(matrix_plans, forgets_what_could_not_be_made) {
  cuda_plan_index *index = make_index();
  bool known;
  cuda_plan_key key = key_of(5, 256, 0.0f);
  cuda_plan_forget(index, cuda_plan_place(index, &key, &known));
  cuda_plan_place(index, &key, &known);
  cr_assert_not(known);
  free(index);
}
