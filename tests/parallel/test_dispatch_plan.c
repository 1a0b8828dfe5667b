/* The sender's plan, on its own. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "parallel/dispatch_plan.h"
#include "parallel/shard.h"

enum { ROOM = 1 << 16 };
static char room[ROOM] __attribute__((aligned(256)));

static moe_dispatch_plan take(int ranks, bool per_expert, int64_t experts, int64_t top_k,
                              int64_t tokens) {
  moe_arena arena = {.base = room, .size = ROOM};
  moe_dispatch_plan p;
  memset(room, 0x7f, ROOM);
  moe_dispatch_plan_take(&p, ranks, per_expert, experts, top_k, tokens, &arena);
  return p;
}

Test(dispatch_plan, sends_a_token_once_to_each_rank_with_that_ranks_experts) {
  /* 4 experts on 2 ranks: token 0 visits both, token 1 only rank 1, token 2 nobody */
  static const int32_t chosen[] = {3, 0, /**/ 2, 3, /**/ -1, -1};
  static const int32_t token[] = {0, 0, 1}, slot[] = {0, 1, 2, -1, -1, -1};
  static const int32_t row_experts[] = {-1, 0, /**/ 1, -1, /**/ 0, 1};
  static const int32_t row_gates[] = {-1, 1, /**/ 0, -1, /**/ 2, 3};
  static const int32_t gate_slot[] = {2, 1, /**/ 4, 5, /**/ -1, -1};
  int64_t sent;
  moe_dispatch_plan p = take(2, false, 4, 2, 3);
  memcpy(p.chosen, chosen, sizeof chosen);
  cr_assert_eq(moe_dispatch_plan_make(&p, 3, &sent), MOE_OK);
  cr_expect_eq(sent, 3);
  cr_expect(p.rows[0] == 1 && p.rows[1] == 2 && p.at[0] == 0 && p.at[1] == 1);
  cr_expect_arr_eq(p.token, token, sizeof token);
  cr_expect_arr_eq(p.slot, slot, sizeof slot);
  cr_expect_arr_eq(p.row_experts, row_experts, sizeof row_experts);
  cr_expect_arr_eq(p.row_gates, row_gates, sizeof row_gates);
  cr_expect_arr_eq(p.gate_slot, gate_slot, sizeof gate_slot);
}

Test(dispatch_plan, sends_a_row_for_each_expert_when_asked_to) {
  /* the same tokens: token 1 goes to rank 1 twice */
  static const int32_t chosen[] = {3, 0, /**/ 2, 3, /**/ -1, -1};
  static const int32_t token[] = {0, 0, 1, 1}, slot[] = {0, 1, 2, 3, -1, -1};
  static const int32_t row_experts[] = {-1, 0, /**/ 1, -1, /**/ 0, -1, /**/ -1, 1};
  static const int32_t row_gates[] = {-1, 1, /**/ 0, -1, /**/ 2, -1, /**/ -1, 3};
  static const int32_t gate_slot[] = {2, 1, /**/ 4, 7, /**/ -1, -1};
  int64_t sent;
  moe_dispatch_plan p = take(2, true, 4, 2, 3);
  memcpy(p.chosen, chosen, sizeof chosen);
  cr_assert_eq(moe_dispatch_plan_make(&p, 3, &sent), MOE_OK);
  cr_expect_eq(sent, 4);
  cr_expect(p.rows[0] == 1 && p.rows[1] == 3 && p.at[0] == 0 && p.at[1] == 1);
  cr_expect_arr_eq(p.token, token, sizeof token);
  cr_expect_arr_eq(p.slot, slot, sizeof slot);
  cr_expect_arr_eq(p.row_experts, row_experts, sizeof row_experts);
  cr_expect_arr_eq(p.row_gates, row_gates, sizeof row_gates);
  cr_expect_arr_eq(p.gate_slot, gate_slot, sizeof gate_slot);
}

Test(dispatch_plan, lists_a_tokens_rows_in_rank_order_whatever_the_experts_order) {
  static const int32_t chosen[] = {6, 0, 4, 2};
  int64_t sent;
  moe_dispatch_plan p = take(4, false, 8, 4, 1);
  memcpy(p.chosen, chosen, sizeof chosen);
  cr_assert_eq(moe_dispatch_plan_make(&p, 1, &sent), MOE_OK);
  for (int32_t i = 0; i < 4; i++) cr_expect_eq(p.slot[i], i);
}

Test(dispatch_plan, refuses_experts_that_do_not_exist) {
  static const int32_t bad[] = {4, -2, INT32_MAX, INT32_MIN};
  int64_t sent;
  for (int i = 0; i < 4; i++) {
    moe_dispatch_plan p = take(2, false, 4, 2, 1);
    p.chosen[0] = 0;
    p.chosen[1] = bad[i];
    cr_expect_eq(moe_dispatch_plan_make(&p, 1, &sent), MOE_INVALID);
    cr_expect(strstr(moe_error_message(), "of 4"), "%s", moe_error_message());
  }
}

/* Count over all sets of K of E experts, as bit masks. */
static double counted_rows(int ranks, int experts, int top_k) {
  double rows = 0.0, sets = 0.0;
  for (unsigned set = 0; set < 1u << experts; set++) {
    if (__builtin_popcount(set) != top_k) continue;
    sets += 1.0;
    for (int r = 0; r < ranks; r++) {
      moe_range own = moe_shard_range(experts, ranks, r);
      rows += (set & ((1u << own.end) - (1u << own.begin))) != 0;
    }
  }
  return rows / sets * (ranks - 1) / ranks;
}

Test(dispatch_plan, expects_the_rows_that_counting_all_routings_gives) {
  for (int ranks = 1; ranks <= 8; ranks++)
    for (int top_k = 1; top_k <= 8; top_k++)
      cr_expect(fabs(moe_dispatch_expected_rows(ranks, 8, top_k) - counted_rows(ranks, 8, top_k)) <
                    1e-12,
                "%d ranks, top %d", ranks, top_k);
}
