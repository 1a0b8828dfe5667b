/* The sender's plan of an all-to-all dispatch: which token goes where, once per rank (or, to see
 * what that saves, once per expert). Host only, no communication. Private to parallel/.
 *
 * Letters: T tokens, K experts per token, M the most rows one token makes: min(ranks, K), or K once
 * per expert; S the rows sent. Rows are sorted by destination, then by token. */
#ifndef MOE_PARALLEL_DISPATCH_PLAN_H
#define MOE_PARALLEL_DISPATCH_PLAN_H

#include "core/base/arena.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int ranks;
  bool per_expert;
  int64_t experts, top_k, fan; /* E, K, M */
  /* in */
  int32_t *chosen; /* [T, K] global expert numbers, -1: dropped */
  /* out */
  int32_t *token;       /* [S] */
  int32_t *slot;        /* [T, M] the rows of each token, ascending, then -1 */
  int32_t *gate_slot;   /* [T, K] place of each gate among the rows' [S, K], or -1 */
  int32_t *row_experts; /* [S, K] the destination's own expert numbers, -1: not its */
  int32_t *row_gates;   /* [S, K] place of each gate among the tokens' [T, K], or -1 */
  int64_t *rows, *at;   /* [ranks] rows for each destination: [at, at + rows) */
  /* private */
  int64_t *next, *seen; /* [ranks] next free row; the last token that counted */
} moe_dispatch_plan;

/* Local. Room for `tokens` tokens, taken from `arena` (host memory; pinned is best). */
void moe_dispatch_plan_take(moe_dispatch_plan *p, int ranks, bool per_expert, int64_t experts,
                            int64_t top_k, int64_t tokens, moe_arena *arena);
/* Local. Make the plan of the first `tokens` tokens of `chosen`; sent: S. MOE_INVALID when a token
 * names an expert that is not there. */
moe_status moe_dispatch_plan_make(moe_dispatch_plan *p, int64_t tokens, int64_t *sent);
/* The rows one rank expects to send to others per token when every set of K experts is equally
 * likely: (ranks - 1) / ranks * sum over ranks of the chance that a token visits it,
 *     1 - C(E - e_r, K) / C(E, K),   e_r: experts of rank r */
double moe_dispatch_expected_rows(int ranks, int64_t experts, int64_t top_k);

#ifdef __cplusplus
}
#endif
#endif
