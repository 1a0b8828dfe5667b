/* Planning an all-to-all dispatch: a counting sort of (destination, token), each pair once. */
#include "parallel/dispatch_plan.h"

#include "parallel/shard.h"

static int32_t *take_i32(moe_arena *arena, int64_t n) {
  return moe_arena_take(arena, n * (int64_t)sizeof(int32_t));
}

static int64_t *take_i64(moe_arena *arena, int64_t n) {
  return moe_arena_take(arena, n * (int64_t)sizeof(int64_t));
}

void moe_dispatch_plan_take(moe_dispatch_plan *p, int ranks, bool per_expert, int64_t experts,
                            int64_t top_k, int64_t tokens, moe_arena *arena) {
  int64_t fan = per_expert || ranks > top_k ? top_k : ranks, rows = tokens * fan;
  *p = (moe_dispatch_plan){
      .ranks = ranks, .per_expert = per_expert, .experts = experts, .top_k = top_k, .fan = fan};
  p->chosen = take_i32(arena, tokens * top_k);
  p->token = take_i32(arena, rows);
  p->slot = take_i32(arena, rows);
  p->gate_slot = take_i32(arena, tokens * top_k);
  p->row_experts = take_i32(arena, rows * top_k);
  p->row_gates = take_i32(arena, rows * top_k);
  p->rows = take_i64(arena, ranks);
  p->at = take_i64(arena, ranks);
  p->next = take_i64(arena, ranks);
  p->seen = take_i64(arena, ranks);
}

/* Whether token t needs a row of its own to rank r, now that it chose an expert there. */
static bool is_new(moe_dispatch_plan *p, int64_t t, int r) {
  bool first = p->seen[r] != t;
  p->seen[r] = t;
  return first || p->per_expert;
}

/* Count the rows to each destination; refuse experts that do not exist. */
static moe_status count_rows(moe_dispatch_plan *p, int64_t tokens) {
  for (int r = 0; r < p->ranks; r++) {
    p->rows[r] = 0;
    p->seen[r] = -1;
  }
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t k = 0; k < p->top_k; k++) {
      int32_t e = p->chosen[t * p->top_k + k];
      if (e == -1) continue;
      if (e < 0 || e >= p->experts)
        return moe_fail(MOE_INVALID, "moe_dispatch_send: token %lld goes to expert %d of %lld",
                        (long long)t, (int)e, (long long)p->experts);
      int r = moe_shard_owner(p->experts, p->ranks, e);
      p->rows[r] += is_new(p, t, r);
    }
  }
  return MOE_OK;
}

/* Row `row` carries token t to rank r for its expert `chosen`, with those of its others that live
 * there (per expert: alone). */
static void fill_row(moe_dispatch_plan *p, int64_t t, int64_t chosen, int r, int64_t row) {
  int64_t k_count = p->top_k;
  moe_range range = moe_shard_range(p->experts, p->ranks, r);
  p->token[row] = (int32_t)t;
  for (int64_t k = 0; k < k_count; k++) {
    int64_t from = t * k_count + k, to = row * k_count + k, e = p->chosen[from];
    bool there = p->per_expert ? k == chosen : e >= range.begin && e < range.end;
    p->row_experts[to] = there ? (int32_t)(e - range.begin) : -1;
    p->row_gates[to] = there ? (int32_t)from : -1;
    if (there) p->gate_slot[from] = (int32_t)to;
  }
}

/* Keep a token's rows ascending, so that their sum has one order whatever the experts' order. */
static void insert_slot(int32_t *slot, int64_t used, int64_t row) {
  for (; used > 0 && slot[used - 1] > row; used--) slot[used] = slot[used - 1];
  slot[used] = (int32_t)row;
}

static void fill_token(moe_dispatch_plan *p, int64_t t) {
  int64_t used = 0;
  for (int64_t m = 0; m < p->fan; m++) p->slot[t * p->fan + m] = -1;
  for (int64_t k = 0; k < p->top_k; k++) {
    int64_t i = t * p->top_k + k;
    if (p->chosen[i] < 0) {
      p->gate_slot[i] = -1;
      continue;
    }
    int r = moe_shard_owner(p->experts, p->ranks, p->chosen[i]);
    if (!is_new(p, t, r)) continue;
    int64_t row = p->next[r]++;
    fill_row(p, t, k, r, row);
    insert_slot(p->slot + t * p->fan, used++, row);
  }
}

moe_status moe_dispatch_plan_make(moe_dispatch_plan *p, int64_t tokens, int64_t *sent) {
  MOE_TRY(count_rows(p, tokens));
  int64_t sum = 0;
  for (int r = 0; r < p->ranks; r++) {
    p->at[r] = p->next[r] = sum;
    p->seen[r] = -1;
    sum += p->rows[r];
  }
  for (int64_t t = 0; t < tokens; t++) fill_token(p, t);
  *sent = sum;
  return MOE_OK;
}

double moe_dispatch_expected_rows(int ranks, int64_t experts, int64_t top_k) {
  double rows = 0.0;
  for (int r = 0; r < ranks; r++) {
    int64_t others = experts - moe_range_size(moe_shard_range(experts, ranks, r));
    double missed = 1.0; /* C(others, K) / C(E, K) */
    for (int64_t i = 0; i < top_k; i++)
      missed *= others > i ? (double)(others - i) / (double)(experts - i) : 0.0;
    rows += 1.0 - missed;
  }
  return rows * (ranks - 1) / ranks;
}
